"""One bucket against exact arithmetic."""

from __future__ import annotations

from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from gateway.policy.reservation import give
from gateway.policy.token_bucket import LARGEST, NEVER, SECOND, Bucket, Shape, fresh, rate_shape, refill, wait

SECONDS = (1, 60, 3600, 86_400, 30 * 86_400)
NOW = 1_790_000_000 * SECOND

rates = st.builds(
    rate_shape,
    st.integers(1, 10**9),
    st.sampled_from(SECONDS),
    st.one_of(st.none(), st.integers(1, 10**9)),
)
steps = st.lists(st.integers(-5 * SECOND, 90 * SECOND) | st.integers(0, 40 * 86_400 * SECOND), max_size=20)


@given(rates)
def test_no_product_leaves_what_a_double_holds(shape: Shape) -> None:
    assert 0 < shape.capacity <= LARGEST
    assert shape.per * (shape.rate % shape.per) + shape.per < 2**53


@given(st.integers(1, 10**9), st.sampled_from(SECONDS[:4]))
def test_the_rate_of_the_usual_periods_is_exact(amount: int, seconds: int) -> None:
    shape = rate_shape(amount, seconds)
    assert Fraction(shape.rate, shape.per) == Fraction(amount * 1000, seconds * SECOND)


@given(st.integers(1, 10**9), st.sampled_from(SECONDS))
def test_a_rate_that_cannot_be_exact_is_less_and_nearly_the_same(amount: int, seconds: int) -> None:
    shape = rate_shape(amount, seconds)
    told = Fraction(amount * 1000, seconds * SECOND)
    assert told * Fraction(999_999, 1_000_000) <= Fraction(shape.rate, shape.per) <= told


@given(rates, st.integers(-(10**12), 0), steps)
def test_refilling_in_many_steps_is_refilling_in_one(shape: Shape, level: int, moves: list[int]) -> None:
    bucket = Bucket(min(level, shape.capacity), NOW)
    now, latest = NOW, NOW
    for move in moves:
        now += move
        latest = max(latest, now)
        bucket = refill(shape, bucket, now)
    bucket = refill(shape, bucket, latest)
    exact = level + Fraction(latest - NOW) * Fraction(shape.rate, shape.per)
    assert bucket.level == min(shape.capacity, exact.__floor__())


@given(rates, st.integers(-(10**12), 10**12), st.integers(1, 10**12), st.integers(0, 86_399_999))
def test_a_wait_is_as_long_as_needed_and_no_longer(shape: Shape, level: int, amount: int, part: int) -> None:
    bucket = Bucket(min(level, shape.capacity), NOW, part % shape.per)
    amount = min(amount, shape.capacity)
    told = wait(shape, bucket, amount, NOW)
    if told >= NEVER:
        return
    assert refill(shape, bucket, NOW + told).level >= amount
    if told > 3:
        assert refill(shape, bucket, NOW + told - 3).level < amount


def test_after_a_clock_stepped_back_the_wait_counts_from_where_it_was() -> None:
    shape = rate_shape(60, 60)
    bucket = Bucket(0, NOW)
    told = wait(shape, bucket, 1000, NOW - 10 * SECOND)
    assert 11 * SECOND <= told <= 11 * SECOND + 2


def test_a_calendar_s_bucket_is_full_at_each_period_and_pays_its_debt_then() -> None:
    this, following = NOW, NOW + 3600 * SECOND
    shape = Shape(5000, starts=this, ends=following)
    bucket = fresh(shape, NOW + SECOND)
    assert (bucket.level, bucket.epoch) == (5000, this)
    bucket = give(shape, bucket, -7000, NOW + 2 * SECOND)
    assert bucket.level == -2000
    assert wait(shape, bucket, 3000, NOW + 2 * SECOND) == following - NOW - 2 * SECOND
    assert wait(shape, bucket, 3001, NOW + 2 * SECOND) == NEVER
    late = refill(shape, bucket, following)
    assert (late.level, late.epoch) == (3000, following)
    # The replica that still goes by the old calendar does not fill it a second time.
    assert refill(shape, late, following + SECOND).level == 3000
    assert refill(Shape(5000, starts=following, ends=following + 9), late, following + 2).level == 3000


def test_a_bucket_whose_level_was_lost_begins_at_nothing() -> None:
    shape = rate_shape(60, 60)
    assert fresh(shape, NOW).level == 60_000
    assert fresh(shape, NOW, empty_since=NOW - 5 * SECOND).level == 5000
    assert fresh(shape, NOW, empty_since=NOW + 5 * SECOND).level == 0


def test_slots_come_back_only_by_being_given_back() -> None:
    shape = Shape(2000, slots=True)
    bucket = give(shape, fresh(shape, NOW), -2000, NOW)
    assert refill(shape, bucket, NOW + 3600 * SECOND).level == -2000
    assert wait(shape, bucket, 1000, NOW) == NEVER
    bucket = give(shape, bucket, 1000, NOW)
    assert wait(shape, bucket, 1000, NOW) == 0
    assert give(shape, bucket, 9000, NOW).level == 0


def test_a_period_that_began_after_the_loss_is_whole() -> None:
    shape = Shape(5000, starts=NOW, ends=NOW + 60 * SECOND)
    assert fresh(shape, NOW + SECOND, empty_since=NOW - SECOND).level == 5000
    assert fresh(shape, NOW + 2 * SECOND, empty_since=NOW + SECOND).level == 0
