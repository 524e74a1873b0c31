-- Put ids where their tenants' turns are, as far as the window and the rows that wait outside allow.
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
  local room = 0
  if redis.call('HEXISTS', backlog, 'outside:' .. tenant) == 0 then
    local turn = next_turn(turns, tenant, time_of(list, redis.call('LLEN', list), turns))
    local cost, ids, when, of = cost_of(tenant), {}, {}, {}
    for i = 1, count do
      ids[i], when[i], of[i] = ARGV[at + 2 + i], turn, tenant
      turn = turn + cost
    end
    set_next(turns, tenant, turn)
    room = let_in(list, backlog, turns, lane, ids, when, of, window, now_iso)
  end
  if room > 0 then ring(bell, room, strokes) end
  if room < count then
    mark_outside(backlog, tenant, redis.call('HINCRBY', backlog, 'refusals', count - room))
  end
  taken = taken + room
  at = at + 3 + count
end
return taken
