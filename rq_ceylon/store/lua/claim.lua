-- claim: decide of each delivery whether it may run.
-- KEYS: the group's.
-- ARGV: worker, may a suspect start (1|0), then one per delivery:
--       'tid issue lineage fence supersedes' ('-': it supersedes none).
-- Reply: GONE | OK status defaults stop replies. The replies are 3 words per delivery:
--          GRANTED, 'attempt crashes releases', task text
--          (a single word may be GONE too: there is no such task)
--          DONE, reason, why in words      (if this claim ended the task as expired or poison)
--          any verdict, '', ''             (else)
--        The worker runs on GRANTED; acknowledges on GONE DONE DUPLICATE OUTDATED NOTREADY CLOSED
--        PARKED; keeps the entry and asks again on LATER; and forgets it on LOST, which is to never
--        run, renew or acknowledge it.
-- Repeatable: the same fence and worker get the same grant. A batch may name one task twice, so
-- what the script is going to write is kept by tid until its end.
-- docs/protocol.md has the two decision tables. Their rows stand in `answer`, `answer_in_progress`
-- and `take_over`, in the same order, but for LATER in `take_over`: it comes before the crash is
-- counted, as it must write nothing.
-- include: group_state
local CRASH_LIMIT = 3             -- crashes that a task survives, unless it says otherwise
local REPLY_BYTES_MAX = 4194304   -- payload in one reply; the rest is LATER
-- A task under which a worker died this often may be what kills workers. A worker runs one such
-- suspect at a time, so that a poison takes nothing else down with it.
local SUSPECT_CRASHES = 2
local worker, suspect_may_start = ARGV[1], ARGV[2] == '1'

