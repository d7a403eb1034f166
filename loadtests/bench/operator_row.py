"""The row as an operator sees it: how many streams at 40 tokens/s does one core carry, everything else going on?

Streams of 200 tokens, one every 25 ms, arrive at random (Poisson, open loop); 5 % of the requests are 1 MB; 1,000
tenants take turns; `/metrics` is read every 15 s and the configuration is reloaded in the middle. The load is raised
until the chunks come late: more than 10 ms late for one in a hundred, or 50 ms for one in a thousand.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import sqrt

from loadtests.bench.processes import http_get
from loadtests.bench.rows import KIB, Bench, Body, Load, Sample, Target

NAME = "operator"
INTERVAL_MS = 25
CHUNKS = 200
P99_MS, P999_MS = 10.0, 50.0
_LIFE = CHUNKS * INTERVAL_MS / 1000
_PROBES = 6
_STEPS_DOWN = 3
_METRICS_EVERY = 15.0


def operator_load(streams: float) -> Load:
    """`streams` of them at once on average, 5 % of them begun by a megabyte."""
    unasked = Body(2 * KIB, 0.855, stream=True, chunks=CHUNKS, interval_ms=INTERVAL_MS)
    bodies = [
        unasked,
        replace(unasked, weight=0.095, include_usage=True),
        replace(unasked, weight=0.05, size=1000 * KIB),
    ]
    # The warm-up lasts a stream's life: then as many end as begin.
    return Load(bodies, connections=int(streams * 2) + 64, rate=streams / _LIFE, warmup=_LIFE + 0.5, drain=1.0)


def in_time(sample: Sample) -> bool:
    """Whether the chunks of a run came as the aim asks, and all of them."""
    gap, wanted = sample.generator["added_gap"], sample.generator["mean_inflight"] * 1000 / INTERVAL_MS
    kept_up = sample.generator["chunks_per_second"] >= 0.95 * wanted and not sample.generator["faults"]
    return bool(kept_up and gap["p99"] <= P99_MS and gap["p999"] <= P999_MS)


@dataclass(slots=True)
class Search:
    """Bisection for the largest load that is in time; knows nothing of how a load is tried."""

    good: float = 0.0
    bad: float = 0.0

    def next(self, at_full_core: float) -> float | None:
        """The next load to try, or None when the answer is within a tenth."""
        if not self.bad:
            return min(self.good * 4, max(self.good * 1.15, at_full_core * 0.85))
        if not self.good:
            return self.bad * 0.6
        return None if self.bad / self.good < 1.1 else sqrt(self.good * self.bad)


def find_capacity(bench: Bench, target: Target, seconds: float) -> float:
    """Streams at once that one core carries in time, found in a few short probes without disturbances."""
    search, streams = Search(), 64.0
    for _ in range(_PROBES):
        sample = bench.measure(NAME, target, operator_load(streams), seconds)
        if in_time(sample):
            search.good = streams
        else:
            search.bad = streams
        core = (sample.cpu_user + sample.cpu_system) / seconds
        following = search.next(streams / max(core, 0.01))
        if following is None or following < 4:
            break
        streams = following
    return search.good or search.bad * 0.6


def disturbances(
    window: float, metrics: tuple[int, str] | None, reload: Callable[[], None] | None, sample: list[float]
) -> list[tuple[float, Callable[[], None]]]:
    """What happens meanwhile: `/metrics` every 15 s (how long each took goes to `sample`), a reload half way."""

    def read_metrics() -> None:
        assert metrics is not None
        started = time.monotonic()
        http_get(*metrics)
        sample.append(time.monotonic() - started)

    actions: list[tuple[float, Callable[[], None]]] = []
    at = window * 0.2
    while metrics is not None and at < window:
        actions.append((at, read_metrics))
        at += _METRICS_EVERY
    if reload is not None:
        actions.append((window / 2, reload))
    return actions


def measure_down(
    bench: Bench,
    target: Target,
    streams: float,
    window: float,
    run: int,
    metrics: tuple[int, str] | None,
    reload: Callable[[], None] | None,
) -> tuple[Sample, float]:
    """One full run at the load that was found, less of it when the disturbances make the chunks late.

    Returns the run and its load, which the next run starts from.
    """
    for _ in range(_STEPS_DOWN):
        took: list[float] = []
        actions = disturbances(window, metrics, reload, took)
        sample = bench.measure(NAME, target, operator_load(streams), window, run, actions)
        sample.notes.update(streams=streams, in_time=in_time(sample), metrics_seconds=took, reloaded=reload is not None)
        if in_time(sample):
            break
        streams *= 0.85
    return sample, sample.notes["streams"]
