-- add: put tasks into an open group.
-- KEYS: the group's.
-- ARGV: relay lease ms, then per task: tid, text (as for `submit`), tids that it needs.
-- Reply: GONE | CLOSED status        (the group takes no tasks, or no more)
--        REFUSED name                nothing was added: this task, which one needs, is unknown
--        OK status added pages more  `added` is how many were new
-- Repeatable: a task whose id the group knows is not added, be it open or over. Like `submit`, this
-- is refused at maxmemory, as its first write may allocate.
-- include: group_state
local visible = now + tonumber(ARGV[1])

if not load_group() then return {'GONE'} end
if group.open ~= 'o' and group.open ~= 'i' or closed() then return {'CLOSED', group.status} end
-- include: group_tasks
local here = {}
for i = 2, #ARGV, 3 do
  for need in string.gmatch(ARGV[i + 2], '%S+') do
    if not here[need] and call('HEXISTS', TASKS, need) == 0 and not outcome_of(need) then
      return {'REFUSED', need}
    end
    here[need] = true
  end
  here[ARGV[i]] = true
end

call('HSET', META, 'added', now_text)
note_policy()
local added = 0
for i = 2, #ARGV, 3 do
  if add_task(ARGV[i], ARGV[i + 1], ARGV[i + 2]) then added = added + 1 end
end
write_children()
tail('add', withheld() and now or visible)
return {'OK', group.status, text(added), withheld() and {} or effects.pages, effects.more}