local wanted, tids = {}, {}
for i = 3, #ARGV do
  local tid, issue, lineage, fence, supersedes =
    string.match(ARGV[i], '^(%S+) (%d+) (%S+) (%d+) (%S+)$')
  wanted[#wanted + 1] = {
    tid = tid, issue = tonumber(issue), lineage = lineage, fence = fence, supersedes = supersedes,
  }
  tids[#tids + 1] = tid
end

if not load_group() then return {'GONE'} end
-- include: group_tail
pass_memory_limit()
local found_tasks = call('HMGET', TASKS, unpack(tids))
local found_claims = call('HMGET', CLAIMS, unpack(tids))
local found_needs = group.dag == '1' and call('HMGET', NEEDS, unpack(tids)) or {}
local tasks, claims, changed, bytes = {}, {}, {}, 0
for i, tid in ipairs(tids) do
  tasks[tid] = found_tasks[i]
  claims[tid] = found_claims[i] and claim_of(found_claims[i]) or nil
end

-- ---- what a claim may do to a task -------------------------------------------------------------
-- Ends a task. What this batch noted for it before is void.
-- `words` say why. The worker that asked logs them, since no other saw this end; of a failed task
-- they are also the error. They must have no quotes, as they are pasted into JSON.
local endings = {}
local function end_task(tid, counter, outcome, reason, claim, words)
  local error = outcome == 'failed' and error_text(words) or ''
  local role = task_fields(tasks[tid])
  record_end(tid, counter, outcome, reason, role, claim, 0, error)
  if words then endings[tid] = {reason, words} end
  tasks[tid] = nil
  claims[tid] = nil
  changed[tid] = nil
  return 'DONE'
end

-- A process that lives but holds the GIL renews no lease, and cannot be told from a dead one.
local function poison_words(crashes)
  return 'its worker was lost under it ' .. (crashes == 1 and 'once' or crashes .. ' times') ..
         ': the process died, or answered nothing for a whole lease,' ..
         ' as when code in C holds the GIL; see the log of worker '
end

local function is_suspect(crashes) return crashes >= SUSPECT_CRASHES end

local function grant(delivery, claim, role, priority)
  claim = claim or {attempt = 1, crashes = 0, releases = 0}
  if is_suspect(claim.crashes) then suspect_may_start = false end
  claim.state, claim.fence, claim.worker = 'p', delivery.fence, worker
  claim.lineage, claim.started, claim.due = delivery.lineage, now_text, ''
  claim.role, claim.priority = role, priority
  claims[delivery.tid] = claim
  changed[delivery.tid] = true
  -- The group counts grants: also those after a crash or a release, which raise no task's attempt.
  group.attempts = group.attempts + 1
  return 'GRANTED'
end

-- The entry is void, and a later one stands for the task. `due` as in the claim's record.
local function give_up_entry(delivery, claim, role, priority, due)
  -- Fence 0 says that it was never granted.
  claim = claim or {
    state = 'l', attempt = 1, fence = '0', worker = '', lineage = '', started = '0', crashes = 0,
    releases = 0, due = '',
  }
  -- The issue rises as by a release. So the old entry is OUTDATED if it is delivered again while
  -- the task is pending.
  claim.role, claim.priority, claim.releases = role, priority, claim.releases + 1
  claim.due = due or claim.due
  claims[delivery.tid] = claim
  changed[delivery.tid] = true
  return claim
end

-- Puts the entry back into the outbox, which withholds it until the group goes on. `due`: when it
-- may be delivered next; the time in the old entry counted from the submission. Reissue reads it
-- from the claim, if Redis loses the new entry.
local function park(delivery, claim, role, priority, due)
  claim = give_up_entry(delivery, claim, role, priority, due and text(due))
  enqueue_later(delivery.tid, role, priority, issue_of(claim), due)
  return 'PARKED'
end

-- As many tasks of the group run as may: the entry waits for room, and the tail hands it out.
local function park_for_room(delivery, claim, role, priority)
  give_up_entry(delivery, claim, role, priority, 'room')
  call('ZADD', PARKED, priority, role .. '|' .. priority .. ',' .. delivery.tid)
  return 'PARKED'
end

-- Puts this delivery in the place of the one on record, whose lease is over: its worker is lost.
local function take_over(delivery, task, claim)
  local tid = delivery.tid
  -- The group is closed, or a cancel was asked for: DONE, cancelled. No worker is left to stop it.
  if closed() then return end_task(tid, 'in_progress', 'cancelled', 'closed', claim) end
  if claim.state == 'c' then
    return end_task(tid, 'in_progress', 'cancelled', 'cancelled', claim)
  end
  -- A crash spends no attempt, but has a limit of its own. To lose a worker that was told to stop
  -- is no crash: its death was wanted.
  local crash = claim.state == 's' and 0 or 1
  local role, priority, _, _, limit = task_fields(task)
  -- A limit of 0 says at most once. What was granted may have begun, whatever its worker was told,
  -- so it never runs again.
  local poison = limit == 0 or claim.crashes + crash > (limit or CRASH_LIMIT)
  -- The task is a suspect by now, and this worker may not start one: LATER. Nothing is written, so
  -- the crash is counted when this is asked again.
  local may_run = not poison and group.status ~= 'paused'
  if may_run and is_suspect(claim.crashes + crash) and not suspect_may_start then return 'LATER' end
  claim.crashes = claim.crashes + crash
  group.crashes = group.crashes + crash
  -- It survives no more crashes: DONE, failed (poison).
  if poison then
    local words = poison_words(math.max(1, claim.crashes)) .. claim.worker
    return end_task(tid, 'in_progress', 'failed', 'poison', claim, words)
  end
  -- The group is paused: PARKED.
  if group.status == 'paused' then
    claim.state = 'l'
    move('in_progress', 'pending')
    return park(delivery, claim, role, priority)
  end
  -- Else GRANTED.
  return grant(delivery, claim, role, priority)
end

-- ---- the decision ------------------------------------------------------------------------------
-- The task is in progress: is this delivery the one on record, or does it end that one's lease?
local function answer_in_progress(delivery, task, claim)
  -- The delivery on record asks again, since its answer was lost: the same grant. The worker is
  -- compared too, as a role that Redis lost may give a number once more.
  if claim.fence == delivery.fence and claim.worker == worker then
    if is_suspect(claim.crashes) then suspect_may_start = false end
    return 'GRANTED'
  end
  -- Another entry of this task. That it was delivered says nothing about the lease on record:
  -- DUPLICATE. Unless maintenance made it to end exactly that lease, since it found no worker that
  -- runs the task.
  if claim.lineage ~= delivery.lineage then
    return delivery.supersedes == claim.fence and take_over(delivery, task, claim) or 'DUPLICATE'
  end
  -- The same entry, or a copy of it. An entry is delivered again only when its lease is over or it
  -- was given back, so of two deliveries the larger fence is the later one, which holds the lease.
  if tonumber(delivery.fence) <= tonumber(claim.fence) then return 'LOST' end
  return take_over(delivery, task, claim)
end

-- How many tasks of the group may run. What this call grants does not change it.
local most_running

local function answer(delivery, has_needs)
  local tid = delivery.tid
  local task, claim = tasks[tid], claims[tid]
  -- It has a result, perhaps by an earlier delivery of this batch; or the group never heard of it.
  if not task then
    return (effects.is_ended[tid] or call('HEXISTS', RESULTS, tid) == 1) and 'DONE' or 'GONE'
  end
  -- The reply is full. The worker cannot tell this LATER from that for a suspect, and waits.
  if bytes > 0 and bytes + #task > REPLY_BYTES_MAX then return 'LATER' end
  if running(claim) then return answer_in_progress(delivery, task, claim) end
  -- In a closed group an open task that does not run is cancelled, and no record says so.
  if closed() then return 'CLOSED' end
  -- An entry from before: of an earlier group of this id, or of a run before a retry. The task's
  -- own is made when it becomes ready, so this one may go.
  if group.status ~= 'active' and group.status ~= 'paused' or has_needs then return 'NOTREADY' end
  -- The task was retried, released or parked since this entry was made: a later one stands for it.
  if delivery.issue < issue_of(claim) then return 'OUTDATED' end
  local role, priority, not_before, expiry = task_fields(task)
  if group.status == 'paused' then return park(delivery, claim, role, priority) end
  -- The entry's delay counted from the submission. It must count from the start of the group, which
  -- differs if the group waited. A retry has a due time of its own.
  local never_granted = not claim or claim.fence == '0'
  local due = group.waited > 0 and never_granted and from_start(not_before)
  if due and due > now then return park(delivery, claim, role, priority, due) end
  if expiry and never_granted and now > from_start(expiry) then
    local late = text(now - from_start(expiry))
    local words = 'it had not started when it expired, ' .. late .. ' ms ago'
    return end_task(tid, 'pending', 'cancelled', 'expired', claim, words)
  end
  -- The task is a suspect, and this worker may not start one.
  if claim and is_suspect(claim.crashes) and not suspect_may_start then return 'LATER' end
  most_running = most_running or is_limited() and may_run() or math.huge
  if group.in_progress >= most_running then
    return park_for_room(delivery, claim, role, priority)
  end
  move('pending', 'in_progress')
  return grant(delivery, claim, role, priority)
end

local replies = {}
for i, delivery in ipairs(wanted) do
  local word = answer(delivery, found_needs[i])
  local claim, task = claims[delivery.tid], tasks[delivery.tid]
  local ending = endings[delivery.tid]
  local second, third = '', ''
  if word == 'GRANTED' then
    bytes = bytes + #task
    second, third = claim.attempt .. ' ' .. claim.crashes .. ' ' .. claim.releases, task
  elseif ending then
    second, third = ending[1], ending[2]
    endings[delivery.tid] = nil
  end
  replies[#replies + 1] = word
  replies[#replies + 1] = second
  replies[#replies + 1] = third
end

local records = {}
for tid in pairs(changed) do
  records[#records + 1] = tid
  records[#records + 1] = claim_text(claims[tid])
end
if #records > 0 then call('HSET', CLAIMS, unpack(records)) end
tail('claim', now)
local facts = call('HMGET', META, 'defaults', 'stop')
return {'OK', group.status, facts[1] or '', facts[2] or '0', replies}
