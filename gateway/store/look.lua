-- What the buckets hold now; none is changed.
-- KEYS generation, replicas, this replica's record, buckets...
-- ARGV now, known generation, replica, fence, '', needs...
local id, since = generation(KEYS[1], ARGV[2])
local words = {table.concat({'seen', text(now), id, text(live(KEYS[2])), '0', '0', '0'}, ' ')}
for i = 1, #KEYS - 3 do
  local shape = parse(ARGV[5 + i])
  local bucket = load(KEYS[3 + i], shape, since, KEYS[2])
  refill(shape, bucket)
  words[#words + 1] = report(0, bucket, true)
end
return table.concat(words, '|')
