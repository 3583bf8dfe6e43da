-- fetch: acknowledge, promote what is due, reclaim, read. The only script that delivers, so every delivery has a fence.
-- KEYS: the role's.
-- ARGV: worker, budget, lease ms asked for, mode (read | recover), stream to read first (1..3),
--       n, n entries that this worker holds (recover mode),
--       then per outcome: outcome, n, n entries to acknowledge, m, m histogram fields and increments.
-- Reply: lease ms in force, ms until the next due entry (-1 none), then per entry: entry, task, fence.
-- Not repeatable, since it reads. After a lost reply call it in recover mode, which gives this worker its own pending
-- entries that it does not hold. Acknowledgements are counted once: XACK says which were still pending.
local PROMOTE_MAX = 50
local PENDING_STEP = 1000
local worker, budget, asked, mode = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4]
local first_stream = tonumber(ARGV[5])

local function all_pending(stream, ...)
  local found, from = {}, '-'
  while from do
    local some = pending(stream, from, '+', PENDING_STEP, ...)
    for _, entry in ipairs(some) do found[#found + 1] = entry end
    from = #some == PENDING_STEP and '(' .. some[#some][1]
  end
  return found
end

drain()
local facts = call('HMGET', META, 'last', 'pause_until', 'fence', 'lease', 'v', 'paused')
if facts[5] and facts[5] ~= '1' then error('LAYOUT role has layout ' .. facts[5] .. ', this version knows 1') end
local last, pause_until, fence = tonumber(facts[1] or 0), tonumber(facts[2] or 0), tonumber(facts[3] or 0)
local lease = tonumber(facts[4] or 0)

-- The lease is the role's: it changes only when no worker of the role has been here for as long as it lasts.
if lease == 0 or now - last > lease then
  if lease ~= asked then lease = asked; call('HSET', META, 'lease', text(lease), 'v', '1') end
end

-- Nobody was here for half a lease, or the clock stepped: everybody gets a whole lease to renew before anything is
-- reclaimed. Only fetch writes `last`. Idle times are wall-clock times, so after a step back they start anew.
local stepped_back = last > now
if last == 0 or stepped_back or now - last > lease / 2 then
  pause_until = now + lease
  call('HSET', META, 'pause_until', text(pause_until))
end
call('HSET', META, 'last', now_text)
if stepped_back then
  for stream = 1, 3 do
    for _, entry in ipairs(all_pending(KEYS[stream])) do
      call('XCLAIM', KEYS[stream], GROUP, entry[2], 0, entry[1], 'IDLE', 0, 'JUSTID')
    end
  end
end

local position = 7
local held = {}
for _ = 1, tonumber(ARGV[6]) do held[ARGV[position]] = true; position = position + 1 end

while position <= #ARGV do
  local outcome, count = ARGV[position], tonumber(ARGV[position + 1])
  local by_stream, acknowledged = {{}, {}, {}}, 0
  for i = position + 2, position + 1 + count do
    local stream, id = string.match(ARGV[i], '^([123]):(.+)$')
    table.insert(by_stream[tonumber(stream)], id)
  end
  for stream = 1, 3 do
    if #by_stream[stream] > 0 then acknowledged = acknowledged + acknowledge(KEYS[stream], by_stream[stream]) end
  end
  position = position + 2 + count
  local fields = tonumber(ARGV[position])
  if acknowledged > 0 then call('HINCRBY', META, 'total:' .. outcome, acknowledged) end
  if acknowledged == count then
    for i = position + 1, position + 2 * fields, 2 do call('HINCRBY', META, ARGV[i], ARGV[i + 1]) end
  end
  position = position + 1 + 2 * fields
end

local promoted = call('ZRANGEBYSCORE', DELAYED, '-inf', now_text, 'LIMIT', 0, PROMOTE_MAX)
for _, member in ipairs(promoted) do
  local priority, task = string.match(member, '^([123]) (.+)$')
  if task then call('XADD', KEYS[tonumber(priority)], '*', 'task', task) end
  call('ZREM', DELAYED, member)
end

local next_fence = math.max(fence + 1, now_us)
local delivered, left = {}, budget

-- One that nobody here wrote would be refused at its claim, with all that are claimed beside it, again and again.
local function is_well_formed(fields)
  if #fields ~= 2 or fields[1] ~= 'task' or #fields[2] > ENTRY_MAX then return false end
  local rest = string.match(fields[2], '^[%w._:-]+ [%w._:-]+ %d+(.*)$')
  local lineage = rest and (string.match(rest, '^ (%S+)$') or string.match(rest, '^ (%S+) %d+$'))
  return rest == '' or lineage == '-' or lineage and string.match(lineage, '^[123]:%d+%-%d+$')
end

local function deliver(stream, id, fields)
  local task = fields[2]
  if not is_well_formed(fields) then
    call('XADD', QUARANTINE, 'MAXLEN', '~', QUARANTINE_MAX, '*', 'entry', stream .. ':' .. id, unpack(fields))
    acknowledge(KEYS[stream], {id})
    return
  end
  delivered[#delivered + 1] = stream .. ':' .. id
  delivered[#delivered + 1] = task
  delivered[#delivered + 1] = text(next_fence)
  next_fence = next_fence + 1
  left = left - 1
end

-- Redis 6.2 keeps deleted entries pending for ever, later versions drop them: look each one up.
local function deliver_again(stream, id)
  local entry = call('XRANGE', KEYS[stream], id, id)[1]
  if entry then deliver(stream, id, entry[2]) else acknowledge(KEYS[stream], {id}) end
end

local function recover(stream)
  for _, entry in ipairs(all_pending(KEYS[stream], worker)) do
    if not held[stream .. ':' .. entry[1]] then
      call('XCLAIM', KEYS[stream], GROUP, worker, 0, entry[1], 'JUSTID')
      deliver_again(stream, entry[1])
    end
  end
end

-- The scan goes on where the last one stopped: renewed entries in front must not hide a dead one behind them.
local function reclaim(stream)
  local field = 'cursor' .. stream
  local cursor = call('HGET', META, field) or '0-0'
  local found = redis.pcall('XAUTOCLAIM', KEYS[stream], GROUP, worker, lease, cursor, 'COUNT', left, 'JUSTID')
  if found.err then create_group(KEYS[stream]); return end
  for _, id in ipairs(found[2]) do deliver_again(stream, id) end
  if found[1] ~= cursor then call('HSET', META, field, found[1]) end
end

local function read(stream)
  local found = redis.pcall('XREADGROUP', 'GROUP', GROUP, worker, 'COUNT', left, 'STREAMS', KEYS[stream], '>')
  if found and found.err then
    create_group(KEYS[stream])
    found = call('XREADGROUP', 'GROUP', GROUP, worker, 'COUNT', left, 'STREAMS', KEYS[stream], '>')
  end
  if not found then return end
  for _, entry in ipairs(found[1][2]) do deliver(stream, entry[1], entry[2]) end
end

local order = {1, 2, 3}
if first_stream > 1 then table.remove(order, first_stream); table.insert(order, 1, first_stream) end
if mode == 'recover' then
  for stream = 1, 3 do recover(stream) end
elseif budget > 0 and facts[6] == '1' then
  call('DEL', BELL)  -- a paused role delivers nothing; what it has delivered goes on
elseif budget > 0 then
  if now >= pause_until then
    for _, stream in ipairs(order) do if left > 0 then reclaim(stream) end end
  end
  for _, stream in ipairs(order) do if left > 0 then read(stream) end end
  if left > 0 then call('DEL', BELL) else ring(1) end
elseif #promoted > 0 then ring(#promoted) end

if #delivered > 0 then call('HSET', META, 'fence', text(next_fence - 1)) end
local next_due = call('ZRANGE', DELAYED, 0, 0, 'WITHSCORES')[2]
local wait = next_due and math.max(0, tonumber(next_due) - now) or -1
return {text(lease), text(wait), delivered}
