-- fetch: acknowledge, promote what is due, reclaim, read. The only script that delivers, so every delivery has a fence.
-- KEYS: the role's.
-- ARGV: worker, budget, lease ms asked for, mode (read | recover), ms after which a name that no worker knows is overdue,
--       n, n entries that this worker holds (recover mode),
--       n, n names that this worker knows, of those that tasks wait for: 'count name', of which it takes so many,
--       then per outcome: outcome, n, n entries to acknowledge, m, m histogram fields and increments.
-- Reply: lease ms in force, ms until the next due entry (-1 none), then per entry: entry, task, fence,
--        then some of the names that tasks wait for.
-- Not repeatable, since it reads. After a lost reply call it in recover mode, which gives this worker its own pending
-- entries that it does not hold. Acknowledgements are counted once: XACK says which were still pending.
local PROMOTE_MAX = 50
local worker, budget, asked, mode = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4]
local overdue_ms = tonumber(ARGV[5])
local NAMES_MAX = 64   -- in one reply
local SHARE = 8        -- of so many deliveries one is of low priority and one of normal, if any wait

drain()
local role = keep_clock(asked)

local position = 6
local function listed()
  local list = {}
  for i = 1, tonumber(ARGV[position]) do list[i] = ARGV[position + i] end
  position = position + #list + 1
  return list
end
local held = {}
for _, entry in ipairs(listed()) do held[entry] = true end
local known = listed()

while position <= #ARGV do
  local outcome, count = ARGV[position], tonumber(ARGV[position + 1])
  local by_stream, acknowledged = {{}, {}, {}, {}}, 0
  for i = position + 2, position + 1 + count do
    local stream, id = string.match(ARGV[i], '^([1234]):(.+)$')
    table.insert(by_stream[tonumber(stream)], id)
  end
  for stream = 1, STREAMS do
    if #by_stream[stream] > 0 then
      acknowledged = acknowledged + acknowledge(KEYS[stream], by_stream[stream])
    end
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
  local cursor = role.cursors[stream] or '0-0'
  local found = redis.pcall('XAUTOCLAIM', KEYS[stream], GROUP, worker, role.lease, cursor, 'COUNT', left, 'JUSTID')
  if found.err then create_group(KEYS[stream]); return end
  for _, id in ipairs(found[2]) do deliver_again(stream, id) end
  if found[1] ~= cursor then call('HSET', META, 'cursor' .. stream, found[1]) end
end

-- Reads up to so many; returns whether there may be more.
local function read(stream, count)
  if count <= 0 then return false end
  local ask = {'XREADGROUP', 'GROUP', GROUP, worker, 'COUNT', count, 'STREAMS', KEYS[stream], '>'}
  local found = redis.pcall(unpack(ask))
  if found and found.err then
    create_group(KEYS[stream])
    found = call(unpack(ask))
  end
  if not found then return false end
  for _, entry in ipairs(found[1][2]) do deliver(stream, entry[1], entry[2]) end
  return #found[1][2] == count
end

-- Gives this worker tasks that wait by their name: they become entries of `front`, read before anything else can be.
-- Only when `front` has been read to its end.
local function take(name, count)
  if count <= 0 then return 0 end
  local waiting = call('ZRANGEBYLEX', BY_NAME, '[' .. name .. ' ', '(' .. name .. '!', 'LIMIT', 0, count)
  for i, member in ipairs(waiting) do
    local priority, task = string.match(member, '^%S+ ([123]) (.+)$')
    -- Each begins a line of its own: two entries of one task in one line would end each other's lease.
    local lineage = priority .. ':' .. now_text .. '-' .. text(next_fence + i)
    call('XADD', FRONT, '*', 'task', task .. ' ' .. lineage)
    call('ZREM', BY_NAME, member)
  end
  if #waiting > 0 then read(4, #waiting) end
  return #waiting
end

-- What waits for a name that this worker knows is taken; what waits for one that no worker has asked for in an hour too:
-- the worker that is given it looks whether a live worker knows the name, and ends the task if none does.
local function take_by_name()
  local is_known = {}
  for _, word in ipairs(known) do
    local count, name = string.match(word, '^(%d+) (.+)$')
    is_known[name] = true
    local wanted = math.min(left, tonumber(count))
    if take(name, wanted) < wanted then call('HDEL', NAMES, name)
    -- A worker that knows the name but has no room has asked for it too.
    elseif call('HEXISTS', NAMES, name) == 1 then call('HSET', NAMES, name, now_text) end
  end
  local found = call('HRANDFIELD', NAMES, NAMES_MAX, 'WITHVALUES')
  local names = {}
  for i = 1, #found, 2 do
    local name, since = found[i], tonumber(found[i + 1])
    names[#names + 1] = name
    -- The time stays on record as long again: for the worker that is given these, and for tasks of this name to come.
    local is_overdue = left > 0 and not is_known[name] and now - since >= overdue_ms
    if is_overdue and take(name, left) == 0 and now - since >= 2 * overdue_ms then call('HDEL', NAMES, name) end
  end
  return names
end

-- High before normal before low, but for the share of the lower ones: of the deliveries by priority, which the role
-- counts, every eighth is of low priority, if any waits, and every eighth of normal. So it is the same share with one
-- slot and with a hundred, and however long tasks take.
local function read_by_priority()
  local function due(offset)
    return math.floor((role.served + left + offset) / SHARE) - math.floor((role.served + offset) / SHARE)
  end
  local before, low, normal = left, due(0), due(SHARE / 2)
  local more_low = low == 0 or read(3, low)
  local more_high = left == normal or read(1, left - normal)
  read(2, left)
  if more_high then read(1, left) end
  if more_low then read(3, left) end
  role.served = role.served + before - left
end

local names = {}
if mode == 'recover' then
  for stream = 1, STREAMS do recover(stream) end
elseif budget > 0 and role.paused then
  call('DEL', BELL)  -- a paused role delivers nothing; what it has delivered goes on
else
  if budget > 0 then
    local has_front = call('XLEN', FRONT) > 0
    if now >= role.pause_until then
      for stream = 1, STREAMS do
        if left > 0 and (stream ~= 4 or has_front) then reclaim(stream) end
      end
    end
    if has_front then read(4, left) end
  end
  if call('HLEN', NAMES) > 0 then names = take_by_name() end
  read_by_priority()
  if budget == 0 then
    if #promoted > 0 then ring(#promoted) end
  elseif left > 0 then call('DEL', BELL)
  else ring(1) end
end

if #delivered > 0 then
  call('HSET', META, 'fence', text(next_fence - 1), 'served', text(role.served))
end
local next_due = call('ZRANGE', DELAYED, 0, 0, 'WITHSCORES')[2]
local wait = next_due and math.max(0, tonumber(next_due) - now) or -1
return {text(role.lease), text(wait), delivered, names}
