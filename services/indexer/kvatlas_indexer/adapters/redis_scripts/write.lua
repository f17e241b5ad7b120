-- Writes the present state of some blocks of one engine in one partition, and notes where the engine then stands.
-- KEYS: the engine's state, then the blocks.
-- ARGV: fence, turn, acked, mode, close ('1': the last part), block TTL and state TTL (s), epoch, seq, ts, digest;
--       then per slot: its number (4 bytes), how many of the blocks are its, and a byte of copies for each (0: gone).
-- mode 'normal': the state must be there, trusted, and at `acked` or later; 'next': a further part, right after turn
-- `acked`; 'whole': whatever is there, it is published again. Between the first part and the last the state is `dirty`.
-- A turn is used once and they rise: a write that comes twice, or late, after a later one, changes nothing.
-- Replies {0 done | 1 fenced | 2 behind, the turn the partition is at}.
local state = KEYS[1]
local fence, turn, acked, mode, close = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4], ARGV[5]
local ttl = ARGV[6]

local at = redis.call('HMGET', state, 'fence', 'turn', 'dirty')
local held, stood = tonumber(at[1] or '-1'), tonumber(at[2] or '-1')
if held > fence then
  return {1, stood}
end
if held == fence and stood >= turn then
  return {stood == turn and 0 or 2, stood}
end
if mode == 'normal' and (held < 0 or at[3] or stood < acked) or mode == 'next' and (not at[3] or stood ~= acked) then
  return {2, stood}
end

local find, sub, call = string.find, string.sub, redis.call

-- Where the record of a slot begins in a value, or nil.
local function place(value, slot)
  local found = find(value, slot, 1, true)
  while found and found % 5 ~= 1 do
    found = find(value, slot, found + 1, true)
  end
  return found
end

local first = 2
for arg = 12, #ARGV, 3 do
  local slot, count, copies = ARGV[arg], tonumber(ARGV[arg + 1]), ARGV[arg + 2]
  local values = call('MGET', unpack(KEYS, first, first + count - 1))
  local last, record = nil, nil
  local gone = {}
  for i = 1, count do
    local value, copy = values[i], sub(copies, i, i)
    if copy ~= '\0' then
      if copy ~= last then
        last, record = copy, slot .. copy
      end
      local new = record
      if value and value ~= record then
        local found = place(value, slot)
        new = found and sub(value, 1, found - 1) .. record .. sub(value, found + 5) or value .. record
      end
      call('SET', KEYS[first + i - 1], new, 'EX', ttl)
    elseif value then
      local found = place(value, slot)
      if found and #value == 5 then
        gone[#gone + 1] = KEYS[first + i - 1]
      elseif found then
        call('SET', KEYS[first + i - 1], sub(value, 1, found - 1) .. sub(value, found + 5), 'EX', ttl)
      end
    end
  end
  if #gone > 0 then
    call('DEL', unpack(gone))
  end
  first = first + count
end

if close == '1' then
  call('HSET', state, 'fence', ARGV[1], 'turn', ARGV[2], 'epoch', ARGV[8], 'seq', ARGV[9], 'ts', ARGV[10], 'digest', ARGV[11])
  call('HDEL', state, 'dirty')
else
  call('HSET', state, 'fence', ARGV[1], 'turn', ARGV[2], 'dirty', '1')
end
call('EXPIRE', state, ARGV[7])
return {0, turn}
