-- Gives out slot numbers that were never given out before, not even by a store that has since lost everything: then it
-- begins anew at a number drawn from the clock, far from those that shards may still use or have in stock.
-- KEYS: the last number given out. ARGV: how many, a number they must be above.
-- Replies the first of them; an error when the 32 bits are used up.
local known = redis.call('GET', KEYS[1])
if not known then
  local time = redis.call('TIME')
  known = (tonumber(time[1]) * 7919 + tonumber(time[2]) * 104729) % 2147483648
end
local last = math.max(tonumber(known), tonumber(ARGV[2]))
local upto = last + tonumber(ARGV[1])
if upto > 4294967295 then
  return redis.error_reply('ERR the slot numbers are used up: begin again under another key prefix')
end
redis.call('SET', KEYS[1], string.format('%.0f', upto))
return last + 1
