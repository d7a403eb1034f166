-- Take what is needed from every bucket, or from none and say when it will be there (reservation.take).
-- KEYS generation, replicas, this replica's record, buckets...
-- ARGV now ('': the server's), known generation, replica, fence, number of this call, numbers whose answers have
--      arrived, who, first (1), sharers ('': the replicas that live), whole (1: with promises), needs...
-- What a call took is recorded until its answer is known to have arrived, so that one whose answer was lost can be
-- undone; a call from before the fence is void.
local fence, call, arrived = tonumber(ARGV[4]), ARGV[5], ARGV[6]
local who, first, sharers, whole = ARGV[7], ARGV[8] == '1', tonumber(ARGV[9]), ARGV[10] == '1'
if tonumber(redis.call('HGET', KEYS[3], 'fence') or '0') > fence then
  return 'void'
end
for number in string.gmatch(arrived, WORDS) do
  redis.call('HDEL', KEYS[3], number)
end
local id, since = generation(KEYS[1], ARGV[2])
local alive = live(KEYS[2])
sharers = sharers or alive
local count = #KEYS - 3
local shapes, buckets = {}, {}
local mine
local returns = false

for i = 1, count do
  local shape = parse(ARGV[10 + i])
  local bucket = load(KEYS[3 + i], shape, since, KEYS[2])
  if shape.back ~= 0 then
    returns = true
    give(shape, bucket, shape.back)
  end
  refill(shape, bucket)
  local alive_promises = {}
  for _, promise in ipairs(bucket.promises) do
    if promise.till > now then
      alive_promises[#alive_promises + 1] = promise
      if not first and who ~= '0' and promise.who == who and (not mine or promise.due < mine.due) then
        mine = promise
      end
    end
  end
  bucket.promises = alive_promises
  shapes[i], buckets[i] = shape, bucket
end

local function is_mine(promise)
  return mine and promise.who == mine.who and promise.due == mine.due
end

local function without_mine(bucket)
  local others = {}
  for _, promise in ipairs(bucket.promises) do
    if not is_mine(promise) then
      others[#others + 1] = promise
    end
  end
  return others
end

local function ahead(promise)
  if not mine then
    return true
  end
  return not is_mine(promise) and (now < mine.due or promise.due < mine.due)
end

local function kept(i)
  local shape, most, promised = shapes[i], 0, 0
  for _, promise in ipairs(buckets[i].promises) do
    if ahead(promise) then
      promised = promised + promise.amount
      local gained = 0
      if shape.rate > 0 and promise.due > now then
        gained = max(0, floor((promise.due - now) * shape.rate / shape.per) - 1)
      end
      most = max(most, promised - gained)
    end
  end
  return most
end

local function promised_ahead(i)
  local sum = 0
  for _, promise in ipairs(buckets[i].promises) do
    if ahead(promise) then
      sum = sum + promise.amount
    end
  end
  return sum
end

-- In its place by time. Slots are promised to nobody.
local function note(i, due)
  local promises, at = without_mine(buckets[i]), 1
  if not shapes[i].slots and shapes[i].amount > 0 then
    for _, other in ipairs(promises) do
      if other.due <= due then
        at = at + 1
      end
    end
    table.insert(promises, at, {due = due, till = due + GRACE, amount = shapes[i].amount, who = who})
  end
  buckets[i].promises = promises
end

local function spare(i)
  if shapes[i].slots then
    return shapes[i].capacity + buckets[i].level
  end
  return buckets[i].level
end

local function answer(status, index, told, promised, amounts)
  if call ~= '' and (amounts or returns) then
    local record = {}
    for i = 1, count do
      record[i] = text(amounts and amounts[i] or 0)
    end
    redis.call('HSET', KEYS[3], call, table.concat(record, ' '))
  end
  local words = {table.concat({status, text(now), id, text(alive), text(index), text(told), promised}, ' ')}
  for i = 1, count do
    save(KEYS[3 + i], shapes[i], buckets[i], since)
    words[#words + 1] = report(amounts and amounts[i] or 0, buckets[i], whole)
  end
  return table.concat(words, '|')
end

local function refuse()
  if mine and now < mine.due then
    for i = 1, count do
      for _, promise in ipairs(buckets[i].promises) do
        if is_mine(promise) then
          return answer('early', i - 1, mine.due - now, '1')
        end
      end
    end
  end
  local longest, index, crowded = -1, 0, false
  for i = 1, count do
    if spare(i) - kept(i) < shapes[i].amount then
      local told = wait(shapes[i], buckets[i], shapes[i].amount + promised_ahead(i))
      if told > longest then
        longest, index = told, i - 1
      end
    end
    crowded = crowded or #buckets[i].promises >= MOST_PROMISES
  end
  if who == '0' or longest > FARTHEST or crowded then
    return answer('short', index, longest, '0')
  end
  for i = 1, count do
    note(i, now + longest)
  end
  return answer('short', index, longest, '1')
end

local free = {}
for i = 1, count do
  free[i] = spare(i) - kept(i)
end
for i = 1, count do
  if free[i] < shapes[i].amount then
    return refuse()
  end
end
local amounts = {}
for i = 1, count do
  local shape, bucket = shapes[i], buckets[i]
  amounts[i] = shape.amount
  if shape.more > 0 then
    local more = min(shape.more, quotient(free[i] - shape.amount, 2 * sharers))
    if more >= shape.amount then
      amounts[i] = amounts[i] + more
    end
  end
  bucket.level = bucket.level - amounts[i]
  if shape.slots then
    bucket.mine = bucket.mine + amounts[i]
  end
  bucket.promises = without_mine(bucket)
end
return answer('taken', 0, 0, '0', amounts)
