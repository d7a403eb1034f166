"""Several buckets at once, over any sequence of steps and of clocks."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gateway.policy.reservation import FARTHEST, GRACE, MOST_PROMISES, Need, Short, Taken, give, take
from gateway.policy.token_bucket import LARGEST, NEVER, SECOND, STEP, Bucket, Shape, fresh, rate_shape, refill
from tests.support.examples import examples

NOW = 1_790_000_000 * SECOND
MINUTE = rate_shape(60, 60)


def need(amount: int, shape: Shape = MINUTE, more: int = 0) -> Need:
    return Need(shape, amount * 1000, more * 1000)


def taken(result: Taken | Short) -> Taken:
    assert isinstance(result, Taken), result
    return result


def short(result: Taken | Short) -> Short:
    assert isinstance(result, Short), result
    return result


class AnySequence(RuleBasedStateMachine):
    """Two requests' buckets shared by all; in every window no more is let in than the rule says."""

    SHAPES = (rate_shape(7, 1, 20), rate_shape(90, 60, 5), Shape(4000, slots=True))

    def __init__(self) -> None:
        super().__init__()
        self.now = self.latest = NOW
        self.buckets = tuple(fresh(shape, NOW) for shape in self.SHAPES)
        self.held: list[tuple[int, ...]] = []
        self.admitted: list[tuple[int, tuple[int, ...]]] = []
        self.debt = [0, 0, 0]

    @rule(move=st.integers(-3 * SECOND, 20 * SECOND))
    def clock(self, move: int) -> None:
        # What is further back was wrong before, see below.
        self.now = max(self.now + move, self.latest - STEP)

    @rule(
        amounts=st.tuples(st.integers(0, 6000), st.integers(0, 6000), st.integers(0, 2000)),
        who=st.integers(0, 5),
        more=st.integers(0, 3000),
    )
    def reserve(self, amounts: tuple[int, ...], who: int, more: int) -> None:
        needs = [Need(shape, amount, more) for shape, amount in zip(self.SHAPES, amounts, strict=True)]
        # What no bucket was told, a clock that steps back takes back.
        self.latest = max(self.latest, self.now)
        before = tuple(refill(s, b, self.now) for s, b in zip(self.SHAPES, self.buckets, strict=True))
        result = take(needs, self.buckets, self.now, who, sharers=3)
        if isinstance(result, Short):
            assert [(b.level, b.part, b.at) for b in result.buckets] == [(b.level, b.part, b.at) for b in before]
        else:
            assert all(got >= asked for got, asked in zip(result.amounts, amounts, strict=True))
            self.held.append(result.amounts)
            self.admitted.append((self.latest, result.amounts))
        self.buckets = result.buckets

    @precondition(lambda self: self.held)
    @rule(data=st.data(), used=st.integers(0, 9000))
    def settle(self, data: st.DataObject, used: int) -> None:
        amounts = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.latest = max(self.latest, self.now)
        after = []
        for at, (shape, bucket) in enumerate(zip(self.SHAPES, self.buckets, strict=True)):
            back = amounts[at] if shape.slots else amounts[at] - used
            self.debt[at] += max(0, -back)
            after.append(give(shape, bucket, back, self.now))
            if back > 0 and not shape.slots:
                self.admitted.append((self.latest, tuple(-back if i == at else 0 for i in range(3))))
        self.buckets = tuple(after)

    @invariant()
    def no_window_has_more_than_it_may(self) -> None:
        for at, shape in enumerate(self.SHAPES[:2]):
            running = 0
            # From each admission to now; what was given back made room for others.
            for when, amounts in reversed(self.admitted):
                running += amounts[at]
                passed = self.latest - when
                allowed = shape.capacity + passed * shape.rate // shape.per + self.debt[at]
                assert running <= allowed

    @invariant()
    def slots_are_those_held(self) -> None:
        assert -self.buckets[2].level == sum(amounts[2] for amounts in self.held) <= 4000


AnySequence.TestCase.settings = settings(max_examples=examples(25), stateful_step_count=40)
TestAnySequence = AnySequence.TestCase


def test_all_or_nothing() -> None:
    full, low = fresh(MINUTE, NOW), Bucket(500, NOW)
    refused = short(take([need(1), need(1)], (full, low), NOW))
    assert (refused.index, refused.buckets) == (1, (full, low))
    assert 500_000 <= refused.wait <= 500_002


def test_the_longest_wait_is_the_one_that_is_told() -> None:
    hourly = rate_shape(60, 3600)
    refused = short(take([need(1), need(1, hourly)], (Bucket(0, NOW), Bucket(0, NOW)), NOW))
    assert refused.index == 1
    assert 60 * SECOND <= refused.wait <= 60 * SECOND + 2


def test_whoever_was_refused_is_served_when_it_was_told_to_come_back_whatever_others_ask() -> None:
    buckets: tuple[Bucket, ...] = (Bucket(0, NOW),)
    due: list[int] = []
    for who in range(1, 11):
        refused = short(take([need(2)], buckets, NOW, who))
        buckets = refused.buckets
        due.append(NOW + refused.wait)
    assert [round((at - NOW) / SECOND) for at in due] == [2 * n for n in range(1, 11)]
    for who, at in enumerate(due, start=1):
        # Newcomers ask all the time and get nothing of what was promised.
        buckets = short(take([need(1)], buckets, at, 999)).buckets
        buckets = taken(take([need(2)], buckets, at, who)).buckets


