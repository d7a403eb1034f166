"""Each published rule on a hand-made case."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from engines.simulation.batching import Request
from engines.simulation.profiles import PROFILES
from gateway.policy.routing import Job
from loadtests.simulation.admissions.llmd import saturation
from loadtests.simulation.fleet import SimulatedEndpoint
from loadtests.simulation.routers import Routes, llmd, plain, production_stack, smg

NOW = 1.0
PROFILE = PROFILES["h100-8b"]


def fleet(*loads: int) -> tuple[SimulatedEndpoint, ...]:
    """Endpoints with so many requests in flight each."""
    made = tuple(SimulatedEndpoint(number, PROFILE) for number in range(len(loads)))
    for endpoint, load in zip(made, loads, strict=True):
        endpoint.in_flight = load
    return made


def job(*blocks: int, session: int = 0) -> Job:
    return Job(64 * max(1, len(blocks)), 10, blocks, session)


def chosen(router: Routes, job: Job, able: Sequence[SimulatedEndpoint], seed: int = 0, now: float = NOW) -> int:
    choice = router.choose(job, tuple(able), (), Random(seed).randrange, now)
    assert choice is not None
    router.sent(job, choice.endpoint)
    return choice.endpoint.number


def test_round_robin_goes_round_and_passes_over_who_is_away() -> None:
    router, able = plain.RoundRobin(), fleet(0, 9, 0)
    assert [chosen(router, job(), able) for _ in range(4)] == [0, 1, 2, 0]
    able[1].healthy = False
    assert [chosen(router, job(), able) for _ in range(3)] == [2, 0, 2]


def test_least_requests_and_two_choices_see_the_load() -> None:
    able = fleet(3, 1, 2)
    assert {chosen(plain.LeastRequests(), job(), able, seed) for seed in range(9)} == {1}
    two = {chosen(plain.TwoChoices(), job(), able, seed) for seed in range(30)}
    assert two == {1, 2}, "the fullest of three is never the better one of two"
    assert {chosen(plain.Random(), job(), able, seed) for seed in range(30)} == {0, 1, 2}


def test_nobody_without_room_or_tried_before_is_chosen() -> None:
    able = fleet(0, 0, 0)
    able[0].healthy = False
    choice = plain.LeastRequests().choose(job(), able, (able[1],), Random(1).randrange, NOW)
    assert choice is not None and choice.endpoint is able[2]
    assert plain.LeastRequests().choose(job(), able[:2], (able[1],), Random(1).randrange, NOW) is None


def test_production_stack_keeps_a_session_and_else_takes_the_lowest_rate() -> None:
    router, able = production_stack.Session(), fleet(50, 0, 0)
    homes = {chosen(router, job(session=7), able, seed) for seed in range(5)}
    assert len(homes) == 1
    others = [one for one in range(3) if one not in homes]
    assert [chosen(router, job(), able) for _ in range(2)] == others
    assert chosen(router, job(), able, now=NOW + 61) == 0, "the past of a minute is no rate"


def test_production_stack_prefix_takes_any_of_the_longest_holders() -> None:
    router, able = production_stack.PrefixAware(), fleet(90, 0, 0)
    router.sent(job(1, 2), able[0])
    router.sent(job(1), able[1])
    assert {chosen(router, job(1, 2, 3), able, seed) for seed in range(9)} == {0}, "however loaded"
    assert {chosen(production_stack.PrefixAware(), job(8), able, seed) for seed in range(20)} == {0, 1, 2}


def test_smg_follows_a_prefix_of_more_than_three_tenths_while_in_balance() -> None:
    router, able = smg.CacheAware(), fleet(60, 0, 5)
    router.sent(job(*range(4)), able[0])
    assert chosen(router, job(*range(4), *range(100, 106)), able) == 0, "four of ten"
    assert chosen(router, job(0, 1, *range(200, 208)), able) == 1, "two of ten: the fewest requests"
    able[0].in_flight = 65
    assert chosen(router, job(*range(4)), able) == 1, "out of balance: 65 - 0 > 64 and 65 > 0"
    for endpoint, load in zip(able, (265, 200, 201), strict=True):
        endpoint.in_flight = load
    assert chosen(router, job(*range(4), 300, 301), able) == 1, "was given it last"
    router.emptied(able[1])
    assert chosen(router, job(*range(4), 300, 301), able) == 0, "265 is no more than 1.5 times 200"


def test_llm_d_weighs_queue_cache_and_prefix() -> None:
    router, able = llmd.DefaultProfile(), fleet(0, 0)
    router.sent(job(1, 2), able[0])
    assert chosen(router, job(1, 2), able) == 0
    for number in range(3):
        # What it says is that it has a queue of two: one begins at once.
        able[0].model.arrive(Request(str(number), 100, 10), 0)
    assert able[0].scrape(NOW) == (0, 0.0), "the last look is kept for 50 ms"
    waiting, used = able[0].scrape(NOW + 0.05)
    assert waiting == 2 and 0 < used < 0.01
    assert chosen(router, job(1, 2), able, now=NOW + 0.05) == 0, "3 (all of it) outweighs 2 (queue)"
    assert chosen(router, job(1, 9), able, now=NOW + 0.05) == 1, "half of it does not"


def test_llm_d_forgets_what_an_endpoint_has_not_used_for_longest() -> None:
    router, able = llmd.DefaultProfile(kept=2), fleet(0, 0)
    router.sent(job(1, 2), able[0])
    router.sent(job(3), able[0])
    assert router._matched((1, 2), list(able)) == {}
    assert router._matched((3,), list(able)) == {able[0]: 1}
    router.emptied(able[0])
    assert router._matched((3,), list(able)) == {}


def test_llm_d_is_saturated_by_queues_or_caches() -> None:
    assert saturation([(0, 0.0), (0, 0.4)]) == 0.25
    assert saturation([(5, 0.0), (0, 0.8)]) == 1.0
    assert saturation([(10, 0.1), (0, 0.0)]) == 1.0
    assert saturation([]) == 1.0
