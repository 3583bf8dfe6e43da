-- The records of a task and of its claim, packed with '|'. Times are epoch ms, '' for none.
-- include: group_state

-- Task: role|priority 1..3|not before|expiry|crash limit|opaque JSON.
local function head_of(task)
  local role, priority, not_before, expiry, limit =
    string.match(task, '^([^|]*)|(%d)|(%d*)|(%d*)|(%d*)|')
  return role, priority, tonumber(not_before), tonumber(expiry), tonumber(limit)
end

local function body_of(task) return string.match(task, '^[^|]*|[^|]*|[^|]*|[^|]*|[^|]*|(.*)$') end

-- Delay and expiry of a task were counted from its submission; they hold from when its group
-- became active.
local function from_start(at) return at and at + group.waited end

-- Claim: state|attempt|fence|worker|lineage|started|crashes|releases|due|role|priority.
-- State: p in progress, c in progress and asked to cancel, s in progress at a worker that was told
-- to stop, r retrying, l released. A fence stays text except where two are compared in size: a Lua
-- number would lose its last digits on the way back.
local function claim_of(record)
  local state, attempt, fence, worker, lineage, started, crashes, releases, due, role, priority =
    string.match(record,
      '^(%a)|(%d+)|(%d+)|([^|]*)|([^|]*)|(%d+)|(%d+)|(%d+)|(%d*)|([^|]*)|(%d)$')
  return {state = state, attempt = tonumber(attempt), fence = fence, worker = worker,
          lineage = lineage, started = started, crashes = tonumber(crashes),
          releases = tonumber(releases), due = due, role = role, priority = priority}
end

local function claim_text(c)
  return table.concat({c.state, c.attempt, c.fence, c.worker, c.lineage, c.started, c.crashes,
                       c.releases, c.due, c.role, c.priority}, '|')
end

local function running(claim)
  return claim and (claim.state == 'p' or claim.state == 'c' or claim.state == 's')
end

-- The issue of a task's current entry. A retry and a release raise it, so the claim refuses every
-- older entry of the task as OUTDATED.
local function issue_of(claim) return claim and claim.attempt + claim.releases or 1 end

-- An error that no handler raised, as JSON. `message` needs no escapes.
local function error_text(message)
  return '{"type":"","message":"' .. message .. '","traceback":""}'
end
