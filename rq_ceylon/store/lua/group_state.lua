-- The group of this call: read once at the start, written once by the tail.
-- KEYS: meta tasks claims results needs children outbox events errors parked, all of one group.
-- include: prelude
local META, TASKS, CLAIMS, RESULTS, NEEDS, CHILDREN, OUTBOX, EVENTS, ERRORS, PARKED =
  unpack(KEYS)
local LAYOUT = '1'

-- The numbers of the group; the first of them are the counters that a settled goal keeps.
-- include: records.numbers
local group = {}   -- as this call leaves it
local before = {}  -- as this call found it

-- Reads the group; false if there is none. A script writes nothing for an absent group or for a
-- layout that it does not know.
local function load_group()
  local found = call('HMGET', META, 'v', 'status', 'open', 'dag', 'goals', 'outcome', 'max_running',
                     'lazy', unpack(NUMBERS))
  if not found[2] then return false end
  if found[1] ~= LAYOUT then
    error('LAYOUT group has layout ' .. tostring(found[1]) .. ', this version knows ' .. LAYOUT)
  end
  group.status, group.open, group.dag = found[2], found[3], found[4]
  group.goals, group.outcome = found[5] or '', found[6]
  group.max_running = tonumber(found[7] or math.huge)
  group.is_lazy = found[8] == '1'
  for i, name in ipairs(NUMBERS) do
    group[name] = tonumber(found[8 + i] or 0)
    before[name] = group[name]
  end
  before.status = group.status
  return true
end

-- At maxmemory Redis refuses a script at its first write, if that write may allocate, and lets it
-- finish otherwise. So every script except `submit` makes this write first: a full server can
-- still work off what it holds.
local function pass_memory_limit() call('HDEL', META, '') end

local function closed() return group.status == 'closing' or group.status == 'finished' end

-- The outbox keeps its pages while the group is incomplete, waits for other groups or is paused.
local function withheld()
  return group.status == 'staging' or group.status == 'waiting' or group.status == 'paused'
end

local function move(from, to)
  group[from] = group[from] - 1
  group[to] = group[to] + 1
end
