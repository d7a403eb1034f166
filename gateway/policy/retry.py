"""Whether a request whose attempt failed is sent again, and where."""

from __future__ import annotations

import enum


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


def decide(cause: Cause, attempts: int, retries: int, *, replayed: bool) -> Next:
    """Return what follows ``attempts`` failed ones when ``retries`` more are allowed.

    A stale connection costs no attempt, but ``replayed`` tells that it happened before: then it counts as broken.
    """
    if cause is Cause.STALE and replayed:
        cause = Cause.BROKEN
    if cause is Cause.BROKEN:
        retries = min(retries, BROKEN_RETRIES)
    then = _TABLE[cause]
    if then is Next.ELSEWHERE and attempts > retries:
        return Next.GIVE_UP
    return then
