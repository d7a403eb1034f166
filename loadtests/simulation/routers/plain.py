"""Rules that everybody has: random, round robin, least requests, power of two choices."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateway.policy.routing import Job
from loadtests.simulation.routers import Draw, Rule

if TYPE_CHECKING:
    from loadtests.simulation.fleet import SimulatedEndpoint


class Random(Rule):
    """Any of them."""

    def pick(self, job: Job, left: list[SimulatedEndpoint], draw: Draw, now: float) -> SimulatedEndpoint:
        """Return any of them."""
        return left[draw(len(left))]


class RoundRobin(Rule):
    """One after the other."""

    def __init__(self) -> None:
        self._last = -1

    def pick(self, job: Job, left: list[SimulatedEndpoint], draw: Draw, now: float) -> SimulatedEndpoint:
        """Return the one after the last, by number."""
        chosen = next((one for one in left if one.number > self._last), left[0])
        self._last = chosen.number
        return chosen


class LeastRequests(Rule):
    """Whoever has the fewest requests; any of those that are equal."""

    def pick(self, job: Job, left: list[SimulatedEndpoint], draw: Draw, now: float) -> SimulatedEndpoint:
        """Return one with the fewest requests."""
        return least(left, draw)


class TwoChoices(Rule):
    """The one with fewer requests of two at random."""

    def pick(self, job: Job, left: list[SimulatedEndpoint], draw: Draw, now: float) -> SimulatedEndpoint:
        """Return the one with fewer requests."""
        if len(left) == 1:
            return left[0]
        first = draw(len(left))
        second = (first + 1 + draw(len(left) - 1)) % len(left)
        return min(left[first], left[second], key=lambda one: one.in_flight)


def least(left: list[SimulatedEndpoint], draw: Draw) -> SimulatedEndpoint:
    """Return one with the fewest requests, any of those that are equal."""
    fewest = min(one.in_flight for one in left)
    equal = [one for one in left if one.in_flight == fewest]
    return equal[draw(len(equal))] if len(equal) > 1 else equal[0]
