"""One bucket: what is in it, how it fills, and when it will hold enough.

Rule 1: levels are whole numbers of 1/1000 (of a request, a token, a micro-dollar), times are whole microseconds, and
        every product stays below 2⁵³: the same arithmetic in Lua, whose numbers are doubles, gives the same results.
Rule 2: what refills in part is kept as a fraction: over any time exactly burst + rate * time comes out, to the unit.
Rule 3: a clock that steps back changes nothing, until it has caught up; one that steps far back was wrong before.
"""

from __future__ import annotations

import math

import msgspec

SECOND = 1_000_000
"""Microseconds."""
LARGEST = 2**52
"""Units a bucket may hold; with Rule 1's split products no intermediate reaches 2⁵³."""
NEVER = 2**53
"""A wait without an end."""
STEP = 60 * SECOND
"""A clock that is further back than this will not be waited for: nothing would refill all the time."""


class Shape(msgspec.Struct, frozen=True, gc=False):
    """What a bucket is: how much it holds and how it fills.

    ``capacity`` in units; ``rate / per`` units come back each microsecond (``rate`` 0: nothing by itself). A calendar's
    bucket is full again at ``starts`` and at ``ends`` (microseconds since 1970; 0: no calendar), the begin of this
    period and of the next. ``slots``: what is taken comes back only by being given back.
    """

    capacity: int
    rate: int = 0
    per: int = 1
    starts: int = 0
    ends: int = 0
    slots: bool = False


class Promise(msgspec.Struct, frozen=True, gc=False):
    """A refused request was told to come back at ``due``; until ``until`` its ``amount`` is nobody else's."""

    due: int
    until: int
    amount: int
    who: int


class Bucket(msgspec.Struct, frozen=True, gc=False):
    """What is in a bucket as of ``at``. ``level`` is below zero in debt; of slots it is the negated number in use.

    ``part`` is what has refilled of the next unit, in 1/``per``; ``epoch`` the begin of the calendar's period.
    """

    level: int
    at: int
    part: int = 0
    epoch: int = 0
    promises: tuple[Promise, ...] = ()


def rate_shape(amount: int, seconds: int, burst: int | None = None) -> Shape:
    """Return the bucket of ``amount`` (whole requests, tokens …) each ``seconds``, holding ``burst`` at most."""
    rate, per = amount * 1000, seconds * SECOND
    shared = math.gcd(rate, per)
    rate, per = rate // shared, per // shared
    # Rule 1; never needed for a second, minute, hour or day. Rounded down: never more than was allowed.
    scale = -(-per * (rate % per) // (NEVER - LARGEST // 1000))
    if scale > 1:
        rate, per = rate * (per // scale) // per, per // scale
    return Shape((amount if burst is None else burst) * 1000, rate, per)


def fresh(shape: Shape, now: int, empty_since: int = 0) -> Bucket:
    """Return a bucket nobody has drawn on: full, or empty at ``empty_since`` where what it held was lost."""
    epoch = period(shape, now)
    if shape.slots:
        return Bucket(0, now)
    if empty_since:
        since = min(empty_since, now)
        # A period that began after the loss is whole.
        return refill(shape, Bucket(0, since, 0, epoch if since >= epoch else 0), now)
    return Bucket(shape.capacity, now, 0, epoch)


def period(shape: Shape, now: int) -> int:
    """Return the begin of the calendar period that ``now`` is in."""
    return shape.ends if shape.ends and now >= shape.ends else shape.starts


def refill(shape: Shape, bucket: Bucket, now: int) -> Bucket:
    """Return the bucket as it is at ``now``; the same one where nothing changes."""
    if shape.slots:
        return bucket
    level, part, epoch = bucket.level, bucket.part, bucket.epoch
    begins = period(shape, now)
    if begins > epoch:
        # A debt is paid back out of the next period, what was left over is not carried on.
        level, part, epoch = shape.capacity + min(level, 0), 0, begins
    elapsed = now - bucket.at
    if elapsed < -STEP:
        return Bucket(level, now, part, epoch)
    if elapsed <= 0:
        return bucket if epoch == bucket.epoch else Bucket(level, bucket.at, part, epoch, bucket.promises)
    rate, per = shape.rate, shape.per
    if rate and level < shape.capacity:
        whole, rest = divmod(elapsed, per)
        if whole > (shape.capacity - level) // rate:
            level, part = shape.capacity, 0
        else:
            # rest * rate, with rate split so that no product is larger than per².
            grown = rest * (rate % per) + part
            level += whole * rate + rest * (rate // per) + grown // per
            part = grown % per
    if level >= shape.capacity:
        level, part = shape.capacity, 0
    return Bucket(level, now, part, epoch, bucket.promises)


def set_back(shape: Shape, bucket: Bucket, latest: int, now: int) -> Bucket:
    """Return a bucket as it was at ``latest``, for a clock that was wrong then and says ``now`` instead."""
    bucket = refill(shape, bucket, latest)
    return Bucket(bucket.level, now, bucket.part, bucket.epoch)


def spare(shape: Shape, bucket: Bucket) -> int:
    """Return what could be taken now, promises aside; below zero in debt."""
    return shape.capacity + bucket.level if shape.slots else bucket.level


def wait(shape: Shape, bucket: Bucket, amount: int, now: int) -> int:
    """Return the microseconds until a bucket, refilled at ``now``, holds ``amount``; ``NEVER``: nobody can tell.

    In doubles, like the script: at most a microsecond more than needed, never less.
    """
    missing = amount - bucket.level
    if shape.slots:
        return 0 if missing <= shape.capacity else NEVER
    if missing <= 0:
        return 0
    told = NEVER
    if shape.rate:
        told = math.ceil((float(missing) * float(shape.per) - float(bucket.part)) / float(shape.rate)) + 1
    ends = shape.ends
    if ends > bucket.at and amount <= shape.capacity + min(bucket.level, 0):
        told = min(told, ends - bucket.at)
    # Where the clock has stepped back, nothing refills until it has caught up.
    return min(told + max(0, bucket.at - now), NEVER)


def until_full(shape: Shape, bucket: Bucket) -> int:
    """Return the microseconds until a bucket is full again, as it stands."""
    # A wait is a microsecond on the safe side.
    return max(0, wait(shape, bucket, shape.capacity, bucket.at) - 1)
