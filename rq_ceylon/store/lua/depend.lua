-- depend: groups that start once others have come so far. The waiting group keeps the others in
-- `depends_on`, as gid or gid=when; each of the others keeps its `dependents`, and tells them by a
-- message in its outbox when it has finished or achieved a goal.
-- KEYS: the group's.
-- ARGV: register gid        this group is to tell that one
--       met gid standing    how that group stands, on which this one depends (see standing)
-- Reply: GONE | OK status standing, of met OK status outcome | NO status (met: nothing follows).
-- Repeatable: register adds once, met removes once.
-- include: group_state
local action, gid = ARGV[1], ARGV[2]

if not load_group() then return {'GONE'} end
-- include: group_tail
pass_memory_limit()
if action == 'register' then
  if group.status ~= 'finished' then
    local list = call('HGET', META, 'dependents') or ''
    if not string.find(' ' .. list .. ' ', ' ' .. gid .. ' ', 1, true) then
      call('HSET', META, 'dependents', list == '' and gid or list .. ' ' .. gid)
    end
    -- What has happened before is told by this reply alone.
  end
  return {'OK', group.status, standing()}
end

local outcome, achieved = string.match(ARGV[3], '^([^+]*)'), {}
for goal in string.gmatch(ARGV[3], '%+achieved:([^+]+)') do achieved[goal] = true end

-- Whether this is what a group waits for; nil while it may still come.
local function holds(when)
  local goal = string.match(when, '^achieved:(.+)$')
  if goal and achieved[goal] then return true end
  if outcome == '' then return nil end
  if when == 'finished' then return outcome ~= 'gone' end
  return outcome == when
end

local left, met, missed = {}, false, nil
for entry in string.gmatch(call('HGET', META, 'depends_on') or '', '%S+') do
  local other, when = string.match(entry, '^([^=]+)=?(.*)$')
  if when == '' then when = 'completed' end
  local answer = nil
  if other == gid then answer = holds(when) end
  if answer == nil then left[#left + 1] = entry end
  if answer then met = true end
  if answer == false then missed = when end
end
if group.status ~= 'waiting' or not (met or missed) then return {'NO', group.status} end
if not missed then
  call('HSET', META, 'depends_on', table.concat(left, ' '))
  if #left > 0 then return {'OK', group.status, ''} end
  group.status = 'active'
  -- Delays and expiries in the tasks' records count from the submission. Whoever reads them adds
  -- this, so that no record has to be written again.
  group.waited = now - tonumber(call('HGET', META, 'touched'))
  start_goals()
else
  group.outcome = 'cancelled'
  local reason = 'group ' .. gid .. ' it depends on is ' .. outcome
  if missed ~= 'completed' then reason = reason .. ', not ' .. missed end
  call('HSET', META, 'outcome', 'cancelled', 'reason', reason)
  close('group')
end
tail('depend', now)
return {'OK', group.status, group.outcome or ''}
