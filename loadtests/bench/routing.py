"""What a choice of the router costs, by the number of endpoints: ``python -m loadtests.bench.routing``.

One process, no sockets: microseconds of the pure policy with everything that it asks of an endpoint answered by plain
attributes. Hashing a prompt and learning it are reported apart. The median and the 99th percentile of many single
calls, less what reading the clock costs.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from statistics import median, quantiles

from gateway.policy.prefix import PrefixIndex, block_hashes
from gateway.policy.ring import Ring
from gateway.policy.routing import Job, Router
from gateway.policy.scorers import Slots

COUNTS = (1, 8, 10, 100, 1000)
CALLS = 20_000
PROMPT = 8192
"""Bytes, of which a quarter is a system prompt that all have in common."""


class Place:
    """An endpoint as the router sees it."""

    def __init__(self, name: str, draw: random.Random) -> None:
        self.name = name
        self.in_flight = draw.randrange(60)
        self.tokens = self.in_flight * 1500
        self.prefilling = draw.randrange(4000)
        self.most = 128
        self.most_tokens = 400_000
        self.prefill_rate = 30_000.0
        self.available = True
        self.ramp_from = self.ramp_until = 0.0
        self.slots = Slots(frozenset({"a", "b"}), (), 4)

    def trusted(self, now: float) -> bool:
        """Whether it may be given work."""
        return True

    def room(self, tokens: int) -> bool:
        """Whether one more fits."""
        return self.in_flight < self.most and self.tokens + tokens <= self.most_tokens


def timed(call: Callable[[int], object], calls: int = CALLS) -> tuple[float, float]:
    """Return the median and the 99th percentile of a call in µs, which is given the number of the call."""
    clock = time.perf_counter_ns
    empty = median(-(clock() - clock()) for _ in range(1000))
    took = []
    for at in range(calls):
        start = clock()
        call(at)
        took.append(clock() - start - empty)
    return median(took) / 1000, quantiles(took, n=100)[-1] / 1000


def choices(count: int) -> dict[str, tuple[float, float]]:
    """Return what a choice among so many endpoints costs, by what the request brings with it."""
    draw = random.Random(count)
    able = tuple(Place(f"engine-{at}:8000", draw) for at in range(count))
    router: Router[Place] = Router()
    system = bytes(draw.randrange(256) for _ in range(PROMPT // 4))
    jobs = []
    for at in range(500):
        blocks = block_hashes(1, system + bytes(draw.randrange(256) for _ in range(PROMPT * 3 // 4)))
        jobs.append(Job(PROMPT // 4, 300, blocks, session=at + 1, adapter="a"))
        router.sent(jobs[-1], draw.choice(able))
    kinds = {
        "load": [Job(job.prompt, job.output) for job in jobs],
        "and prefix": [Job(job.prompt, job.output, job.blocks) for job in jobs],
        "and session": [Job(job.prompt, job.output, job.blocks, job.session) for job in jobs],
        "and adapter": jobs,
    }
    rows = {}
    for kind, these in kinds.items():
        router.choose(these[0], able, (), draw.randrange, 1.0)
        rows[kind] = timed(lambda at, these=these: router.choose(these[at % 500], able, (), draw.randrange, 1.0))  # type: ignore[misc]
    for endpoint in able:
        endpoint.in_flight = endpoint.most
    rows["none has room"] = timed(lambda at: router.choose(jobs[at % 500], able, (), draw.randrange, 1.0), 2000)
    return rows


def main() -> None:
    """Print every figure."""
    print("µs, median and 99th percentile\n")
    for count in COUNTS:
        print(f"choice among {count} endpoints")
        for kind, (middle, high) in choices(count).items():
            print(f"  {kind:<14} {middle:8.2f} {high:8.2f}")
    draw = random.Random(1)
    print("hashing and learning")
    for size in (2048, 8192, 65_536):
        prompt = draw.randbytes(size)
        middle, high = timed(lambda at, prompt=prompt: block_hashes(1, prompt), 2000)  # type: ignore[misc]
        print(f"  hash {size >> 10:>3} KB    {middle:8.2f} {high:8.2f}   {middle * 1000 / (size >> 10):.0f} ns/KB")
        index = PrefixIndex()
        hashed = [block_hashes(1, draw.randbytes(size)) for _ in range(200)]
        middle, high = timed(lambda at, index=index, hashed=hashed: index.learn("one", hashed[at % 200]), 2000)  # type: ignore[misc]
        print(f"  learn {size >> 10:>2} KB    {middle:8.2f} {high:8.2f}")
    middle, high = timed(lambda at: Ring([f"engine-{place}:8000" for place in range(1000)]), 20)
    print(f"  ring of 1,000 {middle:8.0f} {high:8.0f}")


if __name__ == "__main__":
    main()
