-- depend: groups that start once others have completed. The waiting group keeps the others in
-- `depends_on`; each of the others keeps its `dependents`, and tells them by a message in its
-- outbox when it has finished.
-- KEYS: the group's.
-- ARGV: register gid        this group is to tell that one
--       met gid outcome     that group, on which this one depends, has finished
-- Reply: GONE | OK status outcome | NO status (met: it does not wait for that one, or no longer).
-- Repeatable: register adds once, met removes once.
-- include: group_state
local action, gid, outcome = ARGV[1], ARGV[2], ARGV[3]

local function without(list, name)
  local kept = {}
  for word in string.gmatch(list, '%S+') do
    if word ~= name then kept[#kept + 1] = word end
  end
  return table.concat(kept, ' '), #kept
end

if not load_group() then return {'GONE'} end
-- include: group_tail
pass_memory_limit()
if action == 'register' then
  if group.status ~= 'finished' then
    local list = without(call('HGET', META, 'dependents') or '', gid)
    call('HSET', META, 'dependents', list == '' and gid or list .. ' ' .. gid)
    -- A group that has finished tells nobody any more: this reply says how it ended.
  end
  return {'OK', group.status, group.outcome or ''}
end

local list = call('HGET', META, 'depends_on') or ''
local rest, left = without(list, gid)
if group.status ~= 'waiting' or rest == list then return {'NO', group.status} end
if outcome == 'completed' then
  call('HSET', META, 'depends_on', rest)
  if left > 0 then return {'OK', group.status, ''} end
  group.status = 'active'
  -- Delays and expiries in the tasks' records count from the submission. Whoever reads them adds
  -- this, so that no record has to be written again.
  group.waited = now - tonumber(call('HGET', META, 'touched'))
  start_goals()
else
  group.outcome = 'cancelled'
  local reason = 'group ' .. gid .. ' it depends on is ' .. outcome
  call('HSET', META, 'outcome', 'cancelled', 'reason', reason)
  close('group')
end
tail('depend', now)
return {'OK', group.status, group.outcome or ''}
