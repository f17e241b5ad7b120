-- Puts and removes records of engines, each unless its engine has been given to somebody with a higher fence.
-- KEYS: the records, the version of the fleet, then per engine the highest fence given out for it.
-- ARGV: per engine its name, the writer's fence, and its record ('': remove it).
-- Replies {the version afterwards, the names refused...}. Versions follow the clock (ms): also after everything was
-- lost they are higher than any before.
local refused, changed = {}, false
for i = 3, #KEYS do
  local arg = (i - 3) * 3
  local name, record = ARGV[arg + 1], ARGV[arg + 3]
  if tonumber(redis.call('GET', KEYS[i]) or '-1') > tonumber(ARGV[arg + 2]) then
    refused[#refused + 1] = name
  elseif record == '' then
    changed = redis.call('HDEL', KEYS[1], name) == 1 or changed
  else
    redis.call('HSET', KEYS[1], name, record)
    changed = true
  end
end
local version = tonumber(redis.call('GET', KEYS[2]) or '0')
if changed then
  local time = redis.call('TIME')
  version = math.max(version + 1, time[1] * 1000 + math.floor(time[2] / 1000))
  redis.call('SET', KEYS[2], string.format('%.0f', version))
end
return {version, unpack(refused)}
