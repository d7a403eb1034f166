"""Requests that wait for their turn, in order of priority and arrival; those of an adapter without a slot are passed
over, as vLLM does.

Pure: no I/O, no clock, no randomness.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import Generic, Protocol, TypeVar


class Waiter(Protocol):
    """What the queue needs to know of whoever waits in it."""

    key: tuple[int, int]
    """Smaller goes first; no two are the same."""
    adapter: str | None
    queued: bool
    """Whether it waits; cleared, it is forgotten."""


W = TypeVar("W", bound=Waiter)


class WaitingQueue(Generic[W]):
    """One heap for each adapter, since the choice is among the adapters that may run."""

    def __init__(self) -> None:
        self._heaps: dict[str | None, list[tuple[tuple[int, int], W]]] = {}
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def push(self, waiter: W) -> None:
        """Let it wait."""
        waiter.queued = True
        self._length += 1
        heapq.heappush(self._heaps.setdefault(waiter.adapter, []), (waiter.key, waiter))

    def forget(self, waiter: W) -> None:
        """Let it wait no longer; it never comes back."""
        waiter.queued = False
        self._length -= 1

    def pop(self, waiter: W) -> None:
        """Take out the one that ``first`` returned."""
        self.forget(waiter)
        heapq.heappop(self._heaps[waiter.adapter])

    def first(self, adapters: Iterable[str | None] | None) -> W | None:
        """Return the first of those with one of ``adapters``, of all when None."""
        best: tuple[tuple[int, int], W] | None = None
        for adapter in list(self._heaps) if adapters is None else adapters:
            heap = self._heaps.get(adapter)
            if heap is None:
                continue
            while heap and not heap[0][1].queued:
                heapq.heappop(heap)
            if not heap:
                del self._heaps[adapter]
            elif best is None or heap[0][0] < best[0]:
                best = heap[0]
        return best[1] if best else None

    def adapters(self) -> list[str]:
        """Return the adapters that somebody may wait for."""
        return [adapter for adapter in self._heaps if adapter is not None]
