-- Show jobs as running, to RQ's registries and to the worker's own list.
-- KEYS  rq:worker:<name>:executions
-- ARGV  now (seconds), now (ISO), the worker's name, lease in seconds; then for each lane: its name, how
--       many ids, the ids
-- Reply nothing
local now, now_iso, worker, lease = tonumber(ARGV[1]), ARGV[2], ARGV[3], tonumber(ARGV[4])
local at, mine = 5, {}
while at < #ARGV do
  local lane, count, entries = ARGV[at], tonumber(ARGV[at + 1]), {}
  for i = at + 2, at + 1 + count do
    local id = ARGV[i]
    local job, run = 'rq:job:' .. id, id .. EXECUTION
    local execution, executions, name = 'rq:execution:' .. run, 'rq:executions:' .. id, string.sub(EXECUTION, 2)
    local status = redis.call('HGET', job, 'status')
    if status ~= 'started' and status ~= 'queued' then
      write_job(id, lane, 'started', now_iso)  -- the worker found it in the database, not in a lane
    end
    redis.call('HSET', job, 'status', 'started', 'worker_name', worker, 'last_heartbeat', now_iso)
    redis.call('HSETNX', job, 'started_at', now_iso)
    redis.call('EXPIRE', job, TAKEN_TTL)
    redis.call('HSETNX', execution, 'created_at', now)
    redis.call('HSET', execution, 'id', name, 'job_id', id, 'worker_name', worker, 'last_heartbeat', now)
    redis.call('EXPIRE', execution, lease)
    redis.call('ZADD', executions, now + lease, name)
    redis.call('EXPIRE', executions, lease)
    entries[#entries + 1] = now + lease
    entries[#entries + 1] = run
    mine[#mine + 1] = run
  end
  each_part('ZADD', 'rq:wip:' .. lane, entries)
  redis.call('SADD', 'rq:queues', 'rq:queue:' .. lane)
  redis.call('ZREMRANGEBYSCORE', 'rq:wip:' .. lane, '-inf', now)
  at = at + 2 + count
end
each_part('SADD', KEYS[1], mine)
redis.call('EXPIRE', KEYS[1], lease)
