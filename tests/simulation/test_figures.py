"""The arithmetic of the figures, on hand-made rows."""

from __future__ import annotations

import pytest

from gateway.policy.routing import Job
from loadtests.scenarios.schema import Slo
from loadtests.simulation.figures import Tally, fair_shares, jain, median, vtc_bound, well, widest
from loadtests.simulation.flight import End, Flight
from loadtests.simulation.workloads import Ask

SLO = Slo(ttft=2.0, itl=0.1)


def flight(
    end: End, first: float = -1.0, ended: float = 9.0, *, at: float = 1.0, tenant: str = "t", **more: int
) -> Flight:
    made = Flight(Ask(1, at, tenant, 100, 11, ((1, 100), (2, 11)), 1), Job(100, 11), ())
    made.end, made.first, made.ended = end, first, ended
    made.cached, made.computed = more.get("cached", 0), more.get("computed", 0)
    return made


def test_served_well_is_all_tokens_the_first_in_time_and_the_others_in_the_mean() -> None:
    assert well(flight(End.SERVED, 3.0, 4.0), SLO)
    assert not well(flight(End.SERVED, 3.01, 4.0), SLO), "first token too late"
    assert not well(flight(End.SERVED, 2.0, 3.1), SLO), "ten gaps of 0.11 s"
    assert not well(flight(End.LOST, 2.0, 2.5), SLO)


def test_the_figures_of_five_requests() -> None:
    tally = Tally(SLO, 1.0, 5.0)
    for one in (
        flight(End.SERVED, 1.5, 2.5, cached=60),
        flight(End.SERVED, 4.0, 4.5, cached=20),
        flight(End.REFUSED),
        flight(End.LOST, 1.2, computed=105),
        flight(End.SERVED, 1.0, 1.5, at=0.5),
    ):
        tally.add(one)
    figures = tally.figures()
    assert tally.all == 5
    assert figures["requests"] == 4, "who came before the beginning does not count"
    assert figures["goodput"] == 0.25
    assert (figures["share_served"], figures["share_refused"], figures["share_lost"]) == (0.5, 0.25, 0.25)
    assert figures["ttft_p50"] == pytest.approx(0.5)
    assert figures["ttft_p99"] == pytest.approx(3.0)
    assert figures["itl_p99"] == pytest.approx(0.1)
    assert figures["prefix_hits"] == 80 / 200
    # Served: 51 and 91 tokens computed, the second in vain; 105 lost with an engine.
    assert figures["wasted"] == pytest.approx((91 + 105) / (51 + 91 + 105))


def test_max_min_fair_shares() -> None:
    assert fair_shares({"a": 10.0, "b": 40.0, "c": 90.0}, 90.0) == {"a": 10.0, "b": 40.0, "c": 40.0}
    assert fair_shares({"a": 10.0, "b": 20.0}, 30.0) == {"a": 10.0, "b": 20.0}
    assert fair_shares({"a": 50.0, "b": 50.0}, 30.0) == {"a": 15.0, "b": 15.0}


def test_jains_index() -> None:
    assert jain({"a": 10.0, "b": 100.0}, {"a": 10.0, "b": 50.0}) == 1.0
    assert jain({"a": 50.0, "b": 50.0}, {"a": 30.0}) == 0.5
    assert jain({"a": 50.0}, {}) == 0.0


def test_the_gap_is_the_widest_change_within_one_time_of_both_waiting() -> None:
    assert widest([1.0, 5.0, 3.0, -2.0, None, 100.0, 101.0]) == 7.0
    assert widest([None, None]) == 0.0
    assert vtc_bound(5000, 1000) == 10_000
    assert vtc_bound(500, 1000) == 4_000


def test_the_median() -> None:
    assert median([3.0, 1.0, 2.0]) == 2.0
    assert median([1.0, 2.0]) == 1.5
