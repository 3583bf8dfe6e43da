-- fetch: acknowledge, promote what is due, reclaim, read. The only script that delivers, so every delivery has a fence.
-- KEYS: the role's.
-- ARGV: worker, budget, lease ms asked for, mode (read | recover), stream to read first (1..3),
--       n, n entries that this worker holds (recover mode),
--       then per outcome: outcome, n, n entries to acknowledge, m, m histogram fields and increments.
-- Reply: lease ms in force, ms until the next due entry (-1 none), then per entry: entry, task, fence.
-- Not repeatable, since it reads. After a lost reply call it in recover mode, which gives this worker its own pending
-- entries that it does not hold. Acknowledgements are counted once: XACK says which were still pending.
local PROMOTE_MAX = 50
local worker, budget, asked, mode = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4]
local first_stream = tonumber(ARGV[5])

drain()
local role = keep_clock(asked)

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

local next_fence = math.max(role.fence + 1, now_us)
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
  local found = redis.pcall('XAUTOCLAIM', KEYS[stream], GROUP, worker, role.lease, cursor, 'COUNT', left, 'JUSTID')
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
elseif budget > 0 and role.paused then
  call('DEL', BELL)  -- a paused role delivers nothing; what it has delivered goes on
elseif budget > 0 then
  if now >= role.pause_until then
    for _, stream in ipairs(order) do if left > 0 then reclaim(stream) end end
  end
  for _, stream in ipairs(order) do if left > 0 then read(stream) end end
  if left > 0 then call('DEL', BELL) else ring(1) end
elseif #promoted > 0 then ring(#promoted) end

if #delivered > 0 then call('HSET', META, 'fence', text(next_fence - 1)) end
local next_due = call('ZRANGE', DELAYED, 0, 0, 'WITHSCORES')[2]
local wait = next_due and math.max(0, tonumber(next_due) - now) or -1
return {text(role.lease), text(wait), delivered}
