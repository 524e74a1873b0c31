-- Take units out of a log again: it turned out that they were not to be charged.
--
-- They come out of the first record that is not older than the call that spent them, which is the one it
-- wrote, or an older one where the clock had been put back. So what stays in the log leaves no earlier than
-- it would have, and no window holds more than the quota. Units that have left the window stay gone.
--
-- KEYS[1]   the log, as sliding_window.lua keeps it
-- ARGV[1]   the moment in us since 1970; '' takes this server's TIME (only tests pass a clock)
-- ARGV[2]   the moment that the spending call replied
-- ARGV[3..] window in us, units
-- reply     1 given back, 0 nothing was there
local HEAD, RECORD = 10, 24

local now = tonumber(ARGV[1])
if not now then
  local time = redis.call('TIME')
  now = tonumber(time[1]) * 1000000 + tonumber(time[2])
end
local spent, window, cost = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local log = redis.call('GET', KEYS[1])
if not log or spent + window <= now then return 0 end

local at = HEAD + 1
while at < #log and tonumber(string.sub(log, at, at + 15)) < spent do at = at + RECORD end
local units = tonumber(string.sub(log, at + 16, at + 23))
if not units or units < cost then return 0 end

local record = ''
if units > cost then
  record = string.sub(log, at, at + 15) .. string.format('%08.0f', units - cost)
end
local records = string.sub(log, HEAD + 1, at - 1) .. record .. string.sub(log, at + RECORD)
if records == '' then
  redis.call('DEL', KEYS[1])
else
  local used = tonumber(string.sub(log, 1, HEAD)) - cost
  redis.call('SET', KEYS[1], string.format('%010.0f', used) .. records, 'KEEPTTL')
end
return 1
