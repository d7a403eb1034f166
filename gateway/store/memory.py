"""Buckets in the memory of one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice

from gateway.policy.cells import Cell, cell_of, draw
from gateway.policy.reservation import Need, Short, take
from gateway.policy.token_bucket import STEP, Bucket, Shape, fresh, refill, set_back
from gateway.store.protocol import Buckets, Granted, Known, Member, Refused, Standing, Verdict

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
        self._cells: dict[str, Cell] = {}
        self._latest = 0
        self._edition = object()
        """Another one whenever a bucket is forgotten or becomes another: what was found for somebody before may be none
        of these."""

    def __len__(self) -> int:
        return len(self._cells)

    def reserve(
        self, buckets: Buckets, amounts: Sequence[int], who: Callable[[], int], *, first: bool = False
    ) -> Verdict:
        """Take every amount, or none."""
        now = self._now()
        cells = buckets.found if buckets.edition is self._edition else self._find(buckets, now, shape_them=True)
        drawn = draw(cells, amounts, now)
        if drawn is not None:
            return Granted(drawn)
        shapes = buckets.shapes
        needs = list(map(Need, shapes, amounts))
        taken = take(needs, [cell.bucket(now) for cell in cells], now, who(), first=first)
        for cell, shape, bucket in zip(cells, shapes, taken.buckets, strict=True):
            self._put(cell, shape, bucket)
        if isinstance(taken, Short):
            return Refused(taken.buckets, taken.index, taken.wait, taken.early)
        return Granted(Known(shapes, taken.buckets))

    def settle(self, buckets: Buckets, amounts: Sequence[int]) -> None:
        """Give back at once."""
        cells = buckets.found if buckets.edition is self._edition else self._find(buckets, self._now())
        for cell, amount in zip(cells, amounts):  # noqa: B905 - as in draw
            if amount > 0 and cell.odd is None:
                # Cell.give, written out: this is what nearly always comes.
                cell.full -= amount * cell.per
            elif amount:
                cell.give(amount, self._now())

    async def look(self, buckets: Buckets) -> tuple[Bucket, ...]:
        """Return what the buckets hold now."""
        now = self._now()
        found = zip(buckets.shapes, map(self._cells.get, buckets.names), strict=True)
        return tuple(
            fresh(shape, now) if cell is None else refill(shape, cell.bucket(now), now) for shape, cell in found
        )

    def join(self, member: Member) -> None:
        """There is nobody else to be told."""

    def hurry(self) -> None:
        """There is nobody to share with."""

    async def start(self) -> None:
        """Nothing has to be reached."""

    async def stop(self) -> None:
        """Nothing outlives the process."""

    def _now(self) -> int:
        """Return the time, which stands still while a clock that was set back a little catches up."""
        now, latest = self._clock(), self._latest
        if now < latest:
            if latest - now <= STEP:
                return latest
            for cell in self._cells.values():
                cell.put(cell.shape, set_back(cell.shape, cell.bucket(latest), latest, now))
        self._latest = now
        return now

    def _find(self, buckets: Buckets, now: int, *, shape_them: bool = False) -> tuple[Cell, ...]:
        """Return the cells. ``shape_them``: from here on they are as these buckets are; whoever only gives back may
        have reserved when they were others."""
        found, known = [], True
        for name, shape in zip(buckets.names, buckets.shapes, strict=True):
            cell = self._cells.get(name)
            if cell is None:
                self._make_room(now)
                cell = self._cells[name] = cell_of(shape, fresh(shape, now))
            elif cell.shape != shape:
                if shape_them:
                    self._put(cell, shape, cell.bucket(now))
                else:
                    known = False
            found.append(cell)
        # Room may have been made of the first for the last.
        self._cells.update(zip(buckets.names, found, strict=True))
        cells = tuple(found)
        if known:
            buckets.edition, buckets.found = self._edition, cells
        return cells

    def _put(self, cell: Cell, shape: Shape, bucket: Bucket) -> None:
        """Have a cell hold a bucket. Where it becomes another, nobody draws on it unlooked; on a calendar's nobody
        does."""
        if cell.shape is not shape and cell.shape != shape and not shape.ends:
            self._edition = object()
        cell.put(shape, bucket)

    def _make_room(self, now: int) -> None:
        """Forget what a new bucket would be like; past twice the bound the oldest, whatever they hold."""
        known = self._cells
        if len(known) < self._most:
            return
        self._edition = object()
        for name in list(islice(known, _LOOKED_AT)):
            cell = known.pop(name)
            shape = cell.shape
            there = refill(shape, cell.bucket(now), now)
            is_new = there.level == (0 if shape.slots else shape.capacity) and not there.promises
            if not is_new and (shape.slots or len(known) < 2 * self._most):
                known[name] = cell
