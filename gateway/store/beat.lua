-- A replica says that it lives and how many slots it holds; with a higher fence, that its older calls are void: this
-- one, too, if it comes late.
-- KEYS generation, replicas, this replica's record, buckets of slots...
-- ARGV now, known generation, replica, fence, lifetime in microseconds (0: it leaves), needs... (`amount` is held)
local fence = tonumber(redis.call('HGET', KEYS[3], 'fence') or '0')
if fence > tonumber(ARGV[4]) then
  return 'void'
end
local id, since = generation(KEYS[1], ARGV[2])
local lifetime = tonumber(ARGV[5])
local before = tonumber(redis.call('ZSCORE', KEYS[2], replica) or '0')
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', text(now - 60 * 1000000))
if lifetime > 0 then
  redis.call('ZADD', KEYS[2], text(now + lifetime), replica)
  redis.call('PEXPIRE', KEYS[2], DAY)
else
  redis.call('ZREM', KEYS[2], replica)
end
if fence < tonumber(ARGV[4]) then
  redis.call('HSET', KEYS[3], 'fence', ARGV[4])
end
redis.call('PEXPIRE', KEYS[3], DAY)
for i = 1, #KEYS - 3 do
  local shape = parse(ARGV[5 + i])
  local bucket = load(KEYS[3 + i], shape, since, KEYS[2])
  bucket.mine = shape.amount
  save(KEYS[3 + i], shape, bucket, since)
end
local status = before > now and 'known' or 'new'
return table.concat({status, text(now), id, text(live(KEYS[2])), '0', '0', '0'}, ' ')
