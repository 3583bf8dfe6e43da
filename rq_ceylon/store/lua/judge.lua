-- judge: look at the goals again, since a deadline may have passed; and take the verdict of a
-- callable goal.
-- KEYS: the group's.
-- ARGV: goal name ('' to look only), achieved | failed.
-- Reply: GONE | OK status next-deadline-ms | NO status next-deadline-ms (this goal is settled or
--        unknown, or the group is reopening).
-- Repeatable: only an undecided goal can be settled, and only once.
-- include: group_state
local name, status = ARGV[1], ARGV[2]

if not load_group() then return {'GONE'} end
if group.status == 'staging' or group.status == 'finished' then
  return {name == '' and 'OK' or 'NO', group.status, '0'}
end
-- include: group_tail
pass_memory_limit()
if name ~= '' and group.reopening > 0 then
  return {'NO', group.status, text(next_deadline())}
end
if name ~= '' then
  -- A deadline that has passed counts before a verdict that came late.
  judge_goals('deadline')
  local kept, goal = {}, nil
  for line in string.gmatch(group.goals, '[^;]+') do
    local candidate = goal_of(line)
    if candidate.name == name then
      goal = candidate
    else
      kept[#kept + 1] = line
    end
  end
  if not goal then
    tail('judge', now)
    return {'NO', group.status, text(next_deadline())}
  end
  group.goals = table.concat(kept, ';')
  call('HSET', META, 'goals', group.goals)
  settle_goal(goal, status, 'callable')
end
tail('judge', now)
return {'OK', group.status, text(next_deadline())}
