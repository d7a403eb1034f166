"""Whether an endpoint that failed is offered requests: a circuit breaker as a table of transitions.

    CLOSED ──failures in a row──▶ OPEN ──its time is over and a request is sent──▶ TRIAL
       ▲                            ▲                                               │  │
       │                            └────────────────failed────────────────────────┘  │
       └──────────────────────────────────────ok─────────────────────────────────────┘

An endpoint that fails again in its trial stays out twice as long, up to a bound; after a while without a failure its
past is forgotten. Time is in seconds of one monotonic clock.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace


class State(enum.Enum):
    """What may be sent."""

    CLOSED = "closed"
    """Everything."""
    OPEN = "open"
    """Nothing until its time is over."""
    TRIAL = "trial"
    """One request is on its way and decides; nothing else until then."""


class Event(enum.Enum):
    """What happened."""

    OK = "ok"
    """An answer came, whatever it said of the request."""
    FAILED = "failed"
    """The engine broke, fell silent or refused the gateway's key."""
    SENT = "sent"
    """A request was sent."""


@dataclass(frozen=True, slots=True)
class BreakerRules:
    """``failures`` in a row open it (0: never), for ``first`` seconds, twice as long each time up to ``longest``.

    After ``forgive`` seconds without a failure it is as good as new. A trial that nobody hears of again counts as lost
    after ``longest``.
    """

    failures: int = 5
    first: float = 2.0
    longest: float = 30.0
    forgive: float = 60.0


@dataclass(frozen=True, slots=True)
class Breaker:
    """One endpoint's past. ``until`` is when it may be tried again, or when its past is forgotten."""

    state: State = State.CLOSED
    failures: int = 0
    opened: int = 0
    until: float = 0.0

    def admits(self, now: float) -> bool:
        """Tell whether a request may be sent."""
        return self.state is State.CLOSED or now >= self.until


NEW = Breaker()
"""Nothing is known against it."""


def step(breaker: Breaker, event: Event, now: float, rules: BreakerRules) -> Breaker:
    """Return the breaker after an event."""
    return _TABLE[breaker.state, event](breaker, now, rules)


def _good(breaker: Breaker, now: float, rules: BreakerRules) -> Breaker:
    return NEW if now >= breaker.until else replace(breaker, failures=0)


def _bad(breaker: Breaker, now: float, rules: BreakerRules) -> Breaker:
    failures = breaker.failures + 1
    if not rules.failures or failures < rules.failures:
        return replace(breaker, failures=failures, until=max(breaker.until, now + rules.forgive))
    return _open(breaker, now, rules)


def _open(breaker: Breaker, now: float, rules: BreakerRules) -> Breaker:
    # Bounded before it is raised to a power: an engine may be away for weeks.
    seconds = min(rules.longest, rules.first * 2.0 ** min(breaker.opened, 32))
    return Breaker(State.OPEN, 0, breaker.opened + 1, now + seconds)


def _close(breaker: Breaker, now: float, rules: BreakerRules) -> Breaker:
    return Breaker(State.CLOSED, 0, breaker.opened, now + rules.forgive)


def _try(breaker: Breaker, now: float, rules: BreakerRules) -> Breaker:
    if now < breaker.until:
        # Sent since no better endpoint was left: no trial, but it may be its rehabilitation.
        return breaker
    return Breaker(State.TRIAL, 0, breaker.opened, now + rules.longest)


def _same(breaker: Breaker, now: float, rules: BreakerRules) -> Breaker:
    return breaker


_TABLE = {
    (State.CLOSED, Event.OK): _good,
    (State.CLOSED, Event.FAILED): _bad,
    (State.CLOSED, Event.SENT): _same,
    (State.OPEN, Event.OK): _close,
    # A straggler of before: its failure is known already.
    (State.OPEN, Event.FAILED): _same,
    (State.OPEN, Event.SENT): _try,
    (State.TRIAL, Event.OK): _close,
    (State.TRIAL, Event.FAILED): _open,
    (State.TRIAL, Event.SENT): _try,
}
