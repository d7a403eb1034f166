"""SMG's cache_aware policy (lightseekorg/smg, sglang-router before), with its defaults.

Out of balance (the most less the fewest requests above 64, and the most above 1.5 times the fewest): whoever has the
fewest. Otherwise, where more than 0.3 of the prompt is held by somebody, whoever holds most of it, of several the one
that was given it last; else whoever has the fewest. Its tree of characters is one of blocks here; it keeps 2^26
characters an endpoint and looks every two minutes whether there are more: never in a run of this length.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateway.policy.routing import Job
from loadtests.simulation.fleet import UNIT
from loadtests.simulation.routers import Draw, Rule
from loadtests.simulation.routers.plain import least

if TYPE_CHECKING:
    from loadtests.simulation.fleet import SimulatedEndpoint

ABSOLUTE = 64
RELATIVE = 1.5
THRESHOLD = 0.3


class CacheAware(Rule):
    """``--policy cache_aware``."""

    def __init__(self) -> None:
        self._held: dict[int, dict[SimulatedEndpoint, None]] = {}
        """Of each block, who holds it, the last one that was given it at the end."""

    def pick(self, job: Job, left: list[SimulatedEndpoint], draw: Draw, now: float) -> SimulatedEndpoint:
        """Return who serves it."""
        most = max(one.in_flight for one in left)
        fewest = min(one.in_flight for one in left)
        if most - fewest > ABSOLUTE and most > RELATIVE * fewest:
            return least(left, draw)
        holder, depth = self._match(job.blocks, left)
        if holder is not None and depth * UNIT > THRESHOLD * job.prompt:
            return holder
        return least(left, draw)

    def _match(self, blocks: tuple[int, ...], left: list[SimulatedEndpoint]) -> tuple[SimulatedEndpoint | None, int]:
        """Return who holds most, and how many blocks."""
        depth = 0
        for block in blocks:
            if block not in self._held:
                break
            depth += 1
        among = set(left)
        while depth:
            # Whoever holds more but is away or has no room counts for nothing.
            for holder in reversed(self._held[blocks[depth - 1]]):
                if holder in among:
                    return holder, depth
            depth -= 1
        return None, 0

    def sent(self, job: Job, endpoint: SimulatedEndpoint) -> None:
        """Note that it holds the prompt."""
        for block in job.blocks:
            holders = self._held.setdefault(block, {})
            holders.pop(endpoint, None)
            holders[endpoint] = None

    def emptied(self, endpoint: SimulatedEndpoint) -> None:
        """Forget what it held: the endpoint left and came back."""
        for block in [block for block, holders in self._held.items() if endpoint in holders]:
            del self._held[block][endpoint]
            if not self._held[block]:
                del self._held[block]
