"""Buckets kept as one number decide as the pure functions do: drawn on, given back, held against promises, reshaped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.policy.cells import cell_of, draw
from gateway.policy.reservation import Need, Short, give, take
from gateway.policy.token_bucket import (
    LARGEST,
    SECOND,
    STEP,
    Bucket,
    Shape,
    fresh,
    rate_shape,
    refill,
    spare,
    until_full,
)
from gateway.store.memory import MemoryStore
from gateway.store.protocol import Buckets, Granted, Refused
from tests.support.examples import examples

NOW = 1_790_000_000 * SECOND
NAMES = ("a", "b", "c")

rates = st.builds(rate_shape, st.integers(1, 10**6), st.sampled_from([1, 60, 3600, 86_400]), st.integers(1, 10**4))
odd_rates = st.builds(Shape, st.integers(1, 10**6), st.integers(1, 97), st.integers(1, 89))
slots = st.builds(Shape, st.integers(1, 20_000), slots=st.just(True))
pots = st.builds(Shape, st.integers(1, 10**6))
calendars = st.builds(
    lambda capacity, begin: Shape(capacity, starts=NOW + begin, ends=NOW + begin + 5 * SECOND),
    st.integers(1, 10**6),
    st.integers(-5 * SECOND, 0),
)
shapes = st.one_of(rates, odd_rates, slots, pots, calendars)
ticks = st.one_of(
    st.integers(0, 3),
    st.integers(0, 4 * SECOND),
    st.integers(-STEP - SECOND, 0),
    st.integers(-STEP - 3, -STEP + 3),
    st.just(-2 * STEP),
)


class Plainly:
    """A store that is nothing but the pure functions and a dictionary."""

    def __init__(self) -> None:
        self.buckets: dict[str, Bucket] = {}

    def find(self, of: Buckets, now: int) -> list[Bucket]:
        for name, shape in zip(of.names, of.shapes, strict=True):
            self.buckets.setdefault(name, fresh(shape, now))
        return [self.buckets[name] for name in of.names]

    def reserve(self, of: Buckets, amounts: Sequence[int], now: int, who: int, first: bool) -> object:
        taken = take(list(map(Need, of.shapes, amounts)), self.find(of, now), now, who, first=first)
        self.buckets.update(zip(of.names, taken.buckets, strict=True))
        return (taken.index, taken.wait, taken.early) if isinstance(taken, Short) else "granted"

    def set_back(self, of: Buckets, latest: int, now: int) -> None:
        """A clock that was far ahead: all is as it was at the last time it told, and time begins anew."""
        for name, bucket in zip(of.names, self.look(of, latest), strict=True):
            self.buckets[name] = Bucket(bucket.level, now, bucket.part, bucket.epoch)

    def settle(self, of: Buckets, amounts: Sequence[int], now: int) -> None:
        for name, shape, amount, bucket in zip(of.names, of.shapes, amounts, self.find(of, now), strict=True):
            if amount:
                self.buckets[name] = give(shape, bucket, amount, now)

    def look(self, of: Buckets, now: int) -> list[Bucket]:
        return [refill(shape, bucket, now) for shape, bucket in zip(of.shapes, self.find(of, now), strict=True)]


class Clock:
    """One that is set back now and then; ``heard`` is what a store makes of it."""

    def __init__(self) -> None:
        self.now, self.heard = NOW, 0

    def __call__(self) -> int:
        return self.now

    def tick(self, by: int) -> None:
        self.now += by
        self.heard = self.now if self.now > self.heard or self.heard - self.now > STEP else self.heard


def seen(shape: Shape, bucket: Bucket) -> tuple[object, ...]:
    """What can be told of a bucket from outside; of slots not when they were last looked at."""
    at = 0 if shape.slots else bucket.at
    return bucket.level, bucket.part, bucket.promises, at


@settings(max_examples=examples(60))
@given(st.data())
def test_the_store_in_memory_is_the_pure_functions(data: st.DataObject) -> None:
    of = Buckets(NAMES, tuple(data.draw(st.tuples(shapes, shapes, shapes))))
    clock, plainly = Clock(), Plainly()
    store = MemoryStore(clock)
    for _ in range(data.draw(st.integers(1, 25))):
        latest = clock.heard
        clock.tick(data.draw(ticks))
        if clock.heard < latest:
            plainly.set_back(of, latest, clock.heard)
        amounts = [data.draw(st.integers(0, 2 * shape.capacity)) for shape in of.shapes]
        if data.draw(st.booleans()):
            who, first = data.draw(st.integers(0, 3)), data.draw(st.booleans())
            told = store.reserve(of, amounts, partial(int, who), first=first)
            expected = plainly.reserve(of, amounts, clock.heard, who, first)
            assert expected == ((told.index, told.wait, told.early) if isinstance(told, Refused) else "granted")
            if isinstance(told, Granted):
                kept = list(zip(of.shapes, plainly.look(of, clock.heard), strict=True))
                assert [told.levels.left(at) for at in range(3)] == [spare(shape, bucket) for shape, bucket in kept]
                refilled = [at for at, shape in enumerate(of.shapes) if shape.rate]
                if refilled:
                    at, left, full = told.levels.least(refilled)
                    least = min(kept[one][1].level for one in refilled)
                    assert (left, kept[at][1].level) == (least, least)
                    # In doubles a wait may be a microsecond more.
                    assert 0 <= until_full(*kept[at]) - full <= 1
        else:
            backs = [amount - data.draw(st.integers(0, 3)) * amount for amount in amounts]
            store.settle(of, backs)
            plainly.settle(of, backs, clock.heard)
        found = run(store.look, of)
        assert list(map(seen, of.shapes, found)) == list(map(seen, of.shapes, plainly.look(of, clock.heard)))


def run(look: Callable[[Buckets], object], of: Buckets) -> tuple[Bucket, ...]:
    """Return what a coroutine returns that never waits."""
    try:
        look(of).send(None)  # type: ignore[attr-defined]
    except StopIteration as done:
        found: tuple[Bucket, ...] = done.value
        return found
    raise AssertionError("it waited")


@pytest.mark.parametrize("shape", [rate_shape(60, 60), Shape(60_000, slots=True), Shape(60_000)])
def test_a_debt_ends_where_it_ends_for_the_pure_functions(shape: Shape) -> None:
    cell = cell_of(shape, fresh(shape, NOW))
    bucket = fresh(shape, NOW)
    for amount in (-LARGEST, -LARGEST, 5):
        cell.give(amount, NOW)
        bucket = give(shape, bucket, amount, NOW)
        assert cell.bucket(NOW).level == bucket.level
    assert bucket.level == 5 - LARGEST


def test_what_does_not_fit_leaves_no_trace_in_what_would_have() -> None:
    minute, slot = (cell_of(shape, fresh(shape, NOW)) for shape in (rate_shape(60, 60), Shape(1000, slots=True)))
    cells = (minute, minute, slot)
    drawn = draw(cells, (10_000, 20_000, 1000), NOW)
    assert drawn is not None
    before = [cell.bucket(NOW) for cell in cells]
    assert draw(cells, (1000, 2000, 1), NOW) is None
    assert draw(cells, (1000, 60_000, 0), NOW) is None
    assert [cell.bucket(NOW) for cell in cells] == before
    assert [drawn.left(at) for at in range(3)] == [50_000, 30_000, 0]


def test_another_shape_keeps_what_is_in_the_bucket() -> None:
    clock = Clock()
    store = MemoryStore(clock)
    assert isinstance(store.reserve(Buckets(("a",), (rate_shape(60, 60),)), [40_000], lambda: 1), Granted)
    smaller = Buckets(("a",), (rate_shape(10, 60),))
    assert isinstance(store.reserve(smaller, [0], lambda: 1), Granted)
    (bucket,) = run(store.look, smaller)
    assert bucket.level == 10_000
    larger = Buckets(("a",), (rate_shape(100, 60),))
    assert isinstance(store.reserve(larger, [1000], lambda: 1), Granted)
    (bucket,) = run(store.look, larger)
    assert bucket.level == 9000


def test_of_two_who_know_a_bucket_by_other_shapes_each_finds_its_own() -> None:
    """The second drew on it as it was, and what it knows of that is of no use once it has become another."""
    store = MemoryStore(Clock())
    small, large = (Buckets(("a",), (rate_shape(amount, 60),)) for amount in (60, 100))
    for of, amount, left in ((small, 1000, 59_000), (large, 1000, 58_000), (small, 1000, 57_000), (large, 0, 57_000)):
        granted = store.reserve(of, [amount], lambda: 0)
        assert isinstance(granted, Granted)
        assert (granted.levels.left(0), granted.levels.least([0])[2]) == (
            left,
            (of.shapes[0].capacity - left) * 60_000_000 // of.shapes[0].capacity,
        )
    # Shapes that are alike are one: many keys share a tenant's bucket.
    edition = store._edition
    assert isinstance(store.reserve(Buckets(("a",), (rate_shape(100, 60),)), [0], lambda: 0), Granted)
    assert store._edition is edition


def test_who_gives_back_what_was_reserved_of_another_shape_leaves_the_bucket_as_it_is() -> None:
    store = MemoryStore(Clock())
    before, after = Buckets(("a",), (rate_shape(60, 60),)), Buckets(("a",), (rate_shape(100, 60),))
    assert isinstance(store.reserve(before, [30_000], lambda: 0), Granted)
    assert isinstance(store.reserve(after, [0], lambda: 0), Granted)
    for _ in range(2):
        store.settle(before, [15_000])
    (bucket,) = run(store.look, after)
    assert bucket.level == 60_000
    assert isinstance(store.reserve(after, [60_000], lambda: 0), Granted)
