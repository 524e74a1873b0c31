-- Put ids back at the head of their lanes, as far as the window allows: they have had their turns, and were
-- kept from running when these came.
-- KEYS  for each lane and tenant: rq:queue:<lane>, laneway:backlog:<lane>, laneway:bell:<queue>,
--       laneway:turns:<lane>
-- ARGV  window, now (ISO), bell strokes; then for each lane and tenant: the lane's name, the tenant, how
--       many ids, the ids
-- Reply how many ids were taken
local window, now_iso, strokes = tonumber(ARGV[1]), ARGV[2], tonumber(ARGV[3])
local at, taken = 4, 0
for k = 1, #KEYS, 4 do
  local list, backlog, bell, turns = KEYS[k], KEYS[k + 1], KEYS[k + 2], KEYS[k + 3]
  local lane, tenant, count = ARGV[at], ARGV[at + 1], tonumber(ARGV[at + 2])
  local depth = redis.call('LLEN', list)
  local room = math.max(0, math.min(count, window - depth))
  local cost, ids = cost_of(tenant), {}
  local now = time_of(list, depth, turns)
  for i = 1, room do  -- the last one first
    ids[i] = ARGV[at + 3 + room - i]
    write_job(ids[i], lane, 'queued', now_iso, shown_turn(now - i * cost, tenant))
  end
  if room > 0 then
    each_part('LPUSH', list, ids)
    redis.call('SADD', 'rq:queues', list)
    ring(bell, room, strokes)
  end
  if room < count then
    mark_outside(backlog, tenant, redis.call('HINCRBY', backlog, 'refusals', count - room))
  end
  taken = taken + room
  at = at + 3 + count
end
return taken
