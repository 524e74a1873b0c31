-- Put back what a lane lost, and let in what waits outside; never an id that is in the lane.
-- KEYS  rq:queue:<lane>, laneway:backlog:<lane>, laneway:bell:<queue>, laneway:turns:<lane>
-- ARGV  window, now (ISO), bell strokes, the lane's name, refusals seen; then for each tenant: its id,
--       complete (1: no other row of it waits), how many ids belong before its first in the lane, how many
--       after its last, and those ids, in order
-- Reply how many ids went in
local list, backlog, bell, turns = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local window, now_iso, strokes = tonumber(ARGV[1]), ARGV[2], tonumber(ARGV[3])
local lane, seen = ARGV[4], tonumber(ARGV[5])
local present, inside, parts, lacking = {}, {}, {}, 0

local function missing(from, count)
  local ids = {}
  for i = from, from + count - 1 do
    local id = ARGV[i]
    if not inside[id] then
      inside[id] = true
      ids[#ids + 1] = id
    end
  end
  return ids
end

local at = 6
while at <= #ARGV do
  local head, tail = tonumber(ARGV[at + 2]), tonumber(ARGV[at + 3])
  if head + tail > 0 and #present == 0 then
    present = redis.call('LRANGE', list, 0, -1)
    for _, id in ipairs(present) do inside[id] = true end
  end
  local part = {tenant = ARGV[at], complete = ARGV[at + 1] == '1'}
  part.head, part.tail = missing(at + 4, head), missing(at + 4 + head, tail)
  if #part.head + #part.tail > 0 then lacking = lacking + 1 end
  parts[#parts + 1] = part
  at = at + 4 + head + tail
end

local added, unfit = 0, {}
if lacking > 0 then
  -- Those before a tenant's first were due before all that is there now: the lane's time goes back for them.
  local now, back = time_of(list, #present, turns), 0
  for _, part in ipairs(parts) do back = math.max(back, #part.head * cost_of(part.tenant)) end
  now = now - back
  local ids, when, of, order = {}, {}, {}, {}
  for _, part in ipairs(parts) do
    local turn, cost = now, cost_of(part.tenant)
    local function line_up(missed)
      for _, id in ipairs(missed) do
        ids[#ids + 1], when[#when + 1], of[#of + 1] = id, turn, part.tenant
        turn = turn + cost
      end
    end
    line_up(part.head)
    turn = math.max(turn, next_turn(turns, part.tenant, now))
    line_up(part.tail)
    if #part.head + #part.tail > 0 then set_next(turns, part.tenant, turn) end
  end
  if lacking > 1 then
    local sorted_ids, sorted_when, sorted_of = {}, {}, {}
    for i = 1, #ids do order[i] = i end
    table.sort(order, function(a, b)
      if when[a] ~= when[b] then return when[a] < when[b] end
      return a < b
    end)
    for i, from in ipairs(order) do
      sorted_ids[i], sorted_when[i], sorted_of[i] = ids[from], when[from], of[from]
    end
    ids, when, of = sorted_ids, sorted_when, sorted_of
  end
  added, unfit = let_in(list, backlog, turns, lane, ids, when, of, window, now_iso)
end
if added > 0 then ring(bell, added, strokes) end
for _, part in ipairs(parts) do
  local known = tonumber(redis.call('HGET', backlog, 'outside:' .. part.tenant))
  if not part.complete or unfit[part.tenant] then
    if not known then mark_outside(backlog, part.tenant, redis.call('HGET', backlog, 'refusals') or 0) end
  elseif known and known <= seen then
    redis.call('HDEL', backlog, 'outside:' .. part.tenant)
  end
end
return added
