"""Where a session is at home, as endpoints come and go."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.policy.ring import Ring

NAMES = st.lists(st.text("abcdefgh-0123", min_size=1, max_size=6), min_size=2, max_size=12, unique=True)
SESSIONS = st.lists(st.integers(-(2**63), 2**64), min_size=1, max_size=30)


@given(names=NAMES, sessions=SESSIONS, data=st.data())
def test_an_endpoint_that_goes_moves_only_its_own_sessions(
    names: list[str], sessions: list[int], data: st.DataObject
) -> None:
    """The other way round: one that comes takes sessions for itself, and moves none between the others."""
    gone = data.draw(st.sampled_from(names))
    left = [name for name in names if name != gone]
    before, after = Ring(names), Ring(left)
    for session in sessions:
        home = names[before.home(session)]
        if home != gone:
            assert left[after.home(session)] == home
        else:
            second = [names[place] for place in before.homes(session)][1]
            assert left[after.home(session)] == second


@given(names=NAMES, session=st.integers(), data=st.data())
def test_the_order_of_the_endpoints_does_not_matter(names: list[str], session: int, data: st.DataObject) -> None:
    other = data.draw(st.permutations(names))
    assert [names[place] for place in Ring(names).homes(session)] == [
        other[place] for place in Ring(other).homes(session)
    ]


@given(names=NAMES, session=st.integers())
def test_every_endpoint_is_a_home_once_and_the_first_is_the_home(names: list[str], session: int) -> None:
    ring = Ring(names)
    homes = list(ring.homes(session))
    assert sorted(homes) == list(range(len(names)))
    assert homes[0] == ring.home(session)


@pytest.mark.parametrize("count", [2, 10, 100, 1000])
def test_no_endpoint_is_home_to_more_than_twice_the_mean(count: int) -> None:
    ring = Ring([f"engine-{at}.pool:8000" for at in range(count)])
    assert _most(ring) * count <= 2


def test_processes_agree() -> None:
    """Written down once: replicas of other versions and other machines must find the same."""
    ring = Ring(["one", "two", "three", "four"])
    assert [ring.home(session) for session in range(1, 13)] == [1, 3, 0, 0, 3, 0, 3, 0, 0, 3, 3, 1]


def test_sessions_counted_up_are_spread() -> None:
    ring = Ring([f"e{at}" for at in range(8)])
    turns = Counter(ring.home(session) for session in range(1, 4001))
    assert len(turns) == 8
    assert max(turns.values()) <= 2 * 500


def _most(ring: Ring) -> float:
    """Return the largest part of all sessions that one endpoint is home to."""
    part: Counter[int] = Counter()
    for at, point in enumerate(ring._points):
        part[ring._owners[at]] += (point - ring._points[at - 1]) % 2**64
    return max(part.values()) / 2**64
