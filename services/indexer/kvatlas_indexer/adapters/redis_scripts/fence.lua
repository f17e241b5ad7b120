-- Raises the fence of an engine in one partition, and says where the partition stands.
-- KEYS: the engine's state. ARGV: fence, TTL (s).
-- Replies {0 raised | 1 there is a higher one, turn, dirty, epoch, seq, ts, digest}; what is not there is false.
local at = redis.call('HMGET', KEYS[1], 'fence', 'turn', 'dirty', 'epoch', 'seq', 'ts', 'digest')
local held = at[1] and tonumber(at[1])
if held and held > tonumber(ARGV[1]) then
  return {1}
end
if held then
  redis.call('HSET', KEYS[1], 'fence', ARGV[1])
else
  -- Nothing of it is here: not to be trusted until all of it has been published.
  redis.call('HSET', KEYS[1], 'fence', ARGV[1], 'turn', '0', 'dirty', '1')
end
redis.call('EXPIRE', KEYS[1], ARGV[2])
return {0, at[2], at[3], at[4], at[5], at[6], at[7]}
