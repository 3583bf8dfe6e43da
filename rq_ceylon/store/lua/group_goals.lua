-- Goals: what each program says of the counters, and what follows when a goal is settled.
-- include: group_outbox records.goal_of records.goal_text records.settled_text

-- Runs a program over intervals, {what is certain now, what the open tasks can still make of it}.
-- 1: it holds however the open tasks end; 0: it never does; nil: undecided.
local function evaluate(program)
  local open = group.waiting + group.pending + group.in_progress
  local more = group.open ~= '0' and not closed() and math.huge or 0
  local stack = {}
  local function push(low, high) stack[#stack + 1] = {low, high} end
  local function pop() return table.remove(stack) end
  local function bit(condition) return condition and 1 or 0 end
  for token in string.gmatch(program, '[^,]+') do
    local number = tonumber(token)
    if number then push(number, number)
    elseif token == 'total' then push(group.total, group.total + more)
    -- A failure in a closed group counts as cancelled, so `failed` stands still there.
    elseif token == 'failed' then
      push(group.failed, group.failed + (closed() and 0 or open + more))
    elseif token == 'completed' or token == 'cancelled' then
      push(group[token], group[token] + open + more)
    elseif token == 'attempts' or token == 'crashes' then
      push(group[token], open + more > 0 and math.huge or group[token])
    elseif token == 'call' then push(0, 1)
    else
      local b, a = pop(), pop()
      if token == 'and' then push(math.min(a[1], b[1]), math.min(a[2], b[2]))
      elseif token == 'or' then push(math.max(a[1], b[1]), math.max(a[2], b[2]))
      elseif token == '*' then push(a[1] * b[1], a[2] * b[2])
      elseif token == '>=' then push(bit(a[1] >= b[2]), bit(a[2] >= b[1]))
      elseif token == '>' then push(bit(a[1] > b[2]), bit(a[2] > b[1]))
      elseif token == '<=' then push(bit(a[2] <= b[1]), bit(a[1] <= b[2]))
      elseif token == '<' then push(bit(a[2] < b[1]), bit(a[1] < b[2]))
      else error('unknown token ' .. token) end
    end
  end
  local result = pop()
  if result[1] == result[2] then return result[1] end
end

-- The deadline first, then what makes the goal fail, then what makes it achieved. Returns the
-- status and what settled it; nil while it is undecided.
local function judge_goal(goal, kind)
  if goal.deadline > 0 and now >= goal.deadline then return 'failed', 'deadline' end
  if goal.fail_program ~= '' and evaluate(goal.fail_program) == 1 then
    return 'failed', 'fail_when'
  end
  local holds = evaluate(goal.program)
  if holds == 1 then return 'achieved', kind end
  if holds == 0 then return 'failed', kind end
end

local function keep_goals(lines)
  group.goals = table.concat(lines, ';')
  call('HSET', META, 'goals', group.goals)
end

local function started(lines_text)
  local lines = {}
  for line in string.gmatch(lines_text, '[^;]+') do
    local goal = goal_of(line)
    if goal.deadline > 0 then goal.deadline = now + goal.deadline end
    lines[#lines + 1] = goal_text(goal)
  end
  return lines
end

-- The goals and their deadlines start with the group. `goals_at_start` has all of them, also those
-- that settled while the group waited: a retry finds there what a failed goal was.
local function start_goals()
  local all = call('HGET', META, 'goals_at_start') or group.goals
  if all == '' then return end
  call('HSET', META, 'goals_at_start', table.concat(started(all), ';'))
  keep_goals(started(group.goals))
end

-- Closes the group in O(1): from now on a task without a claim counts as cancelled, and needs no
-- record of that. `by`: achieved or failed, as a goal was, user or group. `stop`: running tasks are
-- asked to end too.
local function close(by, stop)
  if stop then call('HSET', META, 'stop', '1') end
  if closed() then return end
  group.open = '0'
  call('HSET', META, 'closed_by', by, 'open', '0')
  if group.status == 'waiting' then start_goals() end
  group.cancelled = group.cancelled + group.waiting + group.pending
  group.waiting = 0
  group.pending = 0
  group.status = 'closing'
  -- Messages that are on their way were in it too: what they tell is told again.
  call('UNLINK', OUTBOX, PARKED)
  effects.pages, effects.tells = {}, true
end

-- How the group stands for those that depend on it: its outcome, '' while it goes on, and the goals
-- that it has achieved, as outcome+achieved:name...
local function standing()
  local words = {group.status == 'finished' and group.outcome or ''}
  for line in string.gmatch(call('HGET', META, 'goals_at_start') or '', '[^;]+') do
    local name = goal_of(line).name
    if string.find(call('HGET', META, 'goal:' .. name) or '', '^achieved|') then
      words[#words + 1] = 'achieved:' .. name
    end
  end
  return table.concat(words, '+')
end

local function tell_dependents(visible)
  local dependents = call('HGET', META, 'dependents') or ''
  if dependents == '' then return end
  local words = standing()
  for gid in string.gmatch(dependents, '%S+') do
    effects.pages[#effects.pages + 1] = add_page('@|' .. words .. '|' .. gid, visible)
  end
end

local function settle_goal(goal, status, by)
  effects.event_number = effects.event_number or call('LLEN', EVENTS) + 1
  local counts = {}
  for i = 1, COUNTERS do counts[i] = text(group[NUMBERS[i]]) end
  call('HSET', META, 'goal:' .. goal.name, settled_text({
    status = status, at = now_text, seq = effects.event_number, by = by,
    counters = table.concat(counts, ','),
  }))
  if status == 'achieved' then effects.tells = true
  else group.goals_failed = group.goals_failed + 1 end
  effects.settled[#effects.settled + 1] = goal.name .. ':' .. status
  local policy = status == 'achieved' and goal.on_achieved or goal.on_failed
  if policy ~= 'continue' then close(status, policy == 'cancel') end
end

-- A settled goal may close the group, and closing may decide others: judge until nothing moves.
local function judge_goals(kind)
  local moved = group.goals ~= '' and group.status ~= 'waiting' and group.reopening == 0
  while moved do
    moved = false
    local kept = {}
    for line in string.gmatch(group.goals, '[^;]+') do
      local goal = goal_of(line)
      local status, by = judge_goal(goal, kind)
      if status then
        settle_goal(goal, status, by)
        moved = true
      else
        kept[#kept + 1] = line
      end
    end
    if moved then keep_goals(kept) end
  end
end

-- The nearest deadline of an undecided goal, 0 if there is none. A group that waits for others has
-- not started its deadlines.
local function next_deadline()
  if group.status == 'waiting' then return 0 end
  local nearest = 0
  for line in string.gmatch(group.goals, '[^;]+') do
    local deadline = goal_of(line).deadline
    if deadline > 0 and (nearest == 0 or deadline < nearest) then nearest = deadline end
  end
  return nearest
end
