-- claim: may these deliveries run?
-- KEYS: the group's.
-- ARGV: worker, may a suspect start (1|0), then per delivery: 'tid issue lineage fence supersedes' ('-' none).
-- Reply: GONE | OK status defaults stop, then 3 per delivery: verdict, attempt crashes releases, task text (if GRANTED;
--        if this claim itself ended the task: DONE, reason, why in words).
--        Ack on GONE DONE DUPLICATE OUTDATED NOTREADY CLOSED PARKED; forget on LOST (never run, renew or ack); keep and
--        ask again on LATER; run on GRANTED.
-- Repeatable: the same fence and worker get the same grant. A batch may name one task twice, so what it writes is kept
-- by tid while it runs.
local REPLY_BYTES_MAX = 4194304   -- payload in one reply; the rest is LATER
-- A task whose worker died under it so often may be what kills them. Suspects start one at a time per worker, so that
-- a poison takes down nothing that runs beside it.
local SUSPECT_CRASHES = 2
local worker, room = ARGV[1], ARGV[2] == '1'

local wanted, tids = {}, {}
for i = 3, #ARGV do
  local tid, issue, lineage, fence, supersedes = string.match(ARGV[i], '^(%S+) (%d+) (%S+) (%d+) (%S+)$')
  wanted[#wanted + 1] = {tid = tid, issue = tonumber(issue), lineage = lineage, fence = fence, supersedes = supersedes}
  tids[#tids + 1] = tid
end

if not load() then return {'GONE'} end
drain()
local found_tasks, found_claims = call('HMGET', TASKS, unpack(tids)), call('HMGET', CLAIMS, unpack(tids))
local found_needs = group.dag == '1' and call('HMGET', NEEDS, unpack(tids)) or {}
local tasks, claims, changed, bytes = {}, {}, {}, 0
for i, tid in ipairs(tids) do
  tasks[tid] = found_tasks[i]
  claims[tid] = found_claims[i] and claim_of(found_claims[i]) or nil
end

-- Ends a task at its claim; what this batch may have noted for it is void. No worker saw this end, so the words are all
-- that its owner hears of it: they are recorded, and whoever asked logs them. They are part of a JSON text: no quotes.
local endings = {}
local function end_task(tid, from, outcome, reason, claim, words)
  local error = outcome == 'failed' and error_text(words) or ''
  settle(tid, from, outcome, reason, head_of(tasks[tid]), claim, 0, error)
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

local function grant(delivery, claim, role, priority)
  claim = claim or {attempt = 1, crashes = 0, releases = 0}
  if claim.crashes >= SUSPECT_CRASHES then room = false end
  claim.state, claim.fence, claim.worker, claim.lineage = 'p', delivery.fence, worker, delivery.lineage
  claim.started, claim.due, claim.role, claim.priority = now_text, '', role, priority
  claims[delivery.tid] = claim; changed[delivery.tid] = true
  group.attempts = group.attempts + 1
  return 'GRANTED'
end

-- The entry waits in the outbox, which withholds it until the group goes on. Its issue is raised as by a release: who
-- parks it may acknowledge it late, when it has been reclaimed, and must not take it from one who runs it. `due`: it is
-- not due before, whatever its entry said.
local function park(delivery, claim, role, priority, due)
  claim = claim or {state = 'l', attempt = 1, fence = '0', worker = '', lineage = '', started = '0', crashes = 0,
                    releases = 0, due = ''}
  claim.role, claim.priority, claim.releases = role, priority, claim.releases + 1
  if due then claim.due = text(due) end
  claims[delivery.tid] = claim; changed[delivery.tid] = true
  enqueue_later(delivery.tid, role, priority, issue_of(claim), due)
  return 'PARKED'
end

-- The lease of the delivery on record is over: its worker is lost. A crash spends no attempt, but has a limit of its own;
-- to lose a worker that was told to stop is no crash. A limit of 0 says at most once: what a lost worker was granted may
-- have begun, whatever that worker was told, so it never runs again.
local function take_over(delivery, task, claim)
  local tid = delivery.tid
  if closed() then return end_task(tid, 'in_progress', 'cancelled', 'closed', claim) end
  if claim.state == 'c' then return end_task(tid, 'in_progress', 'cancelled', 'cancelled', claim) end
  local crash = claim.state == 's' and 0 or 1
  local role, priority, _, _, limit = head_of(task)
  local poison = limit == 0 or claim.crashes + crash > (limit or CRASH_LIMIT)
  if not poison and group.status ~= 'paused' and claim.crashes + crash >= SUSPECT_CRASHES and not room then return 'LATER' end
  claim.crashes = claim.crashes + crash; group.crashes = group.crashes + crash
  if poison then
    local words = poison_words(math.max(1, claim.crashes)) .. claim.worker
    return end_task(tid, 'in_progress', 'failed', 'poison', claim, words)
  end
  if group.status == 'paused' then
    claim.state = 'l'
    move('in_progress', 'pending')
    return park(delivery, claim, role, priority)
  end
  return grant(delivery, claim, role, priority)
end

local function judge(delivery, has_needs)
  local tid = delivery.tid
  local task, claim = tasks[tid], claims[tid]
  if not task then return (is_ended[tid] or call('HEXISTS', RESULTS, tid) == 1) and 'DONE' or 'GONE' end
  if bytes > 0 and bytes + #task > REPLY_BYTES_MAX then return 'LATER' end
  if running(claim) then
    if claim.fence == delivery.fence and claim.worker == worker then
      if claim.crashes >= SUSPECT_CRASHES then room = false end
      return 'GRANTED'
    end
    if claim.lineage ~= delivery.lineage then
      return delivery.supersedes == claim.fence and take_over(delivery, task, claim) or 'DUPLICATE'
    end
    if tonumber(delivery.fence) <= tonumber(claim.fence) then return 'LOST' end
    return take_over(delivery, task, claim)
  end
  if closed() then return 'CLOSED' end
  if group.status ~= 'active' and group.status ~= 'paused' or has_needs then return 'NOTREADY' end
  if delivery.issue < issue_of(claim) then return 'OUTDATED' end
  local role, priority, not_before, expiry = head_of(task)
  if group.status == 'paused' then return park(delivery, claim, role, priority) end
  -- Its entry knows the delay from the submission only. A group that never waited has no such entries.
  local due = group.waited > 0 and (not claim or claim.fence == '0') and from_start(not_before)
  if due and due > now then return park(delivery, claim, role, priority, due) end
  if expiry and now > from_start(expiry) then
    local words = 'it had not started when it expired, ' .. text(now - from_start(expiry)) .. ' ms ago'
    return end_task(tid, 'pending', 'cancelled', 'expired', claim, words)
  end
  if claim and claim.crashes >= SUSPECT_CRASHES and not room then return 'LATER' end
  move('pending', 'in_progress')
  return grant(delivery, claim, role, priority)
end

local replies = {}
for i, delivery in ipairs(wanted) do
  local verdict_word = judge(delivery, found_needs[i])
  local claim, task, ending = claims[delivery.tid], tasks[delivery.tid], endings[delivery.tid]
  replies[#replies + 1] = verdict_word
  if verdict_word == 'GRANTED' then
    bytes = bytes + #task
    replies[#replies + 1] = claim.attempt .. ' ' .. claim.crashes .. ' ' .. claim.releases
    replies[#replies + 1] = task
  elseif ending then
    replies[#replies + 1] = ending[1]
    replies[#replies + 1] = ending[2]
    endings[delivery.tid] = nil
  else replies[#replies + 1] = ''; replies[#replies + 1] = '' end
end

local records = {}
for tid in pairs(changed) do records[#records + 1] = tid; records[#records + 1] = claim_text(claims[tid]) end
if #records > 0 then call('HSET', CLAIMS, unpack(records)) end
tail('claim', now)
local facts = call('HMGET', META, 'defaults', 'stop')
return {'OK', group.status, facts[1] or '', facts[2] or '0', replies}
