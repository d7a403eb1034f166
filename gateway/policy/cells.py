"""Buckets as their owner keeps them in memory: one number each, changed in place.

Rule 1: what refills evenly need not be refilled. A cell holds the moment at which it will be full, in steps of 1/rate
        microseconds, so that nothing is ever rounded: taking moves that moment away, giving back moves it near, and
        what has passed means full. Slots are the same at rate 0. (Networks know it as virtual scheduling: GCRA.)
Rule 2: nothing is decided otherwise than by ``take`` and ``give``, which are asked where a calendar or a promise is in
        the way; tests hold the two against each other.
Rule 3: time never goes back here; its owner sees to that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import msgspec

from gateway.policy.reservation import give
from gateway.policy.token_bucket import LARGEST, Bucket, Shape

_NEVER = 1 << 256
"""Steps that no time and no amount reaches."""


@dataclass(slots=True, eq=False)
class Cell:
    # No struct: to set an attribute of one costs as much as ten lines here.
    """One bucket. In steps: ``full`` is the moment at which it will be (never, in an odd one, so that nothing is drawn
    from it here), ``room`` all it holds; ``odd`` is the bucket itself where it is of a calendar or made promises."""

    shape: Shape
    rate: int = 0
    per: int = 1
    room: int = 0
    full: int = 0
    odd: Bucket | None = None

    def put(self, shape: Shape, bucket: Bucket) -> None:
        """Hold what a bucket does."""
        self.shape = shape
        self.rate, self.per = (0, 1) if shape.slots else (shape.rate, shape.per)
        self.room = _room(shape)
        most = 0 if shape.slots else shape.capacity
        lack = (most - bucket.level) * self.per - bucket.part
        self.odd = bucket if shape.ends or bucket.promises else None
        self.full = lack + bucket.at * self.rate if self.odd is None else _NEVER

    def bucket(self, now: int) -> Bucket:
        """Return it as a bucket."""
        if self.odd is not None:
            return self.odd
        lack = self.full - now * self.rate
        if self.shape.slots:
            return Bucket(-max(0, lack), now)
        if lack <= 0:
            return Bucket(self.shape.capacity, now)
        level, part = divmod(self.room - lack, self.per)
        return Bucket(level, now, part)

    def give(self, amount: int, now: int) -> None:
        """Give back, or charge where it is below zero, as ``give`` does."""
        if self.odd is not None:
            self.put(self.shape, give(self.shape, self.odd, amount, now))
        elif amount > 0:
            self.full -= amount * self.per
        else:
            base = now * self.rate
            deepest = base + LARGEST * self.per + (0 if self.shape.slots else self.room)
            self.full = min(max(self.full, base) - amount * self.per, deepest)


@lru_cache(4096)
def _room(shape: Shape) -> int:
    # One number for all cells that are alike: it stays near the processor.
    return shape.capacity * (1 if shape.slots else shape.per)


class Drawn(msgspec.Struct, frozen=True, gc=False):
    """What is left in cells as of when they were drawn on together: of each what it ``lacks`` in steps."""

    # Not kept in the cells: what lives as long as a request is still near the processor when it goes.
    cells: Sequence[Cell]
    lacks: Sequence[int]

    def left(self, at: int) -> int:
        """Return what could be taken."""
        cell = self.cells[at]
        return (cell.room - self.lacks[at]) // cell.per

    def least(self, which: Sequence[int]) -> tuple[int, int, int]:
        """Return which of several that refill has the least left, how much, and the microseconds until it is full."""
        cells, lacks = self.cells, self.lacks
        scarcest, least = -1, _NEVER
        for at in which:
            cell = cells[at]
            left = (cell.room - lacks[at]) // cell.per
            if left < least:
                scarcest, least = at, left
        return scarcest, least, -(-lacks[scarcest] // cells[scarcest].rate)


def cell_of(shape: Shape, bucket: Bucket) -> Cell:
    """Return a cell that holds what a bucket does."""
    cell = Cell(shape)
    cell.put(shape, bucket)
    return cell


def draw(cells: Sequence[Cell], amounts: Sequence[int], now: int) -> Drawn | None:
    """Take every amount where all is there and nothing is in the way, which is nearly always; else take nothing."""
    lacks: list[int] = []
    for cell, amount in zip(cells, amounts):  # noqa: B905 - to be strict costs as much as a cell
        base = now * cell.rate
        full = cell.full
        full = (full if full > base else base) + amount * cell.per
        lack = full - base
        if lack > cell.room:
            break
        cell.full = full
        lacks.append(lack)
    else:
        return Drawn(cells, lacks)
    for cell, amount in zip(cells[: len(lacks)], amounts, strict=False):
        cell.full -= amount * cell.per
    return None
