-- control: what users and maintenance do to a group.
-- KEYS: the group's.
-- ARGV: cancel                 end the group: cancel what has not started, ask what runs to stop
--       cancel_tasks tid...    the same for single tasks
--       pause                  start nothing; what runs goes on, and so do deadlines
--       resume                 go on
--       seal untouched-ms      let a rolling or open group take no more tasks; if this is not 0,
--                              only if none came for this long (an open group: for its own limit)
--       repair n (counter is should)... tid...
--                              set n counters, unless one has moved, and remove what is left of
--                              these ended tasks
--       prune staging-ms [now] remove a group past its retention (now: as soon as it has finished),
--                              or a staging one that no part has reached for this long
-- Reply: GONE | OK status ... | NO status. cancel_tasks: OK status, then per tid cancelled,
--        stopping, ended or unknown. prune: NO status and when to look again (epoch
--        ms; 0: not by time). seal: NO status and `reopening` if a retry is not complete.
-- Repeatable: each is a compare-and-set.
-- include: group_state
local action = ARGV[1]

local function tell_workers(what)
  local namespace, gid = string.match(KEYS[1], '^ceylon:(.-):{g:(.-)}:')
  call('PUBLISH', 'ceylon:' .. namespace .. ':control', what .. ' ' .. gid)
end

if not load_group() then return {'GONE'} end

if action == 'prune' then
  local facts = call('HMGET', META, 'finished', 'retention', 'touched')
  local due = 0
  if group.status == 'finished' then
    due = tonumber(facts[1]) + (ARGV[3] == 'now' and 0 or tonumber(facts[2]))
  elseif group.status == 'staging' then due = tonumber(facts[3]) + tonumber(ARGV[2]) end
  -- Keep the group until its messages to dependents have arrived; else they would ask about a group
  -- that no longer exists.
  if group.status == 'finished' and call('EXISTS', OUTBOX) == 1 then
    due = math.max(due, now + 1000)
  end
  if due == 0 or now < due then return {'NO', group.status, text(due)} end
  call('UNLINK', unpack(KEYS))
  return {'OK', 'pruned'}
end

-- include: group_tail
pass_memory_limit()
if action == 'pause' or action == 'resume' then
  local from, to = 'active', 'paused'
  if action == 'resume' then from, to = to, from end
  if group.status ~= from then return {'NO', group.status} end
  group.status = to
  -- What was withheld is visible to every relay at once.
  if action == 'resume' then
    for _, page in ipairs(call('ZRANGE', OUTBOX, 0, -1)) do
      call('ZADD', OUTBOX, now_text, page)
    end
  end
  tail(action, now)
  return {'OK', group.status}
end

-- include: records.result_of
if action == 'repair' then
  local first = 3 + 3 * tonumber(ARGV[2])
  -- The audit read without a lock: where a counter has moved since, its numbers do not hold.
  for i = 3, first - 1, 3 do
    if group[ARGV[i]] ~= tonumber(ARGV[i + 1]) then return {'NO', group.status} end
  end
  for i = 3, first - 1, 3 do group[ARGV[i]] = tonumber(ARGV[i + 2]) end
  for i = first, #ARGV do
    for _, part in ipairs({TASKS, CLAIMS, NEEDS}) do
      -- The data of a task without a result is all that there is of it.
      if part ~= TASKS or call('HEXISTS', RESULTS, ARGV[i]) == 1 then
        call('HDEL', part, ARGV[i])
      end
    end
    local result = result_of(call('HGET', RESULTS, ARGV[i]) or '')
    if result.outcome == 'completed' then forget_errors(ARGV[i], result.attempts, 1) end
  end
  tail('repair', now)
  return {'OK', group.status}
end

if action == 'seal' then
  if group.open == '0' then
    return {'NO', group.status, group.reopening > 0 and 'reopening' or ''}
  end
  local facts = call('HMGET', META, 'touched', 'added', 'open_timeout')
  local last, limit = math.max(tonumber(facts[1]), tonumber(facts[2] or 0)), tonumber(ARGV[2])
  -- An open group is not the rolling group of one client, and has a limit of its own.
  if limit > 0 and group.open ~= '1' then limit = tonumber(facts[3]) end
  if last > now - limit then return {'NO', group.status} end
  seal()
  tail('seal', now)
  return {'OK', group.status}
end

if action == 'cancel' then
  if group.status == 'staging' then
    call('UNLINK', unpack(KEYS))
    return {'OK', 'pruned'}
  end
  if group.status == 'finished' then return {'NO', group.status} end
  local open = group.waiting + group.pending + group.in_progress
  -- Nobody cancelled a group whose goals are settled (without goals: whose tasks have ended): its
  -- outcome is what it would have been.
  local undecided = group.goals ~= '' or (call('HEXISTS', META, 'specs') == 0 and open > 0)
  if undecided and not group.outcome then
    group.outcome = 'cancelled'
    call('HSET', META, 'outcome', 'cancelled')
  end
  group.reopening = 0
  close('user', true)
  tail('cancel', now)
  tell_workers('stop')
  return {'OK', group.status}
end

-- cancel_tasks
local replies, stopping = {'OK', group.status}, false
for i = 2, #ARGV do
  local tid = ARGV[i]
  local task, record = call('HGET', TASKS, tid), call('HGET', CLAIMS, tid)
  local claim = record and claim_of(record)
  local word
  if group.status == 'staging' then
    word = 'unknown'
  elseif not task or effects.is_ended[tid] then
    local has_ended = effects.is_ended[tid] or call('HEXISTS', RESULTS, tid) == 1
    word = has_ended and 'ended' or 'unknown'
  elseif running(claim) then
    -- Its worker stops it. If that worker is lost, the claim that takes over cancels it.
    word = 'stopping'
    stopping = true
    claim.state = 'c'
    call('HSET', CLAIMS, tid, claim_text(claim))
  elseif closed() then
    word = 'ended'
  else
    word = 'cancelled'
    if claim and claim.due == 'room' then
      call('ZREM', PARKED, claim.role .. '|' .. claim.priority .. ',' .. tid)
    end
    local waiting = call('HDEL', NEEDS, tid) == 1
    local from = waiting and 'waiting' or 'pending'
    record_end(tid, from, 'cancelled', 'cancelled', task_fields(task), claim, 0, '')
  end
  replies[#replies + 1] = word
end
tail('cancel', now)
if stopping then tell_workers('cancel') end
replies[2] = group.status
return replies
