-- The outbox: what must reach a role or another group. A page is a member of a sorted set whose
-- score is the time (ms) from which any relay may take it.
-- Page: number|role|due|item item ..., with items priority,tid,issue[,fence that it supersedes].
-- Message to a group that depends on this one: number|@|outcome|gid.
-- Internal page, the rest of a walk over dependents: number|#step|position|tid.
-- include: group_state
local PAGE_ITEMS = 100

-- What this call does, gathered until the tail writes it.
local effects = {
  entries = {},      -- 'role|due' -> items to enqueue
  entry_keys = {},   -- the keys of `entries` in the order in which they came up
  pages = {},        -- pages written by this call, handed to its caller
  results = {},      -- tid, record, tid, record ...
  ended = {},        -- tids
  is_ended = {},     -- tid -> its outcome
  walks = {},        -- dependents still to look at: {step, tid, position}
  more = '0',        -- '1': an internal page is left, so the caller calls `outbox` at once
  log = {},          -- ends and changes of tasks, for the event: tid,what,role,wait ms,run ms
  settled = {},      -- goals, for the event: name:status
  tells = false,     -- groups that depend on this one must hear of a goal
}

local function enqueue_later(tid, role, priority, issue, due, supersedes)
  local key = role .. '|' .. (due and text(due) or '')
  local items = effects.entries[key]
  if not items then
    items = {}
    effects.entries[key] = items
    effects.entry_keys[#effects.entry_keys + 1] = key
  end
  local item = priority .. ',' .. tid .. ',' .. issue
  items[#items + 1] = supersedes and item .. ',' .. supersedes or item
end

local function add_page(body, visible)
  group.pages = group.pages + 1
  local page = group.pages .. '|' .. body
  call('ZADD', OUTBOX, text(visible), page)
  return page
end

-- The pages stay hidden from relays until `visible`: the caller of this script, which gets them in
-- its reply, is expected to enqueue them before.
local function write_pages(visible)
  local pages = effects.pages
  for _, key in ipairs(effects.entry_keys) do
    local items = effects.entries[key]
    for first = 1, #items, PAGE_ITEMS do
      local last = math.min(first + PAGE_ITEMS - 1, #items)
      pages[#pages + 1] = add_page(key .. '|' .. table.concat(items, ' ', first, last), visible)
    end
  end
end

-- Removes enqueued pages, and keeps per role the latest entry or due time (ms) they led to: the
-- horizon, up to which a role must be clear before an entry counts as lost.
-- ARGV from `first`: count, then page, role, horizon for each. Returns the position after them.
local function acknowledge_pages(first)
  local count = tonumber(ARGV[first])
  for i = first + 1, first + 3 * count, 3 do
    call('ZREM', OUTBOX, ARGV[i])
    local field, horizon = 'horizon:' .. ARGV[i + 1], tonumber(ARGV[i + 2])
    if horizon > tonumber(call('HGET', META, field) or 0) then
      call('HSET', META, field, text(horizon))
    end
  end
  return first + 3 * count + 1
end
