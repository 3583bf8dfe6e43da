-- Prelude of every script: the server's clock, and numbers as text.
-- Decisions use this clock alone; a client's clock never enters one.
local call = redis.call
local clock = call('TIME')
local now_us = clock[1] * 1000000 + clock[2]
local now = math.floor(now_us / 1000)

-- tostring() turns 16 digits into 1.7e+15.
local function text(number) return string.format('%.0f', number) end
local now_text = text(now)
