"""Requests a second of three replicas: with limits each for itself, on one Redis leased, and on one Redis exact.

The three share the gateway's core, so the sum is what one core carries; the Redis server shares the other core with the
mock engine and three generators of 11 connections. Five limits apply to each request and refuse none. A thousand keys
take turns, then ten: a lease is of use to whoever comes back soon.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from loadtests.bench.native import BenchError
from loadtests.bench.processes import Cost, core_busy, cost_of
from loadtests.bench.rows import KIB, Bench, Body, Load, Sample, Target

NAME = "replicas"
REPLICAS = 3
MODES = ("memory", "leased", "exact")
FEW = 10
"""Keys of the second measurement."""
LOAD = Load([Body(2 * KIB)], connections=11)


def measure(
    bench: Bench,
    subject: str,
    targets: Sequence[Target],
    server: int | None,
    seconds: float,
    run: int,
    load: Load = LOAD,
    keys: Path | None = None,
) -> Sample:
    """One run against replicas that are up; ``server`` is the process id of the store, if there is one, ``keys`` a file
    of those that ask, instead of all."""
    sample = Sample(NAME, subject, run, seconds)
    with ExitStack() as started:
        generators = []
        for target in targets:
            command = bench.command(target, load, seconds, keys)
            generator = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            started.enter_context(generator)
            started.callback(generator.kill)
            generators.append(generator)
        for generator in generators:
            _until(generator, "start")
        before, of_server, busy = _cost(targets), _server(server), core_busy(targets[0].cores[0])
        began = time.monotonic()
        # The first window to end closes all: what is measured is while all three send.
        _until(generators[0], "end")
        used, wall = _cost(targets).since(before), time.monotonic() - began
        sample.notes["server_cpu"] = _server(server) - of_server
        sample.foreign = max(0.0, (core_busy(targets[0].cores[0]) - busy - used.cpu) / wall)
        results = [_until(generator, "result") for generator in generators]
    each = [result["requests_per_second"] for result in results]
    faults = {f"{at} {kind}": number for at, result in enumerate(results) for kind, number in result["faults"].items()}
    sample.seconds, sample.cpu_user, sample.cpu_system = wall, used.user, used.system
    sample.generator = {
        "requests_per_second": sum(each),
        "completed": sum(each) * wall,
        "faults": faults,
        "example": next((result["example"] for result in results if result["faults"]), ""),
    }
    return sample


def _until(generator: subprocess.Popen[str], event: str) -> dict[str, Any]:
    assert generator.stdout is not None
    for line in generator.stdout:
        told = json.loads(line)
        if told["event"] == event:
            found: dict[str, Any] = told
            return found
    raise BenchError(f"the load generator ended before its {event!r} (exit code {generator.wait()})")


def _cost(targets: Sequence[Target]) -> Cost:
    costs = [cost_of(target.pid) for target in targets]
    return Cost(sum(cost.user for cost in costs), sum(cost.system for cost in costs), sum(cost.rss for cost in costs))


def _server(pid: int | None) -> float:
    return cost_of(pid).cpu if pid is not None else 0.0
