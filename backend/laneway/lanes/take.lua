-- Take ids off the lanes, in the lanes' order, and mark the jobs that waited as started.
-- KEYS  rq:queue:<lane> of each lane, most urgent first
-- ARGV  how many ids, the worker's name, now (ISO)
-- Reply the ids, in order
local room, worker, now_iso = tonumber(ARGV[1]), ARGV[2], ARGV[3]
local taken = {}
for _, list in ipairs(KEYS) do
  if room <= 0 then break end
  for _, id in ipairs(redis.call('LPOP', list, room) or {}) do
    local job = 'rq:job:' .. id
    if redis.call('HGET', job, 'status') == 'queued' then
      redis.call('HSET', job, 'status', 'started', 'worker_name', worker,
        'started_at', now_iso, 'last_heartbeat', now_iso)
      redis.call('EXPIRE', job, TAKEN_TTL)
    end
    taken[#taken + 1] = id
    room = room - 1
  end
end
return taken
