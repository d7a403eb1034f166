-- Carry on what was given back or owed, once (reservation.give).
-- KEYS generation, replicas, this replica's record, buckets...
-- ARGV now, known generation, replica, fence, number of this batch, needs... (of which `back` is given)
local id, since = generation(KEYS[1], ARGV[2])
local batch = tonumber(ARGV[5])
local status = 'given'
if tonumber(redis.call('HGET', KEYS[3], 'batch') or '0') >= batch then
  status = 'replayed'
else
  redis.call('HSET', KEYS[3], 'batch', text(batch))
  redis.call('PEXPIRE', KEYS[3], DAY)
end
local words = {table.concat({status, text(now), id, text(live(KEYS[2])), '0', '0', '0'}, ' ')}
for i = 1, #KEYS - 3 do
  local shape = parse(ARGV[5 + i])
  local bucket = load(KEYS[3 + i], shape, since, KEYS[2])
  if status == 'given' then
    give(shape, bucket, shape.back)
    save(KEYS[3 + i], shape, bucket, since)
  else
    refill(shape, bucket)
  end
  words[#words + 1] = report(shape.back, bucket)
end
return table.concat(words, '|')
