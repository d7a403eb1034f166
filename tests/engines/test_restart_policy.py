"""When an engine that ended by itself is started again, and when it is given up: pure, so every time is said here."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from engines.minder import GiveUp, History, RestartPolicy, Wait, after_end

POLICY = RestartPolicy(first=1, factor=2, cap=60, jitter=0.2, never_ready=3, storm=5, window=900, steady=300)
MIDDLE = 0.5
"""The chance at which jitter adds nothing."""


def waits(ends: Iterable[tuple[float, float | None]], policy: RestartPolicy = POLICY) -> list[float | str]:
    """Return what follows each end, given as (time, how long it had been ready): seconds, or why it is given up."""
    history, decisions = History(), list[float | str]()
    for now, ready_for in ends:
        history, decision = after_end(policy, history, now, ready_for, MIDDLE)
        decisions.append(decision.seconds if isinstance(decision, Wait) else decision.why)
    return decisions


def test_each_wait_is_twice_as_long() -> None:
    policy = RestartPolicy(first=1, factor=2, cap=60, storm=100)
    assert waits([(now, 10) for now in range(8)], policy) == [1, 2, 4, 8, 16, 32, 60, 60]


def test_one_that_was_never_ready_is_given_up_soon() -> None:
    """Its configuration is wrong, and loading for ever does not make it right."""
    assert waits([(0, None), (60, None), (120, None)]) == [1, 2, "it ended 3 times and was never ready"]
    assert waits([(0, None)], RestartPolicy(never_ready=1)) == ["it ended once and was never ready"]


def test_a_storm_is_given_up() -> None:
    """One that becomes ready and ends again, over and over, costs everybody who is sent there."""
    ends: list[tuple[float, float | None]] = [(100.0 * i, 30) for i in range(5)]
    assert waits(ends) == [1, 2, 4, 8, "it ended 5 times within 900 s"]


def test_loads_that_fail_later_on_are_a_storm_too() -> None:
    """It was ready once, so the first bound does not hold; the second does."""
    assert waits([(0, 100), (10, None), (20, None), (30, None), (40, None)])[-1] == "it ended 5 times within 900 s"


def test_now_and_then_is_no_storm() -> None:
    """A crash every half an hour is worth a look, not an outage."""
    assert not [wait for wait in waits([(1800.0 * i, 200) for i in range(50)]) if isinstance(wait, str)]


def test_being_ready_for_a_while_resets_the_count() -> None:
    assert waits([(0, 10), (10, 10), (20, 10), (1000, 300), (1010, 10)]) == [1, 2, 4, 1, 2]


@given(st.floats(0, 1), st.integers(1, 200))
def test_jitter_stays_within_its_share(chance: float, times: int) -> None:
    policy = RestartPolicy(storm=1000, never_ready=1000)
    history, decision = History(ends=(0.0,) * (times - 1), ever_ready=True), None
    history, decision = after_end(policy, history, 0, 1, chance)
    assert isinstance(decision, Wait)
    plain = min(policy.cap, policy.first * policy.factor ** min(times - 1, 64))
    assert 0.8 * plain <= decision.seconds * (1 + 1e-9)
    assert decision.seconds <= 1.2 * plain * (1 + 1e-9)


@given(st.lists(st.tuples(st.floats(0, 1000), st.none() | st.floats(0, 299))))
def test_it_never_goes_on_for_ever_in_a_hurry(steps: list[tuple[float, float | None]]) -> None:
    """However ends are spread, no window of the stated length holds more starts than the policy's storm."""
    now, history, allowed = 0.0, History(), list[float]()
    for pause, ready_for in steps:
        now += pause
        history, decision = after_end(POLICY, history, now, ready_for, MIDDLE)
        if isinstance(decision, GiveUp):
            break
        allowed.append(now)
    for first in allowed:
        assert sum(1 for at in allowed if first <= at <= first + POLICY.window) < POLICY.storm
