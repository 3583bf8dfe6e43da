-- How many tasks of the group may run at once. What exceeds it waits in PARKED until there is room.
-- include: group_goals
local FILL_MAX = 500
local LAZY_PATIENCE = 10000  -- ms without an end after which a lazy group starts one more

local function is_limited() return group.is_lazy or group.max_running < math.huge end

-- The least number of completions that achieves the goal if no open task ends otherwise.
local function completions_needed(goal)
  local completed, pending = group.completed, group.pending
  local function is_achieved(more)
    group.completed, group.pending = completed + more, pending - more
    local holds = evaluate(goal.program)
    group.completed, group.pending = completed, pending
    return holds == 1
  end
  local low, high = 0, group.waiting + group.pending + group.in_progress
  while low < high do
    local middle = math.floor((low + high) / 2)
    if is_achieved(middle) then high = middle else low = middle + 1 end
  end
  return high
end

-- A lazy group starts what the nearest goal that ends it still needs, and one more. Tasks that end
-- otherwise are made up for by the share that has completed so far; a task that hangs, by one more
-- for each time in which none has ended.
local function lazy_limit()
  local nearest
  for line in string.gmatch(group.goals, '[^;]+') do
    local goal = goal_of(line)
    if goal.on_achieved ~= 'continue' then
      nearest = math.min(nearest or math.huge, completions_needed(goal))
    end
  end
  if not nearest then return math.huge end
  local ended = group.completed + group.failed + group.cancelled
  local facts = call('HMGET', META, 'last_end', 'touched')
  local still = now - tonumber(facts[1] or facts[2])
  return math.ceil(nearest * (ended + 1) / (group.completed + 1)) + 1
         + math.floor(still / LAZY_PATIENCE)
end

local function may_run()
  return math.min(group.max_running, group.is_lazy and lazy_limit() or math.huge)
end

-- Hands out entries that wait for room in the group, by priority: as many as tasks ended, or as are
-- missing by the numbers. Tasks that are due later count as if they were queued; so when no task
-- runs, all the room is filled. What is too much is parked again.
local function fill_room()
  local ended = before.in_progress - group.in_progress
  if group.is_lazy and ended > 0 then call('HSET', META, 'last_end', now_text) end
  local parked = call('ZCARD', PARKED)
  local room = parked > 0 and may_run() - group.in_progress or 0
  if room <= 0 then return end
  local queued = group.pending - parked
  local count = math.max(ended, room - queued)
  if group.in_progress == 0 then count = room end
  count = math.min(count, room, FILL_MAX)
  if count <= 0 then return end
  local popped = call('ZPOPMIN', PARKED, count)  -- member, score, member, score ...
  for i = 1, #popped, 2 do
    local role, priority, tid = string.match(popped[i], '^([^|]+)|(%d),(.+)$')
    local record = call('HGET', CLAIMS, tid)
    local claim = record and claim_of(record)
    if claim and claim.due == 'room' then
      claim.due = ''
      call('HSET', CLAIMS, tid, claim_text(claim))
      enqueue_later(tid, role, priority, issue_of(claim))
    end
  end
end
