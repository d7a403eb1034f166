"""llm-d's flow control (llm-d/llm-d-router, pkg/epp/flowcontrol), with its defaults.

Nobody is sent while the pool is saturated: the mean over the engines of the greater of waiting / 5 and cache used /
0.8 is 1 or more, as their metrics said 50 ms ago at most. Between two looks all who wait are sent. Of a band of
priority the one that came first goes first (global-strict fairness, FCFS order); here all are in one band. 5,000 wait
at most, for 60 s.
"""

from __future__ import annotations

from dataclasses import dataclass

from loadtests.simulation.admissions.others import UNBOUNDED, Queued
from loadtests.simulation.fleet import SCRAPED
from loadtests.simulation.world import World

QUEUE, CACHE = 5, 0.8


class Saturation(Queued):
    """Its utilisation detector before a queue."""

    every = SCRAPED

    def open(self, now: float) -> bool:
        """Tell whether the pool is not saturated."""
        return saturation([one.scrape(now) for one in self.world.endpoints if one.healthy]) < 1.0


def saturation(seen: list[tuple[int, float]]) -> float:
    """Return it, of engines in which so many wait and that part of the cache is used; of none it is complete."""
    if not seen:
        return 1.0
    return sum(max(waiting / QUEUE, used / CACHE) for waiting, used in seen) / len(seen)


@dataclass(frozen=True, slots=True)
class FlowControl:
    """``patience``: its ``defaultRequestTTL``, None: as the SLO of the world has it."""

    length: int = 5000
    patience: float | None = 60.0

    def __call__(self, world: World) -> Saturation:
        """Make it."""
        patience = world.setting.patience if self.patience is None else self.patience
        return Saturation(world, UNBOUNDED, self.length, patience)
