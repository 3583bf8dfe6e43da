-- renew: keep the leases that are still this worker's, and the role's clock, also when nothing is held: handlers that
-- block a worker's loop hold up its fetches, not this.
-- KEYS: the role's.
-- ARGV: worker, lease ms asked for, entries.
-- Reply: lease ms in force, then per entry MINE | OTHER (reclaimed: cancel it here) | ABSENT (acknowledged or lost: go
--        on, the fence decides).
-- Repeatable. Ownership is checked, since XCLAIM would take an entry back from its new owner.
local worker, asked = ARGV[1], tonumber(ARGV[2])

drain()
local replies = {text(keep_clock(asked).lease)}
for i = 3, #ARGV do
  local stream, id = split_entry(ARGV[i])
  local entry = pending(stream, id, id, 1)[1]
  if not entry then replies[#replies + 1] = 'ABSENT'
  elseif entry[2] ~= worker then replies[#replies + 1] = 'OTHER'
  else
    call('XCLAIM', stream, GROUP, worker, 0, id, 'JUSTID')
    replies[#replies + 1] = 'MINE'
  end
end
return replies
