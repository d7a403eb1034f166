"""Forebay's: the gateway's own ``Admission``, with its queue, its limits and its turns, driven by the loop's clock.

What the relay does around it is here: it asks for a choice, waits where there is none, tries again when it is called.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from gateway.metrics import Metrics
from gateway.policy.concurrency import ConcurrencyRules, Targets
from gateway.policy.queue import QueueRules, Rejected, Waiting, Why
from gateway.policy.routing import Router
from gateway.serving.admission import LOOK, Admission, AdmissionRules, Terms
from gateway.serving.pool import Endpoint
from loadtests.simulation.fleet import SimulatedEndpoint
from loadtests.simulation.flight import Flight
from loadtests.simulation.world import World

if TYPE_CHECKING:
    from gateway.serving.ticket import Ticket


@dataclass(frozen=True, slots=True)
class Told:
    """What an operator who has an SLO sets: ``ttft`` and ``itl``: times the SLO's that become the targets of
    ``capacity``; None: no targets. ``most``: requests an engine is given at once at most.

    Half of the time of a first token is for the queue, half for the engine. The SLO is of each request's mean between
    tokens, the target of 95 of 100 single gaps, of which those that hold a long prompt are many times the mean.
    """

    ttft: float | None = 0.5
    itl: float | None = 2.5
    start: int = 128
    most: int = 256


def rules(world: World, told: Told) -> AdmissionRules:
    """Return the gateway's rules for a world's SLO."""
    slo, patience = world.setting.workload.slo, world.setting.patience
    targets = Targets(
        told.ttft * slo.ttft if told.ttft else None,
        told.itl * slo.itl if told.itl and slo.itl else None,
    )
    capacity = ConcurrencyRules(targets, start=told.start, most=told.most)
    # The bounds of one process's memory, for as many engines as a fleet of processes has.
    queue = QueueRules(requests=2048 * max(1, world.setting.endpoints // 8), tokens=1 << 40, bytes=1 << 50)
    return AdmissionRules(queue=queue, capacity=capacity, patience=(patience,) * 3)


class _Caller:
    """Who is called when it is a request's turn."""

    __slots__ = ("_flight", "_gate")

    def __init__(self, gate: ForebayGate, flight: Flight) -> None:
        self._gate = gate
        self._flight = flight

    def on_turn(self, now: float) -> None:
        flight = self._flight
        if flight.waiting is not None and flight.waiting.cost:
            flight.turn = flight.waiting
        self._gate.attempt(flight, now, turn=True)

    def on_displaced(self, rejected: Rejected, now: float) -> None:
        self._gate.refuse(self._flight, rejected)

    def on_regroup(self, now: float) -> None:
        self._gate.attempt(self._flight, now, turn=False)


class ForebayGate:
    """The gateway's admission in a world."""

    every = LOOK

    def __init__(self, world: World, told: Told | None = None) -> None:
        self._world = world
        self.admission = Admission(
            world.pool, Metrics(1), world.clock, rules(world, told or Told()), world.soon, world.draw
        )
        self.admission.router = cast("Router[Endpoint]", world.router)
        self._expiring: list[tuple[float, int, Flight]] = []

    def arrive(self, flight: Flight, now: float) -> None:
        """Send a request, let it wait or refuse it."""
        self.attempt(flight, now, turn=False)

    def attempt(self, flight: Flight, now: float, *, turn: bool) -> None:
        """Send it if somebody has room, let it wait if that is of use."""
        admission, group = self.admission, self._world.group
        choice = admission.choose(group, cast("list[Endpoint]", flight.tried), flight.job, now, turn=turn)
        if choice is not None:
            self._world.send(flight, choice)  # type: ignore[arg-type]
        elif admission.hopeful(group, cast("list[Endpoint]", flight.tried)):
            self._wait(flight, now)
        else:
            self._world.refuse(flight, "no engine")

    def _wait(self, flight: Flight, now: float) -> None:
        world, admission = self._world, self.admission
        left = tuple(one for one in world.endpoints if one not in flight.tried)
        group = world.group if not flight.tried else world.pool.group_of(left)
        job = flight.job
        size = job.prompt, job.output
        item = admission.place(cast("Ticket", flight), group, Terms(), 1.0, size, now, _Caller(self, flight))
        if flight.tried:
            item.cost = 0.0  # Charged with its first turn.
        rejected = admission.enter(group, item, now)
        if rejected is not None:
            self.refuse(flight, rejected)
            return
        flight.waiting = item
        heapq.heappush(self._expiring, (item.deadline, flight.ask.number, flight))

    def refuse(self, flight: Flight, rejected: Rejected) -> None:
        """Refuse a request."""
        self._world.refuse(flight, rejected.why.value)

    def freed(self, endpoint: SimulatedEndpoint, now: float) -> None:
        """Give turns when this event is dealt with."""
        self.admission.freed(endpoint)

    def left(self, flight: Flight, now: float) -> None:
        """Let go of its place."""
        if flight.waiting is not None:
            self.admission.leave(flight.waiting)

    def done(self, flight: Flight, now: float) -> None:
        """Correct what its tenant was charged."""
        if flight.turn is not None:
            self.admission.settle(flight.turn, flight.ask.prompt - flight.cached, flight.ask.output)

    def tick(self, now: float) -> None:
        """Let limits learn, give turns, refuse whose time is over."""
        expiring = self._expiring
        while expiring and expiring[0][0] <= now:
            flight = heapq.heappop(expiring)[2]
            item = flight.waiting
            if item is not None and not item.gone and item.deadline <= now:
                self.refuse(flight, self.admission.give_up(item, now, Why.EXPIRED))
        self.admission.on_deadline(now)

    def waiting(self) -> int:
        """Return how many wait."""
        return self.admission.queue.count

    def places(self) -> list[Waiting]:
        """Return whoever waits."""
        return [one.waiting for one in self._world.flights.values() if one.waiting and not one.waiting.gone]


def gate(told: Told | None = None) -> Callable[[World], ForebayGate]:
    """Return how it is made."""
    return lambda world: ForebayGate(world, told)
