-- probe: which tasks of a group have an entry in this role, up to the group's horizon? It is
-- condition 3 of the rule at the head of maintenance/reissue.py.
-- KEYS: the role's.
-- ARGV: gid, horizon ms, how many entries of each queue to look at, then where to begin: '' at the
--       first call, then what the last reply said.
-- Reply: a word, where to begin the next call, then tids of this group that have an entry.
--          BUSY    too many entries wait to be delivered; they move on by themselves: ask later
--          MORE    call again, and begin where this says
--          CLEAR   there are no others up to the horizon
--          DUE     there are no others that are due; more are delayed than were looked at
-- Reads only. Delivered entries are read to the end, call by call: a task that runs for long must
-- not hide what is lost behind it.
-- include: role
local gid, horizon, count = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local word, shown = 'CLEAR', {}

local function show(task)
  local its_gid, tid = string.match(task, '^(%S+) (%S+)')
  if its_gid == gid then shown[#shown + 1] = tid end
end

-- Per queue what was looked at last: an entry id of each stream, a member of `by_name`, and whether
-- `delayed` was looked at; '-' nothing yet, '' all.
local seen = {'-', '-', '-', '-', '-', '-'}
if ARGV[4] ~= '' then
  seen = {string.match(ARGV[4], '^([^|]*)|([^|]*)|([^|]*)|([^|]*)|([^|]*)|([^|]*)$')}
end

-- Up to which entry a stream was delivered.
local function delivered_up_to(stream)
  for _, facts in ipairs(call('XINFO', 'GROUPS', KEYS[stream])) do
    local of = {}
    for i = 1, #facts, 2 do of[facts[i]] = facts[i + 1] end
    if of.name == GROUP then return of['last-delivered-id'] end
  end
  return '0-0'
end

local function is_later(id, than)
  local ms, number = string.match(id, '^(%d+)-(%d+)$')
  local than_ms, than_number = string.match(than, '^(%d+)-(%d+)$')
  if ms ~= than_ms then return tonumber(ms) > tonumber(than_ms) end
  return tonumber(number) > tonumber(than_number)
end

for stream = 1, STREAMS do
  if seen[stream] ~= '' then
    local from = seen[stream] == '-' and '-' or '(' .. seen[stream]
    local entries = call('XRANGE', KEYS[stream], from, '+', 'COUNT', count)
    for _, entry in ipairs(entries) do
      if entry[2][1] == 'task' then show(entry[2][2]) end
    end
    local last = #entries == count and entries[count][1]
    seen[stream] = ''
    if last and tonumber(string.match(last, '^%d+')) <= horizon then
      if is_later(last, delivered_up_to(stream)) then return {'BUSY', ''} end
      seen[stream] = last
      word = 'MORE'
    end
  end
end

if seen[5] ~= '' then
  local from = seen[5] == '-' and '-' or '(' .. seen[5]
  local members = call('ZRANGEBYLEX', BY_NAME, from, '+', 'LIMIT', 0, count)
  for _, member in ipairs(members) do show(string.match(member, '^%S+ [123] (.+)$') or '') end
  seen[5] = ''
  if #members == count then
    seen[5] = members[count]
    word = 'MORE'
  end
end

if seen[6] == '-' then
  local due = call('ZRANGEBYSCORE', DELAYED, '-inf', text(horizon), 'LIMIT', 0, count)
  seen[6] = ''
  if #due == count then
    if call('ZCOUNT', DELAYED, '-inf', now_text) >= count then return {'BUSY', ''} end
    seen[6] = 'due'
  end
  for _, member in ipairs(due) do show(string.match(member, '^[123] (.+)$') or '') end
end

if word == 'CLEAR' and seen[6] == 'due' then word = 'DUE' end
return {word, table.concat(seen, '|'), unpack(shown)}
