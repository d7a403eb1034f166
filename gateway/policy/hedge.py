"""Whether a request whose engine is silent is sent to a second one, and when.

Rule 1: only after longer than 95 of 100 others took lately, or after a time that was set; never while it is not known.
Rule 2: at most a share of the requests: what an overload makes slow is not doubled.

A request that is outrun counts for as long as it was waited for: less than it would have taken, but no less than most.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from itertools import accumulate

import msgspec

QUANTILE = 0.95
KNOWN_AFTER = 40
"""Requests after which it is known how long they take."""
MEMORY = 1000
"""Requests after which the past counts half."""
STEP = 1.25
"""From one bound to the next: how exact a time is."""
SHORTEST = 0.001
BOUNDS = tuple(SHORTEST * STEP**place for place in range(64))
MOST_SAVED = 10.0
"""Requests that may be sent a second time at once, at most."""
KINDS = 1024
"""Of requests whose times are kept apart."""


class HedgeRules(msgspec.Struct, frozen=True, gc=False):
    """``after``: seconds of silence, None: as long as 95 of 100 take; ``share`` of the requests, at most."""

    after: float | None = None
    share: float = 0.05


class Times:
    """How long requests of one kind took lately."""

    __slots__ = ("_counts", "_seen")

    def __init__(self) -> None:
        self._counts = [0.0] * (len(BOUNDS) + 1)
        self._seen = 0.0

    def took(self, seconds: float) -> None:
        """Take that one took so long."""
        place = math.ceil(math.log(seconds / SHORTEST, STEP) - 1e-9) if seconds > SHORTEST else 0
        self._counts[min(place, len(BOUNDS))] += 1
        self._seen += 1
        if self._seen >= MEMORY:
            self._counts = [count / 2 for count in self._counts]
            self._seen /= 2

    def usual(self) -> float:
        """Return the seconds within which 95 of 100 were, up to ``STEP`` times as much; infinity: it is not known."""
        if self._seen < KNOWN_AFTER:
            return math.inf
        needed = QUANTILE * self._seen
        below = accumulate(self._counts)
        return next((bound for bound, count in zip(BOUNDS, below, strict=False) if count >= needed), math.inf)


class Hedging:
    """When requests of one gateway are sent a second time. One owner. Kinds are whatever takes a time of its own."""

    def __init__(self, rules: HedgeRules) -> None:
        self.rules = rules
        self._times: dict[Hashable, Times] = {}
        self._saved = 0.0

    def asked(self) -> None:
        """Count a request: those that are sent a second time are a share of these."""
        self._saved = min(MOST_SAVED, self._saved + self.rules.share)

    def took(self, kind: Hashable, seconds: float) -> None:
        """Take how long a request took to begin its answer."""
        times = self._times.get(kind)
        if times is None:
            if len(self._times) >= KINDS:
                del self._times[next(iter(self._times))]
            times = self._times[kind] = Times()
        times.took(seconds)

    def after(self, kind: Hashable) -> float:
        """Return the seconds of silence after which a request is sent a second time; infinity: it is not."""
        if self.rules.after is not None:
            return self.rules.after
        times = self._times.get(kind)
        return times.usual() if times is not None else math.inf

    def take(self) -> bool:
        """Take one out of the share, if there is one left."""
        if self._saved < 1.0:
            return False
        self._saved -= 1.0
        return True
