-- May `cost` more units happen now under every rule at once? All rules are charged, or none is. A shadow
-- rule only watches: it never refuses, and is charged for what it would have let pass.
--
-- A weighted log of a sliding window. A unit spent at t counts in [t, t + window); at t + window it is
-- free again. Stamps are rounded up to the rule's grain, so a log holds at most window / grain + 1
-- records, no window ever holds more than the quota, and a unit comes back at most one grain late.
--
-- KEYS[1..]   one log per rule, all in one hash slot
-- ARGV[1]     the moment in us since 1970; '' takes this server's TIME (only tests pass a clock)
-- ARGV[2]     1 spends; 0 says what would be, and spends nothing
-- ARGV[3..]   per rule: quota, window in us, grain in us, cost (0 looks), shadow (1 or 0)
-- reply       allowed (1 or 0), the moment in us, then per rule:
--               used   units counted in the window, with this call's when they were spent
--               reset  us until the oldest counted unit leaves; 0 when none is counted
--               retry  us until this call would pass the rule; 0 passes now, -1 never (cost > quota)
-- value       10 digits: the units in the log. Then 24 per record, oldest first: 16 digits stamp in us,
--             8 digits units. Text, since servers that stand in for Redis lack `struct`.
-- expiry      set by every write: when the newest record leaves the window
local HEAD, RECORD = 10, 24

local function stamp_at(log, at) return tonumber(string.sub(log, at, at + 15)) end
local function units_at(log, at) return tonumber(string.sub(log, at + 16, at + 23)) end

local now = tonumber(ARGV[1])
if not now then
  local time = redis.call('TIME')
  now = tonumber(time[1]) * 1000000 + tonumber(time[2])
end

local function write(key, log, us_to_live)
  redis.call('SET', key, log, 'PX', string.format('%.0f', math.ceil(us_to_live / 1000)))
end

local allowed, rules = 1, {}
for i = 1, #KEYS do
  local a = 5 * i - 2
  local quota, window, cost = tonumber(ARGV[a]), tonumber(ARGV[a + 1]), tonumber(ARGV[a + 3])
  local log = redis.call('GET', KEYS[i])
  local used, first, size = 0, HEAD + 1, HEAD
  if log then
    used, size = tonumber(string.sub(log, 1, HEAD)), #log
    if stamp_at(log, size - RECORD + 1) > now + 2 * window then
      -- The clock went back. Count everything as spent now, and keep that even when refusing: else
      -- the key would refuse until the clock has caught up.
      log = string.format('%010.0f%016.0f%08.0f', used, now, used)
      size = #log
      write(KEYS[i], log, window)
    end
    while first <= size and stamp_at(log, first) + window <= now do
      used = used - units_at(log, first)
      first = first + RECORD
    end
  end
  local retry = 0
  if cost > quota then
    retry = -1
  elseif used + cost > quota then
    local excess, at = used + cost - quota, first
    while excess > 0 do
      excess = excess - units_at(log, at)
      retry = stamp_at(log, at) + window - now
      at = at + RECORD
    end
  end
  if retry ~= 0 and ARGV[a + 4] ~= '1' then allowed = 0 end
  rules[i] = {log, first, size, used, retry}
end

local reply, spend = {allowed, now}, allowed == 1 and ARGV[2] == '1'
for i = 1, #KEYS do
  local a = 5 * i - 2
  local window, grain, cost = tonumber(ARGV[a + 1]), tonumber(ARGV[a + 2]), tonumber(ARGV[a + 3])
  local log, first, size, used, retry = unpack(rules[i])
  local oldest = first <= size and stamp_at(log, first)
  if spend and cost > 0 and retry == 0 then
    local stamp, units, kept = math.ceil(now / grain) * grain, cost, size
    if oldest then
      local last = size - RECORD + 1
      if stamp_at(log, last) >= stamp then
        stamp, units, kept = stamp_at(log, last), units + units_at(log, last), size - RECORD
      end
    end
    used = used + cost
    write(KEYS[i], string.format('%010.0f', used) .. (oldest and string.sub(log, first, kept) or '')
      .. string.format('%016.0f%08.0f', stamp, units), stamp + window - now)
    oldest = oldest or stamp
  end
  reply[#reply + 1] = used
  reply[#reply + 1] = oldest and oldest + window - now or 0
  reply[#reply + 1] = retry
end
return reply
