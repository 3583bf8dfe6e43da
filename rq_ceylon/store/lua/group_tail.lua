-- The tail of every script that may end tasks: results, dependents, pages, goals, the end of the
-- group, its counters, and the event that tells all of it.
-- include: group_ends group_goals group_room
local CALLABLE_WAIT = 3600000  -- ms that a group waits for a callable goal without a deadline
local TTL_MARGIN = 3600000          -- ms between maintenance's prune and the TTL, a backstop

-- No task is open, so every counter is final, and judge_goals has settled all goals but those
-- with a function. A monitor has until the deadline of such a goal, or an hour, to run it.
-- Repeatable: a deadline that is there stays.
local function await_callables()
  group.status = 'closing'
  local lines, changed = {}, false
  for line in string.gmatch(group.goals, '[^;]+') do
    local goal = goal_of(line)
    if goal.deadline == 0 then
      goal.deadline = now + CALLABLE_WAIT
      changed = true
    end
    lines[#lines + 1] = goal_text(goal)
  end
  if changed then keep_goals(lines) end
end

local function finish(visible)
  local facts = call('HMGET', META, 'retention', 'goals_total')
  if not group.outcome then
    local good = group.completed == group.total
    if tonumber(facts[2] or 0) > 0 then good = group.goals_failed == 0 end
    group.outcome = good and 'completed' or 'failed'
  end
  group.status = 'finished'
  call('HSET', META, 'outcome', group.outcome, 'finished', now_text)
  -- No task is open. So what is left there are pages that arrived and whose acknowledgement was
  -- lost, or a walk over dependents that have all ended.
  call('UNLINK', OUTBOX)
  effects.pages = {}
  tell_dependents(visible)
  local ttl = text(tonumber(facts[1]) + TTL_MARGIN)
  for _, key in ipairs(KEYS) do call('PEXPIRE', key, ttl) end
end

local function finish_if_over(visible)
  local open = group.waiting + group.pending + group.in_progress
  if group.status == 'finished' or open > 0 or group.reopening > 0 then return end
  -- A group that still takes tasks, and one that has not started, go on without an open task. A
  -- closing group finishes even so. A paused group finishes too.
  local goes_on = group.open ~= '0' or group.status == 'staging' or group.status == 'waiting'
  if goes_on and group.status ~= 'closing' then return end
  if group.goals ~= '' then await_callables() else finish(visible) end
end

-- Lets the group take no more tasks.
local function seal()
  group.open = '0'
  call('HSET', META, 'open', '0')
end

-- A group that is open until it is idle.
local function seal_if_idle()
  local open = group.waiting + group.pending + group.in_progress
  local has_run = group.total > 0 and group.status ~= 'waiting' and group.status ~= 'staging'
  if group.open == 'i' and has_run and open == 0 and group.reopening == 0 then seal() end
end

-- Writes the numbers that moved, and the status. Returns the status if it is new, else ''.
local function write_group()
  local changes, status = {}, ''
  for _, name in ipairs(NUMBERS) do
    if group[name] ~= before[name] then
      changes[#changes + 1] = name
      changes[#changes + 1] = text(group[name])
    end
  end
  if group.status ~= before.status then
    status = group.status
    changes[#changes + 1] = 'status'
    changes[#changes + 1] = status
  end
  if #changes > 0 then call('HSET', META, unpack(changes)) end
  return status
end

-- Event: when|kind|ends and changes of tasks|settled goals|new status. Subscribers get its number.
local function tell(kind, status)
  local told, settled = table.concat(effects.log, ' '), table.concat(effects.settled, ' ')
  local number = call('RPUSH', EVENTS, table.concat({now_text, kind, told, settled, status}, '|'))
  local namespace, gid = string.match(KEYS[1], '^ceylon:(.-):{g:(.-)}:')
  call('PUBLISH', 'ceylon:' .. namespace .. ':events:' .. gid, number)
  -- `finish` could not give a TTL to a list that did not exist yet.
  if group.status == 'finished' and number == 1 then call('PEXPIRE', EVENTS, call('PTTL', META)) end
end

-- `kind` names the event. `visible`: time (ms) from which a relay may take the pages and messages
-- written here. A script that returns them passes the end of the relay lease: so long its caller
-- has to hand them over. One that does not passes `now`.
local function tail(kind, visible)
  if #effects.ended > 0 then
    call('HSET', RESULTS, unpack(effects.results))
    call('HDEL', TASKS, unpack(effects.ended))
    call('HDEL', CLAIMS, unpack(effects.ended))
  end
  -- Results before dependents: a task that ended in this call must be gone from TASKS when the walk
  -- meets it. Dependents before pages, as they become entries. Pages before goals, as a goal may
  -- close the group, which removes them. Sealing before goals: a share of the total is certain only
  -- once no task can be added.
  -- Goals before the end, which waits for callable ones.
  walk_dependents()
  if not closed() then
    if is_limited() then fill_room() end
    write_pages(visible)
  end
  seal_if_idle()
  judge_goals(kind)
  finish_if_over(visible)
  if effects.tells and group.status ~= 'finished' then tell_dependents(visible) end
  local status = write_group()
  if #effects.log > 0 or #effects.settled > 0 or status ~= '' then tell(kind, status) end
end
