"""Estimates are high quantiles of what was seen, bounded by what was stated, and what is learned is bounded itself."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gateway.policy.estimate import ENOUGH, HALVED_AT, QUANTILE, TEMPLATE, WELL_KNOWN, Estimator, empty


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


def test_what_never_changes_is_estimated_exactly() -> None:
    learned = Estimator()
    for _ in range(1000):
        learned.learn("k", "m", 1000, 0, TEMPLATE + 300, 42, 1)
    assert (learned.output("k", "m", None, 1024), learned.prompt("m", 1000)) == (42, TEMPLATE + 300)


def test_never_more_than_stated_and_what_is_stated_until_something_is_learned() -> None:
    learned = Estimator()
    assert learned.output("k", "m", None, 1024) == 1024
    assert learned.output("k", "m", 5, 1024) == 5
    for _ in range(ENOUGH):
        learned.learn("k", "m", 100, 0, 90, 500, 1)
    assert [learned.output("k", "m", stated, 1024) for stated in (None, 5, 9000)] == [500, 5, 500]


def test_a_new_key_has_what_others_used_of_the_model() -> None:
    learned = Estimator()
    for _ in range(ENOUGH):
        learned.learn("k", "m", 100, 0, 90, 50, 1)
    assert learned.output("other", "m", None, 1024) == 50
    assert learned.output("other", "another", None, 1024) == 1024


def test_several_answers_are_learned_as_one_each() -> None:
    learned = Estimator()
    for _ in range(ENOUGH):
        learned.learn("k", "m", 100, 0, 90, 80, 4)
    assert learned.output("k", "m", None, 1024) == 20


def test_images_have_a_cost_of_their_own() -> None:
    learned = Estimator()
    for _ in range(ENOUGH):
        learned.learn("k", "m", 1000, 0, TEMPLATE + 250, 1, 1)
    for _ in range(ENOUGH):
        learned.learn("k", "m", 1000, 2, 250 + 2 * 576 + TEMPLATE, 1, 1)
    assert learned.prompt("m", 1000, 2) == 250 + 2 * 576 + TEMPLATE


def test_what_is_old_counts_for_less() -> None:
    learned = Estimator()
    for _ in range(200):
        learned.learn("k", "m", 0, 0, 0, 5000, 1)
    for _ in range(5 * HALVED_AT):
        learned.learn("k", "m", 0, 0, 0, 10, 1)
    assert learned.output("k", "m", None, 1024) == 10


def test_what_a_template_adds_is_learned_with_the_size_of_the_body() -> None:
    learned = Estimator()
    for size, tokens in ((100, 210), (8000, 2200)):
        for _ in range(ENOUGH):
            learned.learn("k", "m", size, 0, tokens, 1, 1)
    assert [learned.prompt("m", size) for size in (100, 8000)] == [210, 2200]
    assert learned.prompt("m", 1000) == TEMPLATE + 350


def test_events_stand_for_what_they_stood_for() -> None:
    learned = Estimator()
    assert learned.per_event("m openai") == 1.0
    for _ in range(ENOUGH):
        learned.learn_events("m openai", 3.0)
    assert learned.per_event("m openai") == 3.0


def test_of_what_is_well_known_one_in_four_is_enough() -> None:
    learned = Estimator()
    assert not any(learned.passes("k", "m", limited=True) for _ in range(10))
    for _ in range(WELL_KNOWN):
        learned.learn("k", "m", 0, 0, 0, 10, 1)
    passed = [learned.passes("k", "m", limited=True) for _ in range(4000)]
    assert 2800 < sum(passed) < 3200
    assert not learned.passes("other", "m", limited=True)
    # Nobody waits for an estimate of what nothing limits.
    passed = [learned.passes("other", "m", limited=False) for _ in range(16_000)]
    assert 900 < passed.count(False) < 1100


def test_subjects_are_bounded_and_the_longest_unused_goes() -> None:
    learned = Estimator(most=10)
    for number in range(100):
        learned.learn(f"k{number}", "m", 0, 0, 0, 10, 1)
    assert len(learned) == 10
