"""The least loaded endpoint, and a fair turn among equals."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from gateway.policy.routing import least_loaded


@dataclass(eq=False)
class Place:
    in_flight: int
    available: bool = True


PLACES = st.lists(st.builds(Place, st.integers(0, 4), st.booleans()), max_size=6)


@given(places=PLACES, data=st.data(), start=st.integers(-100, 10**9))
def test_the_choice_is_open_untried_and_least_loaded(places: list[Place], data: st.DataObject, start: int) -> None:
    tried = data.draw(st.lists(st.sampled_from(places), unique_by=id)) if places else []
    chosen = least_loaded(places, tried, start)
    open_ = [place for place in places if place.available and place not in tried]
    if not open_:
        assert chosen is None
    else:
        assert chosen in open_
        assert chosen.in_flight == min(place.in_flight for place in open_)


@given(count=st.integers(1, 6), load=st.integers(0, 3), rounds=st.integers(1, 4), start=st.integers(0, 10**6))
def test_equals_share_the_work_exactly(count: int, load: int, rounds: int, start: int) -> None:
    places = [Place(load) for _ in range(count)]
    turns = Counter(least_loaded(places, (), start + turn) for turn in range(count * rounds))
    assert turns == dict.fromkeys(places, rounds)


@given(count=st.integers(2, 6), requests=st.integers(1, 40))
def test_work_that_stays_is_spread_to_within_one(count: int, requests: int) -> None:
    places = [Place(0) for _ in range(count)]
    for turn in range(requests):
        chosen = least_loaded(places, (), turn)
        assert chosen is not None
        chosen.in_flight += 1
    loads = [place.in_flight for place in places]
    assert max(loads) - min(loads) <= 1


def test_nobody_to_choose_from() -> None:
    assert least_loaded([], (), 3) is None
