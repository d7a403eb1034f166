"""Who is sent to an engine now, who waits, and who is refused: the shell around the queue and the endpoints' limits.

Rule 1: whoever can be served at once is, without a place in the queue; nobody overtakes those who wait for the same.
Rule 2: whoever waits costs no task: his relay is told when it is his turn, and keeps its own deadlines meanwhile.
Rule 3: turns are given out once an event loop's turn, after whatever made room is done.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Protocol

import msgspec

from engines.protocol import Capability
from gateway.errors import Kind, Refusal
from gateway.metrics import Metrics
from gateway.policy.concurrency import ConcurrencyRules
from gateway.policy.hedge import HedgeRules, Hedging
from gateway.policy.queue import Queue, QueueRules, Rejected, Waiting, Why, line_name
from gateway.policy.resume import Moves, ResumeRules, moved
from gateway.policy.retry import BudgetRules, fresh, requested, retried
from gateway.policy.routing import Choice, Job, Router
from gateway.serving.deadlines import NEVER
from gateway.serving.pool import Endpoint, Group, Pool
from gateway.serving.resume import Memory

if TYPE_CHECKING:
    from gateway.serving.ticket import Ticket

CLASSES = ("priority", "default", "flex")
"""The best first; the words are those of OpenAI's ``service_tier``."""
DEFAULT = CLASSES.index("default")
LOOK = 0.1
"""Seconds after which those who wait are looked at again, whatever happened: endpoints come up by themselves."""


@dataclass(frozen=True, slots=True)
class AdmissionRules:
    """``patience``: seconds that each class may wait; ``output_weight``: what a token of an answer counts for when
    tenants share, one of a prompt being 1."""

    queue: QueueRules = field(default_factory=QueueRules)
    capacity: ConcurrencyRules = field(default_factory=ConcurrencyRules)
    patience: tuple[float, ...] = (60.0, 60.0, 600.0)
    output_weight: float = 2.0
    retries: BudgetRules = field(default_factory=BudgetRules)
    hedge: HedgeRules | None = None

    def cost(self, prompt: int, output: int) -> float:
        """Return what a request counts for when tenants share."""
        return 1.0 + prompt + self.output_weight * output


class Terms(msgspec.Struct, frozen=True, gc=False):
    """On what terms a request waits: its class, and how many seconds its client has patience for (None: as many as the
    class)."""

    rank: int = DEFAULT
    patience: float | None = None


USUAL = Terms()


class Waiter(Protocol):
    """Whoever waits for an engine."""

    def on_turn(self, now: float) -> None:
        """Take that it is his turn: an endpoint has room for him."""
        ...

    def on_displaced(self, rejected: Rejected, now: float) -> None:
        """Take that he has to make room for somebody else."""
        ...

    def on_regroup(self, now: float) -> None:
        """Take that other endpoints serve what he waits for, and that he is in no line any more."""
        ...


