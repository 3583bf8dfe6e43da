-- claim: may these deliveries run?
-- KEYS: the group's.
-- ARGV: worker, then per delivery: 'tid issue lineage fence'.
-- Reply: GONE | OK status defaults stop, then 3 per delivery: verdict, attempt crashes releases, task text (if GRANTED).
--        Ack on GONE DONE DUPLICATE OUTDATED NOTREADY CLOSED; forget on LOST (never run, renew or ack); keep and ask
--        again on LATER; run on GRANTED.
-- Repeatable: the same fence and worker get the same grant. A batch may name one task twice, so what it writes is kept
-- by tid while it runs.
local REPLY_BYTES_MAX = 4194304   -- payload in one reply; the rest is LATER
local worker = ARGV[1]

local wanted, tids = {}, {}
for i = 2, #ARGV do
  local tid, issue, lineage, fence = string.match(ARGV[i], '^(%S+) (%d+) (%S+) (%d+)$')
  wanted[#wanted + 1] = {tid = tid, issue = tonumber(issue), lineage = lineage, fence = tonumber(fence)}
  tids[#tids + 1] = tid
end

if not load() then return {'GONE'} end
drain()
local found_tasks, found_claims = call('HMGET', TASKS, unpack(tids)), call('HMGET', CLAIMS, unpack(tids))
local found_needs = group.dag == '1' and call('HMGET', NEEDS, unpack(tids)) or {}
local tasks, claims, granted, bytes = {}, {}, {}, 0
for i, tid in ipairs(tids) do
  tasks[tid] = found_tasks[i]
  claims[tid] = found_claims[i] and claim_of(found_claims[i]) or nil
end

-- Ends a task at its claim; what this batch may have noted for it is void.
local function end_task(tid, from, outcome, reason, claim)
  local role = head_of(tasks[tid])
  settle(tid, from, outcome, reason, role, claim, 0, outcome == 'failed' and '{"type":"","message":"' .. reason .. '","traceback":""}' or '')
  tasks[tid] = nil; claims[tid] = nil; granted[tid] = nil
  return 'DONE'
end

local function grant(delivery, task, claim)
  local role, priority = head_of(task)
  claim = claim or {attempt = 1, crashes = 0, releases = 0}
  claim.state, claim.fence, claim.worker, claim.lineage = 'p', delivery.fence, worker, delivery.lineage
  claim.started, claim.due, claim.role, claim.priority = text(now), '', role, priority
  claims[delivery.tid] = claim; granted[delivery.tid] = true
  group.attempts = group.attempts + 1
  return 'GRANTED'
end

-- The lease of the delivery on record is over: its worker is lost. A crash spends no attempt, but has a limit of its own;
-- to lose a worker that was told to stop is no crash.
local function take_over(delivery, task, claim)
  local tid = delivery.tid
  if closed() then return end_task(tid, 'in_progress', 'cancelled', 'closed', claim) end
  if claim.state == 'c' then return end_task(tid, 'in_progress', 'cancelled', 'cancelled', claim) end
  if claim.state == 's' then return grant(delivery, task, claim) end
  local _, _, _, _, limit = head_of(task)
  claim.crashes = claim.crashes + 1; group.crashes = group.crashes + 1
  if claim.crashes > (limit or tonumber(call('HGET', META, 'crash_limit') or 3)) then
    return end_task(tid, 'in_progress', 'failed', 'poison', claim)
  end
  return grant(delivery, task, claim)
end

local function judge(delivery, has_needs)
  local tid = delivery.tid
  local task, claim = tasks[tid], claims[tid]
  if not task then return (is_ended[tid] or call('HEXISTS', RESULTS, tid) == 1) and 'DONE' or 'GONE' end
  if bytes > 0 and bytes + #task > REPLY_BYTES_MAX then return 'LATER' end
  if running(claim) then
    if claim.fence == delivery.fence and claim.worker == worker then return 'GRANTED' end
    if claim.lineage ~= delivery.lineage then return 'DUPLICATE' end
    if delivery.fence <= claim.fence then return 'LOST' end
    return take_over(delivery, task, claim)
  end
  if closed() then return 'CLOSED' end
  if group.status ~= 'active' or has_needs then return 'NOTREADY' end
  if delivery.issue < issue_of(claim) then return 'OUTDATED' end
  local _, _, _, expiry = head_of(task)
  if expiry and now > expiry then return end_task(tid, 'pending', 'cancelled', 'expired', claim) end
  move('pending', 'in_progress')
  return grant(delivery, task, claim)
end

local replies = {}
for i, delivery in ipairs(wanted) do
  local verdict_word = judge(delivery, found_needs[i])
  local claim, task = claims[delivery.tid], tasks[delivery.tid]
  replies[#replies + 1] = verdict_word
  if verdict_word == 'GRANTED' then
    bytes = bytes + #task
    replies[#replies + 1] = claim.attempt .. ' ' .. claim.crashes .. ' ' .. claim.releases
    replies[#replies + 1] = task
  else replies[#replies + 1] = ''; replies[#replies + 1] = '' end
end

local records = {}
for tid in pairs(granted) do records[#records + 1] = tid; records[#records + 1] = claim_text(claims[tid]) end
if #records > 0 then call('HSET', CLAIMS, unpack(records)) end
tail('claim', now)
local facts = call('HMGET', META, 'defaults', 'stop')
return {'OK', group.status, facts[1] or '', facts[2] or '0', replies}
