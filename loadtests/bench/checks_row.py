"""What a check of limits costs: a reservation and its settlement, in memory, leased and exact.

No gateway and no HTTP: the store alone, as a replica calls it, as fast as one loop can. CPU is this process's; of the
exact and leased ways the server's is beside it. What a store does by itself meanwhile (giving back, saying that it
lives) is in it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from itertools import count

import uvloop

from gateway.policy.token_bucket import Shape, rate_shape
from gateway.store.memory import MemoryStore
from gateway.store.protocol import Buckets, Granted, Store
from gateway.store.redis import Mode, RedisStore
from loadtests.bench.native import BenchError
from loadtests.bench.processes import core_busy, cost_of
from loadtests.bench.rows import Sample
from tests.store.servers import Server

NAME = "checks"
_PLENTY = rate_shape(10**9, 1)
_TURN = 8
"""Checks between two turns of the event loop, where nothing is waited for."""


@dataclass(frozen=True, slots=True)
class Case:
    """One cell of the table."""

    subject: str
    buckets: int
    at_once: int = 1


CASES = [
    Case(subject, buckets, at_once)
    for buckets in (1, 5)
    for subject, at_once in (("memory", 1), ("leased", 1), ("exact", 1), ("exact", 32))
]


def _check(buckets: int) -> tuple[Buckets, list[int], list[int]]:
    """What is drawn from, what is reserved and what comes back: a limit on requests; with five, two on requests, two on
    tokens, one on requests at once."""
    if buckets == 1:
        return Buckets(("key:requests",), (_PLENTY,)), [1000], []
    names = ("key:requests", "key:tokens", "key:concurrent", "tenant:requests", "tenant:tokens")
    slots = Shape(100_000_000, slots=True)
    five = Buckets(names, (_PLENTY, _PLENTY, slots, _PLENTY, _PLENTY))
    return five, [1000, 300_000, 1000, 1000, 300_000], [0, 40_000, 1000, 0, 40_000]


def microseconds() -> int:
    """The wall clock's time."""
    return time.time_ns() // 1000


def measure(seconds: float, run: int, core: int) -> Iterator[Sample]:
    """One run of every case, in turn."""
    server = Server()
    server.start()
    try:
        for case in CASES:
            yield uvloop.run(_measure(case, server, seconds, run, core))
    finally:
        server.close()


async def _measure(case: Case, server: Server, seconds: float, run: int, core: int) -> Sample:
    server.command("FLUSHALL")
    store: Store = MemoryStore(microseconds)
    if case.subject != "memory":
        store = RedisStore(url=server.url, replica_id="bench", clock=microseconds, mode=Mode(case.subject), timeout=5.0)
    await store.start()
    drawn, taken, back = _check(case.buckets)
    numbers = count(1)

    async def checks(until: float) -> int:
        done = 0
        while not done or time.monotonic() < until:
            for _ in range(_TURN):
                verdict = store.reserve(drawn, taken, numbers.__next__)
                if isinstance(verdict, asyncio.Future):
                    verdict = await verdict
                if not isinstance(verdict, Granted):
                    raise BenchError("a check was refused")
                if back:
                    store.settle(drawn, back)
                done += 1
            await asyncio.sleep(0)
        return done

    await _all(checks, case.at_once, time.monotonic() + seconds / 4)
    began, busy = time.monotonic(), core_busy(core)
    own, other = time.process_time(), cost_of(server.pid).cpu
    completed = await _all(checks, case.at_once, began + seconds)
    own, other = time.process_time() - own, cost_of(server.pid).cpu - other
    wall, busy = time.monotonic() - began, core_busy(core) - busy
    await store.stop()
    return Sample(
        NAME,
        case.subject,
        run,
        wall,
        cpu_user=own,
        foreign=max(0.0, (busy - own - other) / wall),
        generator={"completed": completed, "requests_per_second": completed / wall, "faults": {}},
        notes={"buckets": case.buckets, "at_once": case.at_once, "server_cpu": other},
    )


async def _all(checks: Callable[[float], Awaitable[int]], at_once: int, until: float) -> int:
    return sum(await asyncio.gather(*(checks(until) for _ in range(at_once))))