class Admission:
    """The queue of one replica and what stands between it and the endpoints. ``soon`` calls back once this turn of the
    event loop is over, ``draw`` returns a random number below another."""

    def __init__(
        self,
        pool: Pool,
        metrics: Metrics,
        clock: Callable[[], float],
        rules: AdmissionRules,
        soon: Callable[[Callable[[], None]], object],
        draw: Callable[[int], int],
    ) -> None:
        self.pool = pool
        self.queue = Queue(rules.queue, len(CLASSES), _line_name)
        self.rules = rules
        self._metrics = metrics
        self._clock = clock
        self._soon = soon
        self._freed: dict[Endpoint, None] = {}
        self._lines: dict[Endpoint, dict[Group, None]] = {}
        """Of each endpoint the lines of those who may wait for it."""
        self._called = False
        self._place: Endpoint | None = None
        """Whose turns are given out now."""
        self._draw = draw
        self.router: Router[Endpoint] = Router(stretches=Endpoint.stretches)
        self._retries = fresh(rules.retries, clock())
        self._requests = 0
        self.kept = Memory()
        """What is kept of streams so that they can go on elsewhere."""
        self._moves = Moves()
        self.deadline = NEVER
        self.hedging: Hedging | None = None
        """When requests are sent to a second engine; None: never."""
        self.on_wait: list[Callable[[Group], None]] = []
        """Who is told when somebody begins to wait."""
        pool.on_index = self._regroup
        pool.on_return = self.router.emptied
        self.configure(rules)

    def configure(self, rules: AdmissionRules) -> None:
        """Take other rules; whoever waits keeps his place."""
        self.rules = rules
        self.queue.rules = rules.queue
        if rules.hedge is None or self.hedging is None:
            self.hedging = Hedging(rules.hedge) if rules.hedge is not None else None
        else:
            self.hedging.rules = rules.hedge
        self.pool.give_at_most(rules.capacity)
        self.deadline = 0.0 if rules.capacity.targets else min(self.deadline, NEVER)

    # --- who is served now ------------------------------------------------------------------------------------------

    def choose(
        self, group: Group, tried: Collection[Endpoint], job: Job, now: float, *, turn: bool = False
    ) -> Choice[Endpoint] | None:
        """Return who serves a request now; None: nobody has room, or others wait for them (unless it is the request's
        own ``turn``)."""
        left: Container[Endpoint] = tried
        place = self._place if turn else None
        if self.queue.count:
            if not turn and self.queue.in_line(group):
                return None
            left = _Spoken(tried, partial(self._awaited, group, place))
        choice = self.router.choose(job, group.endpoints, left, self._draw, now, near=place)
        if choice is None or (not choice.trusted and self._better(group, tried, now)):
            return None
        if group.chosen:
            self.router.sent(job, choice.endpoint)
        return choice

    def _awaited(self, group: Group, place: Endpoint | None, endpoint: Endpoint) -> bool:
        """Whether an endpoint that is not the ``place`` is held, or somebody in another line than a group's waits for
        it."""
        if endpoint is place:
            return False
        in_line = self.queue.in_line
        return self.queue.holds(endpoint) or any(
            other is not group and in_line(other) for other in self._lines.get(endpoint, ())
        )

    def would_choose(self, group: Group, job: Job, now: float) -> Choice[Endpoint] | None:
        """Return who would serve a request now, whoever waits; nothing is learnt of it."""
        return self.router.choose(job, group.endpoints, (), self._draw, now)

    @staticmethod
    def _better(group: Group, tried: Collection[Endpoint], now: float) -> bool:
        """Whether somebody else, busy now, is a better choice than an endpoint that is not trusted."""
        return any(one.available and one.trusted(now) for one in group.endpoints if one not in tried)

    @staticmethod
    def hopeful(group: Group, tried: Collection[Endpoint]) -> bool:
        """Whether it is any use to wait: an endpoint is there that is only busy, or one will be started for somebody
        whom none has failed."""
        if group.wake is not None and not tried:
            return True
        return any(one.healthy and not one.holds for one in group.endpoints if one not in tried)

    def fitting(self, group: Group, model: str, needs: Capability, context: tuple[int, int]) -> Group:
        """Return those of a group that can serve a request, where they are not alike. ``context``: the tokens that it
        needs at the very least, and probably: a context that is probably too short serves while no other can."""
        least, likely = context
        fit = self.pool.fitting(group, model, needs, likely)
        return fit if self.hopeful(fit, ()) else self.pool.fitting(group, model, needs, least)

    @staticmethod
    def asleep(group: Group) -> bool:
        """Whether an endpoint has to be started before anybody is served."""
        return group.wake is not None and not any(one.healthy and not one.holds for one in group.endpoints)

    @staticmethod
    def sound(group: Group, tried: Collection[Endpoint], now: float) -> bool:
        """Whether an endpoint is there that nothing speaks against, busy or not."""
        return any(one.healthy and not one.holds and one.trusted(now) for one in group.endpoints if one not in tried)

    def idle(self, group: Group, tokens: int, now: float, tried: Collection[Endpoint] = ()) -> bool:
        """Whether an endpoint is well, has room for so many tokens more, and nobody waits for it."""
        waits = self.queue.waiting
        return any(
            one.available and one.room(tokens) and one.trusted(now) and not any(map(waits, self._lines.get(one, ())))
            for one in group.endpoints
            if one not in tried
        )

    def asked(self) -> None:
        """Count a request: what retries are allowed is a share of these."""
        self._requests += 1

    def may_retry(self, now: float) -> bool:
        """Take one out of the budget of retries, if there is one left: engines that fail are not sent more for it."""
        rules = self.rules.retries
        budget = requested(self._retries, now, rules, self._requests)
        self._requests = 0
        after = retried(budget, now, rules)
        self._retries = budget if after is None else after
        if after is None:
            self._metrics.retries_denied += 1
        return after is not None

    def may_move(self, now: float, rules: ResumeRules) -> bool:
        """Count that a stream goes on elsewhere, if one more may now."""
        moves = moved(self._moves, now, self._metrics.in_flight(), rules)
        if moves is None:
            return False
        self._moves = moves
        return True

    # --- who waits --------------------------------------------------------------------------------------------------

    def place(
        self,
        ticket: Ticket,
        group: Group,
        terms: Terms,
        weight: float,
        size: tuple[int, int],
        now: float,
        waiter: Waiter | None,
    ) -> Waiting:
        """Return what the queue must know of a request whose prompt and answers are estimated at ``size`` tokens."""
        rules, (prompt, output) = self.rules, size
        patience = rules.patience[terms.rank]
        asleep = self.asleep(group)
        if asleep and group.wake is not None and group.wake.seconds > patience:
            patience = group.wake.seconds
        if terms.patience is not None and terms.patience < patience:
            patience = terms.patience
        item = Waiting(
            ticket.tenant,
            now,
            ticket.started + patience,
            rank=terms.rank,
            weight=weight,
            cost=rules.cost(prompt, output),
            tokens=prompt + output,
            size=ticket.bytes_in,
            waiter=waiter,
        )
        item.patient = asleep
        return item

    def look(self, group: Group, item: Waiting, now: float) -> Rejected | None:
        """Tell whether a request would be refused a place now, before anything is reserved for it."""
        if not self.queue.waiting(group):
            return None
        rejected = self.queue.look(group, item, now)
        if rejected is not None:
            self._metrics.queue_refused(CLASSES[item.rank], rejected.why.value)
        return rejected

    def enter(self, group: Group, item: Waiting, now: float) -> Rejected | None:
        """Let a request wait, or say why it may not."""
        result = self.queue.enter(group, item, now)
        if isinstance(result, Rejected):
            self._metrics.queue_refused(CLASSES[item.rank], result.why.value)
            self._left(group)
            return result
        if group.endpoints and group not in self._lines.get(group.endpoints[0], ()):
            for endpoint in group.endpoints:
                self._lines.setdefault(endpoint, {})[group] = None
        self.deadline = min(self.deadline, now + LOOK)
        for displaced in result or ():
            self._left(_group_of(displaced))
            waiter: Waiter = displaced.waiter
            waiter.on_displaced(self.give_up(displaced, now, Why.DISPLACED), now)
        for told in self.on_wait:
            told(group)
        return None

    def waiting_for(self, endpoint: Endpoint) -> int:
        """Return how many wait for an endpoint: of those that wait for any of several, its part."""
        waiting = 0
        for group in self._lines.get(endpoint, ()):
            count = self.queue.waiting(group)
            if count:
                able = sum(one.available for one in group.endpoints)
                waiting += -(-count // max(1, able))
        return waiting

    def leave(self, item: Waiting) -> None:
        """Let go of a request that waits no longer, unless it is out already."""
        if not item.gone:
            self.queue.leave(item)
            self._left(_group_of(item))

    def _left(self, group: Group) -> None:
        """Forget a line that is empty, if nobody but those who have tried others before can stand in it: there are as
        many such lines as there are pairs of endpoints."""
        if not group.kept and not self.queue.waiting(group):
            for endpoint in group.endpoints:
                lines = self._lines.get(endpoint)
                if lines is not None:
                    lines.pop(group, None)
            self.queue.drop(group)
            self.pool.drop(group)

    def give_up(self, item: Waiting, now: float, why: Why) -> Rejected:
        """Return what a request is told that waited in vain."""
        self.leave(item)
        self._metrics.queue_refused(CLASSES[item.rank], why.value)
        return self.queue.displaced(item, now, why)

    def settle(self, item: Waiting, prompt: int, output: int) -> None:
        """Correct what the tenant was charged by what the request really used."""
        self.queue.settle(item, self.rules.cost(prompt, output) - item.cost)

    # --- whose turn it is -------------------------------------------------------------------------------------------

    def freed(self, endpoint: Endpoint) -> None:
        """Take that an endpoint may have room again."""
        if self.queue.count:
            self._freed[endpoint] = None
            if not self._called:
                self._called = True
                self._soon(self._turns)

    def _turns(self) -> None:
        self._called = False
        self._give_turns(self._clock())

    def _give_turns(self, now: float) -> None:
        while self._freed and self.queue.count:
            endpoint, _ = self._freed.popitem()
            # At most as often as somebody waits: whoever cannot be sent after all waits again, and not for ever here.
            for _ in range(self.queue.count):
                if not (endpoint.available and endpoint.room(0)):
                    break
                lines: Iterable[Group] = self._lines.get(endpoint, ())
                if not endpoint.trusted(now):
                    lines = [group for group in lines if not self._better(group, (), now)]
                item = self.queue.next(lines, partial(_fits, endpoint), now, endpoint)
                if item is None:
                    break
                self._left(_group_of(item))
                self._give_turn(item, endpoint, now)
        self._freed.clear()

    def _give_turn(self, item: Waiting, endpoint: Endpoint, now: float) -> None:
        self._metrics.queue_waited(CLASSES[item.rank], now - item.arrived)
        waiter: Waiter = item.waiter
        self._place = endpoint
        try:
            waiter.on_turn(now)
        except Exception as error:
            # Heard of by itself: it is nobody else's fault, and must not cost others their turns.
            self._soon(partial(_raise, error))
        self._place = None

    def on_deadline(self, now: float) -> None:
        """Look at those who wait, and at how fast endpoints answer: what made room was perhaps nobody's word."""
        watched = False
        for endpoint in self.pool.endpoints:
            if endpoint.watched:
                watched = True
                endpoint.adapt(now)
        if self.queue.count:
            self._freed.update(dict.fromkeys(self._lines))
            self._give_turns(now)
        self.deadline = now + LOOK if watched or self.queue.count else NEVER

    def _regroup(self) -> None:
        """Queue everybody anew: other endpoints serve what they wait for."""
        groups = [group for group, _ in self.queue.lines()]
        self._lines.clear()
        self._freed.clear()
        now = self._clock()
        for item in [item for group in groups for item in self.queue.forget(group)]:
            waiter: Waiter = item.waiter
            waiter.on_regroup(now)
        for endpoint in self._lines:
            self.freed(endpoint)

    def waiting_by_pool(self) -> Iterable[tuple[str, int]]:
        """Return how many wait for each pool that has a name; those that are started for them are always there."""
        counts = dict.fromkeys((wake.pool for wake in self.pool.wakes.values()), 0)
        for group, count in self.queue.lines():
            assert isinstance(group, Group)
            name = group.wake.pool if group.wake is not None else ""
            name = name or (group.endpoints[0].spec.pool if group.endpoints else "")
            if name:
                counts[name] = counts.get(name, 0) + count
        return counts.items()

    def waiting(self) -> Iterable[tuple[str, int]]:
        """Return how many of each class wait."""
        return zip(CLASSES, self.queue.by_class(), strict=True)


def _line_name(group: Group) -> str:
    names = [endpoint.name for endpoint in group.endpoints]
    # Of engines that are not there yet the pool is all that is known.
    return line_name([*names, group.wake.pool] if group.wake is not None else names)


class _Spoken(Container[Endpoint]):
    """Endpoints that somebody who has just come is not sent to: those he tried, and those that others wait for."""

    __slots__ = ("_awaited", "_tried")

    def __init__(self, tried: Collection[Endpoint], awaited: Callable[[Endpoint], bool]) -> None:
        self._tried = tried
        self._awaited = awaited

    def __contains__(self, endpoint: object) -> bool:
        return endpoint in self._tried or (isinstance(endpoint, Endpoint) and self._awaited(endpoint))


def _raise(error: Exception) -> None:
    raise error


def _fits(endpoint: Endpoint, item: Waiting) -> bool:
    return endpoint.available and endpoint.room(item.tokens)


def _group_of(item: Waiting) -> Group:
    assert item.line is not None
    group = item.line.key
    assert isinstance(group, Group)
    return group


_TOLD = {
    Why.FULL: "As many requests as may are waiting already.",
    Why.DISPLACED: "It had to make room for others: fewer of theirs were waiting, or they go first.",
}


def slow_down(rejected: Rejected, model: str, waited: float) -> Refusal:
    """Return what a client is told whose request is not let in, or waited in vain."""
    if rejected.why is Why.LATE:
        why = f"This request would have to wait for about {_seconds(rejected.wait)}, longer than it may."
    elif rejected.why is Why.EXPIRED:
        why = f"This request waited for {_seconds(waited)}, as long as it may, and none came free."
    else:
        why = _TOLD[rejected.why]
    told = f"The engines that serve {model!r} are busy. {why} Send it again in {_seconds(rejected.retry_after)}."
    return Refusal(Kind.SLOW_DOWN, told, retry_after=rejected.retry_after)


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
