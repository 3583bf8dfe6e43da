-- Shared by the scripts of the role slot.
-- KEYS: high normal low delayed meta bell quarantine, all of one role. Entries are named '<1..3>:<stream id>'.
-- An entry has one field, `task`: 'gid tid issue lineage supersedes', the last two left out where there are none. The
-- lineage of a copy is the entry it replaces, whose line of deliveries it continues ('-' for none); `supersedes` is the
-- fence of a lost delivery, whose lease it ends.
local DELAYED, META, BELL, QUARANTINE = KEYS[4], KEYS[5], KEYS[6], KEYS[7]
local GROUP = 'workers'
local BELL_MAX = 64          -- tokens; more idle workers than that wake within their blocking wait
local QUARANTINE_MAX = 1000
local ENTRY_MAX = 256   -- bytes; two ids of 64, and numbers
local UNPACK_MAX = 1000      -- Lua's stack ends at 8,000

-- See group.lua: every writing script must be able to run at maxmemory.
local function drain() call('HDEL', META, '') end

-- One token wakes one idle worker.
local function ring(entries)
  local tokens = math.min(entries, BELL_MAX - call('LLEN', BELL))
  if tokens <= 0 then return end
  local list = {}
  for i = 1, tokens do list[i] = '1' end
  call('RPUSH', BELL, unpack(list))
end

local function split_entry(name)
  local stream, id = string.match(name, '^([123]):(%d+%-%d+)$')
  return KEYS[tonumber(stream)], id
end

-- The consumer group exists from the start of the stream: what was added before the first worker came is delivered.
local function create_group(stream) redis.pcall('XGROUP', 'CREATE', stream, GROUP, '0', 'MKSTREAM') end

-- Pending entries; none if stream or group are missing, which creates them.
local function pending(stream, ...)
  local found = redis.pcall('XPENDING', stream, GROUP, ...)
  if found.err then create_group(stream); return {} end
  return found
end

local function acknowledge(stream, ids)
  local acknowledged = 0
  for first = 1, #ids, UNPACK_MAX do
    local last = math.min(first + UNPACK_MAX - 1, #ids)
    local count = redis.pcall('XACK', stream, GROUP, unpack(ids, first, last))
    call('XDEL', stream, unpack(ids, first, last))
    acknowledged = acknowledged + (type(count) == 'number' and count or 0)
  end
  return acknowledged
end
