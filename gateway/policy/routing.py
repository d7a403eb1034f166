"""Which endpoint serves a request."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import inf
from typing import Protocol, TypeVar

LEAST_SHARE = 0.1
"""What an endpoint that has just come up gets of a whole share: enough to warm it up."""


class Candidate(Protocol):
    """What routing looks at."""

    in_flight: int
    ramp_from: float
    """When it came up, in seconds of the clock that ``now`` is of."""
    ramp_until: float
    """When it may be given as much as any other."""

    @property
    def available(self) -> bool:
        """Whether the endpoint can be given work now."""
        ...

    def trusted(self, now: float) -> bool:
        """Whether nothing speaks against giving it work."""
        ...


C = TypeVar("C", bound=Candidate)


def least_loaded(candidates: Sequence[C], tried: Collection[C], start: int, now: float) -> C | None:
    """Return the available endpoint with the fewest requests in flight for its share, None when there is none.

    One that is not trusted is chosen only when no other is left: a bad engine is better than a sure refusal. Ties go
    round robin: the search begins at ``start`` (any integer), so that equal endpoints share the work.
    """
    if len(candidates) == 1:
        only = candidates[0]
        return only if only not in tried and only.available else None
    best: C | None = None
    least = (True, inf)
    count = len(candidates)
    for offset in range(count):
        candidate = candidates[(start + offset) % count]
        if candidate in tried or not candidate.available:
            continue
        load: float = candidate.in_flight
        if candidate.ramp_until > now:
            # The request to come counts too: an empty newcomer must not look better than an empty old hand.
            load = (load + 1) / share(candidate.ramp_from, candidate.ramp_until, now) - 1
        trusted = candidate.trusted(now)
        rank = (not trusted, load)
        if rank < least:
            best, least = candidate, rank
            if trusted and load == 0:
                break
    return best


def share(since: float, until: float, now: float) -> float:
    """Return what part of a whole share an endpoint gets: it grows evenly from ``since`` to ``until``."""
    if now >= until:
        return 1.0
    return max(LEAST_SHARE, (now - since) / (until - since))
