"""Several buckets at once: a request takes what it needs from all of them or from none.

Rule 1: a refusal changes no level. What it leaves is a promise: the time it was told, and that what the request needs
        then is kept for it until a little later. A promise is asked for by ``who`` (not 0).
Rule 2: newcomers get what nobody was promised; who comes back in time gets what only those before it were promised.
Rule 3: what is given back may be less than nothing: that is a debt, which the refill pays; it ends at ``LARGEST``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import msgspec

from gateway.policy.token_bucket import LARGEST, NEVER, SECOND, Bucket, Promise, Shape, refill, spare, wait

GRACE = 2 * SECOND
"""How much later than promised somebody may come back."""
FARTHEST = 60 * SECOND
"""Beyond this no SDK waits, so nothing is promised."""
MOST_PROMISES = 256
"""Promises one bucket keeps; who is refused beyond that is told a time, but nothing is kept for it."""


class Asking(Protocol):
    """What is asked of one bucket: at least ``amount``, and ``more`` beside it if there is plenty (a lease)."""

    @property
    def shape(self) -> Shape:
        """What the bucket is."""
        ...

    @property
    def amount(self) -> int:
        """In units."""
        ...

    @property
    def more(self) -> int:
        """In units; 0: nothing beyond the amount."""
        ...


class Need(msgspec.Struct, frozen=True, gc=False):
    """The plainest ``Asking``."""

    shape: Shape
    amount: int
    more: int = 0


class Taken(msgspec.Struct, frozen=True, gc=False):
    """It fits: the buckets afterwards, and what was taken from each."""

    buckets: tuple[Bucket, ...]
    amounts: tuple[int, ...]


class Short(msgspec.Struct, frozen=True, gc=False):
    """It does not: the buckets with their levels unchanged, which one was the last to have enough, and in how many
    microseconds (``NEVER``: nobody can tell). ``early``: it was promised a later time."""

    buckets: tuple[Bucket, ...]
    index: int
    wait: int
    early: bool = False


def take(
    needs: Sequence[Asking], buckets: Sequence[Bucket], now: int, who: int = 0, sharers: int = 1, *, first: bool = False
) -> Taken | Short:
    """Take what is needed from every bucket or say when it will be there.

    ``sharers`` are those who lease. ``first``: this is no repetition, so what was promised to the same ``who`` is for
    others that look alike.
    """
    current = [_alive(refill(need.shape, bucket, now), now) for need, bucket in zip(needs, buckets, strict=True)]
    mine = None if first or not who else _promised(current, who)
    free = [
        spare(need.shape, bucket) - (_kept(need.shape, bucket, mine, now) if bucket.promises else 0)
        for need, bucket in zip(needs, current, strict=True)
    ]
    for need, left in zip(needs, free, strict=True):
        if left < need.amount:
            return _refuse(needs, current, now, who, mine)
    amounts = []
    after = []
    for need, bucket, left in zip(needs, current, free, strict=True):
        amount = need.amount
        if need.more:
            # Half of what is left, shared among all: the nearer the end, the smaller the share. What would not do for
            # one more request like this is of use to somebody else only.
            more = min(need.more, (left - amount) // (2 * sharers))
            amount += more if more >= amount else 0
        amounts.append(amount)
        promises = _without(bucket.promises, mine)
        after.append(Bucket(bucket.level - amount, bucket.at, bucket.part, bucket.epoch, promises))
    return Taken(tuple(after), tuple(amounts))


def give(shape: Shape, bucket: Bucket, amount: int, now: int) -> Bucket:
    """Return a bucket to which ``amount`` was given back; below zero, it is taken even where that is a debt."""
    bucket = refill(shape, bucket, now)
    level, most, part = bucket.level + amount, 0 if shape.slots else shape.capacity, bucket.part
    if level >= most:
        level, part = most, 0
    elif level < -LARGEST:
        level = -LARGEST
    return Bucket(level, bucket.at, part, bucket.epoch, bucket.promises)


def _refuse(needs: Sequence[Asking], buckets: list[Bucket], now: int, who: int, mine: Promise | None) -> Short:
    if mine is not None and now < mine.due:
        index = next(i for i, b in enumerate(buckets) if any(p.who == who and p.due == mine.due for p in b.promises))
        return Short(tuple(buckets), index, mine.due - now, early=True)
    longest, index = -1, 0
    for position, (need, bucket) in enumerate(zip(needs, buckets, strict=True)):
        kept = _kept(need.shape, bucket, mine, now) if bucket.promises else 0
        if spare(need.shape, bucket) - kept < need.amount:
            ahead = sum(promise.amount for promise in _ahead(bucket, mine, now))
            told = wait(need.shape, bucket, need.amount + ahead, now)
            if told > longest:
                longest, index = told, position
    if not who or longest > FARTHEST or any(len(bucket.promises) >= MOST_PROMISES for bucket in buckets):
        return Short(tuple(buckets), index, longest)
    due = now + longest
    noted = [
        _with(need, bucket, _without(bucket.promises, mine), Promise(due, due + GRACE, need.amount, who))
        for need, bucket in zip(needs, buckets, strict=True)
    ]
    return Short(tuple(noted), index, longest)


def _with(need: Asking, bucket: Bucket, others: tuple[Promise, ...], promise: Promise) -> Bucket:
    """Return the bucket with a promise in its place by time. Slots are promised to nobody: they would stand empty."""
    if need.shape.slots or not need.amount:
        promises = others
    else:
        at = sum(other.due <= promise.due for other in others)
        promises = (*others[:at], promise, *others[at:])
    return Bucket(bucket.level, bucket.at, bucket.part, bucket.epoch, promises)


def _promised(buckets: Sequence[Bucket], who: int) -> Promise | None:
    """Return the first of the promises made to ``who``, as the first bucket that has one remembers it."""
    found = None
    for bucket in buckets:
        for promise in bucket.promises:
            if promise.who == who and (found is None or promise.due < found.due):
                found = promise
    return found


def _ahead(bucket: Bucket, mine: Promise | None, now: int) -> list[Promise]:
    """Return the promises to others that count: all of them, or once one's own time has come those before it."""
    if mine is None:
        return list(bucket.promises)
    before = mine.due if now >= mine.due else NEVER
    return [p for p in bucket.promises if p.due < before and (p.due != mine.due or p.who != mine.who)]


def _kept(shape: Shape, bucket: Bucket, mine: Promise | None, now: int) -> int:
    """Return what must stay for others to get what they were promised, each at its time: what will have refilled by
    then need not be there now."""
    most = promised = 0
    for promise in _ahead(bucket, mine, now):
        promised += promise.amount
        gained = 0
        if shape.rate and promise.due > now:
            # In doubles, like the script, and never more than what refills.
            gained = max(0, math.floor(float(promise.due - now) * float(shape.rate) / float(shape.per)) - 1)
        most = max(most, promised - gained)
    return most


def _without(promises: tuple[Promise, ...], mine: Promise | None) -> tuple[Promise, ...]:
    if mine is None or not promises:
        return promises
    return tuple(p for p in promises if p.who != mine.who or p.due != mine.due)


def _alive(bucket: Bucket, now: int) -> Bucket:
    """Return the bucket without the promises nobody claimed in time."""
    if not bucket.promises or all(promise.until > now for promise in bucket.promises):
        return bucket
    alive = tuple(promise for promise in bucket.promises if promise.until > now)
    return Bucket(bucket.level, bucket.at, bucket.part, bucket.epoch, alive)
