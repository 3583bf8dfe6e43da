-- reissue: find and put back what Redis itself lost of this group in a role. docs/protocol.md has
-- the rule.
-- KEYS: the group's.
-- ARGV: look
--       scan role pages cursor count CLEAR|DUE tid...
--                               the open tasks of the role, except those that it shows (tid...):
--                               pending ones become pages (DUE: if they are due), those in progress
--                               are listed
--       orphans (tid fence)...  those in progress under this fence: a page that ends that lease; in
--                               a closed group they are cancelled
-- Reply: GONE | OK status, then
--          look:     pages in the outbox, number of the last page, open tasks, then {role horizon}
--          scan:     cursor, {tid fence worker ...}, how many entries became pages
--          orphans:  how many
--        MOVED status: the group is neither active nor closing; scan: a page was written since the
--        look.
-- Repeatable: an entry too many is DUPLICATE or OUTDATED at its claim, and orphans compares the
-- fence.
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
  -- The probe cannot have shown the entries of a page that is on its way, or arrived after it.
  if cursor == '0' and (number ~= group.pages or call('ZCARD', OUTBOX) > 0) then
    return {'MOVED', group.status}
  end
  local shown = {}
  for i = 7, #ARGV do shown[ARGV[i]] = true end
  local found = call('HSCAN', TASKS, cursor, 'COUNT', count)
  local running_here, entries = {}, 0
  for i = 1, #found[2], 2 do
    local tid = found[2][i]
    local its_role, priority = head_of(found[2][i + 1])
    if its_role == role and not shown[tid] then
      local record = call('HGET', CLAIMS, tid)
      local claim = record and claim_of(record)
      if running(claim) then
        running_here[#running_here + 1] = tid
        running_here[#running_here + 1] = claim.fence
        running_here[#running_here + 1] = claim.worker
      elseif not closed() and call('HEXISTS', NEEDS, tid) == 0 then
        local _, _, not_before = head_of(found[2][i + 1])
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
