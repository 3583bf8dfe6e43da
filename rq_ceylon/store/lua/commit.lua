-- commit: record how attempts ended.
-- KEYS: the group's.
-- ARGV: worker, relay lease ms, page acknowledgements (see acknowledge_pages),
--       then per outcome: 'tid fence kind reason delay-ms run-ms[ n]', JSON value or error, and n
--         times a task that it spawned: tid, text, needs (as for `add`). The kind is
--         completed, failed, retry
--         release    given back (reason `interrupted`: its handler had begun)
--         stopped    the task was asked to cancel, and did
--         stopping   not an end: the worker was told to stop, so that losing it now is no crash
-- Reply: GONE | OK status verdicts pages more. On GONE the worker acknowledges. The verdicts, and
--        what it does:
--          OK      counted now: acknowledges
--          DONE    this attempt is on record, or the task has ended: acknowledges
--          STALE   this delivery is not the one on record, and the task has no result: forgets, so
--                  it never acknowledges or renews
--          FULL    given back, as Redis is at maxmemory and takes no task that it spawned:
--                  acknowledges
-- Repeatable: a second run finds no claim in progress and answers DONE, or STALE if the task was
-- granted again meanwhile; `stopping` answers OK again. A caller that lost the
-- answer asks `outbox` for the pages that it had. A batch may name one task twice.
-- include: group_state
local FULL_DELAY = 5000  -- ms until a task runs again whose children found no room
local worker, relay_lease = ARGV[1], tonumber(ARGV[2])

if not load_group() then return {'GONE'} end
-- include: group_tail
local first, spawns = 4 + 3 * tonumber(ARGV[3]), false
local outcomes, tids = {}, {}
while first <= #ARGV do
  local tid, fence, kind, reason, delay, run, children =
    string.match(ARGV[first], '^(%S+) (%d+) (%a+) (%S+) (%d+) (%d+) ?(%d*)$')
  outcomes[#outcomes + 1] = {
    tid = tid, fence = fence, kind = kind, reason = reason, delay = tonumber(delay),
    run = tonumber(run), blob = ARGV[first + 1], children = tonumber(children) or 0,
    first_child = first + 2,
  }
  spawns = spawns or children ~= ''
  first = first + 2 + 3 * (tonumber(children) or 0)
  tids[#tids + 1] = tid
end
-- At maxmemory Redis refuses this write, as it may allocate; pass_memory_limit makes one behind
-- which all others pass. `added` is when a task last came to an open group.
local is_full = false
if spawns then
  local refusal = redis.pcall('HSET', META, 'added', now_text)
  is_full = type(refusal) == 'table' and refusal.err ~= nil
end
pass_memory_limit()
acknowledge_pages(3)
if #tids == 0 then return {'OK', group.status, {}, {}, '0'} end
local claims = {}
for i, record in ipairs(call('HMGET', CLAIMS, unpack(tids))) do
  claims[tids[i]] = record and claim_of(record) or nil
end

-- At most once: a task with a crash limit of 0 whose handler had begun does not run again, though
-- its worker gives it back.
local function runs_once(tid)
  local _, _, _, _, limit = task_fields(call('HGET', TASKS, tid))
  return limit == 0
end

local function is_over(outcome)
  return outcome.kind == 'release' and outcome.reason == 'interrupted' and runs_once(outcome.tid)
end

-- A retry or a release: the task is pending again, and its next entry is an item of a page. Both
-- raise its issue, so that the entry that was delivered now is out of date.
local function again(outcome, claim)
  local what = outcome.kind == 'retry' and 'retry' or 'release'
  if what == 'retry' then
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
  log_task(outcome.tid, what, claim.role, 0, outcome.run)
  enqueue_later(outcome.tid, claim.role, claim.priority, issue_of(claim), due)
end

local function ends(outcome, claim, as, reason, blob)
  record_end(outcome.tid, 'in_progress', as, reason, claim.role, claim, outcome.run, blob)
end

-- What a task spawned is added by the step that counts its completion. A group that was sealed or
-- closed meanwhile takes none.
local function spawn(outcome)
  if group.open ~= 'o' and group.open ~= 'i' then return end
  -- include: group_tasks
  note_policy()
  for i = 0, outcome.children - 1 do
    local at = outcome.first_child + 3 * i
    add_task(ARGV[at], ARGV[at + 1], ARGV[at + 2])
  end
  write_children()
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
  elseif outcome.kind == 'completed' and outcome.children > 0 and is_full and not closed()
      and claim.state ~= 'c' then
    if runs_once(tid) then
      local words = 'Redis took no task that it spawned, and it may not run twice (max_crashes 0)'
      ends(outcome, claim, 'failed', 'poison', error_text(words))
      return 'OK'
    end
    outcome.delay = FULL_DELAY
    again(outcome, claim)
    return 'FULL'
  elseif outcome.kind == 'completed' then
    ends(outcome, claim, 'completed', '', outcome.blob)
    forget_errors(tid, claim.attempt, claim.releases)
    if outcome.children > 0 and not is_full then spawn(outcome) end
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
