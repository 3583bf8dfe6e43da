-- renew: keep the leases that are still this worker's. It keeps the role's clock too, even if the
-- worker holds nothing: handlers that block a worker's event loop hold up its fetches, but not
-- this.
-- KEYS: the role's.
-- ARGV: worker, lease ms asked for, entries.
-- Reply: lease ms in force, then per entry
--          MINE     renewed
--          OTHER    reclaimed by another worker: cancel the attempt here
--          ABSENT   acknowledged or lost: go on, the fence decides
-- Repeatable.
-- include: role
local worker, asked = ARGV[1], tonumber(ARGV[2])

pass_memory_limit()
local replies = {text(keep_clock(asked).lease)}
for i = 3, #ARGV do
  local stream, id = split_entry(ARGV[i])
  local entry = pending(stream, id, id, 1)[1]
  if not entry then
    replies[#replies + 1] = 'ABSENT'
  -- XCLAIM would take the entry back from its new owner.
  elseif entry[2] ~= worker then
    replies[#replies + 1] = 'OTHER'
  else
    call('XCLAIM', stream, GROUP, worker, 0, id, 'JUSTID')
    replies[#replies + 1] = 'MINE'
  end
end
return replies
