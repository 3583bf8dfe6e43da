-- The records of a task and of its claim. store/records.py tells their fields, and makes the
-- functions that read and pack them.
-- include: group_state records.task_fields records.task_json records.claim_of records.claim_text

-- Delay and expiry of a task were counted from its submission; they hold from when its group
-- became active.
local function from_start(at) return at and at + group.waited end

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
