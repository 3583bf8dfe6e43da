-- fetch: acknowledge, move what is due, reclaim, read. The only script that delivers, so that every
-- delivery has a fence.
-- KEYS: the role's.
-- ARGV: worker, budget, lease ms asked for, mode (read | recover),
--       ms after which a name that no worker knows is overdue,
--       n, n entries that this worker holds (recover mode),
--       n, n names that tasks wait for and this worker knows: 'count name' (how many it takes),
--       then per outcome: outcome, n, n entries to acknowledge, m, m histogram fields and
--       increments.
-- Reply: lease ms in force, ms until the next entry is due (-1: none), then per entry: entry, task,
--        fence; then some of the names that tasks wait for.
-- Not repeatable, since it delivers. After a lost reply call it in recover mode, which delivers the
-- entries that are pending for this worker and that it does not hold. Acknowledgements count once,
-- as XACK says which entries were still pending.
-- include: role
local PROMOTE_MAX = 50
local worker, budget, asked, mode = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4]
local overdue_ms = tonumber(ARGV[5])
local NAMES_MAX = 64   -- in one reply
local SHARE = 8        -- of this many deliveries one is low and one normal, if any wait

pass_memory_limit()
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
  -- Else some were acknowledged by a fetch whose reply was lost, and which counted these already.
  if acknowledged == count then
    for i = position + 1, position + 2 * fields, 2 do
      call('HINCRBY', META, ARGV[i], ARGV[i + 1])
    end
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

-- An entry that this package did not write. Its claim would be refused, with all that are claimed
-- beside it, again and again.
local function is_well_formed(fields)
  if #fields ~= 2 or fields[1] ~= 'task' or #fields[2] > ENTRY_MAX then return false end
  local rest = string.match(fields[2], '^[%w._:-]+ [%w._:-]+ %d+(.*)$')
  if not rest then return false end
  local lineage = string.match(rest, '^ (%S+)$') or string.match(rest, '^ (%S+) %d+$')
  return rest == '' or lineage == '-' or lineage and string.match(lineage, '^[123]:%d+%-%d+$')
end

local function deliver(stream, id, fields)
  local task = fields[2]
  if not is_well_formed(fields) then
    local entry = stream .. ':' .. id
    call('XADD', QUARANTINE, 'MAXLEN', '~', QUARANTINE_MAX, '*', 'entry', entry, unpack(fields))
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
  if entry then
    deliver(stream, id, entry[2])
  else
    acknowledge(KEYS[stream], {id})
  end
end

local function recover(stream)
  for _, entry in ipairs(all_pending(KEYS[stream], worker)) do
    if not held[stream .. ':' .. entry[1]] then
      call('XCLAIM', KEYS[stream], GROUP, worker, 0, entry[1], 'JUSTID')
      deliver_again(stream, entry[1])
    end
  end
end

-- The scan goes on where the last one stopped, as it looks at a few entries a time: those that are
-- renewed must not hide a lost one behind them.
local function reclaim(stream)
  local cursor = role.cursors[stream] or '0-0'
  local found = redis.pcall('XAUTOCLAIM', KEYS[stream], GROUP, worker, role.lease, cursor,
                            'COUNT', left, 'JUSTID')
  if found.err then
    create_group(KEYS[stream])
    return
  end
  for _, id in ipairs(found[2]) do deliver_again(stream, id) end
  if found[1] ~= cursor then call('HSET', META, 'cursor' .. stream, found[1]) end
end

-- Reads up to so many; returns whether there may be more.
local function read(stream, count)
  if count <= 0 then return false end
  local key = KEYS[stream]
  local ask = {'XREADGROUP', 'GROUP', GROUP, worker, 'COUNT', count, 'STREAMS', key, '>'}
  local found = redis.pcall(unpack(ask))
  if found and found.err then
    create_group(key)
    found = call(unpack(ask))
  end
  if not found then return false end
  for _, entry in ipairs(found[1][2]) do deliver(stream, entry[1], entry[2]) end
  return #found[1][2] == count
end

-- Gives this worker up to `count` tasks that wait by their name: they become entries of `front`,
-- which the script reads before any other worker can. To be called only when `front` was read to
-- its end. Returns how many there were.
local function take(name, count)
  if count <= 0 then return 0 end
  -- '!' is the character after the space: the range holds this name, and none that begins with it.
  local waiting = call('ZRANGEBYLEX', BY_NAME,
                       '[' .. name .. ' ', '(' .. name .. '!', 'LIMIT', 0, count)
  for i, member in ipairs(waiting) do
    local priority, task = string.match(member, '^%S+ ([123]) (.+)$')
    -- Each begins a line of its own: of two entries of one task with the same lineage, each
    -- delivery would end the lease of the other.
    local lineage = priority .. ':' .. now_text .. '-' .. text(next_fence + i)
    call('XADD', FRONT, '*', 'task', task .. ' ' .. lineage)
    call('ZREM', BY_NAME, member)
  end
  if #waiting > 0 then read(4, #waiting) end
  return #waiting
end

-- Takes what waits for names that this worker knows, and what waits for a name that no worker has
-- asked for in an hour: the worker that gets it looks whether a live worker knows the name, and
-- ends the task if none does. Returns some of the names that are waited for.
local function take_by_name()
  local is_known = {}
  for _, word in ipairs(known) do
    local count, name = string.match(word, '^(%d+) (.+)$')
    is_known[name] = true
    local wanted = math.min(left, tonumber(count))
    if take(name, wanted) < wanted then
      call('HDEL', NAMES, name)
    -- A worker that knows the name but has no room has asked for it too.
    elseif call('HEXISTS', NAMES, name) == 1 then
      call('HSET', NAMES, name, now_text)
    end
  end
  local found = call('HRANDFIELD', NAMES, NAMES_MAX, 'WITHVALUES')
  local names = {}
  for i = 1, #found, 2 do
    local name, since = found[i], tonumber(found[i + 1])
    names[#names + 1] = name
    -- The time stays on record as long again: the worker that gets these reads it, and later tasks
    -- of this name are overdue at once.
    local is_overdue = left > 0 and not is_known[name] and now - since >= overdue_ms
    if is_overdue and take(name, left) == 0 and now - since >= 2 * overdue_ms then
      call('HDEL', NAMES, name)
    end
  end
  return names
end

-- High before normal before low, but for the share of the lower ones: of every eight deliveries by
-- priority one is low and one normal, if any wait. The role counts these deliveries (`served`), so
-- the shares are the same with one slot and with a hundred, however long tasks take.
local function read_by_priority()
  -- How many of the next `left` deliveries have a number, moved by `offset`, that SHARE divides.
  local function due(offset)
    local from = role.served + offset
    return math.floor((from + left) / SHARE) - math.floor(from / SHARE)
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
    -- What was given back is not held up by the pause: no worker holds it any more.
    if has_front then read(4, left) end
  end
  if call('HLEN', NAMES) > 0 then names = take_by_name() end
  read_by_priority()
  -- Wake another worker for what may be left; and none once there is nothing.
  if budget == 0 then
    if #promoted > 0 then ring(#promoted) end
  elseif left > 0 then
    call('DEL', BELL)
  else
    ring(1)
  end
end

if #delivered > 0 then
  call('HSET', META, 'fence', text(next_fence - 1), 'served', text(role.served))
end
local next_due = call('ZRANGE', DELAYED, 0, 0, 'WITHSCORES')[2]
local wait = next_due and math.max(0, tonumber(next_due) - now) or -1
return {text(role.lease), text(wait), delivered, names}
