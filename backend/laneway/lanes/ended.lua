-- Show that runs are over. A job without a hash is left alone: it expired, or never was in a lane.
-- KEYS  rq:worker:<name>, rq:worker:<name>:executions; the name is empty when no worker is to be counted
-- ARGV  now (seconds), now (ISO), most ids of one registry; then for each lane: its name, how many jobs;
--       and for each of its jobs: id, RQ status (queued: only the run is over), when it runs again
--       (seconds), its error as RQ stores it
-- Reply nothing
local now, now_iso, limit = tonumber(ARGV[1]), ARGV[2], tonumber(ARGV[3])
local at, succeeded, broken = 4, 0, 0

-- A registry keeps its newest `limit` ids, so that the mirror's memory has a bound at any rate of jobs.
local function enter(registry, entries, stale_before)
  each_part('ZADD', registry, entries)
  redis.call('ZREMRANGEBYSCORE', registry, '-inf', stale_before)
  local excess = redis.call('ZCARD', registry) - limit
  if excess > 0 then
    for _, id in ipairs(redis.call('ZRANGE', registry, 0, excess - 1)) do
      redis.call('UNLINK', 'rq:job:' .. id, 'rq:results:' .. id)
    end
    redis.call('ZREMRANGEBYRANK', registry, 0, excess - 1)
  end
end

while at < #ARGV do
  local lane, count = ARGV[at], tonumber(ARGV[at + 1])
  local runs, entries = {}, {finished = {}, failed = {}, canceled = {}, scheduled = {}}
  for i = at + 2, at + 1 + 4 * count, 4 do
    local id, status, due, error_text = ARGV[i], ARGV[i + 1], tonumber(ARGV[i + 2]), ARGV[i + 3]
    local job = 'rq:job:' .. id
    runs[#runs + 1] = id .. EXECUTION
    local before = status ~= 'queued' and redis.call('HGET', job, 'status')
    if before then
      if before ~= 'started' and before ~= status then leave_registry(id, before, lane) end
      local ttl, score = RESULT_TTL, now + RESULT_TTL
      if status == 'failed' then
        ttl, score = FAILURE_TTL, now + FAILURE_TTL
      elseif status == 'scheduled' then
        ttl, score = math.ceil(math.max(0, due - now)) + RESULT_TTL, due
      end
      redis.call('HSET', job, 'status', status, 'ended_at', now_iso)
      redis.call('EXPIRE', job, ttl)
      if error_text ~= '' then
        local results = 'rq:results:' .. id
        redis.call('XADD', results, 'MAXLEN', 10, '*', 'type', 2, 'exc_string', error_text)
        redis.call('EXPIRE', results, ttl)
      end
      local entry = entries[status]
      entry[#entry + 1] = score
      entry[#entry + 1] = id
    end
    if status == 'finished' then succeeded = succeeded + 1 end
    if status == 'failed' then broken = broken + 1 end
  end
  -- Only jobs that outlived a tick of mirror_running were ever shown as running.
  if each_part('ZREM', 'rq:wip:' .. lane, runs) > 0 then
    for _, run in ipairs(runs) do
      redis.call('UNLINK', 'rq:execution:' .. run, 'rq:executions:' .. string.sub(run, 1, -#EXECUTION - 1))
    end
    each_part('SREM', KEYS[2], runs)
  end
  for status, of_status in pairs(entries) do
    if #of_status > 0 then
      enter(REGISTRIES[status] .. lane, of_status, status == 'scheduled' and now - RESULT_TTL or now)
    end
  end
  at = at + 2 + 4 * count
end
if succeeded + broken > 0 and redis.call('EXISTS', KEYS[1]) == 1 then
  if succeeded > 0 then redis.call('HINCRBY', KEYS[1], 'successful_job_count', succeeded) end
  if broken > 0 then redis.call('HINCRBY', KEYS[1], 'failed_job_count', broken) end
end
