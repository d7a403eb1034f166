"""Models share a name by weight: stickily, and with as little moving about as there can be."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from gateway.policy.split import Arm, Split

NAMES = st.lists(st.text("abcd-1", min_size=1, max_size=4), min_size=1, max_size=5, unique=True)
WEIGHT = st.one_of(st.just(0.0), st.floats(0.001, 1000))
SUBJECT = st.integers(-(2**63), 2**64)


@st.composite
def weighed(draw: st.DrawFn) -> list[tuple[Arm, float]]:
    arms = [Arm(name) for name in draw(NAMES)]
    weights = draw(st.lists(WEIGHT, min_size=len(arms), max_size=len(arms)).filter(any))
    return list(zip(arms, weights, strict=True))


def shares(weights: list[float]) -> list[float]:
    return [weight / sum(weights) for weight in weights]


def picks(weights: list[float], subjects: int = 4000, name: str = "n") -> list[int]:
    split = Split(name, [(Arm(f"m{place}"), weight) for place, weight in enumerate(weights)])
    return [split.pick(subject) for subject in range(subjects)]


@given(arms=weighed(), subject=SUBJECT, factor=st.floats(0.01, 100))
def test_a_subject_stays_where_it_is_and_never_where_nothing_weighs(
    arms: list[tuple[Arm, float]], subject: int, factor: float
) -> None:
    """Whatever the process: a second split says the same. Weights count against each other, not by themselves."""
    picked = Split("n", arms).pick(subject)
    assert arms[picked][1] > 0
    assert Split("n", arms).pick(subject) == picked
    backwards = Split("n", arms[::-1]).pick(subject)
    assert arms[::-1][backwards] == arms[picked]


@given(arms=weighed(), subject=SUBJECT, place=st.integers(0, 4), weight=WEIGHT)
def test_when_one_weight_changes_subjects_move_to_it_or_from_it_alone(
    arms: list[tuple[Arm, float]], subject: int, place: int, weight: float
) -> None:
    place %= len(arms)
    changed = [(arm, weight if at == place else before) for at, (arm, before) in enumerate(arms)]
    if not any(one for _, one in changed):
        return
    before, after = Split("n", arms).pick(subject), Split("n", changed).pick(subject)
    if before != after:
        assert after == place if weight > arms[place][1] else before == place


def test_each_gets_its_part() -> None:
    """Within what chance allows at four thousand subjects: four standard deviations."""
    for weights in ([90, 10], [1, 1, 1], [0.5, 0, 2, 7.5]):
        counted = Counter(picks([float(weight) for weight in weights]))
        for place, share in enumerate(shares([float(weight) for weight in weights])):
            assert abs(counted[place] - 4000 * share) <= 4 * (4000 * share * (1 - share)) ** 0.5


def test_no_more_move_than_must_when_several_weights_change() -> None:
    """Two models: as many as the share that moves. More of them: at most 2d/(1+d)."""
    for before, after in (
        ([90.0, 10.0], [50.0, 50.0]),
        ([1.0, 1.0, 1.0], [4.0, 1.0, 0.0]),
        ([5.0, 3.0, 2.0], [2.0, 3.0, 5.0]),
    ):
        least = sum(abs(a - b) for a, b in zip(shares(before), shares(after), strict=True)) / 2
        most = least if len(before) == 2 else 2 * least / (1 + least)
        moved = sum(a != b for a, b in zip(picks(before), picks(after), strict=True)) / 4000
        assert moved <= most + 4 * (most * (1 - most) / 4000) ** 0.5
        assert moved >= least - 4 * (least * (1 - least) / 4000) ** 0.5


def test_the_few_of_one_name_are_not_those_of_another() -> None:
    few = [{subject for subject, place in enumerate(picks([9.0, 1.0], name=name)) if place} for name in ("a", "b")]
    # By chance a tenth of them would be in both: 40 of 400.
    assert len(few[0] & few[1]) < 80
