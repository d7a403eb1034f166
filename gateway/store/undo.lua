-- Give back what calls took whose answers were lost. Sent after the fence was moved: what is not recorded by now was
-- never taken and never will be.
-- KEYS generation, replicas, this replica's record, buckets...
-- ARGV now, known generation, replica, fence, number of the call, needs...
local id, since = generation(KEYS[1], ARGV[2])
local record = redis.call('HGET', KEYS[3], ARGV[5])
if not record then
  return table.concat({'unknown', text(now), id, text(live(KEYS[2])), '0', '0', '0'}, ' ')
end
redis.call('HDEL', KEYS[3], ARGV[5])
local amounts = string.gmatch(record, WORDS)
for i = 1, #KEYS - 3 do
  local shape = parse(ARGV[5 + i])
  local amount = tonumber(amounts())
  local bucket = load(KEYS[3 + i], shape, since, KEYS[2])
  give(shape, bucket, amount)
  save(KEYS[3 + i], shape, bucket, since)
end
return table.concat({'undone', text(now), id, text(live(KEYS[2])), '0', '0', '0'}, ' ')
