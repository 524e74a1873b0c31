-- Put back what a lane lost, and let in what waits outside; never an id that is in the lane.
-- KEYS  rq:queue:<lane>, laneway:backlog:<lane>, laneway:bell:<queue>
-- ARGV  window, now (ISO), bell strokes, the lane's name, complete (1: no other row waits), refusals seen,
--       how many ids belong before the lane's first; then those ids and the ones after its last, in order
-- Reply how many ids went in
local list, backlog, bell = KEYS[1], KEYS[2], KEYS[3]
local window, now_iso, strokes = tonumber(ARGV[1]), ARGV[2], tonumber(ARGV[3])
local lane, complete, seen, heads = ARGV[4], ARGV[5] == '1', ARGV[6], tonumber(ARGV[7])
local FIRST = 8
local inside, depth = {}, 0
if #ARGV >= FIRST then
  local present = redis.call('LRANGE', list, 0, -1)
  depth = #present
  for _, id in ipairs(present) do inside[id] = true end
end
local head, tail, all_fit = {}, {}, true
for i = FIRST, #ARGV do
  local id = ARGV[i]
  if not inside[id] then
    if depth < window then
      local side = i < FIRST + heads and head or tail
      side[#side + 1] = id
      inside[id] = true
      depth = depth + 1
      write_job(id, lane, 'queued', now_iso)
    else
      all_fit = false
    end
  end
end
local backwards = {}
for i = #head, 1, -1 do backwards[#backwards + 1] = head[i] end
each_part('LPUSH', list, backwards)
each_part('RPUSH', list, tail)
local added = #head + #tail
if added > 0 then
  redis.call('SADD', 'rq:queues', list)
  ring(bell, added, strokes)
end
if not (complete and all_fit) then
  redis.call('HSET', backlog, 'waiting', 1)
elseif (redis.call('HGET', backlog, 'refusals') or '0') == seen then
  redis.call('HDEL', backlog, 'waiting')
end
return added
