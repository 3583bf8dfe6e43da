-- The tail of every script that may end tasks: results, dependents, pages, goals, the end of the
-- group, its counters, and the event that tells all of it.
-- include: group_ends group_goals
local CALLABLE_WAIT = 3600000  -- ms that a group waits for a callable goal without a deadline
local LATER = 3600000          -- ms between maintenance's prune and the TTL, a backstop

-- All tasks have ended, but a callable goal is undecided: its owner has until the goal's deadline,
-- or an hour.
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
  -- Pages whose acknowledgement was lost with a worker: nothing needs them any more.
  call('UNLINK', OUTBOX)
  local messages = {}
  for gid in string.gmatch(call('HGET', META, 'dependents') or '', '%S+') do
    messages[#messages + 1] = add_page('@|' .. group.outcome .. '|' .. gid, visible)
  end
  effects.pages = messages
  local ttl = text(tonumber(facts[1]) + LATER)
  for _, key in ipairs(KEYS) do call('PEXPIRE', key, ttl) end
end

local function end_of_group(visible)
  local open = group.waiting + group.pending + group.in_progress
  if group.status == 'finished' or open > 0 then return end
  if group.status ~= 'closing' then
    if group.open == '1' or withheld() and group.status ~= 'paused' then return end
  end
  if group.goals ~= '' then await_callables() else finish(visible) end
end

-- Writes the counters that moved. Returns the new status, or '' if it is the old one.
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

-- `visible`: when a relay may take the pages that this call hands to its caller.
local function tail(kind, visible)
  if #effects.ended > 0 then
    call('HSET', RESULTS, unpack(effects.results))
    call('HDEL', TASKS, unpack(effects.ended))
    call('HDEL', CLAIMS, unpack(effects.ended))
  end
  -- Dependents before pages, as they become entries; pages before goals, as a goal may close the
  -- group, which removes them; goals before the end of the group, which waits for callable ones.
  walk_dependents()
  if not closed() then write_pages(visible) end
  judge_goals(kind)
  end_of_group(visible)
  local status = write_group()
  if #effects.log > 0 or #effects.settled > 0 or status ~= '' then tell(kind, status) end
end
