-- release: give entries back, so that another worker gets them at once; or all that a worker held.
-- KEYS: the role's.
-- ARGV: worker, then room entries...     there was no room for them here
--                    leaving entries...  this worker takes nothing more
--                    *                   all of this worker's, after which its consumer is removed
-- Reply: how many were given back, 1 if more are left to give back, and the gids of what was.
-- Repeatable: what is given back is a copy, and the entry itself is gone, so it is never again this
-- worker's. A release that arrives late takes nothing from a worker that got the copy. The copy
-- keeps the lineage, so that a claim of it ends the lease of whatever the original was claimed for.
-- include: role
local RELEASE_MAX = 500
local worker, why = ARGV[1], ARGV[2]

pass_memory_limit()
local given_back, gids, is_listed = 0, {}, {}
local function give_back(stream, id)
  local entry = call('XRANGE', KEYS[stream], id, id)[1]
  if entry and entry[2][1] == 'task' then
    local facts, lineage, supersedes = string.match(entry[2][2], '^(%S+ %S+ %d+) ?(%S*) ?(%d*)$')
    if facts then
      local to = FRONT
      if lineage == '' or lineage == '-' then
        lineage = stream .. ':' .. id
      elseif why == 'room' then
        -- It was given back before. At the front it would go to and fro between full workers.
        to = KEYS[tonumber(string.sub(lineage, 1, 1))]
      end
      local task = facts .. ' ' .. lineage .. (supersedes ~= '' and ' ' .. supersedes or '')
      call('XADD', to, '*', 'task', task)
      given_back = given_back + 1
      local gid = string.match(facts, '^%S+')
      if not is_listed[gid] then
        is_listed[gid] = true
        gids[#gids + 1] = gid
      end
    end
  end
  acknowledge(KEYS[stream], {id})
end

local more = '0'
if why == '*' then
  for stream = 1, STREAMS do
    local entries = pending(KEYS[stream], '-', '+', RELEASE_MAX, worker)
    for _, entry in ipairs(entries) do give_back(stream, entry[1]) end
    -- DELCONSUMER forgets what is still pending, so nothing may be.
    if #entries == RELEASE_MAX then
      more = '1'
    else
      redis.pcall('XGROUP', 'DELCONSUMER', KEYS[stream], GROUP, worker)
    end
  end
else
  for i = 3, #ARGV do
    local stream, id = string.match(ARGV[i], '^([1234]):(.+)$')
    local entry = pending(KEYS[tonumber(stream)], id, id, 1)[1]
    if entry and entry[2] == worker then give_back(tonumber(stream), id) end
  end
end
if given_back > 0 then ring(given_back) end
return {given_back, more, gids}
