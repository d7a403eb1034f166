"""What the serving side asks of a store of buckets.

Rule 1: a reservation is all or nothing, and a refusal changes no level.
Rule 2: settling never waits: what is given back is noted here and carried on by the store's own time.
Rule 3: a store answers within its stated time, whatever becomes of what is behind it; then it says by whose word.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Iterator, Sequence
from typing import ClassVar, Protocol

import msgspec

from gateway.policy.token_bucket import Bucket, Shape


class Standing(enum.StrEnum):
    """By whose word requests are let in; a metric label and a header's value."""

    STORE = "store"
    DEGRADED = "degraded"
    """The store is lost; each replica gives out its own share of every limit."""
    OPEN = "open"
    """The store is lost; everybody is let in."""
    CLOSED = "closed"
    """The store is lost; nobody is."""


class Turn(enum.StrEnum):
    """What happens to a store that is shared."""

    LOST = "lost"
    """It does not answer; the policy decides from here on."""
    FOUND = "found"
    EMPTIED = "emptied"
    """It answers, and has forgotten everything."""


class Draw(msgspec.Struct, frozen=True, gc=False):
    """What a request takes from one bucket, or gives back to it: ``amount`` in 1/1000."""

    more: ClassVar[int] = 0
    """Nothing beyond: requests lease nothing."""

    bucket: str
    shape: Shape
    amount: int


class Buckets(Protocol):
    """Buckets in the order of the draws; each may be worked out when it is looked at."""

    def __getitem__(self, at: int, /) -> Bucket: ...

    def __iter__(self) -> Iterator[Bucket]: ...


class Granted(msgspec.Struct, frozen=True, gc=False):
    """The reservation holds. ``buckets`` are what is known of them afterwards, then or whenever they are looked at."""

    buckets: Buckets
    standing: Standing = Standing.STORE


class Refused(msgspec.Struct, frozen=True, gc=False):
    """It does not hold: draw number ``index`` is the last that will fit, in ``wait`` microseconds (``NEVER``: nobody
    can tell). ``early``: whoever asks was told a later time before."""

    buckets: tuple[Bucket, ...]
    index: int
    wait: int
    early: bool = False
    standing: Standing = Standing.STORE


Verdict = Granted | Refused


class Store(Protocol):
    """Buckets by name. What it was given with ``settle`` it never loses while its process lives."""

    @property
    def standing(self) -> Standing:
        """By whose word it answers now."""
        ...

    @property
    def trouble(self) -> str:
        """What keeps it from what is behind it, as far as it knows; never a password."""
        ...

    def reserve(self, draws: Sequence[Draw], who: int, *, first: bool = False) -> Verdict | asyncio.Future[Verdict]:
        """Take every draw, or none. ``who`` (not 0) stands for the request and its repetitions: a refused one is
        promised its time. ``first`` says that this is no repetition, though it may look like one. A future that is
        cancelled gives back what it would have been granted."""
        ...

    def settle(self, draws: Sequence[Draw]) -> None:
        """Give back what was reserved and not used; below zero: more was used, a debt."""
        ...

    async def look(self, draws: Sequence[Draw]) -> tuple[Bucket, ...]:
        """Return what the buckets hold, for people; the amounts do not matter."""
        ...

    async def start(self) -> None:
        """Begin: a store that cannot be reached is no error, only a standing."""
        ...

    async def stop(self) -> None:
        """Carry on what is noted, return what is leased, and end."""
        ...
