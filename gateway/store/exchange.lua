-- Tell the other replicas something, once, and hear what they told since.
-- KEYS generation, replicas, this replica's record, messages by number, the last number
-- ARGV now, known generation, replica, fence, number of its message, message ('' none), last number heard ('' none)
-- Numbers are microseconds, each later than any that was heard, even after all was forgotten. A message there is no
-- room for is not kept: it is sent again.
local KEPT, MOST = 3000000, 512
local fence = tonumber(ARGV[4])
if tonumber(redis.call('HGET', KEYS[3], 'fence') or '0') > fence then
  return 'void'
end
local id = generation(KEYS[1], ARGV[2])
local found = redis.pcall('GET', KEYS[5])
local last = type(found) == 'string' and tonumber(found) or 0
local gone = redis.pcall('ZREMRANGEBYSCORE', KEYS[4], '-inf', text(now - KEPT))
if type(gone) == 'table' then
  redis.call('DEL', KEYS[4])
elseif last > now + STEP then
  -- The clock was set back: what was told until then would be kept until it is as late again.
  redis.call('ZREMRANGEBYSCORE', KEYS[4], '-inf', '+inf')
  last = 0
end
local heard = tonumber(ARGV[7])
local away = '0'
if not heard or heard > max(last, now) then
  heard = max(last, now)
elseif heard < now - KEPT then
  away = '1'
end
last = max(last, now)

local status = 'kept'
if ARGV[6] ~= '' and tonumber(redis.call('HGET', KEYS[3], 'told') or '0') < tonumber(ARGV[5]) then
  if redis.call('ZCOUNT', KEYS[4], '-inf', '+inf') < MOST then
    last = last + 1
    redis.call('ZADD', KEYS[4], text(last), text(last) .. ' ' .. replica .. ' ' .. ARGV[6])
    redis.call('PEXPIRE', KEYS[4], text(KEPT / 1000))
    redis.call('HSET', KEYS[3], 'told', ARGV[5])
    redis.call('PEXPIRE', KEYS[3], DAY)
  else
    status = 'full'
  end
end
redis.call('SET', KEYS[5], text(last), 'PX', DAY)

local lines = {table.concat({status, text(now), id, text(live(KEYS[2])), '0', '0', '0'}, ' '), text(last) .. ' ' .. away}
for _, kept in ipairs(redis.call('ZRANGEBYSCORE', KEYS[4], '(' .. text(heard), '+inf')) do
  local teller, message = string.match(kept, '^%d+ (%S+) (.*)$')
  if teller and teller ~= replica then
    lines[#lines + 1] = message
  end
end
return table.concat(lines, '\n')
