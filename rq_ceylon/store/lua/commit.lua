-- commit: record how attempts ended.
-- KEYS: the group's.
-- ARGV: worker, relay lease ms, page acknowledgements (see acknowledge_pages),
--       then per outcome: 'tid fence kind reason delay-ms run-ms', JSON value or error. The kind is
--         completed, failed, retry
--         release    given back (reason `interrupted`: its handler had begun)
--         stopped    it was asked to cancel, and did
--         stopping   not an end: its worker was told to stop, so that losing it now is no crash
-- Reply: GONE | OK status verdicts pages more. The verdicts, and what the worker does:
--          OK      counted now: acknowledges
--          DONE    this attempt is on record, or the task has ended: acknowledges
--          STALE   another delivery holds the task: forgets, so it never acknowledges or renews
-- Repeatable: a second run finds no claim in progress and answers DONE. A caller that lost the
-- answer asks `outbox` for the pages that it had. A batch may name one task twice.
-- include: group_state
local worker, relay_lease = ARGV[1], tonumber(ARGV[2])

if not load_group() then return {'GONE'} end
-- include: group_tail
pass_memory_limit()
local first = acknowledge_pages(3)
local outcomes, tids = {}, {}
for i = first, #ARGV, 2 do
  local tid, fence, kind, reason, delay, run =
    string.match(ARGV[i], '^(%S+) (%d+) (%a+) (%S+) (%d+) (%d+)$')
  outcomes[#outcomes + 1] = {
    tid = tid, fence = fence, kind = kind, reason = reason, delay = tonumber(delay),
    run = tonumber(run), blob = ARGV[i + 1],
  }
  tids[#tids + 1] = tid
end
if #tids == 0 then return {'OK', group.status, {}, {}, '0'} end
local claims = {}
for i, record in ipairs(call('HMGET', CLAIMS, unpack(tids))) do
  claims[tids[i]] = record and claim_of(record) or nil
end

-- At most once: a task with a crash limit of 0 whose handler had begun does not run again, though
-- its worker gives it back.
local function is_over(outcome)
  if outcome.kind ~= 'release' or outcome.reason ~= 'interrupted' then return false end
  local _, _, _, _, limit = task_fields(call('HGET', TASKS, outcome.tid))
  return limit == 0
end

-- A retry or a release: the task is pending again, and its next entry is an item of a page. Both
-- raise its issue, so that the entry that was delivered now is out of date.
local function again(outcome, claim)
  if outcome.kind == 'retry' then
    keep_error(outcome.tid, claim.attempt, outcome.blob, claim)
    claim.state = 'r'
    claim.attempt = claim.attempt + 1
  else
    claim.state = 'l'
    claim.releases = claim.releases + 1
  end
  local due = outcome.delay > 0 and now + outcome.delay
  claim.due = due and text(due) or ''
  call('HSET', CLAIMS, outcome.tid, claim_text(claim))
  move('in_progress', 'pending')
  log_task(outcome.tid, outcome.kind, claim.role, 0, outcome.run)
  enqueue_later(outcome.tid, claim.role, claim.priority, issue_of(claim), due)
end

local function ends(outcome, claim, as, reason, blob)
  record_end(outcome.tid, 'in_progress', as, reason, claim.role, claim, outcome.run, blob)
end

local function record(outcome)
  local tid, claim = outcome.tid, claims[outcome.tid]
  -- By an earlier outcome of this batch.
  if effects.is_ended[tid] then return 'DONE' end
  -- Only the delivery on record counts: a worker that was cut off shows an old fence here.
  if not claim or claim.fence ~= outcome.fence or claim.worker ~= worker then
    return call('HEXISTS', RESULTS, tid) == 1 and 'DONE' or 'STALE'
  end
  -- The fence is the one on record but the claim is not in progress: this is a repetition.
  if not running(claim) then return 'DONE' end
  if outcome.kind == 'stopping' then
    if claim.state == 'p' then
      claim.state = 's'
      call('HSET', CLAIMS, tid, claim_text(claim))
    end
  elseif outcome.kind == 'completed' then
    ends(outcome, claim, 'completed', '', outcome.blob)
    forget_errors(tid, claim.attempt, claim.releases)
  -- A success counts even in a closed group and after a cancel was asked for, as its work is done.
  -- Any other outcome becomes cancelled there.
  elseif closed() then
    ends(outcome, claim, 'cancelled', 'closed', '')
  elseif claim.state == 'c' or outcome.kind == 'stopped' then
    ends(outcome, claim, 'cancelled', 'cancelled', '')
  elseif outcome.kind == 'failed' then
    ends(outcome, claim, 'failed', outcome.reason, outcome.blob)
  elseif is_over(outcome) then
    local words = 'its worker was stopped while it ran, and it may lose no worker (max_crashes 0)'
    ends(outcome, claim, 'failed', 'poison', error_text(words))
  else
    again(outcome, claim)
  end
  return 'OK'
end

local verdicts = {}
for i, outcome in ipairs(outcomes) do verdicts[i] = record(outcome) end
tail('commit', now + relay_lease)
return {'OK', group.status, verdicts, withheld() and {} or effects.pages, effects.more}
