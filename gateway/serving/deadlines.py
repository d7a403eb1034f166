"""One sweep for every time-out: whoever waits keeps its own deadline, the sweep asks who is late.

Moving a deadline is one attribute write, which is what a stream does on every event; a timer of its own per wait
would cost more than the event. The price is precision: a deadline is noticed up to one sweep late.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

SWEEP_INTERVAL = 0.1
"""Seconds between two sweeps."""

NEVER = float("inf")


class Waiter(Protocol):
    """Something with a deadline in seconds of the sweep's clock."""

    deadline: float

    def on_deadline(self, now: float) -> None:
        """Act on a deadline that has passed, and set the next one."""
        ...


class Deadlines:
    """Everything that waits, and the clock it waits by."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        # In the order they came: what is done to several at once is the same each time.
        self._waiters: dict[Waiter, None] = {}
        self._task: asyncio.Task[None] | None = None

    def watch(self, waiter: Waiter) -> None:
        """Begin to ask ``waiter`` whether it is late."""
        self._waiters[waiter] = None

    def forget(self, waiter: Waiter) -> None:
        """Stop asking."""
        self._waiters.pop(waiter, None)

    def __len__(self) -> int:
        return len(self._waiters)

    def run_due(self) -> None:
        """Tell everyone who is late, once. Raises what the first that failed raised, when all have been told."""
        now = self.clock()
        late = [waiter for waiter in self._waiters if waiter.deadline <= now]
        failed: Exception | None = None
        for waiter in late:
            # An earlier one may have ended this one.
            if waiter in self._waiters and waiter.deadline <= now:
                try:
                    waiter.on_deadline(now)
                except Exception as error:
                    failed = failed or error
        if failed is not None:
            raise failed

    def start(self) -> None:
        """Sweep until ``stop``."""
        self._task = asyncio.get_running_loop().create_task(self._sweep(), name="deadlines")

    async def stop(self) -> None:
        """Stop sweeping."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_INTERVAL)
            # In a callback of its own: what fails there is heard of, and the sweep goes on.
            asyncio.get_running_loop().call_soon(self.run_due)
