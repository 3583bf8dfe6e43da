-- reissue: make entries of this group again that Redis itself lost. The rule, whose conditions are
-- numbered here, is at the head of maintenance/reissue.py.
-- KEYS: the group's.
-- ARGV: look
--       scan role last_page cursor count CLEAR|DUE tid...
--                               open tasks of the role that its probe did not show (it showed
--                               tid...): a page for each pending one (5), a list of the others
--       orphans (tid fence)...  tasks that are still in progress under this fence (6): a page whose
--                               entry supersedes it; in a closing group the task is cancelled
-- Reply: GONE
--        OK status, then
--          look:     pages in the outbox, number of the last page, open tasks, {role horizon}...
--          scan:     the next cursor, {tid fence worker...} in progress, number of entries written
--          orphans:  number of tasks
--        MOVED status: the group is neither active nor closing (1), or a page was written since the
--        look (4)
-- Repeatable: a second entry of a task is DUPLICATE or OUTDATED at its claim, and orphans compares
-- the fence.
-- include: group_state
local mode = ARGV[1]

if not load_group() then return {'GONE'} end
if mode == 'look' then
  local reply = {'OK', group.status, text(call('ZCARD', OUTBOX)), text(group.pages)}
  reply[#reply + 1] = text(group.pending + group.in_progress)
  local facts = call('HGETALL', META)
  for i = 1, #facts, 2 do
    local role = string.match(facts[i], '^horizon:(.+)$')
    if role then
      reply[#reply + 1] = role
      reply[#reply + 1] = facts[i + 1]
    end
  end
  return reply
end
if group.status ~= 'active' and group.status ~= 'closing' then return {'MOVED', group.status} end

-- include: group_tail
pass_memory_limit()
if mode == 'scan' then
  local role, number, cursor, count = ARGV[2], tonumber(ARGV[3]), ARGV[4], tonumber(ARGV[5])
  -- (4) The probe cannot have shown the entries of a page that is on its way, or that has arrived
  -- since. Pages that this scan writes itself change the number, so only its first call compares.
  if cursor == '0' and (number ~= group.pages or call('ZCARD', OUTBOX) > 0) then
    return {'MOVED', group.status}
  end
  local shown = {}
  for i = 7, #ARGV do shown[ARGV[i]] = true end
  local found = call('HSCAN', TASKS, cursor, 'COUNT', count)
  local running_here, entries = {}, 0
  for i = 1, #found[2], 2 do
    local tid = found[2][i]
    local its_role, priority = task_fields(found[2][i + 1])
    if its_role == role and not shown[tid] then
      local record = call('HGET', CLAIMS, tid)
      local claim = record and claim_of(record)
      if running(claim) then
        running_here[#running_here + 1] = tid
        running_here[#running_here + 1] = claim.fence
        running_here[#running_here + 1] = claim.worker
      -- A task that waits for room in its group has no entry, and has lost none.
      elseif not closed() and call('HEXISTS', NEEDS, tid) == 0
          and not (claim and claim.due == 'room') then
        local _, _, not_before = task_fields(found[2][i + 1])
        local due = claim and tonumber(claim.due) or not claim and from_start(not_before)
        local is_due = not due or due <= now
        if is_due or ARGV[6] == 'CLEAR' then
          enqueue_later(tid, role, priority, issue_of(claim), not is_due and due)
          entries = entries + 1
        end
      end
    end
  end
  tail('reissue', now)
  return {'OK', group.status, found[1], running_here, text(entries)}
end

local count = 0
for i = 2, #ARGV, 2 do
  local tid, fence = ARGV[i], ARGV[i + 1]
  local record = call('HGET', CLAIMS, tid)
  local claim = record and claim_of(record)
  if running(claim) and claim.fence == fence then
    count = count + 1
    if closed() then record_end(tid, 'in_progress', 'cancelled', 'closed', claim.role, claim, 0, '')
    else enqueue_later(tid, claim.role, claim.priority, issue_of(claim), nil, fence) end
  end
end
tail('reissue', now)
return {'OK', group.status, text(count)}
