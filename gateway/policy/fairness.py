"""Fair shares by virtual counters of service: start-time fair queueing, as VTC has it for tokens (arXiv 2401.00588).

A flow's counter is the service it has had, in its own unit, divided by its weight; whoever has the smallest counter is
served next. A flow that begins to wait is lifted to the virtual time, the counter of whoever was served last: nobody
saves up for later what he did not use, and nobody pays for having used what nobody wanted.

Between two flows that wait all the time the service they get differs by no more than their largest single charges, and
by what is not settled yet of requests under way.

**Several gateways** have counters each, and tell each other what they charged (``Deltas``, ``served_elsewhere``). Of N,
each knows of what the N - 1 others charged but for the last lag. So one serves f before g only if f, without what the
others gave it within the lag, has had no more than g; and between f and g that wait at every gateway all the time the
service, all gateways together, differs by no more than

    largest charge of f + largest charge of g + what N - 1 gateways charged f within a lag + the same of g

each by its weight (a settlement is a charge, whichever way it goes), and by what is not settled yet of requests under
way. What was never told, because a gateway was cut off, is added until one of the two does not wait.

A flow waits as long as it does at any gateway: only who waits nowhere is lifted. So one that waits at some gateways
only is next there until it has had its share, as far as they have it to give; what they do not have, and what others
were given where it did not wait, comes on top.

Without the exchange it is N times the largest charges where both wait everywhere, and without bound where they do not.
"""

from __future__ import annotations

from collections.abc import Hashable
from itertools import islice
from typing import Generic, NamedTuple, TypeVar

MOST_COUNTERS = 65_536
"""Flows that are remembered at most; beyond it those are forgotten that the virtual time has passed."""
MOST_DELTAS = 4096
"""Flows of which is noted what they were charged, until that has been told."""


class Shares:
    """The counters of flows that compete for one thing."""

    def __init__(self) -> None:
        self.time = 0.0
        """Virtual time: never goes back."""
        self._counters: dict[Hashable, float] = {}

    def __len__(self) -> int:
        return len(self._counters)

    def counter(self, flow: Hashable) -> float:
        """Return what a flow has had; one that is not known stands at the virtual time."""
        return self._counters.get(flow, self.time)

    def enter(self, flow: Hashable) -> float:
        """Take that a flow begins to wait; return its counter."""
        counter = self._counters.get(flow, 0.0)
        if counter < self.time:
            counter = self.time
        if len(self._counters) >= MOST_COUNTERS:
            self._forget_past()
        self._counters[flow] = counter
        return counter

    def serve(self, flow: Hashable, cost: float, weight: float) -> float:
        """Charge a flow for what it is given now; return its counter."""
        counter = self.counter(flow)
        if counter > self.time:
            self.time = counter
        counter += cost / weight
        self._counters[flow] = counter
        return counter

    def settle(self, flow: Hashable, more: float, weight: float) -> float | None:
        """Correct a charge by what was used beyond it (less than nothing: short of it). None: nothing is known of it
        any more, and its past no longer counts."""
        counter = self._counters.get(flow)
        if counter is None:
            return None
        counter += more / weight
        self._counters[flow] = counter
        return counter

    def pass_to(self, time: float) -> None:
        """Take that the virtual time is as late as this, because of what was served elsewhere."""
        if time > self.time:
            self.time = time

    def served_elsewhere(self, flow: Hashable, amount: float, *, lifted: bool) -> float:
        """Charge a flow for what it was given elsewhere, by its weight; return its counter. ``lifted``: it begins to
        wait, there."""
        known = self._counters.get(flow)
        counter = self.time if known is None or (lifted and known < self.time) else known
        counter += amount
        if known is None and len(self._counters) >= MOST_COUNTERS:
            self._forget_past()
        self._counters[flow] = counter
        return counter

    def _forget_past(self) -> None:
        """Drop who would be lifted anyway; where that is nobody, drop all: they begin together."""
        ahead = {flow: counter for flow, counter in self._counters.items() if counter > self.time}
        self._counters = ahead if len(ahead) < MOST_COUNTERS else {}


class Charge(NamedTuple):
    """What a flow was charged elsewhere, by its weight: for having been served, and as corrections of that; and whether
    it waits there."""

    served: float = 0.0
    settled: float = 0.0
    waits: bool = False

    def with_more(self, other: Charge) -> Charge:
        """Return both as one."""
        return Charge(self.served + other.served, self.settled + other.settled, self.waits or other.waits)


NOTHING = Charge()


F = TypeVar("F", bound=Hashable)


class Deltas(Generic[F]):
    """What flows were charged here and those who serve them elsewhere have not been told. Bounded: of more flows than
    ``most`` nothing is noted, only counted as ``lost``."""

    def __init__(self, most: int = MOST_DELTAS) -> None:
        self._most = most
        self._noted: dict[F, Charge] = {}
        self.lost = 0
        """Charges that nobody will be told of."""

    def __len__(self) -> int:
        return len(self._noted)

    def note(self, flow: F, charge: Charge) -> None:
        """Note a charge."""
        known = self._noted.get(flow)
        if known is not None:
            charge = known.with_more(charge)
        elif len(self._noted) >= self._most:
            self.lost += 1
            return
        self._noted[flow] = charge

    def take(self, most: int) -> dict[F, Charge]:
        """Return what is to be told now, of so many flows at most: those noted first. It is not noted any more."""
        taken = dict(islice(self._noted.items(), most))
        for flow in taken:
            del self._noted[flow]
        return taken
