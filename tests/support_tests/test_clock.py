"""Time moves only when the test says so."""

from __future__ import annotations

import pytest

from tests.support.clock import ManualClock


def test_it_stands_still_until_it_is_moved(clock: ManualClock) -> None:
    before = clock()
    assert clock() == before
    clock.advance(2.5)
    assert clock() == before + 2.5


def test_it_never_goes_back(clock: ManualClock) -> None:
    with pytest.raises(ValueError, match="cannot go back by 1 s"):
        clock.advance(-1)