def test_who_comes_early_is_told_the_same_time_again() -> None:
    first = short(take([need(2)], (Bucket(0, NOW),), NOW, 7))
    again = short(take([need(2)], first.buckets, NOW + SECOND, 7))
    assert again.early
    assert again.wait == first.wait - SECOND
    assert again.buckets[0].promises == first.buckets[0].promises
    assert not first.early


def test_who_comes_early_is_let_in_when_there_is_room_after_all() -> None:
    first = short(take([need(2)], (Bucket(0, NOW),), NOW, 7))
    filled = give(MINUTE, first.buckets[0], 5000, NOW)
    assert taken(take([need(2)], (filled,), NOW, 7)).buckets[0].promises == ()


def test_what_nobody_claims_is_free_again_after_a_grace() -> None:
    first = short(take([need(2)], (Bucket(0, NOW),), NOW, 7))
    due = NOW + first.wait
    assert isinstance(take([need(2)], first.buckets, due + GRACE - 1 - 2 * SECOND, 8), Short)
    assert taken(take([need(2)], first.buckets, due + GRACE, 8)).buckets[0].promises == ()


def test_requests_that_look_alike_have_a_promise_each() -> None:
    buckets: tuple[Bucket, ...] = (Bucket(0, NOW),)
    due: list[int] = []
    for _ in range(5):
        refused = short(take([need(2)], buckets, NOW, 7, first=True))
        buckets, due = refused.buckets, [*due, NOW + refused.wait]
    assert len({*due}) == 5
    for at in due:
        buckets = short(take([need(2)], buckets, at, 7, first=True)).buckets
        buckets = (Bucket(buckets[0].level, buckets[0].at, buckets[0].part, 0, buckets[0].promises[:-1]),)
        buckets = taken(take([need(2)], buckets, at, 7)).buckets
    assert buckets[0].promises == ()


def test_nothing_is_kept_for_somebody_who_will_not_come_back_in_time() -> None:
    hourly = rate_shape(60, 3600)
    buckets = (Bucket(0, NOW),)
    refused = short(take([need(2, hourly)], buckets, NOW, 7))
    assert refused.wait > FARTHEST
    assert refused.buckets[0].promises == ()
    assert short(take([need(1)], buckets, NOW)).buckets[0].promises == ()


def test_promises_are_bounded() -> None:
    buckets: tuple[Bucket, ...] = (Bucket(0, NOW),)
    quick = rate_shape(1000, 1)
    for who in range(1, MOST_PROMISES + 50):
        buckets = short(take([need(1, quick)], buckets, NOW, who)).buckets
    assert len(buckets[0].promises) == MOST_PROMISES


@pytest.mark.parametrize("sharers", [1, 3, 20])
def test_a_lease_shrinks_with_what_is_left(sharers: int) -> None:
    bucket = fresh(MINUTE, NOW)
    leased = []
    while isinstance(result := take([need(1, more=60)], (bucket,), NOW, 0, sharers), Taken):
        leased.append(result.amounts[0])
        bucket = result.buckets[0]
    assert sum(leased) == 60_000 - bucket.level <= 60_000
    assert leased == sorted(leased, reverse=True)
    assert leased[-1] < 2000
    assert leased[0] == 1000 + 59_000 // (2 * sharers)


def test_slots_that_are_taken_say_that_nobody_can_tell() -> None:
    shape = Shape(1000, slots=True)
    refused = short(take([Need(shape, 1000)], (Bucket(-1000, NOW),), NOW, 7))
    assert (refused.wait, refused.buckets[0].promises) == (NEVER, ())


@dataclass
class Client:
    who: int
    comes: int
    told: list[int] = field(default_factory=list)


@given(st.lists(st.tuples(st.integers(0, 30 * SECOND), st.integers(1, 20)), min_size=1, max_size=60))
def test_under_any_contention_each_succeeds_at_the_time_it_was_promised(arrivals: list[tuple[int, int]]) -> None:
    """Clients that come back exactly when they were told are refused once at most, as long as SDKs would wait."""
    shape = rate_shape(120, 60, 20)
    buckets: tuple[Bucket, ...] = (fresh(shape, NOW),)
    waiting = [(NOW + at, who, amount, 0) for who, (at, amount) in enumerate(arrivals, start=1)]
    while waiting:
        waiting.sort()
        now, who, amount, refusals = waiting.pop(0)
        result = take([need(amount, shape)], buckets, now, who)
        buckets = result.buckets
        if isinstance(result, Short) and result.wait <= FARTHEST:
            assert refusals == 0
            waiting.append((now + result.wait, who, amount, 1))


def test_a_clock_that_was_far_ahead_keeps_nobody_waiting_for_it() -> None:
    """Nothing refills twice while it is back a little; further back, it goes on from there, once."""
    ahead = Bucket(0, NOW + STEP)
    assert short(take([need(1)], (ahead,), NOW, who=1)).wait == STEP + SECOND + 1
    (told,) = short(take([need(1)], (ahead,), NOW - 1, who=1)).buckets
    assert told == Bucket(0, NOW - 1, promises=told.promises)
    assert short(take([need(1)], (told,), NOW + SECOND, who=2)).buckets[0].level == 1000
    promised = Bucket(
        1000, NOW + STEP, promises=short(take([need(1)], (ahead,), NOW + STEP, who=3)).buckets[0].promises
    )
    assert taken(take([need(1)], (promised,), NOW - 1)), "nobody comes back at a time that was wrong"


def test_a_debt_has_an_end() -> None:
    owing = give(MINUTE, give(MINUTE, fresh(MINUTE, NOW), -(10**30), NOW), -1, NOW)
    assert owing.level == -LARGEST
    assert give(MINUTE, owing, 10**30, NOW).level == MINUTE.capacity
