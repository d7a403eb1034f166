"""What follows a failed attempt: the table, and what holds for all of it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gateway.policy.retry import BROKEN_RETRIES, Cause, Next, decide
from tests.support.table import each

ELSEWHERE = {Cause.CONNECT, Cause.OVERLOADED, Cause.UNKNOWN_MODEL, Cause.CREDENTIALS, Cause.BROKEN}


@each("cause", list(Cause))
def test_the_first_failure(cause: Cause) -> None:
    """The request's own fault and used-up time end it; everything else may be better elsewhere."""
    expected = Next.SAME if cause is Cause.STALE else Next.ELSEWHERE if cause in ELSEWHERE else Next.GIVE_UP
    assert decide(cause, 1, 2, replayed=False) is expected


@given(cause=st.sampled_from(Cause), attempts=st.integers(1, 10), retries=st.integers(0, 10), replayed=st.booleans())
def test_it_always_ends(cause: Cause, attempts: int, retries: int, replayed: bool) -> None:
    then = decide(cause, attempts, retries, replayed=replayed)
    if attempts > retries and not (cause is Cause.STALE and not replayed):
        assert then is Next.GIVE_UP
    if then is Next.SAME:
        assert cause is Cause.STALE
        assert not replayed
    # More room never turns an answer into none.
    if then is Next.ELSEWHERE:
        assert decide(cause, attempts, retries + 1, replayed=replayed) is Next.ELSEWHERE


@given(retries=st.integers(0, 10))
def test_a_request_is_offered_to_as_many_engines_as_allowed(retries: int) -> None:
    offered = 1
    while decide(Cause.OVERLOADED, offered, retries, replayed=False) is Next.ELSEWHERE:
        offered += 1
    assert offered == retries + 1


@given(retries=st.integers(0, 10))
def test_a_request_that_breaks_engines_does_not_meet_all_of_them(retries: int) -> None:
    broken = 1
    while decide(Cause.BROKEN, broken, retries, replayed=False) is Next.ELSEWHERE:
        broken += 1
    assert broken == min(retries, BROKEN_RETRIES) + 1


def test_a_stale_connection_is_replayed_once_and_counts_as_broken_then() -> None:
    assert decide(Cause.STALE, 5, 0, replayed=False) is Next.SAME
    assert decide(Cause.STALE, 1, 2, replayed=True) is Next.ELSEWHERE
    assert decide(Cause.STALE, 1, 0, replayed=True) is Next.GIVE_UP
