-- How tasks end: results, errors of attempts, and the dependents of what has ended.
-- include: group_records group_outbox records.result_text
local ERRORS_KEPT = 5      -- errors of a task's last attempts
local CHILDREN_MAX = 1000  -- dependents looked at in one call; the rest waits in an internal page

local function log_task(tid, what, role, wait, run)
  local words = {tid, what, role, wait or 0, run or 0}
  effects.log[#effects.log + 1] = table.concat(words, ',')
end

-- Errors: 'tid attempt' -> the error with which that attempt ended, if another attempt followed;
-- 'tid 0' is that of a task that had failed and was reopened. A completed task keeps none.
-- `run` is the record of the claim, or of the result, with the attempt's worker and times.
local function keep_error(tid, attempt, blob, run)
  local facts = string.format(',"attempt":%d,"worker":"%s","started":%s,"ended":%s}', attempt,
                              run.worker, run.started, run.ended or now_text)
  call('HSET', ERRORS, tid .. ' ' .. attempt, string.sub(blob, 1, -2) .. facts)
  if attempt >= ERRORS_KEPT then call('HDEL', ERRORS, tid .. ' ' .. attempt - ERRORS_KEPT) end
end

-- `releases`: only a task that has some may have been reopened.
local function forget_errors(tid, attempts, releases)
  for attempt = math.max(releases > 0 and 0 or 1, attempts - ERRORS_KEPT), attempts - 1 do
    call('HDEL', ERRORS, tid .. ' ' .. attempt)
  end
end

-- A task that did not complete may be reopened: its result keeps what that needs. Returns the JSON
-- values of the result: the error or null, and the payload.
local function reopenable(result, blob, task, issue)
  local _, priority, _, _, crash_limit = task_fields(task)
  blob = blob == '' and 'null' or blob
  result.priority, result.crash_limit = priority, crash_limit
  result.issue, result.value_bytes = issue, #blob
  return blob .. ',' .. task_json(task)
end

-- Writes the result of a task that has ended, and its end into the event. `claim` is its record or
-- nil, `run` the handler's ms, `blob` a JSON value or ''.
local function write_end(tid, outcome, reason, role, claim, run, blob)
  local attempts, crashes, worker, started, wait = 0, 0, '', '', 0
  if claim then
    attempts, crashes = claim.attempt, claim.crashes
    worker, started = claim.worker, claim.started
    -- The attempt to come, which never started.
    if claim.state == 'r' then attempts = attempts - 1 end
    -- Parked, never granted.
    if claim.fence == '0' then
      attempts, started = 0, ''
    end
    if started ~= '' then
      local arrived = string.match(claim.lineage, ':(%d+)') or started
      wait = math.max(0, tonumber(started) - tonumber(arrived))
    end
  end
  local result = {
    outcome = outcome, reason = reason, role = role, attempts = attempts, crashes = crashes,
    worker = worker, started = started, ended = now_text, wait = wait, run = run,
  }
  if outcome ~= 'completed' then
    blob = reopenable(result, blob, call('HGET', TASKS, tid), issue_of(claim))
  end
  effects.is_ended[tid] = outcome
  effects.ended[#effects.ended + 1] = tid
  effects.results[#effects.results + 1] = tid
  effects.results[#effects.results + 1] = result_text(result, '[' .. blob .. ']')
  log_task(tid, outcome, role, wait, run)
end

-- Ends a task, which was counted as `from`.
local function record_end(tid, from, outcome, reason, role, claim, run, blob)
  move(from, outcome)
  write_end(tid, outcome, reason, role, claim, run, blob)
  if group.dag == '1' and not closed() then
    local step = outcome == 'completed' and 'release' or 'miss'
    effects.walks[#effects.walks + 1] = {step, tid, 1}
  end
end

-- A task that was reopened has a claim before it is first claimed.
local function issue_of_task(tid)
  local record = call('HGET', CLAIMS, tid)
  return issue_of(record and claim_of(record))
end

-- Ends a task that needs one that did not complete, as its group wants it; its own dependents are
-- next. Written at once: a walk may end a thousand tasks.
local function miss(tid, task, role)
  local outcome, blob = 'cancelled', ''
  if group.on_need_failed == 'fail' then
    outcome = 'failed'
    blob = error_text('a task that it needs did not complete')
  end
  local result = {
    outcome = outcome, reason = 'skipped', role = role, attempts = 0, crashes = 0,
    ended = now_text, wait = 0, run = 0,
  }
  blob = reopenable(result, blob, task, issue_of_task(tid))
  effects.is_ended[tid] = outcome
  call('HDEL', NEEDS, tid)
  call('HDEL', TASKS, tid)
  call('HDEL', CLAIMS, tid)
  call('HSET', RESULTS, tid, result_text(result, '[' .. blob .. ']'))
  move('waiting', outcome)
  log_task(tid, outcome, role)
  effects.walks[#effects.walks + 1] = {'miss', tid, 1}
end

-- One dependent of a task that completed ('release') or did not ('miss').
local function visit(tid, step)
  local unmet, task = call('HGET', NEEDS, tid), call('HGET', TASKS, tid)
  if not unmet or not task then return end
  local role, priority, not_before = task_fields(task)
  if step == 'miss' and group.on_need_failed ~= 'continue' then
    miss(tid, task, role)
  elseif tonumber(unmet) > 1 then
    call('HINCRBY', NEEDS, tid, -1)
  else
    call('HDEL', NEEDS, tid)
    move('waiting', 'pending')
    local due = from_start(not_before)
    enqueue_later(tid, role, priority, issue_of_task(tid), due and due > now and due)
  end
end

-- Releases the dependents of completed tasks. For those of other tasks the group's policy decides:
-- skip (the default), fail, or continue, which releases them too.
local function walk_dependents()
  if #effects.walks == 0 then return end
  group.on_need_failed = call('HGET', META, 'on_need_failed') or 'skip'
  local left = CHILDREN_MAX
  while #effects.walks > 0 do
    local step, parent, position = unpack(table.remove(effects.walks))
    local children = call('HGET', CHILDREN, parent) or ''
    local first, last, tid = string.find(children, '(%S+)', position)
    while first and left > 0 do
      left = left - 1
      position = last + 1
      visit(tid, step)
      first, last, tid = string.find(children, '(%S+)', position)
    end
    if first then
      add_page('#' .. step .. '|' .. position .. '|' .. parent, now)
      effects.more = '1'
    elseif children ~= '' then
      call('HDEL', CHILDREN, parent)
    end
  end
end
