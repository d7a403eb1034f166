"""The loop: requests come, engines work, a router and an admission decide, until every request has ended.

Rule 1: time goes from event to event; of two at the same nanosecond the one that was noted first comes first.
Rule 2: nothing is drawn but from the run's own seed: the same run gives the same figures.
Rule 3: every request ends exactly once.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Protocol, cast

from adapters.catalogue import Catalogue
from engines.simulation.batching import Finished, FirstToken, Request
from engines.simulation.profiles import Profile
from gateway.limits import Limits
from gateway.policy import retry
from gateway.policy.estimate import Estimator
from gateway.policy.prefix import MOST_BLOCKS, block_hashes
from gateway.policy.retry import BudgetRules, Cause, Next
from gateway.policy.routing import Choice, Job
from gateway.policy.scorers import Slots
from gateway.serving.pool import Endpoint, Group, Pool
from loadtests.simulation.fleet import NS, UNIT, SimulatedEndpoint, hashed
from loadtests.simulation.flight import End, Flight
from loadtests.simulation.routers import Routes
from loadtests.simulation.workloads import BYTES, Ask, Faults, Workload, text_of

MOST_HASHED = 1024
"""Blocks of a prompt that an engine's cache tells apart: all that is asked here."""
RETRIES = 2
"""As ``stream.retries`` of the gateway has it."""
_MODEL = "model"


class Gate(Protocol):
    """Decides who is sent to an engine now, who waits and who is refused: an admission."""

    every: float
    """Seconds after which it looks again at who waits."""

    def arrive(self, flight: Flight, now: float) -> None:
        """Take a request, or one whose attempt failed: send it, let it wait or refuse it."""

    def freed(self, endpoint: SimulatedEndpoint, now: float) -> None:
        """Take that a request has ended at an endpoint."""

    def left(self, flight: Flight, now: float) -> None:
        """Take that a request waits no longer: its client is gone."""

    def done(self, flight: Flight, now: float) -> None:
        """Take that a request was served to its end."""

    def tick(self, now: float) -> None:
        """Look at who waits."""

    def waiting(self) -> int:
        """Return how many wait."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What is simulated, policies aside. ``oracle``: the length of an answer is known when it is asked for."""

    workload: Workload
    profile: Profile
    endpoints: int
    seed: int
    oracle: bool = False

    @property
    def patience(self) -> float:
        """Seconds that a request may wait in a queue: half of the time its first token may take."""
        workload = self.workload
        return workload.slo.ttft / 2 if workload.patience is None else workload.patience


