"""Three gateways on one Redis and one PostgreSQL server, in front of two real vLLM engines on the CPU and two simulated
ones, under limits and load; meanwhile gateways are killed and told to stop, engines and stores are killed and frozen.

What must hold afterwards is in the docstring of loadtests/soak/account.py. It grows with what the gateway can do.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

import psutil

from loadtests.children import Child, FleetError, engine_figures, get, wait_ended
from loadtests.limits.fleet import slots_held
from loadtests.soak.account import Look, Report, Seen, lines, read_rows, report_of
from loadtests.soak.clients import Clients
from loadtests.soak.faults import Happened, do
from loadtests.soak.fleet import Fleet, start_fleet
from loadtests.soak.plan import REAL, SIMULATED, TIMELINE, Event, Plan, crowds

_PATIENCE = 60.0
"""Seconds until nothing is held any more, when nobody asks."""
_LOOK_EVERY = 0.3
_EXAMPLES = """\
examples:
  python -m loadtests.soak.run                                  five minutes, as `make soak`
  python -m loadtests.soak.run --seconds 60 --without-real      one minute, simulated engines alone: a first look
"""

Say = Callable[[str], None]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m loadtests.soak.run",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--seconds", type=float, default=300.0, help="length of the load (default 300)")
    made.add_argument("--seed", type=int, default=1, help="of the clients' choices (default 1)")
    made.add_argument("--without-real", action="store_true", help="simulated engines alone")
    return made


class Looks:
    """What the engines count, looked at all the time by a thread of its own: a killed one cannot be asked."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="looks")
        self.looks: dict[str, list[Look]] = {name: [] for name in fleet.engines}

    def __enter__(self) -> Looks:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(_LOOK_EVERY):
            self.once()

    def once(self) -> None:
        """Look at every engine that answers."""
        for name, engine in list(self._fleet.engines.items()):
            with suppress(OSError, FleetError):
                figures = engine_figures(engine.port)
                self.looks[name].append(Look(time.time(), figures["prompt"] + figures["generation"]))


async def _load(fleet: Fleet, timeline: Sequence[Event], say: Say) -> tuple[Clients, list[Happened]]:
    plan = fleet.plan
    clients = Clients(fleet.replicas, fleet.living, plan.seed)
    happened: list[Happened] = []
    began = time.monotonic()

    async def events() -> None:
        loop = asyncio.get_running_loop()
        for event in timeline:
            await asyncio.sleep(max(0.0, began + event.at * plan.seconds - time.monotonic()))
            say(f"  {time.monotonic() - began:5.0f} s, {len(clients.asked):,} requests: {event.said}")
            happened.append(await loop.run_in_executor(fleet.hands, do, fleet, event.does))

    asking = [one for one in crowds(plan.model) if plan.real or one.model == SIMULATED]
    doing = asyncio.create_task(events())
    loading = asyncio.create_task(clients.run(asking, plan.seconds))
    # A step that fails ends the load at once.
    await asyncio.wait({doing, loading}, return_when=asyncio.FIRST_EXCEPTION)
    if doing.done() and doing.exception() is not None:
        loading.cancel()
    await doing
    await loading
    return clients, happened


def run(plan: Plan, say: Say, timeline: Sequence[Event] = TIMELINE) -> Report:
    """One soak. FleetError when something does not start, come back or end."""
    say("starting engines, stores and gateways; real engines take a minute or more")
    with start_fleet(plan) as fleet:
        say(f"started; {plan.seconds:g} s of load")
        before = _memory(fleet)
        with Looks(fleet) as looks:
            clients, happened = asyncio.run(_load(fleet, timeline, say))
            say(f"  {len(clients.asked):,} requests; waiting until nothing is held")
            fleet.all_back()
            holds = _until_idle(fleet)
        looks.once()
        after = _memory(fleet)
        stop_replicas(fleet)
        seen = Seen(
            asked=clients.asked,
            rows=read_rows(fleet.database.url),
            happened=happened,
            looks=looks.looks,
            model_of={name: plan.model if name in REAL else SIMULATED for name in fleet.engines},
            killed={at: one.killed_at for at, one in enumerate(fleet.replicas) if one.killed_at is not None},
            left=dict(fleet.leaving),
            holds=holds,
        )
    report = report_of(seen)
    report.said.append(f"memory of gateways, MB, at the start {before} and at the end {after}")
    return report


def stop_replicas(fleet: Fleet) -> None:
    """SIGTERM to all that live, and wait: the ledger is whole when this returns. FleetError when one ends badly."""
    living: list[Child] = [fleet.replicas[at] for at in fleet.living()]
    for child in living:
        child.process.terminate()
    for child in living:
        wait_ended(child)


def _memory(fleet: Fleet) -> list[int]:
    return [psutil.Process(fleet.replicas[at].pid).memory_info().rss // 1_000_000 for at in fleet.living()]


def _until_idle(fleet: Fleet) -> dict[str, float]:
    """Wait until nothing is held anywhere; return what is after all patience."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        held = _held(fleet)
        if not any(held.values()) or time.monotonic() > deadline:
            return held
        time.sleep(0.2)


def _held(fleet: Fleet) -> dict[str, float]:
    held: dict[str, float] = {}
    for name, engine in fleet.engines.items():
        figures = engine_figures(engine.port)
        held[f"requests in {name}"] = figures["running"] + figures["waiting"]
    for at in fleet.living():
        held |= {f"replica {at}: {name}": value for name, value in _gauges(fleet.replicas[at]).items()}
    return held | {name.decode(): slots for name, slots in slots_held(fleet.redis).items()}


def _gauges(replica: Child) -> dict[str, float]:
    """What a gateway says that it holds."""
    found: dict[str, float] = {}
    for line in get(replica.admin_port, "/metrics").decode().splitlines():
        name, _, value = line.rpartition(" ")
        if name.partition("{")[0] in ("forebay_in_flight", "forebay_endpoint_in_flight", "forebay_queue_waiting"):
            found[name] = float(value)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it, print what was seen, return the exit code."""
    told = parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    plan = Plan(seconds=told.seconds, seed=told.seed)
    timeline: Sequence[Event] = TIMELINE
    if told.without_real:
        plan = replace(plan, real=())
        timeline = [event for event in TIMELINE if event.does != "kill_real"]
    try:
        report = run(plan, lambda text: print(text, flush=True), timeline)
    except FleetError as error:
        print(f"soak: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("soak: stopped; everything it started has been ended", file=sys.stderr)
        return 1
    print("\n".join(lines(report)))
    print("everything holds" if not report.problems else f"{len(report.problems)} problems")
    return 1 if report.problems else 0


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
