-- foresee: can each goal hold in some outcome of a group that is not submitted yet?
-- KEYS: the group's.
-- ARGV: how many tasks it has, goals (see goal_of), open (as for `submit`).
-- Reply: OK | REFUSED name, the first goal that cannot.
-- Reads and writes nothing. `submit` judges the same when the group is there; but of several groups
-- the first may run by the time that a later one is refused.
-- include: group_goals
group.status, group.open = 'staging', ARGV[3]
for _, name in ipairs(NUMBERS) do group[name] = 0 end
group.total, group.pending = tonumber(ARGV[1]), tonumber(ARGV[1])
for line in string.gmatch(ARGV[2], '[^;]+') do
  local goal = goal_of(line)
  if evaluate(goal.program) == 0 then return {'REFUSED', goal.name} end
end
return {'OK'}
