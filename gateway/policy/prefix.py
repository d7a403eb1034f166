"""Which endpoint holds which beginning of a prompt, as far as requests sent there tell.

Rule 1: a block stands for everything before it too, so who holds one holds all those before it.
Rule 2: nothing is claimed that was not learned; what is not used for long is forgotten, deep blocks before shallow.
Rule 3: memory is bounded: so many blocks, each with one bit an endpoint; to add one costs the same however many.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

BLOCK = 256
"""Bytes of a prompt that are one block: about 64 tokens of English."""
MOST_BLOCKS = 256
"""Blocks of a prompt that are told apart: what comes after the first 64 KB has no part in routing."""
MOST_HOLDERS = 8
CAPACITY = 262_144
"""Blocks an index keeps: 20 to 60 MB, and 17 million tokens of text: forty caches of an 8B model on an H100."""


def block_hashes(seed: int, data: bytes | memoryview, size: int = BLOCK, most: int = MOST_BLOCKS) -> tuple[int, ...]:
    """Return a 64-bit hash for each whole block of ``size`` bytes, ``most`` of them, each of all bytes up to its end.

    ``seed`` stands for whatever must be the same for a cache to be shared: model, adapter, trust domain. The hashes are
    Python's own, keyed anew in each process: fast, nothing a client could aim at, and of no use to another process.
    """
    whole = bytes(data[: size * most])
    hashes = []
    # As text: Python takes some whole numbers for each other when it hashes them.
    before = hash(str(seed))
    for end in range(size, len(whole) + 1, size):
        before = hash((before, whole[end - size : end]))
        hashes.append(before)
    return tuple(hashes)


class PrefixIndex:
    """Who holds which block. One owner; endpoints go by name.

    Blocks are kept in two generations. What is learned goes into the young one; when that is full it becomes the old
    one, and what only the old one before it had is forgotten. So a block lives until between ``capacity`` / 2 and
    ``capacity`` others were learned after its last use, for each endpoint on its own.
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        """``capacity``: blocks kept at most, at least 2."""
        if capacity < 2:
            raise ValueError("a prefix index keeps at least two blocks")
        self._half = capacity // 2
        # Block → who holds it, one bit an endpoint.
        self._young: dict[int, int] = {}
        self._old: dict[int, int] = {}
        self._bits: dict[str, int] = {}
        self._names: list[str] = []
        self._live = 0
        self._free: list[int] = []
        # Bits of endpoints that are gone, until no generation mentions them any more.
        self._leaving: list[int] = []
        self._left: list[int] = []

    def __len__(self) -> int:
        """Blocks kept, those that are in both generations twice."""
        return len(self._young) + len(self._old)

    def learn(self, endpoint: str, blocks: Sequence[int]) -> None:
        """Note that an endpoint was given a prompt of these blocks."""
        bit = self._bits.get(endpoint) or self._enter(endpoint)
        young = self._young
        # From the end: what others build on is the newest, so the beginning of a prompt is forgotten last.
        for block in reversed(blocks if len(blocks) <= self._half else blocks[: self._half]):
            held = young.get(block)
            if held is None:
                if len(young) >= self._half:
                    young = self._age()
                young[block] = bit
            elif not held & bit:
                young[block] = held | bit

    def holders(self, blocks: Sequence[int], turn: int = 0, most: int = MOST_HOLDERS) -> list[tuple[str, int]]:
        """Return at most ``most`` endpoints with how many of the blocks each holds, best first.

        ``turn`` (any integer of at least 0): where more hold equally much than there is room for, whose turn it is.
        """
        found: list[tuple[str, int]] = []
        among, depth = self._live, len(blocks)
        while depth and (depth := self._deepest(blocks, depth, among)):
            best = self._held(blocks[depth - 1]) & among
            parts: tuple[int, ...] = (best,)
            if best.bit_count() > most - len(found):
                # From the one whose turn it is, and round.
                start = turn % len(self._names)
                upper = best >> start << start
                parts = upper, best ^ upper
            for part in parts:
                while part:
                    bit = part & -part
                    part ^= bit
                    found.append((self._names[bit.bit_length() - 1], depth))
                    if len(found) == most:
                        return found
            among ^= best
            depth -= 1
        return found

    def matched(self, endpoints: Iterable[str], blocks: Sequence[int]) -> dict[str, int]:
        """Return how many of the blocks each of these endpoints holds, those left out that hold none."""
        found: dict[str, int] = {}
        among, depth = 0, len(blocks)
        for endpoint in endpoints:
            among |= self._bits.get(endpoint, 0)
        while among and depth and (depth := self._deepest(blocks, depth, among)):
            best = self._held(blocks[depth - 1]) & among
            among ^= best
            while best:
                bit = best & -best
                best ^= bit
                found[self._names[bit.bit_length() - 1]] = depth
            depth -= 1
        return found

    def forget(self, endpoint: str) -> None:
        """Note that an endpoint holds nothing any more: it is gone, or it was started anew."""
        bit = self._bits.pop(endpoint, None)
        if bit is None:
            return
        self._live &= ~bit
        self._leaving.append(bit)
        if len(self._leaving) + len(self._left) > 64 + len(self._bits):
            # Endpoints come and go faster than prompts: each would make every block one bit longer.
            self._age()

    def _held(self, block: int) -> int:
        return (self._young.get(block, 0) | self._old.get(block, 0)) & self._live

    def _deepest(self, blocks: Sequence[int], most: int, among: int) -> int:
        """Return the greatest number of blocks, ``most`` or fewer, all of which one of those ``among`` holds."""
        young, old = self._young.get, self._old.get
        block = blocks[0]
        if not (young(block, 0) | old(block, 0)) & among:
            return 0
        low, high = 1, most
        middle = high
        while low < high:
            block = blocks[middle - 1]
            if (young(block, 0) | old(block, 0)) & among:
                low = middle
            else:
                high = middle - 1
            middle = (low + high + 1) // 2
        return low

    def _enter(self, endpoint: str) -> int:
        if self._free:
            bit = self._free.pop()
            self._names[bit.bit_length() - 1] = endpoint
        else:
            bit = 1 << len(self._names)
            self._names.append(endpoint)
        self._bits[endpoint] = bit
        self._live |= bit
        return bit

    def _age(self) -> dict[int, int]:
        # The one costly step: freeing a generation takes 10 ns a block, 2 ms each 131,072 new ones.
        self._old, self._young = self._young, {}
        self._free += self._left
        self._left, self._leaving = self._leaving, []
        return self._young
