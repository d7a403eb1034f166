"""A clock that only tests move. The gateway takes any callable that returns seconds, so nothing waits for real time."""

from __future__ import annotations


class ManualClock:
    """Seconds that stand still until ``advance``.

    It starts at an odd figure far from 0, so that code which confuses "unset" with a time shows.
    """

    def __init__(self, start: float = 100_003.25) -> None:
        self._now = start

    def __call__(self) -> float:
        """Return the current time in seconds."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Move the clock forward. Time never runs backwards: a negative step is a ``ValueError``."""
        if seconds < 0:
            raise ValueError(f"a monotonic clock cannot go back by {-seconds} s")
        self._now += seconds
