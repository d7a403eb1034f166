"""Fair shares by virtual counters of service: start-time fair queueing, as VTC has it for tokens (arXiv 2401.00588).

A flow's counter is the service it has had, in its own unit, divided by its weight; whoever has the smallest counter is
served next. A flow that begins to wait is lifted to the virtual time, the counter of whoever was served last: nobody
saves up for later what he did not use, and nobody pays for having used what nobody wanted.

Between two flows that wait all the time the service they get differs by no more than their largest single charges, and
by what is not settled yet of requests under way.
"""

from __future__ import annotations

from collections.abc import Hashable

MOST_COUNTERS = 65_536
"""Flows that are remembered at most; beyond it those are forgotten that the virtual time has passed."""


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

    def _forget_past(self) -> None:
        """Drop who would be lifted anyway; where that is nobody, drop all: they begin together."""
        ahead = {flow: counter for flow, counter in self._counters.items() if counter > self.time}
        self._counters = ahead if len(ahead) < MOST_COUNTERS else {}
