-- Tell the other replicas something, once, and hear what they told since; take, or give up, parts of endpoints.
-- KEYS generation, replicas, this replica's record, messages by number, the last number, endpoints...
-- ARGV now, known generation, replica, fence, number of its message, message ('' none), last number heard ('' none),
--      for each endpoint: "most held in_flight asked wanted"
-- Numbers of messages are microseconds, each later than any that was heard, even after all was forgotten. A message there is no
-- room for is not kept: it is sent again.
-- Of an endpoint nobody is given what another replica that lives holds. What is in flight is held, whoever else holds
-- what: that is there. After all was forgotten nobody is given more than it had, until all have said what that is.
local KEPT, MOST, SETTLED = 3000000, 512, 3000000
local CLAIM, HELD = '^(%d+) (%d+) (%d+) (%d+) (%d+)$', '^(%d+) (%d+)$'
local fence = tonumber(ARGV[4])
if tonumber(redis.call('HGET', KEYS[3], 'fence') or '0') > fence then
  return 'void'
end
local id, since = generation(KEYS[1], ARGV[2])
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

local lives = tonumber(redis.call('ZSCORE', KEYS[2], replica) or '0') > now
local settling = since > 0 and now - since < SETTLED

local function claim(key, words)
  local most, held, busy, asked, wanted = string.match(words, CLAIM)
  most, held, busy, asked = tonumber(most), tonumber(held), tonumber(busy), tonumber(asked)
  local fields = redis.pcall('HGETALL', key)
  if fields.err then
    redis.call('DEL', key)
    fields = {}
  end
  local others, mine, told = 0, nil, {}
  for i = 1, #fields, 2 do
    local holds, wants = string.match(fields[i + 1], HELD)
    if holds and fields[i] == replica then
      mine = tonumber(holds)
    elseif holds and is_alive(fields[i], KEYS[2]) then
      others = others + tonumber(holds)
      told[#told + 1] = string.match(fields[i], '[^-]*$') .. ' ' .. wants
    else
      redis.call('HDEL', key, fields[i])
    end
  end
  local free = most - others
  local granted = mine or max(0, min(held, free))
  if not lives then
    -- Others count nothing of what is held by one that was taken for dead.
    granted = 0
  elseif asked <= granted then
    granted = asked
  elseif not settling then
    granted = max(granted, min(asked, free))
  end
  granted = max(granted, busy)
  redis.call('HSET', key, replica, text(granted) .. ' ' .. wanted)
  redis.call('PEXPIRE', key, DAY)
  return text(granted) .. ' ' .. table.concat(told, ' ')
end

for i = 6, #KEYS do
  lines[#lines + 1] = claim(KEYS[i], ARGV[i + 2])
end
for _, kept in ipairs(redis.call('ZRANGEBYSCORE', KEYS[4], '(' .. text(heard), '+inf')) do
  local teller, message = string.match(kept, '^%d+ (%S+) (.*)$')
  if teller and teller ~= replica then
    lines[#lines + 1] = message
  end
end
return table.concat(lines, '\n')
