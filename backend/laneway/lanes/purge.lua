-- Forget every id of a lane, with its job hash.
-- KEYS  rq:queue:<lane>
-- Reply how many ids the lane held
local ids = redis.call('LRANGE', KEYS[1], 0, -1)
for _, id in ipairs(ids) do redis.call('UNLINK', 'rq:job:' .. id) end
redis.call('DEL', KEYS[1])
return #ids
