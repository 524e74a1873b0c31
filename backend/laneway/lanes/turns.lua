-- Who is next in a lane: tenants take turns (start-time fair queueing; Goyal, Vin, Cheng 1996). Goes after
-- job.lua, before the scripts that put ids in.
--
--   laneway:turns:<lane>   hash   tenant -> the turn of its next id
--   laneway:weights        hash   tenant -> its weight, of those whose weight is not 1
--
-- A lane's list is in the order of the turns, which the job hashes keep: "<turn> <tenant>". The lane's time
-- is the turn of its first id. A tenant's next id gets the later of that and COST / weight after its last.
-- Of two ids with the same turn the one that came first is first.

local COST = 1000000  -- of a job of weight 1; turns are whole numbers
local FORGET_EVERY = 256  -- tenants new to a lane: then those that are no better off for being known go
local FEW = 4  -- so many ids are put in one by one, more in one pass

-- The turn of an id, and its tenant: nil when nobody gave it one.
local function turn_of(id)
  local turn, tenant = string.match(redis.call('HGET', 'rq:job:' .. id, 'turn') or '', '^(%-?%d+) (.*)$')
  return tonumber(turn) or 0, tenant
end

local function turn_at(list, index)
  return (turn_of(redis.call('LINDEX', list, index)))
end

local function shown_turn(turn, tenant)
  return string.format('%.0f %s', turn, tenant)
end

local function set_next(turns, tenant, turn)
  redis.call('HSET', turns, tenant, string.format('%.0f', turn))
end

local function cost_of(tenant)
  return math.floor(COST / (tonumber(redis.call('HGET', 'laneway:weights', tenant)) or 1))
end

-- The lane's time. In a lane that ran empty all tenants begin anew, where the furthest of them got.
local function time_of(list, depth, turns)
  if depth > 0 then return turn_at(list, 0) end
  local furthest = 0
  for _, turn in ipairs(redis.call('HVALS', turns)) do furthest = math.max(furthest, tonumber(turn)) end
  redis.call('DEL', turns)
  return furthest
end

-- The turn of the tenant's next id in a lane whose time is `now`.
local function next_turn(turns, tenant, now)
  local own = tonumber(redis.call('HGET', turns, tenant))
  if own then return math.max(own, now) end
  local known = redis.call('HLEN', turns)
  if known > 0 and known % FORGET_EVERY == 0 then
    local all = redis.call('HGETALL', turns)
    for i = 1, #all, 2 do
      if tonumber(all[i + 1]) <= now then redis.call('HDEL', turns, all[i]) end
    end
  end
  return now
end

-- How many of the lane's ids come before a new one with this turn.
local function place_of(list, depth, turn)
  local low, high = 0, depth
  while low < high do
    local middle = math.floor((low + high) / 2)
    if turn_at(list, middle) <= turn then low = middle + 1 else high = middle end
  end
  return low
end

-- Put ids in where their turns `at` are, which ascend.
local function insert(list, depth, ids, at)
  if depth == 0 or turn_at(list, -1) <= at[1] then
    each_part('RPUSH', list, ids)
    return
  end
  if #ids <= FEW then
    local place = depth
    for i = #ids, 1, -1 do  -- the last one first: those that are in have no turn yet
      place = place_of(list, place, at[i])
      local next = redis.call('LINDEX', list, place)
      if next then
        redis.call('LINSERT', list, 'BEFORE', next, ids[i])
      else
        redis.call('RPUSH', list, ids[i])
      end
    end
    return
  end
  -- Cut the list open where they belong, and move the shorter end out and back.
  local from, to = place_of(list, depth, at[1]), place_of(list, depth, at[#at])
  local merged, i = {}, 1
  for _, id in ipairs(from < to and redis.call('LRANGE', list, from, to - 1) or {}) do
    local turn = turn_of(id)
    while i <= #ids and at[i] < turn do
      merged[#merged + 1] = ids[i]
      i = i + 1
    end
    merged[#merged + 1] = id
  end
  for rest = i, #ids do merged[#merged + 1] = ids[rest] end
  if from <= depth - to then
    local all, backwards = from > 0 and redis.call('LRANGE', list, 0, from - 1) or {}, {}
    for _, id in ipairs(merged) do all[#all + 1] = id end
    for place = #all, 1, -1 do backwards[#backwards + 1] = all[place] end
    redis.call('LTRIM', list, to, -1)
    each_part('LPUSH', list, backwards)
  else
    for _, id in ipairs(to < depth and redis.call('LRANGE', list, to, -1) or {}) do
      merged[#merged + 1] = id
    end
    redis.call('LTRIM', list, 0, from - 1)
    each_part('RPUSH', list, merged)
  end
end

-- The tenant has rows outside the lane, by the `refusals` that were counted when that became so.
local function mark_outside(backlog, tenant, refusals)
  redis.call('HSET', backlog, 'outside:' .. tenant, refusals)
end

-- Let ids in, with turns `at` that ascend, of the tenants `of`; what then is beyond the window goes out.
-- Returns how many got in, and for each tenant of which some did not how many did not.
local function let_in(list, backlog, turns, lane, ids, at, of, window, now_iso)
  local depth = redis.call('LLEN', list)
  insert(list, depth, ids, at)
  local unfit, dropped, outside, entered = {}, {}, {}, 0
  if depth + #ids > window then
    local new = {}
    for i, id in ipairs(ids) do new[id] = i end
    for _, id in ipairs(redis.call('RPOP', list, depth + #ids - window)) do
      local i = new[id]
      if i then
        unfit[of[i]] = (unfit[of[i]] or 0) + 1
        dropped[id] = true
        set_next(turns, of[i], at[i])
      else
        local turn, tenant = turn_of(id)
        outside[#outside + 1] = tenant or ''
        if tenant then set_next(turns, tenant, turn) end
        redis.call('UNLINK', 'rq:job:' .. id)
      end
    end
  end
  if #outside > 0 then
    local refusals = redis.call('HINCRBY', backlog, 'refusals', #outside)
    for _, tenant in ipairs(outside) do mark_outside(backlog, tenant, refusals) end
  end
  for i, id in ipairs(ids) do
    if not dropped[id] then
      write_job(id, lane, 'queued', now_iso, shown_turn(at[i], of[i]))
      entered = entered + 1
    end
  end
  if entered > 0 then redis.call('SADD', 'rq:queues', list) end
  return entered, unfit
end
