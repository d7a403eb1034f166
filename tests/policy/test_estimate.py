"""Estimates are high quantiles of what was seen, bounded by what was stated, and what is learned is bounded itself."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gateway.policy.estimate import ENOUGH, HALVED_AT, QUANTILE, TEMPLATE, WELL_KNOWN, Estimator, Learned, empty


@given(st.lists(st.integers(1, 100_000), min_size=ENOUGH, max_size=HALVED_AT - 1))
def test_nine_in_ten_are_no_larger_than_the_estimate(seen: list[int]) -> None:
    sketch = empty()
    for value in seen:
        sketch.add(value)
    told = sketch.quantile(QUANTILE)
    assert sum(value <= told for value in seen) >= QUANTILE * len(seen)
    assert told in seen
    # No more than half a doubling above the quantile itself.
    exact = sorted(seen)[min(len(seen) - 1, int(QUANTILE * len(seen)))]
    assert told <= 2 * exact


def learned(learner: Learned, times: int, size: int, parts: int, prompt: int, output: int, answers: int = 1) -> None:
    for _ in range(times):
        learner.learn(size, parts, prompt, output, answers, limited=True)


def test_what_never_changes_is_estimated_exactly() -> None:
    one = Estimator().of("k", "m")
    learned(one, 1000, 1000, 0, TEMPLATE + 300, 42)
    assert (one.output(None, 1024), one.prompt(1000)) == (42, TEMPLATE + 300)


def test_never_more_than_stated_and_what_is_stated_until_something_is_learned() -> None:
    one = Estimator().of("k", "m")
    assert one.output(None, 1024) == 1024
    assert one.output(5, 1024) == 5
    learned(one, ENOUGH, 100, 0, 90, 500)
    assert [one.output(stated, 1024) for stated in (None, 5, 9000)] == [500, 5, 500]


def test_a_new_key_has_what_others_used_of_the_model() -> None:
    estimator = Estimator()
    learned(estimator.of("k", "m"), ENOUGH, 100, 0, 90, 50)
    assert estimator.of("other", "m").output(None, 1024) == 50
    assert estimator.of("other", "another").output(None, 1024) == 1024


def test_who_has_no_key_has_what_everybody_used() -> None:
    estimator = Estimator()
    learned(estimator.of("", "m"), ENOUGH, 100, 0, 90, 50)
    assert estimator.of("", "m").output(None, 1024) == 50
    assert estimator.of("k", "m").output(None, 1024) == 50


def test_what_is_learned_of_a_key_is_there_for_whoever_asks_again() -> None:
    estimator = Estimator()
    learned(estimator.of("k", "m"), ENOUGH, 100, 0, 90, 50)
    learned(estimator.of("other", "m"), 4 * ENOUGH, 100, 0, 90, 700)
    assert estimator.of("k", "m").output(None, 1024) == 50


def test_several_answers_are_learned_as_one_each() -> None:
    one = Estimator().of("k", "m")
    learned(one, ENOUGH, 100, 0, 90, 80, answers=4)
    assert one.output(None, 1024) == 20


def test_images_have_a_cost_of_their_own() -> None:
    one = Estimator().of("k", "m")
    learned(one, ENOUGH, 1000, 0, TEMPLATE + 250, 1)
    learned(one, ENOUGH, 1000, 2, 250 + 2 * 576 + TEMPLATE, 1)
    assert one.prompt(1000, 2) == 250 + 2 * 576 + TEMPLATE


def test_what_is_old_counts_for_less() -> None:
    one = Estimator().of("k", "m")
    learned(one, 200, 0, 0, 0, 5000)
    learned(one, 5 * HALVED_AT, 0, 0, 0, 10)
    assert one.output(None, 1024) == 10


def test_what_a_template_adds_is_learned_with_the_size_of_the_body() -> None:
    one = Estimator().of("k", "m")
    for size, tokens in ((100, 210), (8000, 2200)):
        learned(one, ENOUGH, size, 0, tokens, 1)
    assert [one.prompt(size) for size in (100, 8000)] == [210, 2200]
    assert one.prompt(1000) == TEMPLATE + 350


def test_a_body_of_any_size_is_estimated() -> None:
    one = Estimator().of("k", "m")
    learned(one, ENOUGH, 2**60, 0, 2**60, 1)
    assert one.prompt(2**60) == 2**60
    assert one.prompt(0) == TEMPLATE


def test_events_stand_for_what_they_stood_for() -> None:
    one = Estimator().of("k", "m")
    assert one.per_event("openai") == 1.0
    for _ in range(ENOUGH):
        one.learn_events("openai", 3.0)
    assert one.per_event("openai") == 3.0
    assert one.per_event("anthropic") == 1.0


def passed(one: Learned, requests: int, *, limited: bool) -> int:
    """Of so many requests, those that were not learned from."""
    count = 0
    for _ in range(requests):
        if one.passes():
            count += 1
        else:
            one.learn(0, 0, 0, 10, 1, limited=limited)
    return count


def test_of_what_is_well_known_one_in_eight_is_enough() -> None:
    estimator = Estimator()
    one = estimator.of("k", "m")
    assert passed(one, WELL_KNOWN, limited=True) == 0
    assert 6800 < passed(one, 8000, limited=True) < 7200
    new = estimator.of("other", "m")
    assert 0.5 < passed(new, 3 * ENOUGH, limited=True) / (3 * ENOUGH) < 0.8
    # Nobody waits for an estimate of what nothing limits.
    assert 14_700 < passed(estimator.of("free", "m"), 16_000, limited=False) < 15_300


def test_of_many_keys_that_are_new_their_model_is_told_one_in_three() -> None:
    estimator = Estimator()
    for number in range(4000):
        estimator.of(f"k{number}", "m").learn(100, 0, 90, 10, 1, limited=True)
    everybody = estimator.of("", "m")._everybody
    # Older ones count half from time to time, so what was added is counted, not what is held.
    assert everybody.answers.total <= HALVED_AT
    added = 0
    for number in range(4000):
        before = everybody.answers.total
        estimator.of(f"n{number}", "m").learn(100, 0, 90, 10, 1, limited=True)
        added += everybody.answers.total != before
    assert 1100 < added < 1550


def test_subjects_are_bounded_and_the_longest_unused_goes() -> None:
    estimator = Estimator(most=10)
    kept = estimator.of("kept", "m")
    for number in range(100):
        estimator.of(f"k{number}", f"m{number}")
        assert estimator.of("kept", "m") is kept
    assert len(estimator) == 20
    assert estimator.of("k0", "m0") is not estimator.of("k0", "m1")
