"""What each of several gateways may use of one endpoint."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.policy.capacity import Part, fair
from tests.support.examples import examples

wants = st.lists(st.integers(0, 40), min_size=1, max_size=12)


@settings(max_examples=examples(75))
@given(most=st.integers(1, 60), wanted=wants, turn=st.integers(0, 100))
def test_what_is_fair(most: int, wanted: list[int], turn: int) -> None:
    """Never more than there is; all of it when so much is wanted; nobody short while another has more than he."""
    parts = fair(most, wanted, turn)
    assert sum(parts) <= most
    if sum(min(most, want) for want in wanted) >= most:
        assert sum(parts) == most
    for part, want in zip(parts, wanted, strict=True):
        assert part >= min(want, most // len(wanted)), "less than an equal part"
        if part < want:
            assert max(parts) <= part + 1, "short, while another has more"
        if most >= len(wanted):
            assert part >= 1, "one that cannot answer at once"


@given(most=st.integers(1, 20), wanted=wants)
def test_what_cannot_be_divided_goes_round(most: int, wanted: list[int]) -> None:
    """Whoever is short has as much as the others in time, also where there are more gateways than there is."""
    turns = len(wanted)
    had = [sum(parts) for parts in zip(*(fair(most, wanted, turn) for turn in range(720)), strict=True)]
    short = [sum_ for sum_, want in zip(had, wanted, strict=True) if sum_ < 720 * want]
    assert max(short, default=0) - min(short, default=0) <= turns
    assert all(sum_ for sum_, want in zip(had, wanted, strict=True) if want)


def test_of_what_nobody_wants_half_stays_to_be_had_at_once() -> None:
    assert fair(64, [0, 0, 0, 0]) == [8] * 4
    assert fair(64, [0, 40, 0, 0]) == [3, 42, 3, 3]
    assert fair(64, [20]) == [64]
    assert fair(2, [0, 0, 0]) == [0, 0, 0]


def part(most: int, others: tuple[tuple[str, int], ...] = (), held: int = 0) -> Part:
    made = Part(most)
    made.ask(0, 0, "me", 1 + len(others), 0)
    made.granted(held, others)
    return made


def test_what_is_not_fair_any_more_is_not_used_though_it_is_still_in_flight() -> None:
    one = part(10, (("other", 10),), held=9)
    assert (one.ask(9, 4, "me", 2, 0), one.held, one.share) == (9, 9, 5)
    one.granted(9, (("other", 10),))
    assert (one.held, one.share) == (9, 5)


def test_what_was_wanted_a_moment_ago_is_not_given_up_at_once() -> None:
    one = part(10, (("other", 0),), held=1)
    wanted = [one.ask(busy, 0, "me", 2, 0) and one.want for busy in (8, 0, 0, 0, 0, 0, 0)]
    assert wanted == [8, 5, 3, 2, 1, 0, 0]


def test_a_lost_answer_leaves_less() -> None:
    """It holds what it had, or asked for where that was less."""
    one = part(10, (("other", 0),), held=4)
    assert one.ask(4, 4, "me", 2, 0) >= 8
    assert (one.held, one.share) == (4, 4)
    one.others = (("other", 10),)
    one.ask(0, 0, "me", 2, 0)
    assert one.held <= 4


def test_alone_it_uses_an_equal_part() -> None:
    for most, gateways, share in ((10, 3, 3), (2, 3, 1), (8, 1, 8)):
        one = part(most, held=1)
        one.alone(gateways)
        assert (one.held, one.share, one.dry) == (share, share, True)
