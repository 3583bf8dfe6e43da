-- probe: can what was handed to this role up to the horizon still be delivered?
-- KEYS: the role's.
-- ARGV: gid, horizon ms, how many entries of each queue to look at.
-- Reply: BUSY (more are left than were looked at) | CLEAR, or DUE if more are delayed than were looked at, which says
--        nothing of tasks that are not due yet; then the tids of this group that the role shows: not lost.
-- Reads only.
local gid, horizon, count = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local reply = {'CLEAR'}

local function show(task)
  local its_gid, tid = string.match(task, '^(%S+) (%S+)')
  if its_gid == gid then reply[#reply + 1] = tid end
end

for stream = 1, 3 do
  local entries = call('XRANGE', KEYS[stream], '-', '+', 'COUNT', count)
  if #entries == count and tonumber(string.match(entries[count][1], '^%d+')) <= horizon then return {'BUSY'} end
  for _, entry in ipairs(entries) do
    if entry[2][1] == 'task' then show(entry[2][2]) end
  end
end
local due = call('ZRANGEBYSCORE', DELAYED, '-inf', text(horizon), 'LIMIT', 0, count)
if #due == count then
  if call('ZCOUNT', DELAYED, '-inf', now_text) >= count then return {'BUSY'} end
  reply[1] = 'DUE'
end
for _, member in ipairs(due) do show(string.match(member, '^[123] (.+)$') or '') end
return reply
