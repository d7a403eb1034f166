"""Each view of an endpoint: from 0 to 1, and in the right direction."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.policy import scorers
from gateway.policy.scorers import ASSUMED_MOST, Slots, Weights
from tests.support.table import each

COUNTS = st.integers(0, 10**6)
SHARES = st.floats(0, 50)


@given(in_flight=COUNTS, most=COUNTS, tokens=COUNTS, most_tokens=COUNTS)
def test_load_is_by_what_is_used_most(in_flight: int, most: int, tokens: int, most_tokens: int) -> None:
    used = scorers.used(in_flight, most, tokens, most_tokens)
    assert used >= in_flight / (most or ASSUMED_MOST)
    assert not most_tokens or used >= tokens / most_tokens
    assert used in (in_flight / (most or ASSUMED_MOST), tokens / (most_tokens or 1))
    assert 0 <= scorers.load(used) <= 1


def test_load_falls_from_empty_to_full_and_no_further() -> None:
    assert [scorers.load(used) for used in (0.0, 0.25, 1.0, 3.0)] == [1.0, 0.75, 0.0, 0.0]


def test_a_limit_that_is_not_known_neither_hides_load_nor_refuses() -> None:
    assert scorers.used(64, 0, 10**9, 0) == 64 / ASSUMED_MOST


def test_prefix_is_the_part_of_the_prompt_that_was_read_before() -> None:
    assert [scorers.prefix(matched, 4) for matched in (0, 1, 4)] == [0.0, 0.25, 1.0]
    assert scorers.prefix(0, 0) == 0.0


def test_a_session_is_at_home_or_not() -> None:
    assert scorers.session(True) == 1.0
    assert scorers.session(False) == 0.0


@each(
    ("slots", "score"),
    [
        (Slots(("mine", "other"), (), 2), 1.0),
        (Slots(("other",), (), 2), 0.8),
        (Slots((), ("mine",), 2), 0.8),
        (Slots(("other",), ("mine",), 2), 0.6),
        (Slots(("other",), ("another",), 2), 0.0),
        (Slots((), (), 0), 0.0),
    ],
)
def test_an_adapter_is_there_has_room_waits_or_finds_it_full(slots: Slots, score: float) -> None:
    assert scorers.adapter("mine", slots) == score


def test_slot_pressure_is_what_is_taken() -> None:
    assert [scorers.slots(Slots("ab"[:taken], "c"[: taken // 2], 4)) for taken in (0, 1, 2)] == [1.0, 0.75, 0.25]
    assert scorers.slots(Slots("abcdef", (), 4)) == 0.0
    assert scorers.slots(Slots((), (), 0)) == 0.0


@given(ahead=SHARES, uncached=SHARES, rate=st.floats(0.1, 1e6))
def test_the_first_token_comes_after_all_prompts_before_it(ahead: float, uncached: float, rate: float) -> None:
    seconds = scorers.first_token(ahead, uncached, rate)
    assert seconds == pytest.approx(ahead / rate + uncached / rate)
    assert scorers.first_token(ahead, uncached, 2 * rate) == pytest.approx(seconds / 2)


@given(seconds=st.lists(st.floats(0, 1e3), min_size=1, max_size=8))
def test_time_to_the_first_token_is_scored_against_the_best(seconds: list[float]) -> None:
    best = min(seconds)
    scores = [scorers.ttft(one, best) for one in seconds]
    assert all(0 <= score <= 1 for score in scores)
    assert max(scores) == 1.0
    assert [scorers.ttft(one, 1.0) for one in (1.0, 2.0, 4.0)] == [1.0, 0.5, 0.25]


@given(seconds=SHARES, reading=SHARES, used=SHARES, more=st.floats(0.01, 10))
def test_everything_that_is_worse_costs_more(seconds: float, reading: float, used: float, more: float) -> None:
    weights = Weights()
    cost = scorers.cost(weights, seconds, reading, used)
    assert scorers.cost(weights, seconds + more, reading, used) > cost
    assert scorers.cost(weights, seconds, reading, used + more) > cost
    assert scorers.cost(weights, seconds, reading + more, used) >= cost
