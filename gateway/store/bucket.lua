-- The arithmetic of gateway/policy/token_bucket.py and reservation.py, step by step the same; tests/store compares.
-- Rule 1: whole numbers below 2^53 in doubles, quotients by fmod (exact), written with %.0f.
-- Rule 2: a rate's bucket is one string, "level at part epoch" and four words a promise. One of slots is a hash: what
--         each replica holds, counted while that replica lives, and the promises.
-- Rule 3: a key expires when a bucket nobody has drawn on would be the same.
-- Rule 4: a key that holds anything else is as good as none: an error would keep all that travels with it for ever.
local NEVER, LARGEST, GRACE, FARTHEST, MOST_PROMISES = 9007199254740992, 4503599627370496, 2000000, 60000000, 256
local STEP = 60000000
local DAY = 86400000
local WORDS, STATE, PROMISE = '%S+', '^(-?%d+) (%d+) (%d+) (%d+)(.*)$', '(%d+) (%d+) (%d+) (%d+)'
local floor, fmod, min, max = math.floor, math.fmod, math.min, math.max
local injected = ARGV[1] ~= ''
local replica = ARGV[3]
local now
if injected then
  now = tonumber(ARGV[1])
else
  local time = redis.call('TIME')
  now = tonumber(time[1]) * 1000000 + tonumber(time[2])
end

local function text(number)
  return string.format('%.0f', number)
end

local function quotient(a, b)
  return (a - fmod(a, b)) / b
end

-- Which generation of buckets this is, and since when what is missing is empty (0: what is missing is full). A store
-- that has forgotten a generation somebody knows has lost what it held.
local function generation(key, known)
  local found = redis.pcall('GET', key)
  local id, since
  if found then
    id, since = string.match(type(found) == 'string' and found or '', '^(%d+) (%d+)$')
  end
  if id then
    if known == '' or known == id or since ~= '0' then
      return id, tonumber(since)
    end
  end
  id, since = text(now), known == '' and 0 or now
  redis.call('SET', key, id .. ' ' .. text(since))
  return id, since
end

local living
local function is_alive(name, replicas)
  if not living then
    living = {}
    for _, one in ipairs(redis.call('ZRANGEBYSCORE', replicas, '(' .. text(now), '+inf')) do
      living[one] = true
    end
    living[replica] = true
  end
  return living[name]
end

local function live(replicas)
  return max(1, redis.call('ZCOUNT', replicas, '(' .. text(now), '+inf'))
end

-- "capacity rate per starts ends slots amount more back"
local function parse(words)
  local next_word = string.gmatch(words, WORDS)
  local function number()
    return tonumber(next_word())
  end
  return {
    capacity = number(), rate = number(), per = number(), starts = number(), ends = number(), slots = number() == 1,
    amount = number(), more = number(), back = number(),
  }
end

