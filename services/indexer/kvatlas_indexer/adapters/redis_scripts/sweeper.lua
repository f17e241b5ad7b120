-- There is one sweeper at a time. Becomes or stays it, notes how far the sweep is, and says so.
-- KEYS: the lock, how far the sweep is. ARGV: who asks, how long it stays the sweeper (ms), then fields to be set.
-- Replies false when somebody else sweeps; otherwise Redis's time (s), and all fields.
local held = redis.call('GET', KEYS[1])
if held and held ~= ARGV[1] then
  return false
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
if #ARGV > 2 then
  redis.call('HSET', KEYS[2], unpack(ARGV, 3))
end
return {redis.call('TIME')[1], redis.call('HGETALL', KEYS[2])}
