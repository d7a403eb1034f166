"""All retries together: never more than their share of the requests and a few a second."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.policy.retry import Budget, BudgetRules, fresh, requested, retried

RULES = st.builds(BudgetRules, st.floats(0, 1), st.floats(0, 5), st.floats(0.5, 20))
EVENTS = st.lists(st.tuples(st.floats(0, 3), st.booleans()), max_size=80)
"""Seconds since the last one, and whether it is a request (or else wants to be a retry)."""


def played(events: list[tuple[float, bool]], rules: BudgetRules, budget: Budget) -> list[tuple[float, str, Budget]]:
    now, past = budget.at, []
    for seconds, request in events:
        now += seconds
        if request:
            budget = requested(budget, now, rules)
            past.append((now, "request", budget))
        elif (after := retried(budget, now, rules)) is not None:
            budget = after
            past.append((now, "retry", budget))
        else:
            past.append((now, "refused", budget))
    return past


@given(events=EVENTS, rules=RULES, data=st.data())
def test_in_any_time_retries_stay_within_share_seconds_and_what_was_saved(
    events: list[tuple[float, bool]], rules: BudgetRules, data: st.DataObject
) -> None:
    past = played(events, rules, fresh(rules, 50.0))
    first = data.draw(st.integers(0, len(past)))
    start, saved = (past[first - 1][0], past[first - 1][2].credit) if first else (50.0, fresh(rules, 50.0).credit)
    requests = retries = 0
    for now, what, _ in past[first:]:
        requests += what == "request"
        retries += what == "retry"
        assert retries <= saved + rules.share * requests + rules.per_second * (now - start) + 1e-6


@given(events=EVENTS, rules=RULES)
def test_what_is_saved_is_what_a_window_allows_and_a_share_of_all_requests(
    events: list[tuple[float, bool]], rules: BudgetRules
) -> None:
    requests = 0
    for _, what, budget in played(events, rules, fresh(rules, 0.0)):
        requests += what == "request"
        assert 0 <= budget.credit <= rules.per_second * rules.window + rules.share * requests + 1e-6


@given(events=EVENTS, rules=RULES)
def test_a_clock_that_steps_back_gives_nothing(events: list[tuple[float, bool]], rules: BudgetRules) -> None:
    budget = fresh(rules, 100.0)
    assert requested(budget, 40.0, rules) == Budget(budget.credit + rules.share, 100.0)
    after = retried(budget, 40.0, rules)
    assert after is None or after == Budget(budget.credit - 1, 100.0)


@pytest.mark.parametrize("each_second", [10, 200])
def test_when_every_request_fails_retries_add_a_fifth_and_three_a_second(each_second: int) -> None:
    """A minute in which nothing works: the overload grows by a fifth, not by half."""
    rules = BudgetRules()
    budget, retries = fresh(rules, 0.0), 0
    for at in range(60 * each_second):
        budget = requested(budget, at / each_second, rules)
        if (after := retried(budget, at / each_second, rules)) is not None:
            budget, retries = after, retries + 1
    allowed = 60 * (0.2 * each_second + 3)
    assert 0.95 * allowed < retries <= allowed + 30


def test_an_idle_gateway_may_retry_a_few_at_once_and_soon_again() -> None:
    rules = BudgetRules(share=0.2, per_second=1.0, window=10.0)
    budget: Budget | None = fresh(rules, 0.0)
    count = 0
    while budget is not None and (budget := retried(last := budget, 0.0, rules)) is not None:
        count += 1
    assert count == 10
    assert retried(last, 0.5, rules) is None
    assert retried(last, 1.5, rules) is not None


def test_past_traffic_is_forgotten() -> None:
    """A busy hour does not pay for a storm of retries in the quiet one after it."""
    rules = BudgetRules()
    budget = fresh(rules, 0.0)
    for at in range(20_000):
        budget = requested(budget, at / 1000, rules)
    assert 1500 < budget.credit < 2000
    assert requested(budget, 80.0, rules).credit < 36
