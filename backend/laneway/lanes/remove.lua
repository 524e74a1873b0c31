-- Give tenants back the turns of ids that were taken out of a lane: the last ones, one after the other.
-- KEYS  laneway:turns:<lane>
-- ARGV  the ids
-- Reply nothing
local gone = {}
for _, id in ipairs(ARGV) do
  local turn, tenant = turn_of(id)
  if tenant then gone[#gone + 1] = {turn = turn, tenant = tenant} end
end
table.sort(gone, function(a, b) return a.turn > b.turn end)
for _, entry in ipairs(gone) do
  if entry.turn + cost_of(entry.tenant) == tonumber(redis.call('HGET', KEYS[1], entry.tenant)) then
    set_next(KEYS[1], entry.tenant, entry.turn)
  end
end
