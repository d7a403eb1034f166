"""What one replica holds of a shared bucket, and what it gives out of its own when the store is lost.

Rule 1: what is held was taken out of the bucket before: to spend it asks nobody.
Rule 2: a replica wants as much as it used of late, and holds no more than half its part of what is left: the nearer
        the end, the more exact. What lies idle goes back.
Rule 3: nothing here knows a clock; times are the store's microseconds.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from gateway.policy.token_bucket import SECOND, Bucket, Shape, fresh, refill, spare, until_full

HORIZON = SECOND // 5
"""A replica wants what it used for so long."""
IDLE = SECOND // 2
"""What nobody drew on for so long goes back."""


class Lease:
    """Of one bucket: ``held`` to be spent, ``used`` of its slots, and the bucket as the store last said."""

    __slots__ = ("_recent", "_touched", "held", "known", "shape", "used")

    def __init__(self, shape: Shape, now: int) -> None:
        self.shape = shape
        self.held = 0
        self.used = 0
        self.known: Bucket | None = None
        self._recent = 0
        self._touched = now

    def note(self, amount: int, now: int) -> None:
        """Something is drawn: this is what is wanted by."""
        since = now - self._touched
        if since > 0:
            self._recent = self._recent * (HORIZON - since) // HORIZON if since < HORIZON else 0
            self._touched = now
        self._recent += amount

    def spend(self, amount: int, now: int) -> None:
        """Take out of what is held, which is enough."""
        self.held -= amount
        if self.shape.slots:
            self.used += amount
        self.note(amount, now)

    def wanted(self, now: int) -> int:
        """Return what is worth holding."""
        since = now - self._touched
        return self._recent * (HORIZON - max(0, since)) // HORIZON if since < HORIZON else 0

    def asks(self, amount: int, now: int, sharers: int) -> int:
        """Return how much is asked for beside ``amount``: nothing where it would not do for one more of its kind."""
        more = self._most(now, sharers)
        return more if more >= amount else 0

    def keep(self, amount: int, now: int, sharers: int) -> int:
        """Return how much of what comes back is kept here (added to ``held``); a debt is paid out of what is held."""
        room = self._most(now, sharers) - self.held if amount > 0 else 0
        kept = max(0, min(amount, room)) if amount > 0 else max(amount, -self.held)
        self.held += kept
        return kept

    def surplus(self, now: int, sharers: int) -> int:
        """Return how much of what is held goes back (taken off it): all when idle, else what is too much."""
        over = self.held
        if now - self._touched <= IDLE:
            over = max(0, over - max(self._most(now, sharers), self._recent))
        self.held -= over
        return over

    def _most(self, now: int, sharers: int) -> int:
        if self.known is None:
            return 0
        left = spare(self.shape, refill(self.shape, self.known, now))
        return max(0, min(self.wanted(now), left // (2 * sharers)))

    def learn(self, bucket: Bucket) -> None:
        """Take the store's word."""
        self.known = bucket

    def given(self, amount: int) -> None:
        """What is on its way back to the store is as good as there."""
        known = self.known
        if known is not None:
            level = min(known.level + amount, 0 if self.shape.slots else self.shape.capacity)
            self.known = Bucket(level, known.at, known.part, known.epoch, known.promises)

    def seen(self, now: int) -> Bucket:
        """Return the bucket as far as it is known here, with what is held."""
        if self.known is None:
            return fresh(self.shape, now)
        return self.beside(refill(self.shape, self.known, now))

    def beside(self, bucket: Bucket) -> Bucket:
        """Return a bucket with what is held of it."""
        # What was held may have refilled there: then both together are more than there can be.
        level = min(bucket.level + self.held, 0 if self.shape.slots else self.shape.capacity)
        return Bucket(level, bucket.at, bucket.part, bucket.epoch, bucket.promises)


class Seen(msgspec.Struct, frozen=True, gc=False):
    """Levels as far as they are known here, each worked out when somebody looks at it, which few are."""

    leases: Sequence[Lease]
    now: int

    def left(self, at: int) -> int:
        """Return what could be taken of one, in units; below zero in debt."""
        lease = self.leases[at]
        return spare(lease.shape, lease.seen(self.now))

    def least(self, which: Sequence[int]) -> tuple[int, int, int]:
        """Return which of several that refill has the least left, how much, and in how many microseconds it is full."""
        found = [(self.leases[at].seen(self.now), at) for at in which]
        bucket, at = min(found, key=lambda one: one[0].level)
        return at, bucket.level, until_full(self.leases[at].shape, bucket)


class Share:
    """One replica's part of a limit while the store is lost: what is ``spent`` of it is charged afterwards."""

    __slots__ = ("bucket", "shape", "spent")

    def __init__(self, shape: Shape, lease: Lease, replicas: int, now: int) -> None:
        capacity = shape.capacity // replicas
        if shape.slots:
            self.shape = Shape(max(min(1000, shape.capacity), capacity // 1000 * 1000), slots=True)
            self.bucket = Bucket(-lease.used, now)
        else:
            self.shape = Shape(max(1, capacity), shape.rate, shape.per * replicas, shape.starts, shape.ends)
            self.bucket = fresh(self.shape, now)
            if lease.known is not None:
                known = refill(shape, lease.known, now)
                level = min(self.shape.capacity, known.level // replicas)
                self.bucket = Bucket(level, now, 0, known.epoch)
        self.spent = 0

    def amount(self, asked: int) -> int:
        """Return what must be there for ``asked``: what is more than the whole part waits for no more than that."""
        return min(asked, self.shape.capacity)

    def spend(self, amount: int, bucket: Bucket) -> None:
        """Note what was let in; ``bucket`` is what it was taken from already, as far as ``amount()`` says."""
        rest = 0 if self.shape.slots else amount - self.amount(amount)
        self.bucket = Bucket(bucket.level - rest, bucket.at, bucket.part, bucket.epoch, bucket.promises)
        self.spent += amount

    def let_in(self, amount: int, now: int) -> None:
        """Note what was let in unasked; the part is then empty at the worst."""
        if not self.shape.slots:
            bucket = refill(self.shape, self.bucket, now)
            level = max(min(0, bucket.level), bucket.level - amount)
            self.bucket = Bucket(level, bucket.at, bucket.part, bucket.epoch)
        self.spent += amount

    def back(self, amount: int, now: int) -> int:
        """Give back to the part what was spent of it, or charge it; returns what is not the part's."""
        mine = min(amount, self.spent) if amount > 0 else amount
        bucket = refill(self.shape, self.bucket, now)
        top = 0 if self.shape.slots else self.shape.capacity
        self.bucket = Bucket(min(bucket.level + mine, top), bucket.at, bucket.part, bucket.epoch, bucket.promises)
        self.spent -= mine
        return amount - mine

    def is_whole(self, now: int) -> bool:
        """Return whether it is as one that nobody has drawn on."""
        bucket = refill(self.shape, self.bucket, now)
        return bucket.level == (0 if self.shape.slots else self.shape.capacity) and not bucket.promises

    def charge(self, now: int) -> int:
        """Return what the shared bucket is charged: what was spent and has not come back by refilling."""
        if self.shape.slots:
            return 0
        lacks = self.shape.capacity - refill(self.shape, self.bucket, now).level
        return max(0, min(self.spent, lacks))
