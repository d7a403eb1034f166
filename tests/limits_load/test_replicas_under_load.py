"""Gateway processes on one store of limits, under load and under every fault: `make load`, a few minutes.

Each case is a run of `python -m loadtests.limits.run`, which prints the same table.
"""

from __future__ import annotations

import pytest

from loadtests.limits.faults import FAULTS
from loadtests.limits.report import lines
from loadtests.limits.run import plan_for, run_one

SECONDS = 10.0

pytestmark = pytest.mark.load


def holds(replicas: int, mode: str, fault: str) -> None:
    found = run_one(plan_for(FAULTS[fault], replicas, mode), FAULTS[fault], SECONDS, 1, print)
    print("\n".join(lines(found)))
    assert not found.problems


@pytest.mark.parametrize("fault", list(FAULTS))
def test_three_replicas_let_in_what_is_allowed_whatever_happens(fault: str) -> None:
    holds(3, "leased", fault)


@pytest.mark.parametrize("fault", ["none", "freeze"])
def test_three_replicas_that_ask_each_time(fault: str) -> None:
    holds(3, "exact", fault)


@pytest.mark.parametrize("fault", ["none", "kill"])
def test_twenty_replicas(fault: str) -> None:
    holds(20, "leased", fault)


def test_replicas_that_share_nothing_are_found_out() -> None:
    """What is held against the limits above is able to fail."""
    found = run_one(plan_for(FAULTS["none"], 3, "memory"), FAULTS["none"], 3.0, 1, print)
    for limit in ("requests", "tokens", "requests at once"):
        assert any(problem.startswith(f"{limit}: ") for problem in found.problems), found.problems
