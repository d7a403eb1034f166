"""One run: a workload at a load, a router, an admission and a seed; its row."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

from engines.simulation.profiles import PROFILES
from loadtests.scenarios.goodput import percentile
from loadtests.simulation.figures import OUTPUT, Tally, vtc_bound, widest
from loadtests.simulation.flight import Flight
from loadtests.simulation.policies import ADMISSIONS, OURS, ROUTERS
from loadtests.simulation.routers import Routes
from loadtests.simulation.workloads import ABUSER, WORKLOADS, Ask, Faults, Workload, draw
from loadtests.simulation.world import Gate, Setting, World

PROFILE = "h100-8b"
GOOD = 0.9
"""The share that must be served well at a load that an engine can carry."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A run. ``load``: of what the engines can carry, each alone; ``warm``: seconds at the beginning of which requests
    are not counted."""

    workload: Workload
    load: float
    seed: int
    router: str = OURS
    admission: str = OURS
    endpoints: int = 8
    seconds: float = 90.0
    warm: float = 30.0
    oracle: bool = False
    profile: str = PROFILE


class Backlogged:
    """What two tenants got while both waited: the difference of their service, twice a second."""

    def __init__(self) -> None:
        self.got: dict[str, float] = {}
        self.differences: list[float | None] = []
        self.longest = 0

    def ended(self, flight: Flight) -> None:
        """Count what a request has had when it ended."""
        self.got[flight.tenant] = self.got.get(flight.tenant, 0.0) + _service(flight)
        self.longest = max(self.longest, flight.ask.prompt)

    def looked(self, world: World, now: float) -> None:
        """Note how far apart they are."""
        got = dict(self.got)
        waits = set()
        for flight in world.flights.values():
            if flight.first < 0:
                waits.add(flight.tenant)
            else:
                got[flight.tenant] = got.get(flight.tenant, 0.0) + _service(flight)
        two = [got.get(who, 0.0) for who in sorted(waits)]
        self.differences.append(two[0] - two[1] if len(two) == 2 else None)


def _service(flight: Flight) -> float:
    return flight.ask.prompt - flight.cached + OUTPUT * flight.answered() if flight.first >= 0 else 0.0


def run(
    plan: Plan,
    router: Routes | None = None,
    gate: Callable[[World], Gate] | None = None,
    rate: float | None = None,
    told: Callable[[float, int], None] | None = None,
) -> dict[str, float | str | int]:
    """Simulate a plan; return its row. ``router``, ``gate`` and ``rate`` (requests a second) instead of the plan's;
    ``told`` is called each simulated second, with the time and how many requests have ended."""
    workload = plan.workload
    setting = Setting(workload, PROFILES[plan.profile], plan.endpoints, plan.seed, plan.oracle)
    if rate is None:
        rate = capacity(workload.name, plan.profile) * plan.endpoints * plan.load
    tally = Tally(workload.slo, plan.warm, plan.seconds)
    both = Backlogged()

    def ended(flight: Flight) -> None:
        tally.add(flight)
        if workload.watched:
            both.ended(flight)

    world = World(
        setting,
        router or ROUTERS[plan.router](),
        gate or ADMISSIONS[plan.admission],
        ended,
        both.looked if workload.watched else None,
    )
    began = time.process_time()
    if told is not None:
        world.every_second(lambda now: told(now, tally.all))
    world.run(_drawn(workload, rate, plan.seconds, plan.seed))
    row: dict[str, float | str | int] = {
        "workload": workload.name,
        "router": plan.router,
        "admission": plan.admission,
        "load": plan.load,
        "seed": plan.seed,
        "endpoints": plan.endpoints,
        "seconds": plan.seconds,
        "oracle": int(plan.oracle),
        "rate": round(rate, 2),
        "simulated": tally.all,
        "events": world.steps,
        "processor": round(time.process_time() - began, 2),
    }
    row |= {name: round(value, 5) for name, value in tally.figures().items()}
    row |= {f"refused_{why.replace(' ', '_')}": count for why, count in sorted(tally.refusals.items())}
    if workload.watched:
        blocks = world.endpoints[0].profile
        tokens = blocks.kv_blocks * blocks.block_tokens * plan.endpoints
        row |= {"gap": round(widest(both.differences)), "gap_bound": round(vtc_bound(both.longest, tokens))}
    if workload.abuser or workload.name == "victims":
        victims = sorted(one for who, times in tally.ttft_of.items() if who != ABUSER for one in times)
        row["victims_ttft_p95"] = round(percentile(victims, 0.95) or 0.0, 5)
    return row


def _drawn(workload: Workload, rate: float, seconds: float, seed: int) -> Iterable[Ask]:
    """Return the requests of a run; of a small one they are kept for the next policy."""
    small = rate * seconds < _SMALL
    return _kept(workload, rate, seconds, seed) if small else draw(workload, rate, seconds, seed)


_SMALL = 100_000


@lru_cache(maxsize=1)
def _kept(workload: Workload, rate: float, seconds: float, seed: int) -> list[Ask]:
    return list(draw(workload, rate, seconds, seed))


@lru_cache
def capacity(name: str, profile: str = PROFILE) -> float:
    """Return the requests a second that one engine can carry: at which nine of ten are served well without admission.

    One engine alone, so that no router has a part in it; requests come by a Poisson process, nothing is killed or slow,
    and nobody asks more often than others. The load at which all policies are compared is a part of this.
    """
    base = WORKLOADS["chat" if name in ("abuser", "victims") else name]
    calm = replace(base, cv=1.0, faults=Faults(), watched=False, adapters=min(base.adapters, 4))
    low, high = 0.5, 128.0
    while high / low > 1.03:
        middle = (low * high) ** 0.5
        seconds = min(240.0, 60.0 + 2000.0 / middle)
        plan = Plan(calm, 1.0, 4242, admission="none", endpoints=1, seconds=seconds, warm=40.0, profile=profile)
        if float(run(plan, rate=middle)["goodput"]) >= GOOD:
            low = middle
        else:
            high = middle
    return round(low, 2)
