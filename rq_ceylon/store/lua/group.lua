-- Shared by the scripts of the group slot: the state of a group, one read at the start and one write in the tail;
-- records, outbox pages, ends of tasks, dependents, goals, closing and finishing.
-- KEYS: meta tasks claims results needs children outbox events errors, all of one group.
local META, TASKS, CLAIMS, RESULTS, NEEDS, CHILDREN, OUTBOX, EVENTS, ERRORS = unpack(KEYS)
local LAYOUT = '1'
local CRASH_LIMIT = 3       -- crashes that a task survives, unless it says otherwise
local ERRORS_KEPT = 5        -- errors of a task's last attempts
local PAGE_ITEMS = 100       -- entries in one outbox page
local CHILDREN_MAX = 1000    -- dependents looked at in one call; the rest waits in an internal page
local CALLABLE_WAIT = 3600000 -- ms a finished group waits for the verdict of a callable goal without a deadline

local NUMBERS = {'total', 'waiting', 'pending', 'in_progress', 'completed', 'failed', 'cancelled', 'attempts', 'crashes',
                 'pages', 'goals_failed', 'waited'}   -- waited: ms that it waited for other groups
local group, before = {}, {}

-- Reads the group; false if there is none. Nothing is ever written for an absent group or an unknown layout.
local function load()
  local found = call('HMGET', META, 'v', 'status', 'open', 'dag', 'goals', 'outcome', unpack(NUMBERS))
  if not found[2] then return false end
  if found[1] ~= LAYOUT then error('LAYOUT group has layout ' .. tostring(found[1]) .. ', this version knows ' .. LAYOUT) end
  group.status, group.open, group.dag, group.goals, group.outcome = found[2], found[3], found[4], found[5] or '', found[6]
  for i, name in ipairs(NUMBERS) do
    group[name] = tonumber(found[6 + i] or 0); before[name] = group[name]
  end
  before.status = group.status
  return true
end

-- At maxmemory a script is refused at its first write, if that write may allocate. Every script but submit opens with
-- this one, so that a full server can still drain (redis: scripts may finish what they began).
local function drain() call('HDEL', META, '') end

local function closed() return group.status == 'closing' or group.status == 'finished' end
-- Pages stay in the outbox of a group that is not there yet, waits for other groups, or is paused.
local function withheld() return group.status == 'staging' or group.status == 'waiting' or group.status == 'paused' end
local function move(from, to) group[from] = group[from] - 1; group[to] = group[to] + 1 end

-- ---- records ------------------------------------------------------------------------------------------------------
-- Task: role|priority 1..3|not before|expiry|crash limit|opaque JSON.   Times are epoch ms; '' where there is none.
local function head_of(task)
  local role, priority, not_before, expiry, limit = string.match(task, '^([^|]*)|(%d)|(%d*)|(%d*)|(%d*)|')
  return role, priority, tonumber(not_before), tonumber(expiry), tonumber(limit)
end

-- A fence stays text, but where two are compared in size: it has 16 digits.
-- Claim: state|attempt|fence|worker|lineage|started|crashes|releases|due|role|priority.
-- State: p in progress, c in progress and asked to cancel, s in progress at a worker that was told to stop, r retrying,
-- l released.
local function claim_of(record)
  local state, attempt, fence, worker, lineage, started, crashes, releases, due, role, priority = string.match(record,
    '^(%a)|(%d+)|(%d+)|([^|]*)|([^|]*)|(%d+)|(%d+)|(%d+)|(%d*)|([^|]*)|(%d)$')
  return {state = state, attempt = tonumber(attempt), fence = fence, worker = worker, lineage = lineage, started = started,
          crashes = tonumber(crashes), releases = tonumber(releases), due = due, role = role, priority = priority}
end
local function claim_text(c)
  return c.state .. '|' .. c.attempt .. '|' .. c.fence .. '|' .. c.worker .. '|' .. c.lineage .. '|' .. c.started .. '|' ..
         c.crashes .. '|' .. c.releases .. '|' .. c.due .. '|' .. c.role .. '|' .. c.priority
end
-- The delay and the expiry of a task were counted from the submission; they hold from when its group became active.
local function from_start(at) return at and at + group.waited end

