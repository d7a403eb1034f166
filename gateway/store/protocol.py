"""What the serving side asks of a store of buckets.

Rule 1: a reservation is all or nothing, and a refusal changes no level.
Rule 2: settling never waits: what is given back is noted here and carried on by the store's own time.
Rule 3: a store answers within its stated time, whatever becomes of what is behind it; then it says by whose word.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec

from gateway.policy.token_bucket import Bucket, Shape, spare, until_full


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

    bucket: str
    shape: Shape
    amount: int


class Buckets(msgspec.Struct):
    """Which buckets something is drawn from, by name, and what each of them is: made once for all requests that fall
    under the same limits."""

    names: tuple[str, ...]
    shapes: tuple[Shape, ...]
    edition: object = None
    found: Any = None
    """What a store has found for them, and by what it knows that this still holds: its own affair."""

    def draws(self, amounts: Sequence[int]) -> tuple[Draw, ...]:
        """Return what is drawn from each."""
        return tuple(map(Draw, self.names, self.shapes, amounts))


Scarcest = tuple[int, int, int]
"""The position of a bucket, what is left in it in units, and the microseconds until it is full again."""


class Levels(Protocol):
    """What is left in buckets, by their position; worked out when it is looked at."""

    def left(self, at: int, /) -> int:
        """Return what could be taken of one, in units; below zero in debt."""
        ...

    def least(self, which: Sequence[int], /) -> Scarcest:
        """Return which of several that refill has the least left."""
        ...


class Known(msgspec.Struct, frozen=True, gc=False):
    """Levels of buckets as they are."""

    shapes: Sequence[Shape]
    buckets: Sequence[Bucket]

    def left(self, at: int) -> int:
        """Return what could be taken of one, in units; below zero in debt."""
        return spare(self.shapes[at], self.buckets[at])

    def least(self, which: Sequence[int]) -> Scarcest:
        """Return which of several that refill has the least left."""
        at = min(which, key=self.left)
        return at, self.left(at), until_full(self.shapes[at], self.buckets[at])


class Granted(msgspec.Struct, frozen=True, gc=False):
    """The reservation holds. ``levels`` are what is known of the buckets afterwards, then or whenever they are looked
    at."""

    levels: Levels
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


class Claim(msgspec.Struct, frozen=True, gc=False):
    """What a replica says of an endpoint: ``most`` that all replicas together may use of it, what it holds of that and
    has in flight, what it asks for, and what it would want if nobody else did."""

    endpoint: str
    most: int
    held: int
    in_flight: int
    asked: int
    wanted: int


class Grant(msgspec.Struct, frozen=True, gc=False):
    """What a replica holds from now on, and what each of the others wants, by name."""

    held: int
    others: tuple[tuple[str, int], ...]


class Place(msgspec.Struct, frozen=True, gc=False):
    """Who is asked: its name as others are told it, how many live, and the store's time in microseconds."""

    name: str
    live: int
    now: int


class Member(Protocol):
    """Whoever has something to say to the other replicas that share a store, is told by them, and shares endpoints with
    them."""

    def tell(self) -> bytes:
        """Return what the others are to be told now, without a line's end; nothing: empty. It is told once."""
        ...

    def told(self, messages: Sequence[bytes]) -> None:
        """Take what others told, each message once, in the order they came."""
        ...

    def missed(self) -> None:
        """Take that others may have told what was not heard here."""
        ...

    def claims(self, place: Place) -> Sequence[Claim]:
        """Return what is asked for now. What is held afterwards is told with ``granted``, unless that is lost: then
        it is what was held before, or asked for where that was less."""
        ...

    def granted(self, grants: Sequence[Grant]) -> bool:
        """Take what the store has recorded, of each claim; tell whether some of it is to be given up at once."""
        ...

    def alone(self, gateways: int) -> None:
        """Take that nobody can be asked, of so many who share."""
        ...


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

    def reserve(
        self, buckets: Buckets, amounts: Sequence[int], who: Callable[[], int], *, first: bool = False
    ) -> Verdict | asyncio.Future[Verdict]:
        """Take an amount from every bucket, or nothing. ``who`` tells, where somebody may have to wait, what stands for
        the request and its repetitions (0: nothing does): a refused one is promised its time. ``first`` says that this
        is no repetition, though it may look like one. A future that is cancelled gives back what it would have been
        granted."""
        ...

    def settle(self, buckets: Buckets, amounts: Sequence[int]) -> None:
        """Give back what was reserved and not used; below zero: more was used, a debt."""
        ...

    async def look(self, buckets: Buckets) -> tuple[Bucket, ...]:
        """Return what the buckets hold now, for people."""
        ...

    def join(self, member: Member) -> None:
        """Carry what a member tells the other replicas, and what they tell, as long as there are any."""
        ...

    def hurry(self) -> None:
        """Ask soon what the member claims, rather than when it is time."""
        ...

    async def start(self) -> None:
        """Begin: a store that cannot be reached is no error, only a standing."""
        ...

    async def stop(self) -> None:
        """Carry on what is noted, return what is leased, and end."""
        ...
