"""What is done later, and whether somebody has waited too long.

Rule 1: an answer is overdue by the loop's own time; a loop that was itself held up lets the server answer first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

_TURNS = 3
"""Of the event loop, within which what has arrived is read and handed on."""


class Timer:
    """Runs a function once, later; to be set again and again."""

    __slots__ = ("_handle", "_run", "due")

    def __init__(self, run: Callable[[], None]) -> None:
        self._run = run
        self._handle: asyncio.TimerHandle | None = None
        self.due = 0.0
        """By the loop's time, when it was last set."""

    @property
    def is_set(self) -> bool:
        """Whether it will run."""
        return self._handle is not None

    def set(self, seconds: float) -> None:
        """Have it run so much later; what it was set to before is void."""
        self.cancel()
        loop = asyncio.get_running_loop()
        self.due = loop.time() + seconds
        self._handle = loop.call_at(self.due, self._ring)

    def cancel(self) -> None:
        """Not have it run."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _ring(self) -> None:
        self._handle = None
        self._run()


class Overdue:
    """Calls ``late`` before somebody has waited for ``timeout`` seconds; ``oldest`` says since when the first has."""

    def __init__(self, timeout: float, oldest: Callable[[], float | None], late: Callable[[], None]) -> None:
        self._timeout = timeout
        self._oldest = oldest
        self._late = late
        self._timer = Timer(self._look)
        self._turns_left: int | None = None

    def watch(self) -> None:
        """Somebody waits from now on."""
        if not self._timer.is_set:
            self._timer.set(self._timeout / 5)

    def stop(self) -> None:
        """Nobody waits any more."""
        self._timer.cancel()

    def _look(self) -> None:
        now = asyncio.get_running_loop().time()
        oldest = self._oldest()
        if oldest is None or now - oldest < self._timeout * 0.8:
            self._turns_left = None
            if oldest is not None:
                self.watch()
        elif self._turns_left is None and now - self._timer.due > self._timeout / 5:
            self._turns_left = _TURNS
            self.watch()
        elif self._turns_left:
            self._turns_left -= 1
            asyncio.get_running_loop().call_soon(self._look)
        else:
            self._turns_left = None
            self._late()
