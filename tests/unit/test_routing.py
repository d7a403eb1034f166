"""The least loaded endpoint, and a fair turn among equals."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from gateway.policy.routing import LEAST_SHARE, least_loaded, share


@dataclass(eq=False)
class Place:
    in_flight: int
    available: bool = True
    good: bool = True
    ramp_from: float = 0.0
    ramp_until: float = 0.0

    def trusted(self, now: float) -> bool:
        return self.good


NOW = 100.0
PLACES = st.lists(st.builds(Place, st.integers(0, 4), st.booleans(), st.booleans()), max_size=6)


@given(places=PLACES, data=st.data(), start=st.integers(-100, 10**9))
def test_the_choice_is_open_untried_and_least_loaded(places: list[Place], data: st.DataObject, start: int) -> None:
    tried = data.draw(st.lists(st.sampled_from(places), unique_by=id)) if places else []
    chosen = least_loaded(places, tried, start, NOW)
    open_ = [place for place in places if place.available and place not in tried]
    if not open_:
        assert chosen is None
    else:
        best = [place for place in open_ if place.good] or open_
        assert chosen in best
        assert chosen.in_flight == min(place.in_flight for place in best)


@given(count=st.integers(1, 6), load=st.integers(0, 3), rounds=st.integers(1, 4), start=st.integers(0, 10**6))
def test_equals_share_the_work_exactly(count: int, load: int, rounds: int, start: int) -> None:
    places = [Place(load) for _ in range(count)]
    turns = Counter(least_loaded(places, (), start + turn, NOW) for turn in range(count * rounds))
    assert turns == dict.fromkeys(places, rounds)


@given(count=st.integers(2, 6), requests=st.integers(1, 40))
def test_work_that_stays_is_spread_to_within_one(count: int, requests: int) -> None:
    places = [Place(0) for _ in range(count)]
    for turn in range(requests):
        chosen = least_loaded(places, (), turn, NOW)
        assert chosen is not None
        chosen.in_flight += 1
    loads = [place.in_flight for place in places]
    assert max(loads) - min(loads) <= 1


def test_nobody_to_choose_from() -> None:
    assert least_loaded([], (), 3, NOW) is None


@given(since=st.floats(0, 1000), length=st.floats(0.1, 100), now=st.floats(0, 2000))
def test_a_share_grows_from_little_to_whole(since: float, length: float, now: float) -> None:
    got = share(since, since + length, now)
    assert LEAST_SHARE <= got <= 1.0
    assert got <= share(since, since + length, now + 1.0)
    assert share(since, since + length, since + length) == 1.0


def test_a_newcomer_is_not_stormed() -> None:
    """Twenty requests come while an old hand holds ten: the emptiest would get the first ten of them."""
    old, new = Place(10), Place(0, ramp_from=NOW, ramp_until=NOW + 10)
    for turn in range(20):
        chosen = least_loaded([old, new], (), turn, NOW)
        assert chosen is not None
        chosen.in_flight += 1
    assert new.in_flight == 2


def test_after_its_ramp_it_catches_up() -> None:
    old, new = Place(28), Place(2, ramp_from=NOW - 10, ramp_until=NOW)
    for turn in range(26):
        chosen = least_loaded([old, new], (), turn, NOW)
        assert chosen is new
        chosen.in_flight += 1