class World:
    """One run. ``router`` and ``gate`` (made with the world) are what is compared; ``ended`` is told of each request
    that has ended, ``looked`` (twice a second, if given) of the time."""

    def __init__(
        self,
        setting: Setting,
        router: Routes,
        gate: Callable[[World], Gate],
        ended: Callable[[Flight], None],
        looked: Callable[[World, float], None] | None = None,
    ) -> None:
        self.setting = setting
        self.router = router
        self.now = 0.0
        self.steps = 0
        """Events so far."""
        self.flights: dict[str, Flight] = {}
        """Those that have come and not ended."""
        self._ended = ended
        self._looked = looked
        self._chance = random.Random(f"{setting.seed}/decisions")
        self.draw = self._chance.randrange
        self._events: list[tuple[int, int, Callable[[int], None]]] = []
        self._order = 0
        self._soon: list[Callable[[], None]] = []
        self._estimator = Estimator()
        self._assumed = Limits().assumed_output
        self._budget = retry.fresh(BudgetRules(), 0.0)
        self.pool = Pool(Catalogue())
        self.endpoints = tuple(_fleet(setting))
        self.pool.endpoints = list(self.endpoints)
        self.pool.index()
        self.gate = gate(self)
        self.pool.on_return = cast("Callable[[Endpoint], None]", router.emptied)
        self.group: Group = self.pool.group_of(self.endpoints)
        faults = setting.workload.faults
        if faults.every:
            self._at(round(faults.every * NS), lambda ns: self._kill(faults, 0, ns))

    # --- the loop ---------------------------------------------------------------------------------------------------

    def run(self, asks: Iterable[Ask], watch: Callable[[World], None] | None = None) -> None:
        """Run until every request has ended; ``watch`` is called after each event."""
        coming = iter(asks)
        self._next(coming)
        self._at(round(self.gate.every * NS), self._tick)
        if self._looked is not None:
            self._at(NS // 2, self._look)
        events = self._events
        while events and not (self._over and not self.flights):
            ns, _, event = heapq.heappop(events)
            self.now = ns / NS
            self.steps += 1
            event(ns)
            while self._soon:
                soon, self._soon = self._soon, []
                for call in soon:
                    call()
            if watch is not None:
                watch(self)
        assert not self.flights, "some have not ended"

    _over = False

    def _at(self, ns: int, event: Callable[[int], None]) -> None:
        self._order += 1
        heapq.heappush(self._events, (ns, self._order, event))

    def _next(self, coming: Iterator[Ask]) -> None:
        ask = next(coming, None)
        if ask is None:
            self._over = True
            return

        def come(ns: int) -> None:
            self._next(coming)
            self._come(ask, ns)

        self._at(round(ask.at * NS), come)

    def _tick(self, ns: int) -> None:
        self.gate.tick(self.now)
        self._at(ns + round(self.gate.every * NS), self._tick)

    def _look(self, ns: int) -> None:
        assert self._looked is not None
        self._looked(self, self.now)
        self._at(ns + NS // 2, self._look)

    def every_second(self, call: Callable[[float], None]) -> None:
        """Call each second of simulated time."""

        def happen(ns: int) -> None:
            call(ns / NS)
            self._at(ns + NS, happen)

        self._at(NS, happen)

    def clock(self) -> float:
        """Return the time in seconds."""
        return self.now

    def soon(self, call: Callable[[], None]) -> None:
        """Call back when this event is dealt with."""
        self._soon.append(call)

    # --- requests ---------------------------------------------------------------------------------------------------

    def _come(self, ask: Ask, ns: int) -> None:
        hashes = block_hashes(hash((_MODEL, ask.adapter)), text_of(ask.parts), most=MOST_HASHED)
        prompt, output = self._expected(ask)
        blocks = hashes[: min(ask.prompt // UNIT, MOST_BLOCKS)]
        flight = Flight(ask, Job(prompt, output, blocks, ask.session, ask.adapter), hashes)
        self.flights[flight.id] = flight
        self._budget = retry.requested(self._budget, self.now, BudgetRules())
        # By its number: most have long ended by then, and nothing of them is to be kept.
        self._at(ns + round(self.setting.workload.leaves * NS), partial(self._leave, flight.id))
        self.gate.arrive(flight, self.now)

    def _expected(self, ask: Ask) -> tuple[int, int]:
        if self.setting.oracle:
            return ask.prompt, ask.output
        learned = self._estimator.of(ask.tenant, _MODEL)
        return learned.prompt(ask.prompt * BYTES), learned.output(None, self._assumed)

    def _learn(self, ask: Ask) -> None:
        learned = self._estimator.of(ask.tenant, _MODEL)
        if not learned.passes():
            learned.learn(ask.prompt * BYTES, 0, ask.prompt, ask.output, 1, limited=True)

    def send(self, flight: Flight, choice: Choice[SimulatedEndpoint]) -> None:
        """Send a request to the endpoint that was chosen."""
        endpoint, ask, now = choice.endpoint, flight.ask, self.now
        flight.tried.append(endpoint)
        flight.endpoint = endpoint
        flight.sent = now
        flight.ahead, flight.uncached = endpoint.prefilling, choice.uncached
        flight.tokens = flight.job.prompt + flight.job.output
        endpoint.take(flight.uncached, flight.tokens)
        endpoint.sent(now)
        if not endpoint.alive:
            self.soon(lambda: self._unreachable(flight, endpoint))
            return
        ns = round(now * NS)
        if not endpoint.model.running:
            endpoint.look(ns)
        endpoint.flights[flight.id] = flight
        request = Request(flight.id, ask.prompt, ask.output, flight.hashes, ask.adapter)
        refusal = endpoint.model.arrive(request, max(ns, endpoint.model.now))
        assert refusal is None, refusal
        self._arm(endpoint)

    def refuse(self, flight: Flight, why: str) -> None:
        """Refuse a request; one whose engine died is lost instead."""
        flight.refused = why
        self._end(flight, End.LOST if flight.tried else End.REFUSED)

    def _unreachable(self, flight: Flight, endpoint: SimulatedEndpoint) -> None:
        endpoint.down("connection refused")
        self._fail(flight, endpoint, Cause.CONNECT)

    def _fail(self, flight: Flight, endpoint: SimulatedEndpoint, cause: Cause) -> None:
        now = self.now
        if flight.end is not None:
            return
        begun = flight.first >= 0
        endpoint.went_wrong(now)
        then = Next.GIVE_UP if begun else retry.decide(cause, len(flight.tried), RETRIES, replayed=False)
        if then is Next.ELSEWHERE:
            budget = retry.retried(self._budget, now, BudgetRules())
            if budget is None:
                then = Next.GIVE_UP
            else:
                self._budget = budget
        self._give_back(flight)
        if then is Next.ELSEWHERE:
            self.gate.arrive(flight, now)
        else:
            self._end(flight, End.LOST)

    def _give_back(self, flight: Flight) -> None:
        endpoint = flight.endpoint
        if endpoint is not None:
            flight.endpoint = None
            endpoint.flights.pop(flight.id, None)
            endpoint.give_back(flight.uncached, flight.tokens)
            if flight.first >= 0 and endpoint.alive:
                endpoint.streams -= 1
            self.gate.freed(endpoint, self.now)

    def _leave(self, number: str, ns: int) -> None:
        """Its client goes, unless its first token has come."""
        flight = self.flights.get(number)
        if flight is None or flight.first >= 0:
            return
        endpoint = flight.endpoint
        if endpoint is None:
            self.gate.left(flight, self.now)
        elif flight.id in endpoint.flights:
            endpoint.model.abort(flight.id, max(ns, endpoint.model.now))
            self._arm(endpoint)
            self._give_back(flight)
        self._end(flight, End.LEFT)

    def _end(self, flight: Flight, end: End) -> None:
        assert flight.end is None, "a request ended twice"
        flight.end = end
        flight.ended = self.now
        del self.flights[flight.id]
        self._ended(flight)

    # --- engines ----------------------------------------------------------------------------------------------------

    def _arm(self, endpoint: SimulatedEndpoint) -> None:
        due = endpoint.model.next_event()
        if due is not None and due != endpoint.due:
            endpoint.due = due
            model = endpoint.model

            def happen(ns: int) -> None:
                if endpoint.due == ns and endpoint.model is model:
                    endpoint.due = None
                    self._happen(endpoint, ns)

            self._at(due, happen)

    def _happen(self, endpoint: SimulatedEndpoint, ns: int) -> None:
        outcomes = endpoint.model.advance(ns)
        if endpoint.watched:
            endpoint.look(ns)
        adapted = False
        for outcome in outcomes:
            if isinstance(outcome, FirstToken):
                self._first(endpoint, outcome)
            elif isinstance(outcome, Finished):
                adapted = True
                self._finished(endpoint.flights[outcome.id], endpoint)
        if adapted and endpoint.slots is not None:
            _look_at_adapters(endpoint)
        self._arm(endpoint)

    def _first(self, endpoint: SimulatedEndpoint, outcome: FirstToken) -> None:
        flight = endpoint.flights[outcome.id]
        flight.first = self.now
        flight.cached = outcome.cached_tokens
        endpoint.streams += 1
        endpoint.went_well(self.now)
        endpoint.first_token(self.now - flight.sent, flight.uncached, flight.ahead)
        flight.uncached = 0
        if endpoint.slots is not None:
            _look_at_adapters(endpoint)

    def _finished(self, flight: Flight, endpoint: SimulatedEndpoint) -> None:
        endpoint.went_well(self.now)
        self._give_back(flight)
        self._learn(flight.ask)
        self.gate.done(flight, self.now)
        self._end(flight, End.SERVED)

    # --- faults -----------------------------------------------------------------------------------------------------

    def _kill(self, faults: Faults, turn: int, ns: int) -> None:
        endpoint = self.endpoints[turn % len(self.endpoints)]
        if endpoint.alive:
            endpoint.alive = False
            endpoint.due = None
            broken = list(endpoint.flights.values())
            for flight in broken:
                flight.computed += flight.answered() + (flight.ask.prompt - flight.cached if flight.first >= 0 else 0)
            for flight in broken:
                self._fail(flight, endpoint, Cause.BROKEN)
            self._at(ns + round(faults.away * NS), lambda at: self._come_back(endpoint, at))
        if not self._over:
            self._at(ns + round(faults.every * NS), lambda at: self._kill(faults, turn + 1, at))

    def _come_back(self, endpoint: SimulatedEndpoint, ns: int) -> None:
        endpoint.replaced(ns)
        endpoint.healthy = False
        self.router.emptied(endpoint)
        endpoint.up(self.now)
        self.gate.freed(endpoint, self.now)


def _fleet(setting: Setting) -> Iterator[SimulatedEndpoint]:
    faults = setting.workload.faults
    profile = hashed(setting.profile)
    for number in range(setting.endpoints):
        own = profile.slowed(faults.times) if number >= setting.endpoints - faults.slow else profile
        endpoint = SimulatedEndpoint(number, own)
        if setting.workload.adapters:
            endpoint.slots = Slots((), (), own.max_loras)
        yield endpoint


def _look_at_adapters(endpoint: SimulatedEndpoint) -> None:
    """Note which adapters run and wait there: engines say so in their metrics."""
    model = endpoint.model
    running = tuple(model.running_adapters)
    waiting = tuple(name for name in model.waiting_adapters if name not in running)
    endpoint.slots = Slots(running, waiting, endpoint.profile.max_loras)
