"""The loop: the same seed gives the same run, every request ends once, nobody waits where there is room."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import cast

import pytest

from engines.simulation.profiles import PROFILES
from gateway.policy.concurrency import Limit, Window
from gateway.policy.prefix import PrefixIndex
from gateway.policy.queue import Queue
from gateway.policy.routing import Router
from gateway.serving.admission import Admission
from gateway.serving.pool import Endpoint
from loadtests.simulation.admissions.forebay import ForebayGate
from loadtests.simulation.experiment import Backlogged, Plan, run
from loadtests.simulation.flight import End, Flight
from loadtests.simulation.policies import ADMISSIONS, OURS, ROUTERS, SYSTEMS
from loadtests.simulation.routers import Routes
from loadtests.simulation.workloads import WORKLOADS, Ask, Faults, Workload, draw
from loadtests.simulation.world import Setting, World

SECONDS = 4.0
SMALL = PROFILES["h100-8b"].changed(max_num_seqs=8, kv_blocks=8192)


def played(
    workload: Workload, router: str, admission: str, seed: int = 1, rate: float = 30.0, endpoints: int = 2
) -> tuple[World, list[Flight], list[Ask]]:
    ended: list[Flight] = []
    world = World(Setting(workload, SMALL, endpoints, seed), ROUTERS[router](), ADMISSIONS[admission], ended.append)
    asks = list(draw(workload, rate, SECONDS, seed))
    world.run(asks)
    return world, ended, asks


@pytest.mark.parametrize("name", sorted(WORKLOADS))
def test_a_workload_is_the_same_for_the_same_seed(name: str) -> None:
    workload = WORKLOADS[name]
    asks = [list(draw(workload, 20.0, 10.0, seed)) for seed in (1, 1, 2)]
    assert asks[0] == asks[1] != asks[2]
    assert [ask.number for ask in asks[0]] == list(range(len(asks[0])))
    assert all(before.at <= after.at < 10.0 for before, after in zip(asks[0], asks[0][1:], strict=False))
    assert all(ask.prompt + ask.output == sum(tokens for _, tokens in ask.parts) for ask in asks[0])


def test_as_many_come_as_were_asked_for_and_turns_begin_with_those_before() -> None:
    asks = list(draw(WORKLOADS["chat"], 50.0, 60.0, 3))
    assert len(asks) / 60 == pytest.approx(50.0, rel=0.1)
    last: dict[int, Ask] = {}
    later = 0
    for ask in asks:
        if (before := last.get(ask.session)) is not None:
            assert ask.parts[: len(before.parts)] == before.parts and ask.tenant == before.tenant
            later += 1
        last[ask.session] = ask
    assert later > len(asks) / 3


def test_an_abuser_asks_so_many_times_as_often_as_each_of_the_others() -> None:
    counts = Counter(ask.tenant for ask in draw(WORKLOADS["abuser"], 200.0, 30.0, 1))
    assert len(counts) == 10
    assert counts["abuser"] / (counts.total() - counts["abuser"]) == pytest.approx(100 / 9, rel=0.15)


@pytest.mark.parametrize(("router", "admission"), [*SYSTEMS.values(), ("p2c", "fcfs-slo"), ("random", OURS)])
def test_every_request_ends_exactly_once_whatever_happens(router: str, admission: str) -> None:
    """Overload, engines that die and clients that leave: as many end as came, and what was noted is given back."""
    workload = replace(WORKLOADS["chat"], faults=Faults(every=1.4, away=0.9), leaves=1.5)
    world, ended, asks = played(workload, router, admission, endpoints=3)
    assert sorted(flight.ask.number for flight in ended) == [ask.number for ask in asks]
    assert all(flight.end is not None for flight in ended)
    counts = Counter(flight.end for flight in ended)
    assert counts[End.SERVED] and counts[End.LOST]
    for endpoint in world.endpoints:
        assert (endpoint.in_flight, endpoint.tokens, endpoint.prefilling, endpoint.flights) == (0, 0, 0, {})
        assert not endpoint.alive or endpoint.streams == 0
    assert world.gate.waiting() == 0


def test_the_same_seed_gives_the_same_row_and_another_one_another() -> None:
    plans = [Plan(WORKLOADS["bursty"], 1.0, seed, endpoints=2, seconds=SECONDS, warm=1.0) for seed in (5, 5, 6)]
    rows = [run(plan, rate=40.0) for plan in plans]
    for row in rows:
        del row["processor"]
    assert rows[0] == rows[1]
    assert {**rows[2], "seed": 5} != rows[0]


@pytest.mark.parametrize("admission", ["none", "fcfs", OURS])
def test_nobody_waits_where_there_is_room(admission: str) -> None:
    """After every event: whoever waits, waits for engines that are as full as they may be."""
    waited = 0

    def watch(world: World) -> None:
        nonlocal waited
        if world.gate.waiting():
            waited += 1
            assert not any(
                endpoint.available and endpoint.room(0) and endpoint.trusted(world.now) for endpoint in world.endpoints
            )

    workload = WORKLOADS["plain"]
    world = World(Setting(workload, SMALL, 2, 1), ROUTERS[OURS](), ADMISSIONS[admission], lambda flight: None)
    for endpoint in world.endpoints:
        # Few enough that requests wait, as few as an engine takes at once.
        endpoint.give_at_most(replace(endpoint.gives, most=8, start=8))
    world.run(draw(workload, 40.0, SECONDS, 1), watch)
    assert admission == "none" or waited > 20


def test_what_is_simulated_is_what_the_gateway_runs() -> None:
    """The very classes, none of them a copy: queue, router, prefix index, limits, admission."""
    world = World(Setting(WORKLOADS["chat"], SMALL, 2, 1), ROUTERS[OURS](), ADMISSIONS[OURS], lambda flight: None)
    gate = cast(ForebayGate, world.gate)
    assert type(gate.admission) is Admission and type(gate.admission.queue) is Queue
    router = gate.admission.router
    assert cast(Routes, router) is world.router
    assert type(router) is Router and type(router._index) is PrefixIndex
    for endpoint in world.endpoints:
        assert isinstance(endpoint, Endpoint) and type(endpoint.limit) is Limit and type(endpoint.window) is Window
        own = {name for name, value in vars(type(endpoint)).items() if callable(value)}
        assert not own & {"room", "take", "give_back", "first_token", "adapt", "trusted", "went_wrong"}


def test_two_that_wait_share_by_their_counters() -> None:
    """Of a tenant with long prompts and one with long answers neither is ahead by more than VTC bounds it to, and what
    they share is shared: without fair turns one of them falls behind without end."""
    gaps = {}
    for admission in ("fcfs", OURS):
        plan = Plan(WORKLOADS["backlog"], 1.0, 1, admission=admission, endpoints=1, seconds=20.0, warm=0.0)
        row = run(plan, rate=40.0)
        gaps[admission] = float(row["gap"])
        assert float(row["gap_bound"]) > 0
    assert 0 < gaps[OURS] < gaps["fcfs"] / 2


def test_the_gap_counts_only_while_both_wait() -> None:
    workload = WORKLOADS["backlog"]
    both = Backlogged()
    world = World(Setting(workload, SMALL, 1, 1), ROUTERS[OURS](), ADMISSIONS[OURS], both.ended, both.looked)
    world.run(draw(workload, 0.5, SECONDS, 1))
    assert both.differences and set(both.differences) == {None}
