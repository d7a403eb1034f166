"""When a request is sent to a second engine: after longer than is usual, and seldom."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.policy.hedge import KNOWN_AFTER, MOST_SAVED, SHORTEST, STEP, HedgeRules, Hedging, Times
from tests.support.examples import examples

SECONDS = st.floats(0.0, 500.0)


@settings(max_examples=examples(40))
@given(took=st.lists(SECONDS, max_size=300))
def test_what_is_usual_is_no_less_than_ninety_five_of_a_hundred_took_and_little_more(took: list[float]) -> None:
    times = Times()
    for seconds in took:
        times.took(seconds)
    if len(took) < KNOWN_AFTER:
        assert times.usual() == math.inf
        return
    longest = sorted(took)[math.ceil(0.95 * len(took)) - 1]
    assert longest <= times.usual() * (1 + 1e-6)
    assert times.usual() <= max(SHORTEST, longest * STEP) * (1 + 1e-6)


def test_the_past_is_forgotten_and_what_is_beyond_all_bounds_is_never_usual() -> None:
    times = Times()
    for _ in range(5000):
        times.took(10.0)
    for _ in range(6000):
        times.took(0.1)
    assert times.usual() < 0.13
    for _ in range(500):
        times.took(1e9)
    assert times.usual() == math.inf


@given(share=st.floats(0.01, 0.5), asked=st.lists(st.booleans(), max_size=200))
def test_never_more_than_the_share_of_the_requests(share: float, asked: list[bool]) -> None:
    hedging = Hedging(HedgeRules(share=share))
    requests = second = 0
    for request in asked:
        if request:
            hedging.asked()
            requests += 1
        else:
            second += hedging.take()
        assert second <= share * requests + 1e-9


def test_a_quiet_hour_saves_no_storm() -> None:
    hedging = Hedging(HedgeRules(share=0.5))
    for _ in range(1000):
        hedging.asked()
    assert sum(hedging.take() for _ in range(100)) == MOST_SAVED


@pytest.mark.parametrize("after", [None, 2.5])
def test_a_time_that_is_set_needs_no_past(after: float | None) -> None:
    hedging = Hedging(HedgeRules(after=after))
    assert hedging.after("a") == (after or math.inf)
    for _ in range(KNOWN_AFTER):
        hedging.took("a", 0.2)
    assert hedging.after("a") == pytest.approx(after or 0.2, rel=0.25)
    assert hedging.after("b") == (after or math.inf)
