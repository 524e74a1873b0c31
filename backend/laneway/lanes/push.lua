-- Put ids at the end of their lanes, as far as the window and the backlog flag allow.
-- KEYS  for each lane: rq:queue:<lane>, laneway:backlog:<lane>, laneway:bell:<queue>
-- ARGV  window, now (ISO), bell strokes; then for each lane: its name, how many ids, the ids
-- Reply how many ids were taken
local window, now_iso, strokes = tonumber(ARGV[1]), ARGV[2], tonumber(ARGV[3])
local at, taken = 4, 0
for k = 1, #KEYS, 3 do
  local list, backlog, bell = KEYS[k], KEYS[k + 1], KEYS[k + 2]
  local lane, count = ARGV[at], tonumber(ARGV[at + 1])
  local room = 0
  if redis.call('HGET', backlog, 'waiting') ~= '1' then
    room = math.max(0, math.min(count, window - redis.call('LLEN', list)))
  end
  local ids = {}
  for i = 1, room do
    ids[i] = ARGV[at + 1 + i]
    write_job(ids[i], lane, 'queued', now_iso)
  end
  if room > 0 then
    each_part('RPUSH', list, ids)
    redis.call('SADD', 'rq:queues', list)
    ring(bell, room, strokes)
  end
  if room < count then
    redis.call('HSET', backlog, 'waiting', 1)
    redis.call('HINCRBY', backlog, 'refusals', count - room)
  end
  taken = taken + room
  at = at + 2 + count
end
return taken
