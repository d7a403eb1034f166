"""Buckets in memory: bounded, and forgotten only where nobody could tell."""

from __future__ import annotations

from gateway.policy.token_bucket import SECOND, Shape, rate_shape
from gateway.store.memory import MemoryStore
from gateway.store.protocol import Buckets, Draw, Granted, Refused
from tests.store.drawing import back, look, take

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
    assert isinstance(take(store, draws, 1), Granted)
    assert isinstance(take(store, draws, 2), Refused)
    back(store, [Draw("a", MINUTE, 59_000), Draw("b", SLOT, 1000)])
    assert [bucket.level for bucket in await look(store, draws)] == [59_000, 0]
    clock.now += SECOND
    assert [bucket.level for bucket in await look(store, draws)] == [60_000, 0]
    assert isinstance(take(store, draws, 3), Granted)


async def test_names_nobody_would_miss_are_forgotten() -> None:
    clock = Clock()
    store = MemoryStore(clock, most=100)
    take(store, (Draw("held", SLOT, 1000),), 0)
    take(store, (Draw("in use", MINUTE, 60_000),), 0)
    for number in range(5000):
        take(store, (Draw(f"client:{number}", rate_shape(1000, 1), 1000),), 0)
        clock.now += 10_000
    assert len(store) <= 102
    assert [b.level for b in await look(store, (Draw("held", SLOT, 0),))] == [-1000]
    (bucket,) = await look(store, (Draw("in use", MINUTE, 0),))
    assert bucket.level == 50_000


async def test_a_flood_of_names_in_use_stays_within_twice_the_bound() -> None:
    store = MemoryStore(Clock(), most=100)
    for number in range(5000):
        take(store, (Draw(f"client:{number}", MINUTE, 1000),), 0)
    assert len(store) <= 201


async def test_what_was_found_for_somebody_is_looked_for_again_once_something_was_forgotten() -> None:
    clock = Clock()
    store = MemoryStore(clock, most=1)
    held = Buckets(("held",), (SLOT,))
    idle = Buckets(("idle",), (MINUTE,))
    assert isinstance(store.reserve(idle, [1000], lambda: 0), Granted)
    assert isinstance(store.reserve(held, [1000], lambda: 0), Granted)
    clock.now += 60 * SECOND
    for number in range(3):
        store.reserve(Buckets((f"client:{number}",), (MINUTE,)), [0], lambda: 0)
    assert "idle" not in store._cells
    # Made anew, and drawn on where everybody finds it.
    assert isinstance(store.reserve(idle, [60_000], lambda: 0), Granted)
    assert isinstance(store.reserve(Buckets(("idle",), (MINUTE,)), [1000], lambda: 0), Refused)
    store.settle(held, [1000])
    assert [b.level for b in await store.look(held)] == [0]
    another = MemoryStore(clock)
    assert isinstance(another.reserve(idle, [60_000], lambda: 0), Granted)


async def test_what_one_was_told_to_wait_for_is_not_missing_from_what_another_is_told_is_left() -> None:
    store = MemoryStore(Clock())
    of = Buckets(("a", "b"), (MINUTE, SLOT))
    granted = store.reserve(of, [40_000, 0], lambda: 1)
    assert isinstance(granted, Granted)
    assert isinstance(store.reserve(of, [40_000, 0], lambda: 2), Refused)
    assert [granted.levels.left(at) for at in (0, 1)] == [20_000, 1000]
    assert granted.levels.least([0]) == (0, 20_000, 40 * SECOND)
