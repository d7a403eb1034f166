"""What a replica holds: never more than it was given, less the nearer the end, nothing when idle."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gateway.policy.reservation import Need, Short, take
from gateway.policy.token_bucket import SECOND, Bucket, Shape, rate_shape
from gateway.store.lease import HORIZON, IDLE, Lease, Share

NOW = 1_790_000_000 * SECOND
RATE, SLOTS = rate_shape(60, 60), Shape(4000, slots=True)


def a_lease(level: int = 60_000, shape: Shape = RATE) -> Lease:
    lease = Lease(shape, NOW)
    lease.learn(Bucket(level, NOW))
    return lease


def test_a_replica_wants_what_it_used_of_late() -> None:
    lease = a_lease()
    for at in range(10):
        lease.note(1000, NOW + at * HORIZON // 10)
    busy = lease.wanted(NOW + HORIZON)
    assert 4000 < busy < 10_000
    assert lease.wanted(NOW + HORIZON * 3 // 2) < busy
    assert lease.wanted(NOW + 2 * HORIZON) == 0


def test_the_nearer_the_end_the_less_is_held() -> None:
    asked = []
    for level in (60_000, 20_000, 8000, 3000, 0, -5000):
        lease = a_lease(level)
        lease.note(5000, NOW)
        asked.append(lease.asks(500, NOW, 2))
    assert asked == [5000, 5000, 2000, 750, 0, 0]
    assert lease.asks(500, NOW, 2) == 0
    unknown = Lease(RATE, NOW)
    unknown.note(5000, NOW)
    assert unknown.asks(500, NOW, 1) == 0, "nobody has said yet how much is left"


def test_what_would_not_do_for_one_more_is_not_asked_for() -> None:
    lease = a_lease(3000)
    lease.note(5000, NOW)
    assert lease.asks(1000, NOW, 2) == 0


def test_what_lies_idle_goes_back_and_what_is_used_stays() -> None:
    lease = a_lease()
    lease.note(3000, NOW)
    lease.held = 3000
    assert lease.surplus(NOW + IDLE, 1) == 0
    assert lease.surplus(NOW + IDLE + 1, 1) == 3000
    assert lease.held == 0
    lease.note(3000, NOW + IDLE + 1)
    lease.held = 10_000
    assert lease.surplus(NOW + IDLE + 1, 1) == 7000, "more than is used is too much"


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("settle"), st.integers(-5000, 5000)),
            st.tuples(st.just("draw"), st.integers(0, 5000)),
            st.tuples(st.just("tick"), st.integers(0, 2 * IDLE)),
        )
    ),
    st.sampled_from((RATE, SLOTS)),
    st.integers(1, 20),
)
def test_what_is_settled_is_kept_or_goes_back_and_nothing_else_happens(
    steps: list[tuple[str, int]], shape: Shape, sharers: int
) -> None:
    lease = a_lease(0 if shape.slots else 60_000, shape)
    now = NOW
    for what, amount in steps:
        before = lease.held
        if what == "settle":
            kept = lease.keep(amount, now, sharers)
            assert min(amount, 0) <= kept <= max(amount, 0)
            assert lease.held == before + kept
        elif what == "draw" and lease.held >= amount:
            lease.held -= amount
            lease.note(amount, now)
        elif what == "tick":
            now += amount
            assert lease.surplus(now, sharers) == before - lease.held
        assert lease.held >= 0


@given(st.integers(1, 20), st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 3 * SECOND)), max_size=60))
def test_the_parts_of_all_replicas_are_no_more_than_the_limit(replicas: int, steps: list[tuple[int, int]]) -> None:
    """Over any time each lets in its part of burst and refill, and one request at the most beyond."""
    lease = a_lease()
    share = Share(RATE, lease, replicas, NOW)
    now, granted, largest = NOW, 0, 0
    for amount, pause in steps:
        now += pause
        taken = take([Need(share.shape, share.amount(amount))], [share.bucket], now)
        if isinstance(taken, Short):
            continue
        share.spend(amount, taken.buckets[0])
        granted += amount
        largest = max(largest, amount)
        part = (RATE.capacity + (now - NOW) * RATE.rate // RATE.per) // replicas
        assert granted <= part + largest
        assert 0 <= share.charge(now) <= share.spent == granted


def test_what_is_shown_is_never_more_than_the_limit() -> None:
    lease = a_lease(RATE.capacity)
    lease.held = 5000
    assert lease.seen(NOW).level == RATE.capacity


def test_what_was_spent_alone_is_charged_as_far_as_it_has_not_come_back() -> None:
    share = Share(RATE, a_lease(), 2, NOW)
    share.spend(10_000, take([Need(share.shape, 10_000)], [share.bucket], NOW).buckets[0])
    assert share.charge(NOW) == 10_000
    assert share.charge(NOW + 8 * SECOND) == 6000
    assert share.back(4000, NOW) == 0
    assert share.back(7000, NOW) == 1000, "what was taken out of the store goes back there"
    assert share.charge(NOW) == 0
    empty = Share(RATE, a_lease(-9000), 2, NOW)
    assert empty.charge(NOW) == 0, "what was missing before is the store's already"


def test_open_is_never_worse_than_an_empty_part() -> None:
    share = Share(RATE, a_lease(), 2, NOW)
    for _ in range(100):
        share.let_in(1000, NOW)
    assert (share.spent, share.charge(NOW)) == (100_000, 30_000)