local function read_promises(words)
  local promises = {}
  for due, till, amount, who in string.gmatch(words, PROMISE) do
    promises[#promises + 1] = {due = tonumber(due), till = tonumber(till), amount = tonumber(amount), who = who}
  end
  return promises
end

local function write_promises(promises)
  local words = {}
  for _, promise in ipairs(promises) do
    words[#words + 1] = text(promise.due) .. ' ' .. text(promise.till) .. ' ' .. text(promise.amount) .. ' ' .. promise.who
  end
  return table.concat(words, ' ')
end

local function period(shape, at)
  if shape.ends > 0 and at >= shape.ends then
    return shape.ends
  end
  return shape.starts
end

local function refill(shape, bucket)
  if shape.slots then
    return
  end
  local begins = period(shape, now)
  if begins > bucket.epoch then
    bucket.level, bucket.part, bucket.epoch = shape.capacity + min(bucket.level, 0), 0, begins
  end
  local elapsed = now - bucket.at
  if elapsed <= 0 then
    if elapsed < -STEP then
      bucket.at, bucket.promises = now, {}
    end
    return
  end
  if shape.rate > 0 and bucket.level < shape.capacity then
    local rest = fmod(elapsed, shape.per)
    local whole = (elapsed - rest) / shape.per
    if whole > quotient(shape.capacity - bucket.level, shape.rate) then
      bucket.level, bucket.part = shape.capacity, 0
    else
      local odd = fmod(shape.rate, shape.per)
      local grown = rest * odd + bucket.part
      bucket.part = fmod(grown, shape.per)
      bucket.level = bucket.level + whole * shape.rate + rest * ((shape.rate - odd) / shape.per)
        + (grown - bucket.part) / shape.per
    end
  end
  if bucket.level >= shape.capacity then
    bucket.level, bucket.part = shape.capacity, 0
  end
  bucket.at = now
end

local function fresh(shape, since)
  local epoch = period(shape, now)
  if shape.slots then
    return {level = 0, at = now, part = 0, epoch = 0, promises = {}, mine = 0}
  end
  if since > 0 then
    since = min(since, now)
    local bucket = {level = 0, at = since, part = 0, epoch = since < epoch and 0 or epoch, promises = {}}
    refill(shape, bucket)
    return bucket
  end
  return {level = shape.capacity, at = now, part = 0, epoch = epoch, promises = {}}
end

local function load_slots(key, shape, replicas)
  local bucket = fresh(shape, 0)
  local fields = redis.pcall('HGETALL', key)
  if fields.err then
    redis.call('DEL', key)
    return bucket
  end
  for i = 1, #fields, 2 do
    local name, value = fields[i], fields[i + 1]
    if name == 'promises' then
      bucket.promises = read_promises(value)
    else
      local holder, held = string.sub(name, 3), tonumber(string.match(value, '^%d+$'))
      if held and holder == replica then
        bucket.mine = held
        bucket.level = bucket.level - held
      elseif held and is_alive(holder, replicas) then
        bucket.level = bucket.level - held
      else
        redis.call('HDEL', key, name)
      end
    end
  end
  return bucket
end

local function load(key, shape, since, replicas)
  if shape.slots then
    return load_slots(key, shape, replicas)
  end
  local found = redis.pcall('GET', key)
  local level, at, part, epoch, rest = string.match(type(found) == 'string' and found or '', STATE)
  if not level then
    return fresh(shape, since)
  end
  return {
    level = tonumber(level), at = tonumber(at), part = tonumber(part), epoch = tonumber(epoch),
    promises = rest ~= '' and read_promises(rest) or {},
  }
end

local function wait(shape, bucket, amount)
  local missing = amount - bucket.level
  if shape.slots then
    return missing <= shape.capacity and 0 or NEVER
  end
  if missing <= 0 then
    return 0
  end
  local told = NEVER
  if shape.rate > 0 then
    told = math.ceil((missing * shape.per - bucket.part) / shape.rate) + 1
  end
  if shape.ends > bucket.at and amount <= shape.capacity + min(bucket.level, 0) then
    told = min(told, shape.ends - bucket.at)
  end
  return min(told + max(0, bucket.at - now), NEVER)
end

-- Until when it differs from what a new one would be then.
local function life(shape, bucket, since)
  local lives = wait(shape, bucket, shape.capacity)
  if since > 0 then
    lives = max(lives, wait(shape, fresh(shape, since), shape.capacity))
  end
  for _, promise in ipairs(bucket.promises) do
    lives = max(lives, promise.till - now)
  end
  return lives
end

local function save_slots(key, bucket)
  if bucket.mine > 0 then
    redis.call('HSET', key, 'r:' .. replica, text(bucket.mine))
  else
    redis.call('HDEL', key, 'r:' .. replica)
  end
  if #bucket.promises > 0 then
    redis.call('HSET', key, 'promises', write_promises(bucket.promises))
  else
    redis.call('HDEL', key, 'promises')
  end
  redis.call('PEXPIRE', key, DAY)
end

local function save(key, shape, bucket, since)
  if shape.slots then
    return save_slots(key, bucket)
  end
  local state = text(bucket.level) .. ' ' .. text(bucket.at) .. ' ' .. text(bucket.part) .. ' ' .. text(bucket.epoch)
  if #bucket.promises > 0 then
    state = state .. ' ' .. write_promises(bucket.promises)
  end
  local lives = injected and NEVER or life(shape, bucket, since)
  if lives >= NEVER then
    redis.call('SET', key, state)
  else
    redis.call('SET', key, state, 'PX', text(floor(lives / 1000) + 1000))
  end
end

local function give(shape, bucket, amount)
  refill(shape, bucket)
  if shape.slots then
    local level = max(min(bucket.level + amount, 0), -LARGEST)
    bucket.mine = max(0, bucket.mine - (level - bucket.level))
    bucket.level = level
  else
    bucket.level = max(min(bucket.level + amount, shape.capacity), -LARGEST)
    if bucket.level >= shape.capacity then
      bucket.part = 0
    end
  end
end

local function report(amount, bucket, whole)
  local words = text(amount) .. ' ' .. text(bucket.level) .. ' ' .. text(bucket.at) .. ' ' .. text(bucket.part) .. ' '
    .. text(bucket.epoch)
  if whole and #bucket.promises > 0 then
    words = words .. ' ' .. write_promises(bucket.promises)
  end
  return words
end
