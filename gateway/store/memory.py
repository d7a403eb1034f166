"""Buckets in the memory of one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice

from gateway.policy.reservation import Short, give, take
from gateway.policy.token_bucket import Bucket, Shape, fresh, refill
from gateway.store.protocol import Draw, Granted, Refused, Standing, Verdict

MOST_BUCKETS = 100_000
"""Beyond so many, those that hold what a new one would are forgotten."""
_LOOKED_AT = 8
"""Old buckets looked at for each new one, so that a limit per client address stays within bounds."""


class MemoryStore:
    """Every bucket of one replica. ``clock`` returns microseconds since 1970."""

    standing = Standing.STORE
    trouble = ""

    def __init__(self, clock: Callable[[], int], most: int = MOST_BUCKETS) -> None:
        self._clock = clock
        self._most = most
        self._buckets: dict[str, tuple[Shape, Bucket]] = {}

    def __len__(self) -> int:
        return len(self._buckets)

    def reserve(self, draws: Sequence[Draw], who: int, *, first: bool = False) -> Verdict:
        """Take every draw, or none."""
        now = self._clock()
        known = self._buckets
        before = []
        for draw in draws:
            found = known.get(draw.bucket)
            if found is None:
                self._make_room(now)
                before.append(fresh(draw.shape, now))
            else:
                before.append(found[1])
        taken = take(draws, before, now, who, first=first)
        for draw, bucket in zip(draws, taken.buckets, strict=True):
            known[draw.bucket] = draw.shape, bucket
        if isinstance(taken, Short):
            return Refused(taken.buckets, taken.index, taken.wait, taken.early)
        return Granted(taken.buckets)

    def settle(self, draws: Sequence[Draw]) -> None:
        """Give back at once."""
        now = self._clock()
        for draw in draws:
            shape = draw.shape
            found = self._buckets.get(draw.bucket)
            if found is None:
                self._make_room(now)
            bucket = fresh(shape, now) if found is None else found[1]
            self._buckets[draw.bucket] = shape, give(shape, bucket, draw.amount, now)

    async def look(self, draws: Sequence[Draw]) -> tuple[Bucket, ...]:
        """Return what the buckets hold now."""
        now = self._clock()
        found = ((draw.shape, self._buckets.get(draw.bucket)) for draw in draws)
        return tuple(fresh(shape, now) if kept is None else refill(shape, kept[1], now) for shape, kept in found)

    async def start(self) -> None:
        """Nothing has to be reached."""

    async def stop(self) -> None:
        """Nothing outlives the process."""

    def _make_room(self, now: int) -> None:
        """Forget what a new bucket would be like; past twice the bound the oldest, whatever they hold."""
        known = self._buckets
        if len(known) < self._most:
            return
        for name in list(islice(known, _LOOKED_AT)):
            shape, bucket = known.pop(name)
            there = refill(shape, bucket, now)
            is_new = there.level == (0 if shape.slots else shape.capacity) and not there.promises
            if not is_new and (shape.slots or len(known) < 2 * self._most):
                known[name] = (shape, there)
