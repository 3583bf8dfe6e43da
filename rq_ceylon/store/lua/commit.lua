-- commit: record outcomes.
-- KEYS: the group's.
-- ARGV: worker, relay lease ms, page acknowledgements (see acknowledge_pages),
--       then per outcome: 'tid fence kind reason delay-ms run-ms', JSON value or error.
--       kind: completed, failed, retry, release (reason interrupted: its handler had begun), stopped (asked to cancel, and it
--       did), stopping (not an end: the worker was told to stop, so that losing it from now on is no crash).
-- Reply: GONE | OK status verdicts pages more. Verdicts: OK counted now (ack); DONE recorded before, or the task has ended
--        (ack); STALE another delivery holds it (forget: never ack, never renew).
-- Repeatable: a second run finds no record in progress; what the lost answer had to hand over, `outbox` gives again. A
-- batch may name one task twice.
local worker, relay_lease = ARGV[1], tonumber(ARGV[2])

if not load() then return {'GONE'} end
drain()
local first = acknowledge_pages(3)
local outcomes, tids = {}, {}
for i = first, #ARGV, 2 do
  local tid, fence, kind, reason, delay, run = string.match(ARGV[i], '^(%S+) (%d+) (%a+) (%S+) (%d+) (%d+)$')
  outcomes[#outcomes + 1] = {tid = tid, fence = fence, kind = kind, reason = reason, delay = tonumber(delay),
                             run = tonumber(run), blob = ARGV[i + 1]}
  tids[#tids + 1] = tid
end
if #tids == 0 then return {'OK', group.status, {}, {}, '0'} end
local claims = {}
for i, record in ipairs(call('HMGET', CLAIMS, unpack(tids))) do claims[tids[i]] = record and claim_of(record) or nil end

-- At most once: a task with a crash limit of 0 whose handler had begun does not run again, though it is given back.
local function is_over(outcome)
  if outcome.kind ~= 'release' or outcome.reason ~= 'interrupted' then return false end
  local _, _, _, _, limit = head_of(call('HGET', TASKS, outcome.tid))
  return limit == 0
end

-- What is not over goes back to pending, and its next delivery is a page of the outbox.
local function again(outcome, claim)
  if outcome.kind == 'retry' then
    keep_error(outcome.tid, claim.attempt, outcome.blob)
    claim.state = 'r'; claim.attempt = claim.attempt + 1
  else claim.state = 'l'; claim.releases = claim.releases + 1 end
  local due = outcome.delay > 0 and now + outcome.delay
  claim.due = due and text(due) or ''
  call('HSET', CLAIMS, outcome.tid, claim_text(claim))
  move('in_progress', 'pending')
  log_task(outcome.tid, outcome.kind, claim.role, 0, outcome.run)
  enqueue_later(outcome.tid, claim.role, claim.priority, issue_of(claim), due)
end

local function record(outcome)
  local tid, claim = outcome.tid, claims[outcome.tid]
  if is_ended[tid] then return 'DONE' end
  if not claim or claim.fence ~= outcome.fence or claim.worker ~= worker then
    return call('HEXISTS', RESULTS, tid) == 1 and 'DONE' or 'STALE'
  end
  if not running(claim) then return 'DONE' end
  if outcome.kind == 'stopping' then
    if claim.state == 'p' then claim.state = 's'; call('HSET', CLAIMS, tid, claim_text(claim)) end
  elseif outcome.kind == 'completed' then
    settle(tid, 'in_progress', 'completed', '', claim.role, claim, outcome.run, outcome.blob)
    forget_errors(tid, claim.attempt)
  -- A success still counts once a cancel was asked for or the group has closed; anything else becomes cancelled.
  elseif closed() then settle(tid, 'in_progress', 'cancelled', 'closed', claim.role, claim, outcome.run, '')
  elseif claim.state == 'c' or outcome.kind == 'stopped' then
    settle(tid, 'in_progress', 'cancelled', 'cancelled', claim.role, claim, outcome.run, '')
  elseif outcome.kind == 'failed' then
    settle(tid, 'in_progress', 'failed', outcome.reason, claim.role, claim, outcome.run, outcome.blob)
  elseif is_over(outcome) then
    local error = error_text('its worker was stopped while it ran, and it may lose no worker (max_crashes 0)')
    settle(tid, 'in_progress', 'failed', 'poison', claim.role, claim, outcome.run, error)
  else again(outcome, claim) end
  return 'OK'
end

local verdicts = {}
for i, outcome in ipairs(outcomes) do verdicts[i] = record(outcome) end
tail('commit', now + relay_lease)
return {'OK', group.status, verdicts, withheld() and {} or pages, more}
