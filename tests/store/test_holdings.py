"""All that a replica holds: a request is let in by all its draws or by none, and what is told of them is worked out
when somebody looks."""

from __future__ import annotations

from gateway.policy.token_bucket import SECOND, Bucket, Shape, rate_shape
from gateway.store.holdings import Holdings

NOW = 1_790_000_000 * SECOND
RATE, SLOTS = rate_shape(60, 60), Shape(4000, slots=True)
NAMES, SHAPES, AMOUNTS = ("a", "s"), (RATE, SLOTS), (1000, 1000)


def held(amount: int, *, leased: bool = True) -> Holdings:
    leases = Holdings(10, lambda name, now, room: False, leased=leased)
    for name, shape, level in zip(NAMES, SHAPES, (30_000, -2000), strict=True):
        leases.of(name, shape, NOW).learn(Bucket(level, NOW))
        leases.add(name, amount)
    return leases


def test_what_is_told_of_a_hit_is_what_is_known_with_what_is_held() -> None:
    granted = held(2000).take(NAMES, AMOUNTS, NOW + SECOND, NOW + 2 * SECOND)
    assert granted is not None
    assert [granted.levels.left(at) for at in (0, 1)] == [32_000, 3000]
    assert granted.levels.least([0])[2] == 28 * SECOND


def test_one_draw_too_many_takes_nothing() -> None:
    leases = held(2000)
    leases["s"].held = 0
    assert leases.take(NAMES, AMOUNTS, NOW, NOW + SECOND) is None
    assert (leases["a"].held, leases["s"].used) == (2000, 0)


def test_slots_of_a_replica_not_heard_of_are_not_given_out() -> None:
    leases = held(2000)
    assert leases.take(NAMES, AMOUNTS, NOW, NOW) is None
    assert leases.take(NAMES[:1], AMOUNTS[:1], NOW, NOW) is not None


def test_where_the_store_is_asked_each_time_nothing_is_given_out_here() -> None:
    assert held(2000, leased=False).take(NAMES, AMOUNTS, NOW, NOW + SECOND) is None
