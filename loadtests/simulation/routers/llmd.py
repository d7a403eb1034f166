"""llm-d's default scheduling profile (llm-d/llm-d-router): the greatest of 2 queue + 2 kv + 3 prefix.

queue: (most - own) / (most - fewest) of those that wait in the engines, 1 where all are equal; kv: the part of the
cache that is free; both as the metrics said at the last look, 50 ms ago at most. prefix: the part of the prompt that
was sent there before, from an index that keeps the 31,250 blocks of 16 tokens used last of each endpoint: as many
tokens here, in the gateway's blocks of 64. Equal ones by chance.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from gateway.policy.routing import Job
from loadtests.simulation.fleet import UNIT
from loadtests.simulation.routers import Draw, Rule

if TYPE_CHECKING:
    from loadtests.simulation.fleet import SimulatedEndpoint

QUEUE, KV, PREFIX = 2.0, 2.0, 3.0
KEPT = 31_250 * 16 // UNIT


class DefaultProfile(Rule):
    """The default profile. ``kept``: blocks that are remembered of each endpoint."""

    def __init__(self, kept: int = KEPT) -> None:
        self._kept = kept
        self._held: dict[int, set[SimulatedEndpoint]] = {}
        self._used: dict[SimulatedEndpoint, OrderedDict[int, None]] = {}

    def pick(self, job: Job, left: list[SimulatedEndpoint], draw: Draw, now: float) -> SimulatedEndpoint:
        """Return the one with the greatest score."""
        seen = [one.scrape(now) for one in left]
        most = max(waiting for waiting, _ in seen)
        fewest = min(waiting for waiting, _ in seen)
        matched = self._matched(job.blocks, left)
        best: list[SimulatedEndpoint] = []
        top = -1.0
        for one, (waiting, used) in zip(left, seen, strict=True):
            queue = (most - waiting) / (most - fewest) if most > fewest else 1.0
            prefix = matched.get(one, 0) / len(job.blocks) if job.blocks else 0.0
            score = QUEUE * queue + KV * (1.0 - used) + PREFIX * prefix
            if score > top:
                best, top = [one], score
            elif score == top:
                best.append(one)
        return best[draw(len(best))] if len(best) > 1 else best[0]

    def _matched(self, blocks: tuple[int, ...], left: list[SimulatedEndpoint]) -> dict[SimulatedEndpoint, int]:
        """Return how many of the blocks each holds from the first one on."""
        matched: dict[SimulatedEndpoint, int] = {}
        among = set(left)
        for depth, block in enumerate(blocks, 1):
            among &= self._held.get(block, set())
            if not among:
                break
            matched.update(dict.fromkeys(among, depth))
        return matched

    def sent(self, job: Job, endpoint: SimulatedEndpoint) -> None:
        """Note that it holds the prompt, and forget what it has not used for longest."""
        used = self._used.setdefault(endpoint, OrderedDict())
        for block in job.blocks:
            used[block] = None
            used.move_to_end(block)
            self._held.setdefault(block, set()).add(endpoint)
        while len(used) > self._kept:
            self._drop(used.popitem(last=False)[0], endpoint)

    def emptied(self, endpoint: SimulatedEndpoint) -> None:
        """Forget what it held."""
        for block in self._used.pop(endpoint, OrderedDict()):
            self._drop(block, endpoint)

    def _drop(self, block: int, endpoint: SimulatedEndpoint) -> None:
        holders = self._held[block]
        holders.discard(endpoint)
        if not holders:
            del self._held[block]
