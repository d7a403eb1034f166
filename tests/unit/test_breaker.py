"""The circuit breaker: every transition, and what holds whatever happens."""

from __future__ import annotations

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from gateway.policy.breaker import NEW, Breaker, BreakerRules, Event, State, step
from tests.support.table import each

RULES = BreakerRules(failures=2, first=1.0, longest=5.0, forgive=60.0)
OPEN = Breaker(State.OPEN, 0, 1, until=11.0)
TRIAL = Breaker(State.TRIAL, 0, 1, until=16.0)


@each(
    ("before", "event", "now", "after"),
    [
        (NEW, Event.OK, 10.0, NEW),
        (NEW, Event.SENT, 10.0, NEW),
        (NEW, Event.FAILED, 10.0, Breaker(failures=1, until=70.0)),
        (Breaker(failures=1, until=70.0), Event.OK, 20.0, Breaker(until=70.0)),
        (Breaker(failures=1, until=70.0), Event.OK, 70.0, NEW),
        (Breaker(failures=1, until=70.0), Event.FAILED, 10.0, OPEN),
        (OPEN, Event.SENT, 10.5, OPEN),
        (OPEN, Event.SENT, 11.0, Breaker(State.TRIAL, 0, 1, until=16.0)),
        (OPEN, Event.FAILED, 10.5, OPEN),
        (OPEN, Event.OK, 10.5, Breaker(State.CLOSED, 0, 1, until=70.5)),
        (TRIAL, Event.SENT, 12.0, TRIAL),
        (TRIAL, Event.SENT, 16.0, Breaker(State.TRIAL, 0, 1, until=21.0)),
        (TRIAL, Event.OK, 12.0, Breaker(State.CLOSED, 0, 1, until=72.0)),
        (TRIAL, Event.FAILED, 12.0, Breaker(State.OPEN, 0, 2, until=14.0)),
    ],
)
def test_transitions(before: Breaker, event: Event, now: float, after: Breaker) -> None:
    assert step(before, event, now, RULES) == after


def test_every_state_knows_every_event() -> None:
    for state, event in product(State, Event):
        assert isinstance(step(Breaker(state), event, 1.0, RULES), Breaker)


@each(
    ("breaker", "now", "admitted"),
    [(NEW, 0.0, True), (Breaker(failures=1, until=70.0), 1.0, True), (OPEN, 10.9, False), (OPEN, 11.0, True)]
    + [(TRIAL, 15.9, False), (TRIAL, 16.0, True)],
)
def test_who_is_admitted(breaker: Breaker, now: float, admitted: bool) -> None:
    assert breaker.admits(now) is admitted


def test_each_lost_trial_doubles_the_time_up_to_the_bound() -> None:
    breaker, now, waits = NEW, 0.0, []
    for _ in range(RULES.failures):
        breaker = step(breaker, Event.FAILED, now, RULES)
    for _ in range(5):
        waits.append(breaker.until - now)
        now = breaker.until
        breaker = step(step(breaker, Event.SENT, now, RULES), Event.FAILED, now, RULES)
    assert waits == [1.0, 2.0, 4.0, 5.0, 5.0]


EVENTS = st.lists(st.tuples(st.sampled_from(Event), st.floats(0, 30, allow_nan=False)), max_size=60)


@given(events=EVENTS)
def test_it_never_stays_shut_longer_than_its_bound(events: list[tuple[Event, float]]) -> None:
    breaker, now = NEW, 0.0
    for event, pause in events:
        now += pause
        breaker = step(breaker, event, now, RULES)
        assert breaker.admits(now + RULES.longest)


@given(events=EVENTS)
def test_without_failures_nothing_is_held_against_it(events: list[tuple[Event, float]]) -> None:
    breaker, now = NEW, 0.0
    for event, pause in events:
        now += pause
        if event is not Event.FAILED:
            breaker = step(breaker, event, now, RULES)
    assert breaker == NEW


@given(events=EVENTS)
def test_it_can_be_switched_off(events: list[tuple[Event, float]]) -> None:
    breaker, now, rules = NEW, 0.0, BreakerRules(failures=0)
    for event, pause in events:
        now += pause
        breaker = step(breaker, event, now, rules)
        assert breaker.admits(now)


@given(events=EVENTS, quiet=st.floats(60, 1e6))
def test_after_a_while_without_a_failure_it_is_as_good_as_new(events: list[tuple[Event, float]], quiet: float) -> None:
    breaker, now = NEW, 0.0
    for event, pause in events:
        now += pause
        breaker = step(breaker, event, now, RULES)
    for _ in range(2):
        now += quiet
        breaker = step(step(breaker, Event.SENT, now, RULES), Event.OK, now, RULES)
    assert step(breaker, Event.OK, now + RULES.forgive, RULES) == NEW
