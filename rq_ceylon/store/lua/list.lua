-- list: which tasks a group has, and the status of each, without their records.
-- KEYS: the group's.
-- ARGV: tasks | results, cursor, count.
-- Reply: GONE | OK next-cursor, then per task: tid status role.
-- Reads only. A task that ends between two calls may be in both lists, so read `tasks` first: the
-- later word wins.
-- include: group_state
if not load_group() then return {'GONE'} end
local reply = {'OK'}
local function tell(tid, status, role)
  reply[#reply + 1] = tid
  reply[#reply + 1] = status
  reply[#reply + 1] = role
end

if ARGV[1] == 'results' then
  local found = call('HSCAN', RESULTS, ARGV[2], 'COUNT', ARGV[3])
  reply[2] = found[1]
  for i = 1, #found[2], 2 do
    tell(found[2][i], string.match(found[2][i + 1], '^(%a+)|[^|]*|([^|]*)'))
  end
  return reply
end

local found = call('HSCAN', TASKS, ARGV[2], 'COUNT', ARGV[3])
reply[2] = found[1]
for i = 1, #found[2], 2 do
  local tid = found[2][i]
  local role = string.match(found[2][i + 1], '^[^|]+')
  local state = string.match(call('HGET', CLAIMS, tid) or '', '^%a') or ''
  if string.find(state, '[pcs]') then tell(tid, 'in_progress', role)
  elseif closed() then tell(tid, 'cancelled', role)
  elseif call('HEXISTS', NEEDS, tid) == 1 then tell(tid, 'waiting', role)
  else tell(tid, 'pending', role) end
end
return reply
