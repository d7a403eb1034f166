"""How much an endpoint is given at once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.policy.concurrency import (
    ConcurrencyRules,
    Limit,
    Targets,
    Told,
    Window,
    can_keep,
    first_limit,
    hear,
    p95,
    step,
    stretched,
    without_old_word,
)

RULES = ConcurrencyRules(targets=Targets(ttft=1.0, inter_token=0.05), most=200)


def window(gap: float, peak: int, count: int = 20, ttft: float = 0.1) -> Window:
    seen = Window()
    seen.peak = peak
    for _ in range(count):
        seen.gap(gap)
        seen.first_token(ttft)
    return seen


times = st.floats(0, 10, allow_nan=False)


@given(
    windows=st.lists(st.tuples(times, times, st.integers(0, 300), st.integers(0, 40)), max_size=30),
    least=st.integers(1, 4),
)
def test_the_limit_never_falls_below_its_least_nor_exceeds_its_most(
    windows: list[tuple[float, float, int, int]], least: int
) -> None:
    """Whatever is seen."""
    rules = ConcurrencyRules(targets=RULES.targets, least=least, most=64)
    limit = first_limit(rules)
    now = 0.0
    for gap, ttft, peak, count in windows:
        now += 0.7
        limit = step(limit, window(gap, peak, count, ttft), peak, now, rules)
        assert least <= limit.sequences <= 64
        assert limit.room(0, 0, 10**9), "one alone may always be sent"


def test_it_settles_where_the_engine_keeps_to_the_target() -> None:
    """An engine whose tokens take longer the more it has at once is given about as much as it can do in time."""
    rules = RULES
    limit, now = first_limit(rules), 0.0
    seen = []
    for _ in range(120):
        now += 1.0
        busy = int(limit.sequences)
        limit = step(limit, window(0.010 + 0.0005 * busy, busy), busy, now, rules)
        seen.append(limit.sequences)
    # 80 at once are 50 ms.
    assert min(seen[-40:]) >= 64
    assert max(seen[-40:]) <= 84


def test_steps_are_short_near_the_target() -> None:
    """A long one would let in a burst that makes itself slow, and then nobody until as many have ended."""
    sizes = [
        step(Limit(100.0), window(0.05 * slow, 100), 100, 1.0, RULES).sequences for slow in (0.5, 0.9, 1.1, 2.0, 9.0)
    ]
    assert sizes == [pytest.approx(one) for one in (105.0, 101.0, 98.5, 85.0, 85.0)]


def test_a_stretched_limit_falls_once_for_one_fault_too() -> None:
    """What an engine was given beyond its limit keeps it from falling no more than what was within it."""
    limit = step(Limit(100.0), window(0.2, 120), 120, 1.0, RULES)
    assert limit.sequences == 85
    assert step(limit, window(0.2, 120), 110, 3.0, RULES).sequences == 85
    assert step(limit, window(0.2, 120), 102, 3.0, RULES).sequences < 85


def test_one_fault_counts_once() -> None:
    """While what was sent before is still there, the limit does not fall a second time for it."""
    limit = step(Limit(100.0), window(0.2, 100), 100, 1.0, RULES)
    assert limit.sequences == 85
    again = step(limit, window(0.2, 100), 95, 3.0, RULES)
    assert again.sequences == 85
    assert step(again, window(0.2, 84), 84, 5.0, RULES).sequences < 85


def test_it_does_not_grow_while_it_is_not_used() -> None:
    """What was not tried is not known to go well."""
    assert step(Limit(50.0), window(0.01, 20), 20, 1.0, RULES).sequences == 50
    assert step(Limit(50.0), window(0.01, 50), 20, 1.0, RULES).sequences == 54
    assert step(Limit(50.0), window(0.045, 50), 20, 1.0, RULES).sequences == 51


def test_too_little_seen_says_nothing() -> None:
    """A window goes on until enough was seen, and a step waits for its window."""
    limit = Limit(50.0, until=5.0)
    assert step(limit, window(0.2, 50), 50, 4.0, RULES) is limit
    assert step(limit, window(0.2, 50, count=5), 50, 6.0, RULES) is limit


def test_without_targets_the_most_holds_from_the_beginning() -> None:
    """Who states no target wants no limit learnt."""
    assert first_limit(ConcurrencyRules(most=77)).sequences == 77


def test_an_engines_word_counts_while_it_is_fresh() -> None:
    """How full its cache is tells how much it holds in all; an old word, or one about an empty cache, tells nothing."""
    limit = Limit(50.0)
    assert hear(limit, Told(0, 0.5, 10_000, at=0.0), 30.0, oldest=10.0) is limit
    assert hear(limit, Told(0, None, 100, at=0.0), 1.0, oldest=10.0) is limit
    once = hear(limit, Told(0, 0.5, 10_000, at=0.0), 1.0, oldest=10.0)
    assert once.tokens == 19_000
    twice = hear(once, Told(0, 0.5, 8_000, at=1.0), 1.0, oldest=10.0)
    assert twice.tokens == 17_100
    assert not twice.room(3, 17_000, 200)
    assert twice.room(3, 17_000, 100)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=200))
def test_the_95th_percentile_is_one_that_was_seen(values: list[float]) -> None:
    """At least 95 of 100 do not exceed it."""
    found = p95(values)
    assert found in values
    assert sum(value <= found for value in values) >= 0.95 * len(values)


def test_a_window_keeps_no_more_than_it_needs() -> None:
    """Whatever the traffic."""
    seen = Window()
    for _ in range(2 * Window.MOST):
        seen.first_token(1.0)
        seen.gap(1.0)
    assert len(seen.ttfts) == Window.MOST
    assert Window.MOST // 2 <= len(seen.gaps) <= Window.MOST
    seen.clear(3)
    assert (seen.ttfts, seen.gaps, seen.peak) == ([], [], 3)


def test_a_bound_on_tokens_goes_when_the_cache_is_empty_again() -> None:
    """What others had filled it with counted as ours; a bound so small would keep the cache empty, and so itself."""
    limit = hear(Limit(50.0), Told(0, 0.5, 500, at=0.0), 0.0, oldest=10.0)
    assert limit.tokens == 950
    assert hear(limit, Told(0, 0.02, 900, at=1.0), 1.0, oldest=10.0).tokens is None


def test_an_engine_that_says_nothing_any_more_is_not_bound_by_what_it_said() -> None:
    """A word that is ten seconds old bounds nothing."""
    limit = hear(Limit(50.0), Told(0, 0.5, 500, at=100.0), 100.0, oldest=10.0)
    assert without_old_word(limit, 110.0, oldest=10.0) is limit
    assert without_old_word(limit, 110.1, oldest=10.0) == Limit(50.0)
    assert without_old_word(Limit(50.0), 1e6, oldest=10.0) == Limit(50.0)


def test_slow_with_as_few_as_always_may_be_is_not_the_limits_fault() -> None:
    """At night, one long prompt at a time: in the morning the engine is given as much as before."""
    limit = Limit(64.0)
    assert step(limit, window(0.01, 1, ttft=3.0), 1, 1.0, RULES).sequences == 64
    few = ConcurrencyRules(targets=RULES.targets, least=4)
    assert step(limit, window(0.01, 4, ttft=3.0), 1, 1.0, few).sequences == 64
    assert step(limit, window(0.01, 10, ttft=3.0), 1, 1.0, few).sequences == 8.5


def test_one_of_twenty_may_be_slow() -> None:
    """Five of a hundred may: with so few seen that the 95th percentile is the slowest, each would count."""
    seen = window(0.01, 50, count=19)
    seen.gap(0.01)
    seen.first_token(9.0)
    assert step(Limit(50.0), seen, 50, 1.0, RULES).sequences > 50
    seen.first_token(9.0)
    assert step(Limit(50.0), seen, 50, 1.0, RULES).sequences < 50


def test_a_prompt_that_takes_too_long_by_itself_says_nothing_of_the_limit() -> None:
    """However few are sent, its first token comes late; at an unknown or low speed it is not taken to be so long."""
    assert can_keep(8000, 10_000.0, RULES.targets)
    assert not can_keep(12_000, 10_000.0, RULES.targets)
    assert can_keep(1500, 10.0, RULES.targets), "one that is overloaded from the start must be noticed"
    assert can_keep(10**6, 10.0, Targets(inter_token=0.1))


@given(steps=st.integers(20, 400), streams=st.integers(1, 300), data=st.data())
def test_what_is_kept_of_many_gaps_is_spread_over_the_window(steps: int, streams: int, data: st.DataObject) -> None:
    """A long prompt holds up one step of all streams: one step in twenty or fewer is no p95, wherever in the window it
    falls, however many streams there are."""
    at = data.draw(st.integers(0, steps - 1))
    window = Window()
    for number in range(steps):
        for _ in range(streams):
            window.gap(0.5 if number == at else 0.01)
    assert len(window.gaps) <= Window.MOST
    assert len(window.gaps) >= min(steps * streams, Window.MOST // 2)
    share = sum(gap == 0.5 for gap in window.gaps) / len(window.gaps)
    assert abs(share - 1 / steps) <= 2 / min(len(window.gaps), Window.MOST // 2)
    window.clear(3)
    window.gap(0.01)
    assert window.gaps == [0.01]


@given(
    sequences=st.floats(1, 300),
    most=st.integers(1, 300),
    in_flight=st.integers(0, 400),
)
def test_a_limit_is_stretched_by_a_part_and_never_beyond_the_most(sequences: float, most: int, in_flight: int) -> None:
    rules = ConcurrencyRules(most=most)
    limit = Limit(min(sequences, float(most)))
    if limit.room(in_flight, 0, 1) and in_flight:
        assert stretched(limit, in_flight, rules), "who has room is stretched for no one"
    if stretched(limit, in_flight, rules):
        assert in_flight + 1 <= most
        assert in_flight + 1 <= limit.sequences * 1.25
    assert not stretched(limit, most, rules)
