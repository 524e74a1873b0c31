-- Goes before every other script here: the job hash and the registries as RQ 3.0 keeps them, under RQ's
-- default prefix `rq:` (RQ_KEY_PREFIX is not supported). Keys are computed, so Redis Cluster is not either.
--
--   rq:queue:<lane>             list     ids that wait, next first
--   rq:queues                   set      keys of all lanes ever used
--   rq:job:<id>                 hash     one RQ job
--   rq:wip:<lane>               zset     "<id>:<execution>" of running jobs, by when it expires
--   rq:finished:<lane>, rq:failed:<lane>, rq:canceled:<lane>   zset  ids, by when the hash expires
--   rq:scheduled:<lane>         zset     ids that run again, by when
--   rq:execution:<id>:<execution>   hash     one run
--   rq:executions:<id>          zset     a job's executions
--   rq:worker:<name>            hash     a worker, with its counters
--   rq:worker:<name>:executions set      "<id>:<execution>" of what it runs
--   rq:results:<id>             stream   how runs ended; written for failures only
--   laneway:bell:<queue>        list     strokes that no worker has heard yet
--   laneway:backlog:<lane>      hash     refusals: ids ever refused or put out again; outside:<tenant>: what
--                               refusals was when rows of the tenant came to wait outside the lane

local RESULT_TTL, FAILURE_TTL = 500, 7 * 86400
local TAKEN_TTL = 86400  -- what a worker took and never spoke of again
local EXECUTION = ':laneway'  -- a job runs once at a time, so one name serves all its executions
local REGISTRIES = {
  finished = 'rq:finished:', failed = 'rq:failed:', canceled = 'rq:canceled:', scheduled = 'rq:scheduled:',
}
local PART = 1000  -- arguments of one command; Lua's stack holds about 8,000

-- The sum of what `command key member...` answers, over all members.
local function each_part(command, key, members)
  local sum = 0
  for first = 1, #members, PART do
    sum = sum + redis.call(command, key, unpack(members, first, math.min(first + PART - 1, #members)))
  end
  return sum
end

-- pickle.dumps(('laneway.worker.entry.run', None, (id,), {})), protocol 4, without a frame; not compressed.
local function pickled_call(id)
  return '\128\4(\140\24laneway.worker.entry.runN\140' .. string.char(#id) .. id .. '\133}t.'
end

-- Take the id out of the registry that its hash's status names.
local function leave_registry(id, status, lane)
  if REGISTRIES[status] then
    redis.call('ZREM', REGISTRIES[status] .. lane, id)
  elseif status == 'started' then
    redis.call('ZREM', 'rq:wip:' .. lane, id .. EXECUTION)
  end
end

-- A job hash as if it had never run. Timeouts are Laneway's own: -1 keeps RQ's away. `turn`: see turns.lua.
local function write_job(id, lane, status, now_iso, turn)
  local key = 'rq:job:' .. id
  local before = redis.call('HMGET', key, 'status', 'origin')
  if before[1] then
    leave_registry(id, before[1], before[2] or lane)
    redis.call('DEL', key)
  end
  redis.call('HSET', key, 'status', status, 'data', pickled_call(id), 'origin', lane, 'description', id,
    'created_at', now_iso, 'enqueued_at', now_iso, 'timeout', -1,
    'result_ttl', RESULT_TTL, 'failure_ttl', FAILURE_TTL, 'turn', turn or '')
end

-- One stroke for each new id, as long as the bell holds no more than `strokes`.
local function ring(bell, news, strokes)
  local missing = math.min(news, strokes - redis.call('LLEN', bell))
  local row = {}
  for i = 1, missing do row[i] = 1 end
  if missing > 0 then redis.call('RPUSH', bell, unpack(row)) end
end
