"""The soak: does memory stay flat over a great many requests?

Half plain requests and half short streams, 1,000 tenants, 32 connections. Memory is read every quarter of a second and
kept with the number of the second.
"""

from __future__ import annotations

from loadtests.bench.processes import Cost
from loadtests.bench.rows import KIB, Bench, Body, Load, Sample, Target

NAME = "soak"


def measure(bench: Bench, target: Target, requests: int) -> Sample:
    """One soak of so many requests."""
    bodies = [
        Body(2 * KIB, 0.5),
        Body(2 * KIB, 0.4, stream=True, chunks=8),
        Body(2 * KIB, 0.1, stream=True, chunks=8, include_usage=True),
    ]
    readings: list[tuple[float, int]] = []

    def watch(age: float, cost: Cost) -> None:
        readings.append((round(age, 2), cost.rss))

    load = Load(bodies, connections=32, warmup=0.0, requests=requests, drain=5.0)
    sample = bench.measure(NAME, target, load, seconds=0.0, watch=watch)
    sample.notes["rss"] = readings
    return sample
