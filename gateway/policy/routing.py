"""Which endpoint serves a request."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol, TypeVar


class Candidate(Protocol):
    """What routing looks at."""

    in_flight: int

    @property
    def available(self) -> bool:
        """Whether the endpoint can be given work now."""
        ...


C = TypeVar("C", bound=Candidate)


def least_loaded(candidates: Sequence[C], tried: Collection[C], start: int) -> C | None:
    """Return the available endpoint with the fewest requests in flight, None when there is none.

    Ties go round robin: the search begins at ``start`` (any integer), so that equal endpoints share the work.
    """
    best: C | None = None
    count = len(candidates)
    for offset in range(count):
        candidate = candidates[(start + offset) % count]
        if candidate in tried or not candidate.available:
            continue
        if best is None or candidate.in_flight < best.in_flight:
            best = candidate
            if best.in_flight == 0:
                break
    return best
