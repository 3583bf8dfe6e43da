-- New tasks of a group that exists, and the lists of who needs whom.
-- include: group_tail records.task_of records.task_text

-- Need -> its list of children, and a set of them. A task that ended before all its needs had is
-- still in the lists of the others, and must not be told twice.
local lists, listed = {}, {}
local function add_child(need, tid)
  if not lists[need] then
    lists[need], listed[need] = {}, {}
    for child in string.gmatch(call('HGET', CHILDREN, need) or '', '%S+') do
      table.insert(lists[need], child)
      listed[need][child] = true
    end
  end
  if listed[need][tid] then return end
  table.insert(lists[need], tid)
  listed[need][tid] = true
end

local function write_children()
  for need, list in pairs(lists) do call('HSET', CHILDREN, need, table.concat(list, ' ')) end
end

-- How a task ended, also by this very call; nil if it is open or unknown.
local function outcome_of(tid)
  if effects.is_ended[tid] then return effects.is_ended[tid] end
  local record = call('HGET', RESULTS, tid)
  return record and string.match(record, '^%a+')
end

-- The needs of a task that are open; nil if one ended otherwise than completed, and that matters.
local function open_needs(needs)
  local open = {}
  for need in string.gmatch(needs, '%S+') do
    local outcome = outcome_of(need)
    if not outcome then
      open[#open + 1] = need
    elseif outcome ~= 'completed' and group.on_need_failed ~= 'continue' then
      return nil
    end
  end
  return open
end

local function note_policy()
  group.on_need_failed = call('HGET', META, 'on_need_failed') or 'skip'
end

local function wait_for(tid, open)
  group.dag = '1'
  call('HSET', META, 'dag', '1')
  call('HSET', NEEDS, tid, #open)
  for _, need in ipairs(open) do add_child(need, tid) end
end

-- The text of a task with its times from now, as `submit` gets it, with times by the clock. What
-- reads them adds how long the group waited; one that waits still does so from its last part on.
local function by_clock(task)
  local fields = task_of(task)
  if not fields.not_before and not fields.expiry then return task end
  local base = now - group.waited
  if group.status == 'waiting' then base = tonumber(call('HGET', META, 'touched')) end
  fields.not_before = fields.not_before and text(base + fields.not_before)
  fields.expiry = fields.expiry and text(base + fields.expiry)
  return task_text(fields, task_json(task))
end

-- Adds a task, unless the group knows its id. Returns whether it did.
local function add_task(tid, task, needs)
  if outcome_of(tid) or call('HEXISTS', TASKS, tid) == 1 then return false end
  local open = open_needs(needs)
  task = by_clock(task)
  local role, priority, not_before = task_fields(task)
  call('HSET', TASKS, tid, task)
  call('HSETNX', META, 'horizon:' .. role, '0')
  group.total = group.total + 1
  if open and #open == 0 then
    group.pending = group.pending + 1
    local due = from_start(not_before)
    enqueue_later(tid, role, priority, 1, due and due > now and due)
    return true
  end
  group.waiting = group.waiting + 1
  if open then wait_for(tid, open) else miss(tid, task, role) end
  return true
end
