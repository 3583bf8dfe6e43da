-- outbox: hand out visible pages, take acknowledgements, work off internal pages.
-- KEYS: the group's.
-- ARGV: pages wanted; again (1: hidden ones too, since the answer that had them is lost; or 0);
--       relay lease ms; page acknowledgements (see acknowledge_pages).
-- Reply: GONE | OK status next-deadline-ms pages more. No pages while the group withholds them. Of
--        a closed group only messages to other groups are left.
-- Repeatable: acknowledgements are removals; a page that was handed out is hidden for one relay
-- lease, and visible again unless it is acknowledged.
-- include: group_state
local wanted, relay_lease = tonumber(ARGV[1]), tonumber(ARGV[3])
local latest = ARGV[2] == '1' and '+inf' or now_text

if not load_group() then return {'GONE'} end
-- include: group_tail
pass_memory_limit()
acknowledge_pages(4)
if withheld() then return {'OK', group.status, text(next_deadline()), {}, '0'} end
local got = {}
if wanted > 0 then
  for _, page in ipairs(call('ZRANGEBYSCORE', OUTBOX, '-inf', latest, 'LIMIT', 0, wanted)) do
    local step, position, tid = string.match(page, '^%d+|#(%a+)|(%d+)|(.+)$')
    if step then
      -- An internal page: go on where one call was too short for all dependents of a task.
      call('ZREM', OUTBOX, page)
      effects.walks[#effects.walks + 1] = {step, tid, tonumber(position)}
    else
      call('ZADD', OUTBOX, text(now + relay_lease), page)
      got[#got + 1] = page
    end
  end
  -- A lazy group may have waited long enough for what hangs.
  if #effects.walks > 0 or group.is_lazy then tail('outbox', now + relay_lease) end
  for _, page in ipairs(effects.pages) do got[#got + 1] = page end
end
return {'OK', group.status, text(next_deadline()), got, effects.more}
