"""Who makes room in a full queue: the latest requests of whoever has most waiting for his weight, in all lines.

Rule 1: nobody makes room for somebody who would then have more waiting than he.
Rule 2: to find it out costs the same however many wait, or whoever floods a queue would slow down all that it serves.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar


class Item(Protocol):
    """A request that waits."""

    tenant: str
    weight: float
    cost: float
    deadline: float
    gone: bool


W = TypeVar("W", bound=Item)


class _Holder(Generic[W]):
    """What one tenant has waiting."""

    __slots__ = ("cost", "count", "entry", "items", "weight")

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.cost = 0.0
        self.count = 0
        self.entry = 0
        """Which entry is its present one."""
        # In the order in which they are served, those who left among them for a while.
        self.items: list[tuple[float, int, W]] = []


class Holders(Generic[W]):
    """All tenants of a class, by what they have waiting."""

    def __init__(self) -> None:
        self._holders: dict[str, _Holder[W]] = {}
        # Of each tenant an entry that is no less than his share, negative; what it has become shows when it is first.
        self._heap: list[tuple[float, int, _Holder[W]]] = []
        self._entries = 0

    def __len__(self) -> int:
        return len(self._holders)

    def add(self, item: W, order: int) -> None:
        """Take that somebody waits; ``order`` grows with each."""
        holder = self._holders.get(item.tenant)
        if holder is None:
            holder = self._holders[item.tenant] = _Holder(item.weight)
        insort(holder.items, (item.deadline, order, item))
        holder.count += 1
        holder.cost += item.cost
        self._push(holder)

    def drop(self, item: W) -> None:
        """Take that somebody waits no longer; he is marked as gone."""
        holder = self._holders[item.tenant]
        holder.count -= 1
        holder.cost -= item.cost
        while holder.items and holder.items[-1][2].gone:
            holder.items.pop()
        if not holder.count:
            del self._holders[item.tenant]
        elif len(holder.items) > 2 * holder.count + 16:
            holder.items = [entry for entry in holder.items if not entry[2].gone]

    def share(self, tenant: str) -> float:
        """Return the cost of what a tenant has waiting."""
        holder = self._holders.get(tenant)
        return holder.cost if holder is not None else 0.0

    def offer(self, beyond: float, take: Callable[[W], bool]) -> bool:
        """Offer who makes room, one after the other, while they have more than ``beyond`` waiting for their weight;
        until ``take`` says that it is enough. Tell whether it was. Nobody leaves by that."""
        left: dict[_Holder[W], tuple[float, int]] = {}
        enough = False
        while not enough and (holder := self._most(left)) is not None:
            cost, at = left.get(holder) or (holder.cost, len(holder.items))
            at -= 1
            while at >= 0 and holder.items[at][2].gone:
                at -= 1
            if at < 0 or cost / holder.weight <= beyond:
                break
            item = holder.items[at][2]
            left[holder] = cost - item.cost, at
            enough = take(item)
        for holder in left:
            self._push(holder)
        return enough

    def _most(self, left: dict[_Holder[W], tuple[float, int]]) -> _Holder[W] | None:
        """Return who has most waiting for his weight; of some only what is ``left`` counts."""
        heap = self._heap
        while heap:
            bound, entry, holder = heap[0]
            if entry != holder.entry or not holder.count:
                heapq.heappop(heap)
                continue
            cost = left[holder][0] if holder in left else holder.cost
            if bound == -cost / holder.weight:
                return holder
            heapq.heapreplace(heap, (-cost / holder.weight, entry, holder))
        return None

    def _push(self, holder: _Holder[W]) -> None:
        self._entries += 1
        holder.entry = self._entries
        heapq.heappush(self._heap, (-holder.cost / holder.weight, self._entries, holder))
        if len(self._heap) > 2 * len(self._holders) + 64:
            self._heap = [one for one in self._heap if one[1] == one[2].entry and one[2].count]
            heapq.heapify(self._heap)
