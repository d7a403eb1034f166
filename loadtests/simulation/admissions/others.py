"""No admission at all, and a queue first come first served before engines that are given so many at once."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from gateway.policy.concurrency import ConcurrencyRules
from gateway.policy.routing import Choice
from loadtests.simulation.fleet import SimulatedEndpoint
from loadtests.simulation.flight import Flight
from loadtests.simulation.world import World

UNBOUNDED = 1_000_000


class Queued:
    """Requests wait in one line, in the order they came, each for a time at most. ``bound``: an engine is given so many
    at once."""

    every = 0.1

    def __init__(self, world: World, bound: int, length: int, patience: float) -> None:
        self.world = world
        self._length = length
        self._patience = patience
        self._line: deque[Flight] = deque()
        self._count = 0
        for endpoint in world.endpoints:
            endpoint.give_at_most(ConcurrencyRules(most=bound))

    def arrive(self, flight: Flight, now: float) -> None:
        """Send a request, let it wait or refuse it."""
        if not self._count and self._send(flight, now):
            return
        if not any(one.healthy for one in self.world.endpoints if one not in flight.tried):
            self.world.refuse(flight, "no engine")
        elif self._count >= self._length:
            self.world.refuse(flight, "full")
        else:
            flight.expires = now + self._patience
            self._line.append(flight)
            self._count += 1

    def open(self, now: float) -> bool:
        """Tell whether anybody may be sent now."""
        return True

    def _send(self, flight: Flight, now: float) -> bool:
        world = self.world
        if not self.open(now):
            return False
        choice: Choice[SimulatedEndpoint] | None
        choice = world.router.choose(flight.job, world.endpoints, flight.tried, world.draw, now)
        if choice is None:
            return False
        world.router.sent(flight.job, choice.endpoint)
        world.send(flight, choice)
        return True

    def freed(self, endpoint: SimulatedEndpoint, now: float) -> None:
        """Give turns when this event is dealt with."""
        if self._count:
            self.world.soon(lambda: self.turns(now))

    def turns(self, now: float) -> None:
        """Send whoever is first as long as there is room; refuse whose time is over."""
        line = self._line
        while line:
            first = line[0]
            if first.expires < 0 or first.end is not None:
                line.popleft()
            elif first.expires <= now:
                self._out(line.popleft())
                self.world.refuse(first, "expired")
            elif self._send(first, now):
                self._out(line.popleft())
            else:
                return

    def _out(self, flight: Flight) -> None:
        flight.expires = -1.0
        self._count -= 1

    def left(self, flight: Flight, now: float) -> None:
        """Let go of its place."""
        if flight.expires >= 0:
            self._out(flight)

    def done(self, flight: Flight, now: float) -> None:
        """Nobody is charged."""

    def tick(self, now: float) -> None:
        """Look at who waits."""
        self.turns(now)

    def waiting(self) -> int:
        """Return how many wait."""
        return self._count


@dataclass(frozen=True, slots=True)
class NoAdmission:
    """Whatever comes is sent at once; engines have queues of their own."""

    def __call__(self, world: World) -> Queued:
        """Make it."""
        return Queued(world, UNBOUNDED, 0, 0.0)


@dataclass(frozen=True, slots=True)
class Fcfs:
    """``bound`` requests at each engine at once, ``length`` that wait (SMG's ``queue-size`` is 100), for as long as
    ``patience`` says, None: as the SLO of the world has it (SMG's ``queue-timeout`` is 60 s)."""

    bound: int = 256
    length: int = 100
    patience: float | None = 60.0

    def __call__(self, world: World) -> Queued:
        """Make it."""
        patience = world.setting.patience if self.patience is None else self.patience
        return Queued(world, self.bound, self.length, patience)
