"""Runs gateway processes on one Redis under real, concurrent, skewed load, does something to them in the middle, and
holds what they let in against the limits, the store and the engines' own counters.

Four tenants: `asks` uses up a limit on requests a minute, `writes` one on tokens a minute, `holds` one on requests at
once, `light` none. The first replica gets most of the load, the last next to nothing; one client in twelve leaves
before or in the middle of its answer. What is compared with what is in the docstring of loadtests/limits/account.py.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from loadtests.bench.processes import core_busy, cost_of
from loadtests.children import FleetError
from loadtests.limits import report
from loadtests.limits.account import read_rows
from loadtests.limits.faults import FAULTS, Fault, Happened
from loadtests.limits.fleet import LEAVES, STAYS, Fleet, Plan, slots_held, start_fleet
from loadtests.limits.traffic import REFUSED_BY_ENGINE, Traffic

_EXAMPLES = """\
faults:
{faults}

examples:
  python -m loadtests.limits.run                                 three replicas, every fault, leased: two minutes
  python -m loadtests.limits.run --replicas 20 --faults none,kill
  python -m loadtests.limits.run --mode exact --faults none,freeze --seconds 15
  python -m loadtests.limits.run --mode memory --faults none     replicas that share nothing: what is found then
"""
_PATIENCE = 15.0

Say = Callable[[str], None]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    faults = "\n".join(f"  {fault.name:9} {fault.said}" for fault in FAULTS.values())
    made = argparse.ArgumentParser(
        prog="python -m loadtests.limits.run",
        description=__doc__,
        epilog=_EXAMPLES.format(faults=faults),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--replicas", type=int, default=3, help="gateway processes (default 3)")
    made.add_argument("--mode", choices=("leased", "exact", "memory"), default="leased", help="default leased")
    made.add_argument("--faults", default=",".join(FAULTS), help="comma-separated (default: all, one after the other)")
    made.add_argument("--seconds", type=float, default=10.0, help="length of the load (default 10)")
    made.add_argument("--seed", type=int, default=1, help="of the clients' choices (default 1)")
    return made


async def _load(fleet: Fleet, fault: Fault, seconds: float, seed: int) -> tuple[Traffic, Happened]:
    """The load, and a third of its time into it the fault."""
    traffic = Traffic(fleet.replicas, seed)

    async def later() -> Happened:
        await asyncio.sleep(seconds / 3)
        return await asyncio.get_running_loop().run_in_executor(fleet.hands, fault.do, fleet)

    happening = asyncio.create_task(later())
    await traffic.run(seconds)
    return traffic, await happening


def run_one(plan: Plan, fault: Fault, seconds: float, seed: int, say: Say) -> report.Report:
    """One fleet, one load, one fault. FleetError."""
    say(f"{plan.replicas} replicas, {plan.mode}: {fault.said}")
    with start_fleet(plan) as fleet:
        say(f"  started; {seconds:g} s of load")
        for engine in fleet.engines.values():
            _refuse_on_demand(engine.port)
        began, busy, own = time.time(), _busy(), cost_of(os.getpid()).cpu
        traffic, happened = asyncio.run(_load(fleet, fault, seconds, seed))
        until = began + seconds
        foreign = (_busy() - busy - cost_of(os.getpid()).cpu + own) / (time.time() - began) / (os.cpu_count() or 1)
        say(f"  {len(traffic.asked):,} requests; waiting until nothing is held")
        slots = _until_idle(fleet)
        fleet.stop_replicas()
        seen = report.Seen(
            plan=plan,
            fault=fault,
            happened=happened,
            began=began,
            until=until,
            asked=traffic.asked,
            rows=read_rows(fleet.database),
            killed={at: one.killed_at for at, one in enumerate(fleet.replicas) if one.killed_at is not None},
            engines={model: fleet.figures(model) for model in (STAYS, LEAVES)},
            slots_left=slots,
            foreign=max(0.0, foreign),
            levels=_levels(fleet),
        )
    return report.report_of(seen)


def _busy() -> float:
    return sum(core_busy(core) for core in range(os.cpu_count() or 1))


def _refuse_on_demand(port: int) -> None:
    import httpx

    fault = {"kind": "refuse", "rate": 1.0, "match": REFUSED_BY_ENGINE, "status": 500}
    httpx.post(f"http://127.0.0.1:{port}/faults", json=fault).raise_for_status()


def _until_idle(fleet: Fleet) -> dict[str, int]:
    """Wait until no engine works and no living replica holds a slot; returns what is held after all patience."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        working = sum(fleet.figures(model)["running"] + fleet.figures(model)["waiting"] for model in (STAYS, LEAVES))
        slots = {_bucket(name): held for name, held in slots_held(fleet.server).items()}
        if (not working and not any(slots.values())) or time.monotonic() > deadline:
            return slots
        time.sleep(0.1)


def _levels(fleet: Fleet) -> dict[str, int]:
    with fleet.server.client() as untyped:
        client: Any = untyped
        names = [name for name in client.scan_iter("{forebay}:b:*", count=1000) if client.type(name) == b"string"]
        found = ((name, client.get(name)) for name in names)
        # A bucket that is full again has expired.
        return {_bucket(name): int(state.split()[0]) for name, state in found if state is not None}


def _bucket(name: bytes) -> str:
    return name.decode().removeprefix("{forebay}:b:")


def plan_for(fault: Fault, replicas: int, mode: str) -> Plan:
    """What a fault needs to be started."""
    # A calendar's budget that was forgotten is empty until the calendar turns: everything would be refused.
    return Plan(replicas, mode, sentinel=fault.sentinel, budgets=not fault.empties)


def main(argv: Sequence[str] | None = None) -> int:
    """Run; 1 when something does not hold, or does not start."""
    made = parser()
    options = made.parse_args(argv)
    chosen = [name for name in options.faults.split(",") if name]
    unknown = [name for name in chosen if name not in FAULTS]
    if unknown:
        made.error(f"there is no fault {unknown[0]!r}; there are {', '.join(FAULTS)}")
    signal.signal(signal.SIGTERM, _interrupt)  # ended from outside, too, it ends what it started
    bad = 0
    try:
        for name in chosen:
            fault = FAULTS[name]
            plan = plan_for(fault, options.replicas, options.mode)
            found = run_one(plan, fault, options.seconds, options.seed, lambda text: print(text, flush=True))
            bad += bool(found.problems)
            print("\n".join(report.lines(found)), end="\n\n", flush=True)
    except FleetError as error:
        print(f"limits: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("limits: stopped; everything it started has been ended", file=sys.stderr)
        return 1
    print("everything holds" if not bad else f"{bad} of {len(chosen)} runs have problems")
    return 1 if bad else 0


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
