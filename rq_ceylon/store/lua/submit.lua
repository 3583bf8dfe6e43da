-- submit: one part of a group. A staging group takes parts 1, 2, ... and becomes active with its
-- last one, all or nothing; a rolling group (single tasks of one client) is active from its first
-- part until it is sealed.
-- KEYS: the group's.
-- ARGV: part, last (1|0), open (0 no, 1 rolling, o until it is sealed, i until it is idle),
--       digest of all parts so far, relay lease ms,
--       page acknowledgements (see acknowledge_pages), n, n meta fields and values,
--       goals (see goal_of; deadlines relative), groups that it depends on ('' or 'a b c'; both
--       with the last part),
--       then per task: tid, text (role|priority|delay ms|expires ms|crash limit|JSON), tids that it
--       needs ('' or 'a b c').
-- Reply: OK status pages
--        REPEAT status       known: nothing changed; `outbox` gives again what a lost answer had
--        GAP                 parts before it are unknown, or the number has another digest
--        CLOSED              sealed meanwhile
--        EXISTS              the key is taken by other content
--        REFUSED what name   nothing is kept of the group
-- Repeatable by part number and digest. The only script of a group that Redis refuses at maxmemory,
-- as its first write may allocate.
-- include: group_state
local part, last, rolling, digest = tonumber(ARGV[1]), ARGV[2] == '1', ARGV[3] == '1', ARGV[4]
local visible = now + tonumber(ARGV[5])
local acknowledgements = 6
local meta_first = acknowledgements + 1 + 3 * tonumber(ARGV[acknowledgements])
local meta_count = tonumber(ARGV[meta_first])
local goals_at = meta_first + 1 + meta_count
local depends_on = ARGV[goals_at + 1]
local first_task = goals_at + 2

-- WAIT and WAITAOF tell of writes on their own connection only, and a repetition may come by
-- another one: it has to write as well.
local function repeated()
  pass_memory_limit()
  call('HSET', META, 'v', LAYOUT)
  return {'REPEAT', group.status}
end

local known = load_group()
if known then
  local stored = call('HMGET', META, 'parts', 'digest')
  local parts = tonumber(stored[1])
  if rolling then
    if part == parts and digest == stored[2] then return repeated() end
    if part ~= parts + 1 then return {'GAP'} end
    if closed() or group.open == '0' then return {'CLOSED'} end
  else
    -- Only the last digest is on record: an earlier part is known again by its number alone, and
    -- the digest of the last part tells whether all of them were the same.
    if part < parts and not last then return repeated() end
    local is_staging = group.status == 'staging'
    if part == parts and digest == stored[2] and last ~= is_staging then return repeated() end
    if part <= parts or group.status ~= 'staging' then return {'EXISTS'} end
    if part > parts + 1 then return {'GAP'} end
  end
elseif part ~= 1 then return {'GAP'}
else
  group.status, group.open = 'staging', '0'
  if rolling then group.status, group.open = 'active', '1' end
  group.dag, group.goals = '0', ''
  group.max_running = math.huge  -- nothing of it can be parked yet
  for _, name in ipairs(NUMBERS) do group[name] = 0 end
end

local function refused(what, name)
  if rolling then return {'GAP'} end
  call('UNLINK', unpack(KEYS))
  return {'REFUSED', what, name}
end

-- include: group_tail
local tids, here, needed = {}, {}, {}
for i = first_task, #ARGV, 3 do
  local tid = ARGV[i]
  if here[tid] then return refused('duplicate', tid) end
  for need in string.gmatch(ARGV[i + 2], '%S+') do
    if not here[need] then needed[#needed + 1] = need end
  end
  here[tid] = true
  tids[#tids + 1] = tid
end
if known then
  for i, task in ipairs(call('HMGET', TASKS, unpack(tids))) do
    if task then return refused('duplicate', tids[i]) end
  end
end
for first = 1, #needed, 1000 do
  local last_one = math.min(first + 999, #needed)
  for i, task in ipairs(call('HMGET', TASKS, unpack(needed, first, last_one))) do
    if not task then return refused('unknown need', needed[first + i - 1]) end
  end
end

-- include: records.task_of records.task_text
local tasks, unmet, children, parents, roles = {}, {}, {}, {}, {}
for i = first_task, #ARGV, 3 do
  local tid, task, count = ARGV[i], ARGV[i + 1], 0
  local role, priority, delay, expires = task_fields(task)
  if delay or expires then
    local fields = task_of(task)
    fields.not_before = delay and text(now + delay)
    fields.expiry = expires and text(now + expires)
    task = task_text(fields, task_json(task))
  end
  for need in string.gmatch(ARGV[i + 2], '%S+') do
    count = count + 1
    if not children[need] then
      children[need] = {}
      parents[#parents + 1] = need
    end
    table.insert(children[need], tid)
  end
  tasks[#tasks + 1] = tid
  tasks[#tasks + 1] = task
  roles[role] = true
  if count > 0 then
    unmet[#unmet + 1] = tid
    unmet[#unmet + 1] = count
    group.waiting = group.waiting + 1
    group.dag = '1'
  else
    group.pending = group.pending + 1
    enqueue_later(tid, role, priority, 1, delay and delay > 0 and now + delay)
  end
end
group.total = group.total + #tids

-- An impossible goal refuses the whole group.
local complete = rolling or last
group.open = rolling and (last and '0' or '1') or (last and ARGV[3] or '0')
if last and not rolling then
  group.goals = ARGV[goals_at]
  for line in string.gmatch(group.goals, '[^;]+') do
    local goal = goal_of(line)
    if evaluate(goal.program) == 0 then return refused('goal', goal.name) end
  end
  group.status = depends_on == '' and 'active' or 'waiting'
end

-- From here on: writes only. The first must be one that may be refused at maxmemory.
call('HSET', META, 'v', LAYOUT, 'status', group.status, 'open', group.open, 'dag', group.dag,
     'parts', part, 'digest', digest, 'touched', now_text)
if not known then
  local meta_last = meta_first + meta_count
  call('HSET', META, 'created', now_text, unpack(ARGV, meta_first + 1, meta_last))
end
acknowledge_pages(acknowledgements)
if last and not rolling then
  -- The deadlines of a group that waits for others begin when it starts.
  if depends_on ~= '' then
    call('HSET', META, 'depends_on', depends_on, 'goals', group.goals,
         'goals_at_start', group.goals)
  else
    start_goals()
  end
end
if #tasks > 0 then call('HSET', TASKS, unpack(tasks)) end
if #unmet > 0 then call('HSET', NEEDS, unpack(unmet)) end
for _, parent in ipairs(parents) do
  local before_these = call('HGET', CHILDREN, parent)
  local these = table.concat(children[parent], ' ')
  call('HSET', CHILDREN, parent, before_these and before_these .. ' ' .. these or these)
end
-- Reissue looks only at roles that have a horizon.
for role in pairs(roles) do call('HSETNX', META, 'horizon:' .. role, '0') end
-- The pages of a staging group belong to any relay as soon as the group is active; `outbox`
-- withholds them until then.
if not complete or part > 1 and not rolling or withheld() then visible = now end
if complete then
  if part == 1 or not rolling then before.status = 'staging' end
  tail('submit', visible)
  return {'OK', group.status, (rolling or part == 1) and not withheld() and effects.pages or {}}
end
write_pages(visible)
call('HSET', META, 'total', text(group.total), 'waiting', text(group.waiting),
     'pending', text(group.pending), 'pages', text(group.pages))
return {'OK', group.status, {}}