local function running(claim) return claim and (claim.state == 'p' or claim.state == 'c' or claim.state == 's') end

-- The issue of a stream entry. A retry and a release raise it, so every older entry of the task is OUTDATED.
local function issue_of(claim) return claim and claim.attempt + claim.releases or 1 end

-- ---- outbox: what must reach a role ----------------------------------------------------------------------------------
-- Page: number|role|due|item item ... with items priority,tid,issue or priority,tid,issue,fence it supersedes.
-- Message to a group that depends on this one: number|@|outcome|gid.    Internal page: number|#step|position|tid.
local queued, queued_keys = {}, {}   -- entries of this call by role|due, and the order these came up in
local pages = {}                     -- pages written by this call

local function enqueue_later(tid, role, priority, issue, due, supersedes)
  local key = role .. '|' .. (due and text(due) or '')
  local items = queued[key]
  if not items then items = {}; queued[key] = items; queued_keys[#queued_keys + 1] = key end
  items[#items + 1] = priority .. ',' .. tid .. ',' .. issue .. (supersedes and ',' .. supersedes or '')
end

local function add_page(body, visible)
  group.pages = group.pages + 1
  local page = group.pages .. '|' .. body
  call('ZADD', OUTBOX, text(visible), page)
  return page
end

-- Pages become visible to relays only later: whoever gets them in this call's reply is expected to enqueue them.
local function write_pages(visible)
  for _, key in ipairs(queued_keys) do
    local items = queued[key]
    for first = 1, #items, PAGE_ITEMS do
      local last = math.min(first + PAGE_ITEMS - 1, #items)
      pages[#pages + 1] = add_page(key .. '|' .. table.concat(items, ' ', first, last), visible)
    end
  end
end

-- ARGV from `first`: count, then per acknowledged page: page, role, horizon (the largest entry or due ms it got).
-- Returns the position after them.
local function acknowledge_pages(first)
  local count = tonumber(ARGV[first])
  for i = first + 1, first + 3 * count, 3 do
    call('ZREM', OUTBOX, ARGV[i])
    local field, horizon = 'horizon:' .. ARGV[i + 1], tonumber(ARGV[i + 2])
    if horizon > tonumber(call('HGET', META, field) or 0) then call('HSET', META, field, text(horizon)) end
  end
  return first + 3 * count + 1
end

-- ---- ends of tasks ---------------------------------------------------------------------------------------------------
-- Result: outcome|reason|role|attempts|crashes|worker|started|ended|wait ms|run ms|JSON array (value, or error and payload).
local log = {}                       -- what the event of this call tells: tid,outcome,role,wait,run
local results, ended, is_ended = {}, {}, {}
local walks = {}                     -- dependents still to look at: {step, tid, position}
local more = '0'                     -- '1': an internal page is left, the caller should call `outbox` at once

local function log_task(tid, what, role, wait, run)
  log[#log + 1] = tid .. ',' .. what .. ',' .. role .. ',' .. (wait or 0) .. ',' .. (run or 0)
end

-- An error that no handler raised, as JSON.
local function error_text(message) return '{"type":"","message":"' .. message .. '","traceback":""}' end

-- Errors: 'tid attempt' -> the error with which that attempt ended; another followed. Those of a completed task go.
local function keep_error(tid, attempt, blob)
  call('HSET', ERRORS, tid .. ' ' .. attempt, blob)
  if attempt > ERRORS_KEPT then call('HDEL', ERRORS, tid .. ' ' .. attempt - ERRORS_KEPT) end
end
local function forget_errors(tid, attempts)
  for attempt = math.max(1, attempts - ERRORS_KEPT), attempts - 1 do
    call('HDEL', ERRORS, tid .. ' ' .. attempt)
  end
end

-- Ends a task. `claim` is its record or nil, `run` the handler's ms, `blob` a JSON value or ''.
local function settle(tid, from, outcome, reason, role, claim, run, blob)
  local attempts, crashes, worker, started, wait = 0, 0, '', '', 0
  if claim then
    attempts, crashes, worker, started = claim.attempt, claim.crashes, claim.worker, claim.started
    if claim.state == 'r' then attempts = attempts - 1 end    -- the attempt to come, which never started
    if claim.fence == '0' then attempts, started = 0, '' end  -- parked, never granted
    wait = started == '' and 0 or math.max(0, tonumber(started) - tonumber(string.match(claim.lineage, ':(%d+)') or started))
  end
  if outcome == 'failed' then
    local task = call('HGET', TASKS, tid)
    blob = (blob == '' and 'null' or blob) .. ',' .. string.match(task, '^[^|]*|[^|]*|[^|]*|[^|]*|[^|]*|(.*)$')
  end
  move(from, outcome)
  is_ended[tid] = true
  ended[#ended + 1] = tid
  results[#results + 1] = tid
  results[#results + 1] = outcome .. '|' .. reason .. '|' .. role .. '|' .. attempts .. '|' .. crashes .. '|' .. worker ..
                          '|' .. started .. '|' .. now_text .. '|' .. wait .. '|' .. run .. '|[' .. blob .. ']'
  log_task(tid, outcome, role, wait, run)
  if group.dag == '1' and not closed() then
    walks[#walks + 1] = {outcome == 'completed' and 'release' or 'miss', tid, 1}
  end
end

-- Ends a task that needs one that did not complete, as its group wants it; its own dependents are next.
local function miss(tid, task, role)
  local outcome = group.on_need_failed == 'fail' and 'failed' or 'cancelled'
  local blob = outcome == 'failed' and error_text('a task that it needs did not complete') .. ','
    .. string.match(task, '^[^|]*|[^|]*|[^|]*|[^|]*|[^|]*|(.*)$') or ''
  call('HDEL', NEEDS, tid); call('HDEL', TASKS, tid)
  call('HSET', RESULTS, tid, table.concat({outcome, 'skipped', role, 0, 0, '', '', now_text, 0, 0, '[' .. blob .. ']'}, '|'))
  move('waiting', outcome); log_task(tid, outcome, role)
  walks[#walks + 1] = {'miss', tid, 1}
end

-- Releases the dependents of completed tasks; for those of others the group's policy decides: skip (default), fail, or
-- continue, which releases them too.
local function walk_dependents()
  if #walks == 0 then return end
  group.on_need_failed = call('HGET', META, 'on_need_failed') or 'skip'
  local left = CHILDREN_MAX
  while #walks > 0 do
    local step, parent, position = unpack(table.remove(walks))
    local children = call('HGET', CHILDREN, parent) or ''
    local first, last, tid = string.find(children, '(%S+)', position)
    while first and left > 0 do
      left = left - 1; position = last + 1
      local unmet, task = call('HGET', NEEDS, tid), call('HGET', TASKS, tid)
      if unmet and task then
        local role, priority, not_before = head_of(task)
        if step == 'miss' and group.on_need_failed ~= 'continue' then miss(tid, task, role)
        elseif tonumber(unmet) > 1 then call('HINCRBY', NEEDS, tid, -1)
        else
          call('HDEL', NEEDS, tid); move('waiting', 'pending')
          local due = from_start(not_before)
          enqueue_later(tid, role, priority, 1, due and due > now and due)
        end
      end
      first, last, tid = string.find(children, '(%S+)', position)
    end
    if first then add_page('#' .. step .. '|' .. position .. '|' .. parent, now); more = '1'
    elseif children ~= '' then call('HDEL', CHILDREN, parent) end
  end
end

-- ---- goals -----------------------------------------------------------------------------------------------------------
-- An undecided goal: name|on achieved|on failed|deadline ms (0 none)|program|fail program;   programs are reverse Polish.
-- Runs a program over intervals, [what is certain now, what the open tasks can still make of it].
-- 1 holds in every outcome, 0 in none, nil undecided.
local function verdict(program)
  local open = group.waiting + group.pending + group.in_progress
  local more = group.open == '1' and not closed() and math.huge or 0
  local stack = {}
  local function push(low, high) stack[#stack + 1] = {low, high} end
  local function pop() return table.remove(stack) end
  local function bit(condition) return condition and 1 or 0 end
  for token in string.gmatch(program, '[^,]+') do
    local number = tonumber(token)
    if number then push(number, number)
    elseif token == 'total' then push(group.total, group.total + more)
    -- A failure in a closed group counts as cancelled, so `failed` stands still there.
    elseif token == 'failed' then push(group.failed, group.failed + (closed() and 0 or open + more))
    elseif token == 'completed' or token == 'cancelled' then push(group[token], group[token] + open + more)
    elseif token == 'attempts' or token == 'crashes' then
      push(group[token], open + more > 0 and math.huge or group[token])
    elseif token == 'call' then push(0, 1)
    else
      local b, a = pop(), pop()
      if token == 'and' then push(math.min(a[1], b[1]), math.min(a[2], b[2]))
      elseif token == 'or' then push(math.max(a[1], b[1]), math.max(a[2], b[2]))
      elseif token == '*' then push(a[1] * b[1], a[2] * b[2])
      elseif token == '>=' then push(bit(a[1] >= b[2]), bit(a[2] >= b[1]))
      elseif token == '>' then push(bit(a[1] > b[2]), bit(a[2] > b[1]))
      elseif token == '<=' then push(bit(a[2] <= b[1]), bit(a[1] <= b[2]))
      elseif token == '<' then push(bit(a[2] < b[1]), bit(a[1] < b[2]))
      else error('unknown token ' .. token) end
    end
  end
  local result = pop()
  if result[1] == result[2] then return result[1] end
end

local function goal_of(line)
  local name, on_achieved, on_failed, deadline, program, fail_program =
    string.match(line, '^([^|]*)|([^|]*)|([^|]*)|(%d+)|([^|]*)|([^|]*)$')
  return {name = name, on_achieved = on_achieved, on_failed = on_failed, deadline = tonumber(deadline),
          program = program, fail_program = fail_program}
end
local function goal_text(goal)
  return table.concat({goal.name, goal.on_achieved, goal.on_failed, text(goal.deadline), goal.program, goal.fail_program}, '|')
end

-- Deadline first, then what makes it fail, then what makes it achieved. Returns the status and what settled it.
local function decide(goal, kind)
  if goal.deadline > 0 and now >= goal.deadline then return 'failed', 'deadline' end
  if goal.fail_program ~= '' and verdict(goal.fail_program) == 1 then return 'failed', 'fail_when' end
  local holds = verdict(goal.program)
  if holds == 1 then return 'achieved', kind elseif holds == 0 then return 'failed', kind end
end

-- The goals and their deadlines start with the group.
local function start_goals()
  local lines = {}
  for line in string.gmatch(group.goals, '[^;]+') do
    local goal = goal_of(line)
    if goal.deadline > 0 then goal.deadline = now + goal.deadline end
    lines[#lines + 1] = goal_text(goal)
  end
  group.goals = table.concat(lines, ';')
  if group.goals ~= '' then call('HSET', META, 'goals', group.goals) end
end

-- Cancels what has not started, in O(1): with a closed group, `cancelled` is what an open task without a claim is.
local function close(stop)
  if stop then call('HSET', META, 'stop', '1') end
  if closed() then return end
  if group.status == 'waiting' then start_goals() end
  group.cancelled = group.cancelled + group.waiting + group.pending
  group.waiting = 0; group.pending = 0; group.status = 'closing'
  call('UNLINK', OUTBOX); pages = {}
end

local settled, event_number = {}, nil
local function settle_goal(goal, status, by)
  event_number = event_number or call('LLEN', EVENTS) + 1
  local counts = {}
  for i = 1, 9 do counts[i] = text(group[NUMBERS[i]]) end
  call('HSET', META, 'goal:' .. goal.name, table.concat({status, now_text, event_number, by, table.concat(counts, ',')}, '|'))
  if status == 'failed' then group.goals_failed = group.goals_failed + 1 end
  settled[#settled + 1] = goal.name .. ':' .. status
  local policy = status == 'achieved' and goal.on_achieved or goal.on_failed
  if policy ~= 'continue' then close(policy == 'cancel') end
end

-- A settled goal may close the group, and closing may decide others: judge until nothing moves.
local function judge_goals(kind)
  local moved = group.goals ~= '' and group.status ~= 'waiting'
  while moved do
    moved = false
    local kept = {}
    for line in string.gmatch(group.goals, '[^;]+') do
      local goal = goal_of(line)
      local status, by = decide(goal, kind)
      if status then settle_goal(goal, status, by); moved = true else kept[#kept + 1] = line end
    end
    group.goals = table.concat(kept, ';')
    if moved then call('HSET', META, 'goals', group.goals) end
  end
end

-- ---- finishing ---------------------------------------------------------------------------------------------------------
-- All tasks ended but a callable goal is undecided: its owner gets until the goal's deadline, or an hour.
local function await_callables()
  group.status = 'closing'
  local lines, changed = {}, false
  for line in string.gmatch(group.goals, '[^;]+') do
    local goal = goal_of(line)
    if goal.deadline == 0 then goal.deadline = now + CALLABLE_WAIT; changed = true end
    lines[#lines + 1] = goal_text(goal)
  end
  if not changed then return end
  group.goals = table.concat(lines, ';')
  call('HSET', META, 'goals', group.goals)
end

local function finish(visible)
  local facts = call('HMGET', META, 'retention', 'goals_total')
  if not group.outcome then
    local good = group.completed == group.total
    if tonumber(facts[2] or 0) > 0 then good = group.goals_failed == 0 end
    group.outcome = good and 'completed' or 'failed'
  end
  group.status = 'finished'
  call('HSET', META, 'outcome', group.outcome, 'finished', now_text)
  -- Pages whose acknowledgement was lost with a worker: nobody needs them any more.
  call('UNLINK', OUTBOX); pages = {}
  for gid in string.gmatch(call('HGET', META, 'dependents') or '', '%S+') do
    pages[#pages + 1] = add_page('@|' .. group.outcome .. '|' .. gid, visible)
  end
  -- A backstop only: maintenance prunes after the retention, an hour earlier.
  local ttl = text(tonumber(facts[1]) + 3600000)
  for _, key in ipairs(KEYS) do call('PEXPIRE', key, ttl) end
end

local function end_of_group(visible)
  local open = group.waiting + group.pending + group.in_progress
  if group.status == 'finished' or open > 0 then return end
  if group.status ~= 'closing' and (group.open == '1' or withheld() and group.status ~= 'paused') then return end
  if group.goals ~= '' then await_callables() else finish(visible) end
end

-- The shared tail of every script that may end tasks: results, dependents, pages, goals, closing, finishing, counters,
-- event, notification. `visible`: when a relay may take the pages that this call hands to its caller.
local function tail(kind, visible)
  if #ended > 0 then
    call('HSET', RESULTS, unpack(results)); call('HDEL', TASKS, unpack(ended)); call('HDEL', CLAIMS, unpack(ended))
  end
  walk_dependents()
  if not closed() then write_pages(visible) end
  judge_goals(kind)
  end_of_group(visible)
  local changes, changed = {}, #log > 0 or #settled > 0 or group.status ~= before.status
  for _, name in ipairs(NUMBERS) do
    if group[name] ~= before[name] then changes[#changes + 1] = name; changes[#changes + 1] = text(group[name]) end
  end
  local status = ''
  if group.status ~= before.status then status = group.status; changes[#changes + 1] = 'status'; changes[#changes + 1] = status end
  if #changes > 0 then call('HSET', META, unpack(changes)) end
  if not changed then return end
  local event = table.concat({now_text, kind, table.concat(log, ' '), table.concat(settled, ' '), status}, '|')
  local number = call('RPUSH', EVENTS, event)
  local namespace, gid = string.match(KEYS[1], '^ceylon:(.-):{g:(.-)}:')
  call('PUBLISH', 'ceylon:' .. namespace .. ':events:' .. gid, number)
  if group.status == 'finished' and number == 1 then call('PEXPIRE', EVENTS, call('PTTL', META)) end
end

-- The nearest deadline of an undecided goal, 0 if there is none. A group that waits has not started them.
local function next_deadline()
  if group.status == 'waiting' then return 0 end
  local nearest = 0
  for line in string.gmatch(group.goals, '[^;]+') do
    local deadline = goal_of(line).deadline
    if deadline > 0 and (nearest == 0 or deadline < nearest) then nearest = deadline end
  end
  return nearest
end
