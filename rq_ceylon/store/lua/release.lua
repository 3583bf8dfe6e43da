-- release: give unclaimed entries back, so that another worker gets them at once; or all that a dead worker held.
-- KEYS: the role's.
-- ARGV: worker, then entries; or '*' for all of this worker's, after which its consumer is removed.
-- Reply: how many were given back, and 1 if more are left to give back.
-- Repeatable: an entry given back is no longer this worker's. The copy keeps the lineage, so that a claim of it ends the
-- lease of whatever the original was claimed for.
local RELEASE_MAX = 500
local worker = ARGV[1]

drain()
local given_back = 0
local function give_back(stream, id)
  local entry = call('XRANGE', KEYS[stream], id, id)[1]
  if entry and entry[2][1] == 'task' then
    local facts, lineage, supersedes = string.match(entry[2][2], '^(%S+ %S+ %d+) ?(%S*) ?(%d*)$')
    if facts then
      if lineage == '' or lineage == '-' then lineage = stream .. ':' .. id end
      call('XADD', KEYS[stream], '*', 'task', facts .. ' ' .. lineage .. (supersedes ~= '' and ' ' .. supersedes or ''))
      given_back = given_back + 1
    end
  end
  acknowledge(KEYS[stream], {id})
end

local more = '0'
if ARGV[2] == '*' then
  for stream = 1, 3 do
    local entries = pending(KEYS[stream], '-', '+', RELEASE_MAX, worker)
    for _, entry in ipairs(entries) do give_back(stream, entry[1]) end
    -- XGROUP DELCONSUMER forgets what is still pending.
    if #entries == RELEASE_MAX then more = '1' else redis.pcall('XGROUP', 'DELCONSUMER', KEYS[stream], GROUP, worker) end
  end
else
  for i = 2, #ARGV do
    local stream, id = string.match(ARGV[i], '^([123]):(.+)$')
    local entry = pending(KEYS[tonumber(stream)], id, id, 1)[1]
    if entry and entry[2] == worker then give_back(tonumber(stream), id) end
  end
end
if given_back > 0 then ring(given_back) end
return {given_back, more}
