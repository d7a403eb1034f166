"""The KV cache of one engine: blocks that requests hold, prefixes that several share, and what may be evicted.

Pure: no I/O, no clock, no randomness.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class KvCache:
    """Blocks, and cached prefixes in units of ``unit`` blocks, each known by its hash.

    A unit that nobody uses stays until its room is needed; the one unused for longest goes first.
    """

    def __init__(self, blocks: int, unit: int) -> None:
        self.blocks = blocks
        self.unit = unit
        self._free = blocks
        self._users: dict[int, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Blocks that could be had now, by evicting what nobody uses."""
        return self._free + len(self._idle) * self.unit

    @property
    def used(self) -> int:
        """Blocks that requests hold."""
        return self.blocks - self.available

    @property
    def cached_units(self) -> int:
        """How many units are known by their hash, in use or not."""
        return len(self._users)

    def hits(self, hashes: Sequence[int], most: int) -> tuple[int, int]:
        """Return how many of the first ``most`` hashes are there without a gap, and how many of those nobody uses."""
        users = self._users
        found = idle = 0
        for value in hashes[:most]:
            count = users.get(value)
            if count is None:
                break
            found += 1
            idle += not count
        return found, idle

    def share(self, hashes: Sequence[int]) -> None:
        """Use units that are there."""
        for value in hashes:
            if not self._users[value]:
                del self._idle[value]
            self._users[value] += 1

    def take(self, blocks: int) -> None:
        """Hold blocks, evicting what is unused for longest. They must be available."""
        self._free -= blocks
        while self._free < 0:
            value, _ = self._idle.popitem(last=False)
            del self._users[value]
            self._free += self.unit

    def publish(self, value: int) -> bool:
        """Make a unit that its holder filled known by its hash; False when there is such a unit already, which leaves
        the holder with a copy of its own."""
        if value in self._users:
            return False
        self._users[value] = 1
        return True

    def release(self, held: Sequence[int], own: int) -> None:
        """Give back units that were shared or published, and ``own`` further blocks. The end of a prefix is the first
        to be evicted."""
        self._free += own
        users = self._users
        for value in reversed(held):
            users[value] -= 1
            if not users[value]:
                self._idle[value] = None
