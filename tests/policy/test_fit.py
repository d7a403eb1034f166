"""Whoever cannot serve a request is left out, as long as somebody can."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gateway.policy.fit import able, roomy

POWERS = st.lists(st.integers(0, 15), max_size=6)


@given(powers=POWERS, needs=st.integers(0, 15))
def test_those_that_can_do_all_are_left_and_somebody_always_is(powers: list[int], needs: int) -> None:
    left = able(powers, needs)
    whole = [place for place, power in enumerate(powers) if power & needs == needs]
    assert left == whole if whole else bool(left) == bool(powers)
    assert set(left) <= set(range(len(powers)))


@given(powers=POWERS.filter(bool), needs=st.integers(0, 15))
def test_a_power_that_nobody_has_does_not_count(powers: list[int], needs: int) -> None:
    there = 0
    for power in powers:
        there |= power
    assert able(powers, needs) == able(powers, needs & there)


@given(lengths=st.lists(st.none() | st.integers(1, 100), max_size=6), tokens=st.integers(0, 120))
def test_a_context_that_is_too_short_serves_where_no_other_is(lengths: list[int | None], tokens: int) -> None:
    fit = [place for place, length in enumerate(lengths) if length is None or length >= tokens]
    assert roomy(lengths, tokens) == (fit or list(range(len(lengths))))
