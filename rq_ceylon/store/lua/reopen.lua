-- reopen: run tasks again that failed or were cancelled. What has completed never runs again. A
-- retry takes several calls: `settle` until the cursor is 0 if the group has finished, `tasks` for
-- each part, then `end`. From the first reopened task on the group is `reopening`: no goal is
-- judged, and the group cannot finish. Else a goal could fail between two parts, for tasks that the
-- next part reopens, and its policy would cancel what was just reopened.
-- KEYS: the group's.
-- ARGV: settle cursor count       write results for tasks that ended without one, as their group
--                                 closed
--       tasks (tid needs)...      reopen these, each behind those that it needs; `needs` ('' or
--                                 'a b c') as in its payload
--       end untouched-ms          the retry is complete, if no part came for this long (0: at once)
-- Reply: GONE | NO status         (not active, paused or finished; settle: not finished; end: not
--                                  reopening, or too soon)
--        OK status, then
--          settle: the next cursor
--          tasks:  per tid  reopened   it is open again
--                           open       it is open already, perhaps by this call itself, repeated
--                           completed
--                           blocked    a task that it needs did not complete, and was not reopened
--                                      before it
--                           busy       of its end, or that of a task that it needs, dependents are
--                                      still being told; ask later
--                           unknown    there is no such task
--                           old        an older version wrote its result, without what is needed
--        UNSETTLED status         (tasks: `settle` is not done)
-- Repeatable: an open task stays as it is, one that has failed again is reopened again, and settle
-- finds no task twice.
-- include: group_state
local action = ARGV[1]

if not load_group() then return {'GONE'} end
-- include: group_tasks records.result_of records.result_json
pass_memory_limit()

-- A failed goal is undecided again, unless it must fail all the same; then its policy does not act
-- again either. An achieved goal never unsettles.
local function unsettle_failed_goals()
  local lines = {}
  for line in string.gmatch(group.goals, '[^;]+') do lines[#lines + 1] = line end
  for line in string.gmatch(call('HGET', META, 'goals_at_start') or '', '[^;]+') do
    local goal = goal_of(line)
    local settled = call('HGET', META, 'goal:' .. goal.name) or ''
    if string.find(settled, '^failed|') and judge_goal(goal, '') ~= 'failed' then
      call('HDEL', META, 'goal:' .. goal.name)
      group.goals_failed = group.goals_failed - 1
      lines[#lines + 1] = line
      effects.settled[#effects.settled + 1] = goal.name .. ':in_progress'
    end
  end
  keep_goals(lines)
end

if action == 'settle' then
  if group.status ~= 'finished' then return {'NO', group.status} end
  local found = call('HSCAN', TASKS, ARGV[2], 'COUNT', ARGV[3])
  for i = 1, #found[2], 2 do
    local tid, record = found[2][i], call('HGET', CLAIMS, found[2][i])
    local role = task_fields(found[2][i + 1])
    -- The counters have these tasks as cancelled since the group closed.
    if not effects.is_ended[tid] then
      write_end(tid, 'cancelled', 'closed', role, record and claim_of(record) or nil, 0, '')
    end
  end
  tail('settle', now)
  -- It may be new, and then has no TTL yet.
  call('PEXPIRE', RESULTS, call('PTTL', META))
  return {'OK', group.status, found[1]}
end

if action == 'end' then
  local is_silent = group.reopening > 0 and now - group.reopening >= tonumber(ARGV[2])
  if not is_silent then return {'NO', group.status} end
  group.reopening = 0
  unsettle_failed_goals()
  tail('reopen', now)
  return {'OK', group.status}
end

if group.status ~= 'active' and group.status ~= 'paused' and group.status ~= 'finished' then
  return {'NO', group.status}
end
-- A cancelled task without a result would be open again as soon as the group is.
if group.status == 'finished' and call('EXISTS', TASKS) == 1 then
  return {'UNSETTLED', group.status}
end

-- While the group is active, a task that ended stays in CHILDREN until its dependents were told.
local function tells(tid)
  return group.status ~= 'finished' and call('HEXISTS', CHILDREN, tid) == 1 and outcome_of(tid)
end

-- What hinders a task that ended as `result`. An old result lacks its issue.
local function hindrance(tid, result, needs)
  if not result then return call('HEXISTS', TASKS, tid) == 1 and 'open' or 'unknown' end
  if result.outcome == 'completed' then return 'completed' end
  if not result.issue then return 'old' end
  -- Its children would be told of an end that is no longer one, or it of one that it counts as met.
  if tells(tid) then return 'busy' end
  for need in string.gmatch(needs, '%S+') do
    if tells(need) then return 'busy' end
  end
end

-- The finished group goes on. No task is open, so what is left of claims and needs is of no use.
local function start_again()
  group.status, group.outcome = 'active', nil
  call('HDEL', META, 'outcome', 'finished', 'stop', 'reason', 'closed_by')
  call('UNLINK', CLAIMS, NEEDS, CHILDREN, PARKED)
  for _, key in ipairs(KEYS) do call('PERSIST', key) end
end

local function times_of(result)
  return {
    worker = result.worker, started = text(result.started or result.ended),
    ended = text(result.ended),
  }
end

local function reopen(tid, record, result, open)
  local json = result_json(record)
  local error = string.sub(json, 2, 1 + result.value_bytes)
  local payload = string.sub(json, 3 + result.value_bytes, -2)
  -- Without its delay and expiry: it runs as soon as it can.
  local task = {role = result.role, priority = result.priority, crash_limit = result.crash_limit}
  call('HSET', TASKS, tid, task_text(task, payload))
  call('HDEL', RESULTS, tid)
  -- It begins at attempt 1. The issue goes on, so that every older entry is OUTDATED.
  local claim = {
    state = 'l', attempt = 1, fence = '0', worker = '', lineage = '', started = '0', crashes = 0,
    releases = result.issue, due = '', role = result.role, priority = result.priority,
  }
  call('HSET', CLAIMS, tid, claim_text(claim))
  -- A task that was cancelled while it waited for another attempt has its last error here.
  local kept = call('HGET', ERRORS, tid .. ' ' .. result.attempts)
  forget_errors(tid, result.attempts + 1, result.issue)
  if error ~= 'null' then keep_error(tid, 0, error, times_of(result))
  elseif kept then call('HSET', ERRORS, tid .. ' 0', kept) end
  log_task(tid, 'reopened', result.role)
  if #open == 0 then
    move(result.outcome, 'pending')
    enqueue_later(tid, result.role, result.priority, issue_of(claim))
    return
  end
  move(result.outcome, 'waiting')
  wait_for(tid, open)
end

note_policy()
local replies = {'OK', group.status}
for i = 2, #ARGV, 2 do
  local tid, record = ARGV[i], call('HGET', RESULTS, ARGV[i])
  local result = record and result_of(record)
  local word = hindrance(tid, result, ARGV[i + 1])
  local open = not word and open_needs(ARGV[i + 1])
  if open then
    if group.status == 'finished' then start_again() end
    group.reopening = now
    reopen(tid, record, result, open)
  end
  replies[#replies + 1] = word or (open and 'reopened' or 'blocked')
end
write_children()
tail('reopen', now)
replies[2] = group.status
return replies
