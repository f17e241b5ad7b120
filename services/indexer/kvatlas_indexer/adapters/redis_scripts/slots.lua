-- Gives out slot numbers that were never given out before, not even by a store that has since lost everything: they
-- follow the clock, four for each second since 2025.
-- KEYS: the last number given out. ARGV: how many, a number they must be above.
-- Replies the first of them; an error when the 32 bits are used up (in 2059, or after four thousand million slots).
local elapsed = tonumber(redis.call('TIME')[1]) - 1735689600
local last = math.max(tonumber(redis.call('GET', KEYS[1]) or '0'), tonumber(ARGV[2]), elapsed * 4)
local upto = last + tonumber(ARGV[1])
if upto > 4294967295 then
  return redis.error_reply('ERR the slot numbers are used up: begin again under another key prefix')
end
redis.call('SET', KEYS[1], string.format('%.0f', upto))
return last + 1
