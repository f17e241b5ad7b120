-- One step of the sweep over some blocks of a partition. KEYS: blocks; those to be renewed first, then those to change.
-- ARGV: TTL (s), how many are to be renewed; then for each block to change the value it was seen with and its new one
-- ('': nobody holds it). A block that has changed since is left as it is.
-- Replies the places (in KEYS) of those.
local ttl, renewed, changed = ARGV[1], tonumber(ARGV[2]), {}
for i = 1, renewed do
  redis.call('EXPIRE', KEYS[i], ttl)
end
for i = renewed + 1, #KEYS do
  local arg = 3 + 2 * (i - renewed - 1)
  local old, new = ARGV[arg], ARGV[arg + 1]
  if redis.call('GET', KEYS[i]) ~= old then
    changed[#changed + 1] = i
  elseif new == '' then
    redis.call('DEL', KEYS[i])
  else
    redis.call('SET', KEYS[i], new, 'EX', ttl)
  end
end
return changed
