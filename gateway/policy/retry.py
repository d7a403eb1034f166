"""Whether a request whose attempt failed is sent again, and where; and how many may be, all in all.

Retries help while few requests fail; when an overload makes most of them fail they would double it. So all retries of a
gateway come out of one budget, which requests fill.
"""

from __future__ import annotations

import enum
import math

import msgspec


class Cause(enum.Enum):
    """How an attempt failed before anything of the answer reached the client."""

    STALE = "stale"
    """A kept connection was closed under the request: nothing was done."""
    CONNECT = "connect"
    OVERLOADED = "overloaded"
    UNKNOWN_MODEL = "unknown_model"
    CREDENTIALS = "credentials"
    BROKEN = "broken"
    """The engine failed, or its answer broke off; it may have worked on the request."""
    SLOW = "slow"
    REQUEST = "request"
    """The request itself is at fault."""


class Next(enum.Enum):
    """What to do about it."""

    SAME = "same"
    ELSEWHERE = "elsewhere"
    FALL_BACK = "fall_back"
    """Another model, where there is one to fall back on."""
    GIVE_UP = "give_up"


_TABLE = {
    Cause.STALE: Next.SAME,
    Cause.CONNECT: Next.ELSEWHERE,
    Cause.OVERLOADED: Next.ELSEWHERE,
    Cause.UNKNOWN_MODEL: Next.ELSEWHERE,
    Cause.CREDENTIALS: Next.ELSEWHERE,
    Cause.BROKEN: Next.ELSEWHERE,
    # Its time is used up, and a second engine would only begin what the client no longer waits for.
    Cause.SLOW: Next.GIVE_UP,
    Cause.REQUEST: Next.GIVE_UP,
}


BROKEN_RETRIES = 1
"""How many more engines are offered a request that an engine broke over: one that kills engines must not kill all."""


def decide(cause: Cause, attempts: int, retries: int, *, replayed: bool, others: bool = False) -> Next:
    """Return what follows ``attempts`` failed ones when ``retries`` more are allowed. ``others``: there are models to
    fall back on; each of these is asked once when no more attempt is allowed.

    A stale connection costs no attempt, but ``replayed`` tells that it happened before: then it counts as broken.
    """
    if cause is Cause.STALE and replayed:
        cause = Cause.BROKEN
    if cause is Cause.BROKEN:
        retries = min(retries, BROKEN_RETRIES)
    then = _TABLE[cause]
    if then is Next.ELSEWHERE and attempts > retries:
        return Next.FALL_BACK if others else Next.GIVE_UP
    return then


class BudgetRules(msgspec.Struct, frozen=True, gc=False):
    """How many retries there may be: a ``share`` of the requests and ``per_second`` more, so that a few always may be.

    What is not used is kept, less and less of it, for about ``window`` seconds: so many seconds' worth may come at once
    when an engine dies.
    """

    share: float = 0.2
    per_second: float = 3.0
    window: float = 10.0


class Budget(msgspec.Struct, frozen=True, gc=False):
    """How many retries may follow at once, as of ``at`` (seconds of one monotonic clock)."""

    credit: float
    at: float


def fresh(rules: BudgetRules, now: float) -> Budget:
    """Return the budget of a gateway that has had no requests."""
    return Budget(rules.per_second * rules.window, now)


def requested(budget: Budget, now: float, rules: BudgetRules, count: int = 1) -> Budget:
    """Return the budget after ``count`` requests, not counting their retries.

    All of them count as if they came now, though no more than a window's worth of an even flow would have left of them:
    so they may be told together, later than they came.
    """
    credit = _credit(budget, now, rules)
    passed = max(0.0, now - budget.at)
    share = rules.share * count
    if count > 1 and passed:
        # An even flow over this time: each faded since it came.
        share *= rules.window / passed * (1.0 - math.exp(-passed / rules.window))
    return Budget(credit + share, max(now, budget.at))


def retried(budget: Budget, now: float, rules: BudgetRules) -> Budget | None:
    """Return the budget after one more retry, None when there may be none now."""
    credit = _credit(budget, now, rules)
    return Budget(credit - 1.0, max(now, budget.at)) if credit >= 1.0 else None


def _credit(budget: Budget, now: float, rules: BudgetRules) -> float:
    passed = now - budget.at
    if passed <= 0:
        return budget.credit
    # What was saved is forgotten, and without requests it comes to what a window of seconds allows.
    kept = math.exp(-passed / rules.window)
    return budget.credit * kept + rules.per_second * rules.window * (1.0 - kept)
