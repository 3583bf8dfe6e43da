-- enqueue: hand outbox pages to a role.
-- KEYS: the role's.
-- ARGV: insist (1, or 0: may be refused at maxmemory), then per page: gid, due ms ('' now), items
--       'priority,tid,issue[,[fence it supersedes][,name]] ...'. With a name, the worker that was
--       granted this task cannot run it: it waits by this name for a worker that can.
-- Reply: the horizon, which is the largest entry ms or due ms that any of them got.
-- Repeatable: a repetition only doubles entries, and the claim decides.
-- include: role
if ARGV[1] == '1' then pass_memory_limit() end
local horizon, added = 0, 0
for i = 2, #ARGV, 3 do
  local gid, due = ARGV[i], tonumber(ARGV[i + 1]) or 0
  for priority, tid, issue, rest in string.gmatch(ARGV[i + 2], '([123]),([^, ]+),(%d+)(%S*)') do
    local supersedes, name = string.match(rest, '^,?(%d*),?(.*)$')
    local task = gid .. ' ' .. tid .. ' ' .. issue
    if supersedes ~= '' then task = task .. ' - ' .. supersedes end
    if name ~= '' then
      call('ZADD', BY_NAME, 0, name .. ' ' .. priority .. ' ' .. task)
      call('HSETNX', NAMES, name, now_text)
      horizon = math.max(horizon, now)
      added = added + 1
    elseif due > now then
      call('ZADD', DELAYED, text(due), priority .. ' ' .. task)
      horizon = math.max(horizon, due)
    else
      local id = call('XADD', KEYS[tonumber(priority)], '*', 'task', task)
      horizon = math.max(horizon, tonumber(string.match(id, '^%d+')))
      added = added + 1
    end
  end
end
if added > 0 then ring(added) end
return text(horizon)
