-- renew: keep the leases that are still this worker's. Does not write `last`: a worker that renews but does not fetch
-- must not hide that nobody fetches.
-- KEYS: the role's.
-- ARGV: worker, entries.
-- Reply: per entry MINE | OTHER (reclaimed: cancel it here) | ABSENT (acknowledged or lost: go on, the fence decides).
-- Repeatable. Ownership is checked, since XCLAIM would take an entry back from its new owner.
local worker = ARGV[1]

drain()
local replies = {}
for i = 2, #ARGV do
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
