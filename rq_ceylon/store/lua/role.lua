-- Shared by the scripts of the role slot.
-- KEYS: high normal low front delayed meta bell quarantine by_name names, all of one role.
-- An entry is named '<1..4>:<stream id>', the number being that of its stream. `front` holds what
-- was delivered before and goes before all else.
-- An entry has one field, `task`: 'gid tid issue lineage supersedes', of which the last two may be
-- left out. The lineage is the entry that this one is a copy of, whose line of deliveries it
-- continues ('-' for none); its first digit is the task's priority. `supersedes` is the fence of a
-- lost delivery, whose lease a claim of this entry ends.
-- `by_name` holds tasks by the name of their function, 'name priority gid tid issue', all with
-- score 0: the worker that was granted them does not know the name, or has no thread or process
-- free for it.
-- `names`: name -> since when (ms) no worker that knows it has asked.
-- include: prelude
local FRONT, DELAYED, META, BELL, QUARANTINE, BY_NAME, NAMES = unpack(KEYS, 4)
local STREAMS = 4            -- of KEYS, the first ones
local GROUP = 'workers'
local BELL_MAX = 64          -- tokens; the other idle workers wake when their wait is over
local QUARANTINE_MAX = 1000
local ENTRY_MAX = 256        -- bytes; two ids of 64, and numbers
local UNPACK_MAX = 1000      -- Lua's stack ends at 8,000

-- As in group_state.lua: at maxmemory Redis refuses a script whose first write may allocate. This
-- write does not, so a script that opens with it can still empty a full server.
local function pass_memory_limit() call('HDEL', META, '') end

-- One token wakes one idle worker.
local function ring(entries)
  local tokens = math.min(entries, BELL_MAX - call('LLEN', BELL))
  if tokens <= 0 then return end
  local list = {}
  for i = 1, tokens do list[i] = '1' end
  call('RPUSH', BELL, unpack(list))
end

local function split_entry(name)
  local stream, id = string.match(name, '^([1234]):(%d+%-%d+)$')
  return KEYS[tonumber(stream)], id
end

-- The consumer group begins at the start of the stream, so that it delivers what was added before
-- the first worker came.
local function create_group(stream)
  redis.pcall('XGROUP', 'CREATE', stream, GROUP, '0', 'MKSTREAM')
end

-- Pending entries; none if stream or group are missing, which creates them.
local function pending(stream, ...)
  local found = redis.pcall('XPENDING', stream, GROUP, ...)
  if found.err then
    create_group(stream)
    return {}
  end
  return found
end

-- All pending entries of a stream, or (with a consumer's name) those of one consumer.
local PENDING_STEP = 1000
local function all_pending(stream, ...)
  local found, from = {}, '-'
  while from do
    local some = pending(stream, from, '+', PENDING_STEP, ...)
    for _, entry in ipairs(some) do found[#found + 1] = entry end
    from = #some == PENDING_STEP and '(' .. some[#some][1]
  end
  return found
end

-- Keeps the role's clock: reads the role's record and notes that a worker was here. Every renewal
-- and every fetch calls it.
-- It notes a gap together with the pause that follows from it. If `last` moved without the pause,
-- the next fetch would take entries from workers that live and could not renew in the gap.
-- `asked`: the lease (ms) to put in force where none is.
local function keep_clock(asked)
  local facts = call('HMGET', META, 'v', 'last', 'pause_until', 'lease', 'fence', 'paused',
                     'served', 'cursor1', 'cursor2', 'cursor3', 'cursor4')
  if facts[1] and facts[1] ~= '1' then
    error('LAYOUT role has layout ' .. facts[1] .. ', this version knows 1')
  end
  local last, lease = tonumber(facts[2] or 0), tonumber(facts[4] or 0)
  local role = {
    pause_until = tonumber(facts[3] or 0), fence = tonumber(facts[5] or 0),
    paused = facts[6] == '1', served = tonumber(facts[7] or 0), cursors = {unpack(facts, 8)},
  }
  local changes = {'last', now_text}
  -- The lease is the role's. It changes only when no worker of the role has been here for as long
  -- as it lasts, so that no worker renews by another lease than the one by which it may be
  -- reclaimed.
  if lease == 0 or now - last > lease then
    if lease ~= asked then
      lease = asked
      for _, word in ipairs({'lease', text(lease), 'v', '1'}) do changes[#changes + 1] = word end
    end
  end
  role.lease = lease
  -- No worker was here for half a lease, or the clock stepped back: reclaim nothing for one lease,
  -- so that every worker that lives can renew first.
  local stepped_back = last > now
  if last == 0 or stepped_back or now - last > lease / 2 then
    role.pause_until = now + lease
    changes[#changes + 1] = 'pause_until'
    changes[#changes + 1] = text(role.pause_until)
  end
  call('HSET', META, unpack(changes))
  if stepped_back then
    -- Redis measures idle times by the wall clock, so after a step back they must start anew.
    for stream = 1, STREAMS do
      for _, entry in ipairs(all_pending(KEYS[stream])) do
        call('XCLAIM', KEYS[stream], GROUP, entry[2], 0, entry[1], 'IDLE', 0, 'JUSTID')
      end
    end
  end
  return role
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
