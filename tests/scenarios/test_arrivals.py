from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev

import pytest

from loadtests.scenarios.arrivals import BadTraceError, Columns, Step, process, replay, steps


@pytest.mark.parametrize("cv", [0.0, 0.5, 1.0, 3.0])
def test_a_process_has_its_rate_and_its_burstiness(cv: float) -> None:
    found = [one.at for one in process(50, cv, 0, 400, random.Random(5))]
    gaps = [later - earlier for earlier, later in pairwise(found)]
    assert found == sorted(found)
    assert found[0] >= 0
    assert found[-1] < 400
    assert len(found) == pytest.approx(20_000, rel=0.02 + 0.03 * cv)
    assert stdev(gaps) / fmean(gaps) == pytest.approx(cv, rel=0.05, abs=1e-6)


def test_the_same_seed_draws_the_same() -> None:
    one, other, third = (process(5, 2, 0, 20, random.Random(seed)) for seed in (1, 1, 2))
    assert one == other
    assert one != third


def test_clocks_of_two_classes_do_not_begin_together() -> None:
    firsts = {process(1, 0, 0, 5, random.Random(seed))[0].at for seed in range(20)}
    assert len(firsts) == 20


def test_steps_follow_each_other() -> None:
    found = steps(20, 1, [Step(0.5, 50), Step(0, 10), Step(1.5, 50)], random.Random(1))
    slow = [one.at for one in found if one.phase == "0.5 x"]
    fast = [one.at for one in found if one.phase == "1.5 x"]
    assert len(slow) + len(fast) == len(found)
    assert len(slow) == pytest.approx(500, rel=0.15)
    assert len(fast) == pytest.approx(1500, rel=0.15)
    assert max(slow) < 50
    assert min(fast) >= 60
    assert max(fast) < 110


def test_a_trace_is_replayed(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:03.9799600,4808,10\n"
        "2023-11-16 18:17:07.9799600,0,8\n"
        "2023-11-16 18:17:05.9799600,110,27\n"
        "2023-11-16 18:27:03.9799600,110,27\n"
    )
    found = replay(trace, Columns("TIMESTAMP", "ContextTokens", "GeneratedTokens"), 2.0, 60.0)
    assert [(one.at, one.input, one.output) for one in found] == [(0, 4808, 10), (1, 110, 27), (2, 1, 8)]
    trace.write_text("time\n7.5\n10\n")
    assert [(one.at, one.input) for one in replay(trace, Columns(), 1.0, 60.0)] == [(0, None), (2.5, None)]


@pytest.mark.parametrize(
    ("text", "said"),
    [("at\n1\n", "no column 'time'; there are at"), ("time\n1\nlater\n", "line 3"), ("", "no column 'time'")],
)
def test_a_trace_that_is_none_is_told(tmp_path: Path, text: str, said: str) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(text)
    with pytest.raises(BadTraceError, match=said):
        replay(trace, Columns(), 1.0, 60.0)
