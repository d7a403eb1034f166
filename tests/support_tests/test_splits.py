"""The plans cover every place where a reader of streams could go wrong, and lose no byte."""

from __future__ import annotations

from itertools import islice

import pytest

from tests.support.recordings import Recording, all_recordings
from tests.support.splits import (
    around_events,
    byte_by_byte,
    cut_at,
    delicate_cuts,
    every_cut,
    inside_characters,
    inside_needles,
    pieces,
    plans,
    random_plans,
)
from tests.support.table import each

EVENT = 'data: {"model":"m","content":"é€😀","usage":null}\n\ndata: [DONE]\n\n'.encode()


@each("recording", all_recordings(streams=True))
def test_no_plan_loses_a_byte(recording: Recording) -> None:
    for plan in islice(plans(recording.body), 300):
        assert b"".join(pieces(recording.body, plan)) == recording.body
        assert list(plan) == sorted(set(plan))


def test_pieces_are_what_lies_between_the_cuts() -> None:
    assert pieces(b"abcdef", (1, 4)) == [b"a", b"bcd", b"ef"]
    assert pieces(b"abc", ()) == [b"abc"]
    assert pieces(b"abc", byte_by_byte(b"abc")) == [b"a", b"b", b"c"]


def test_every_cut_is_each_position_once() -> None:
    assert list(every_cut(b"abcd")) == [(1,), (2,), (3,)]


def test_cuts_around_events_include_the_middle_of_the_blank_line() -> None:
    end = EVENT.index(b"\n\n") + 2
    assert {end - 3, end - 2, end - 1, end, end + 1} <= around_events(EVENT)


def test_cuts_inside_needles_split_each_of_them_everywhere() -> None:
    start = EVENT.index(b'"usage"')
    assert set(range(start, start + 8)) <= inside_needles(EVENT, [b'"usage"'])
    done = EVENT.index(b"[DONE]")
    assert set(range(done, done + 7)) <= inside_needles(EVENT)


def test_cuts_inside_characters_break_the_decoding() -> None:
    """Each such cut leaves bytes that are not UTF-8 on their own: 1 in é, 2 in €, 3 in 😀."""
    cuts = inside_characters(EVENT)
    assert len(cuts) == 1 + 2 + 3
    for cut in cuts:
        with pytest.raises(UnicodeDecodeError):
            EVENT[:cut].decode()


def test_cuts_far_apart_are_each_position_once() -> None:
    assert list(cut_at([1, 2, 3, 7, 8, 12], 5)) == [(1, 7, 12), (2, 8), (3,)]
    assert list(cut_at([])) == []


def test_long_bodies_are_cut_only_where_it_can_hurt() -> None:
    whole, single, *far_apart = plans(EVENT * 100, count=0)
    assert (whole, single) == ((), byte_by_byte(EVENT * 100))
    cuts = sorted(position for plan in far_apart for position in plan)
    assert cuts == delicate_cuts(EVENT * 100)
    assert len(cuts) < len(EVENT * 100)


def test_short_bodies_are_cut_everywhere() -> None:
    _, _, *far_apart = plans(EVENT, count=0)
    assert sorted(position for plan in far_apart for position in plan) == list(range(1, len(EVENT)))


def test_random_plans_repeat_for_the_same_seed_and_differ_for_another() -> None:
    assert list(random_plans(EVENT, seed=1, count=5)) == list(random_plans(EVENT, seed=1, count=5))
    assert list(random_plans(EVENT, seed=1, count=5)) != list(random_plans(EVENT, seed=2, count=5))
    assert list(random_plans(b"x", seed=1, count=5)) == []
