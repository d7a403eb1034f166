"""Buckets in memory: bounded, and forgotten only where nobody could tell."""

from __future__ import annotations

from gateway.policy.token_bucket import SECOND, Shape, rate_shape
from gateway.store.memory import MemoryStore
from gateway.store.protocol import Draw, Granted, Refused

NOW = 1_790_000_000 * SECOND
MINUTE, SLOT = rate_shape(60, 60), Shape(1000, slots=True)


class Clock:
    now = NOW

    def __call__(self) -> int:
        return self.now


async def test_a_reservation_is_seen_and_settled() -> None:
    clock = Clock()
    store = MemoryStore(clock)
    draws = (Draw("a", MINUTE, 60_000), Draw("b", SLOT, 1000))
    assert isinstance(store.reserve(draws, 1), Granted)
    assert isinstance(store.reserve(draws, 2), Refused)
    store.settle([Draw("a", MINUTE, 59_000), Draw("b", SLOT, 1000)])
    assert [bucket.level for bucket in await store.look(draws)] == [59_000, 0]
    clock.now += SECOND
    assert [bucket.level for bucket in await store.look(draws)] == [60_000, 0]
    assert isinstance(store.reserve(draws, 3), Granted)


async def test_names_nobody_would_miss_are_forgotten() -> None:
    clock = Clock()
    store = MemoryStore(clock, most=100)
    store.reserve((Draw("held", SLOT, 1000),), 0)
    store.reserve((Draw("in use", MINUTE, 60_000),), 0)
    for number in range(5000):
        store.reserve((Draw(f"client:{number}", rate_shape(1000, 1), 1000),), 0)
        clock.now += 10_000
    assert len(store) <= 102
    assert [b.level for b in await store.look((Draw("held", SLOT, 0),))] == [-1000]
    (bucket,) = await store.look((Draw("in use", MINUTE, 0),))
    assert bucket.level == 50_000


async def test_a_flood_of_names_in_use_stays_within_twice_the_bound() -> None:
    store = MemoryStore(Clock(), most=100)
    for number in range(5000):
        store.reserve((Draw(f"client:{number}", MINUTE, 1000),), 0)
    assert len(store) <= 201
