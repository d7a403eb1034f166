"""One behaviour of every store: in memory, leased and exact on a real server."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence

import pytest

from gateway.policy.token_bucket import SECOND, Shape, rate_shape
from gateway.store.memory import MemoryStore
from gateway.store.protocol import Draw, Granted, Refused, Standing, Store, Verdict
from gateway.store.redis import Mode, RedisStore
from tests.store.drawing import back, look, take
from tests.store.servers import Server

NOW = 1_790_000_000 * SECOND
MINUTE, SECONDLY, SLOTS = rate_shape(60, 60), rate_shape(2, 1, 4), Shape(2000, slots=True)
names = itertools.count()


class Clock:
    now = NOW

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["memory", "leased", "exact"])
async def store(request: pytest.FixtureRequest, clock: Clock, shared_server: Server) -> AsyncIterator[Store]:
    made: Store
    if request.param == "memory":
        made = MemoryStore(clock)
    else:
        made = RedisStore(
            url=shared_server.url,
            replica_id="one",
            clock=clock,
            mode=Mode(request.param),
            namespace=f"contract{next(names)}",
            server_clock=clock,
            timeout=5.0,
        )
    await made.start()
    yield made
    await made.stop()


async def reserve(store: Store, draws: Sequence[Draw], who: int, *, first: bool = False) -> Verdict:
    verdict = take(store, draws, who, first=first)
    return verdict if isinstance(verdict, Granted | Refused) else await verdict


async def levels(store: Store, draws: Sequence[Draw], expected: list[int]) -> None:
    """Wait until what was given back has arrived, and all is as expected."""
    for _ in range(400):
        found = [bucket.level for bucket in await look(store, draws)]
        if found == expected:
            return
        await asyncio.sleep(0.005)
    assert found == expected


async def test_all_or_none_and_what_is_left_is_told(store: Store) -> None:
    both = (Draw("a", MINUTE, 40_000), Draw("b", SLOTS, 1000))
    granted = await reserve(store, both, 1)
    assert isinstance(granted, Granted)
    assert [granted.levels.left(at) for at in (0, 1)] == [20_000, 1000]
    assert granted.levels.least([0])[2] == 40 * SECOND
    refused = await reserve(store, both, 2)
    assert isinstance(refused, Refused)
    assert (refused.index, refused.wait, refused.early) == (0, 20 * SECOND + 1, False)
    await levels(store, both, [20_000, -1000])
    assert store.standing is Standing.STORE


async def test_a_promise_is_kept_to_the_microsecond(store: Store, clock: Clock) -> None:
    draws = (Draw("a", SECONDLY, 4000),)
    assert isinstance(await reserve(store, draws, 1), Granted)
    refused = await reserve(store, draws, 2)
    assert isinstance(refused, Refused)
    clock.now += SECOND
    again = await reserve(store, draws, 2)
    assert isinstance(again, Refused)
    assert again.early
    assert again.wait == refused.wait - SECOND
    clock.now += again.wait - 2
    assert isinstance(await reserve(store, draws, 2), Refused)
    clock.now += 2
    newcomer = await reserve(store, (Draw("a", SECONDLY, 1000),), 3)
    assert isinstance(newcomer, Refused)
    assert isinstance(await reserve(store, draws, 2), Granted)


async def test_a_first_attempt_is_never_early(store: Store) -> None:
    draws = (Draw("a", SECONDLY, 4000),)
    assert isinstance(await reserve(store, draws, 1), Granted)
    waits = []
    for _ in range(3):
        refused = await reserve(store, draws, 2, first=True)
        assert isinstance(refused, Refused)
        assert not refused.early
        waits.append(refused.wait)
    assert waits == [2 * SECOND + 1, 4 * SECOND + 1, 6 * SECOND + 1]
    again = await reserve(store, draws, 2)
    assert isinstance(again, Refused)
    assert again.early
    assert again.wait == waits[0]


async def test_a_promise_is_of_what_was_asked_for(store: Store) -> None:
    """Two that send the same, from two addresses, are one to nobody but the bucket they share; nor is less refused
    because more was."""
    both = Draw("all", MINUTE, 1000)
    assert isinstance(await reserve(store, (Draw("a", SECONDLY, 3000), both), 1), Granted)
    assert isinstance(await reserve(store, (Draw("a", SECONDLY, 4000), both), 2), Refused)
    assert isinstance(await reserve(store, (Draw("b", SECONDLY, 4000), both), 2), Granted)
    assert isinstance(await reserve(store, (Draw("a", SECONDLY, 1000), both), 2), Granted)


async def test_what_is_settled_comes_back_and_a_debt_is_taken(store: Store) -> None:
    draws = (Draw("a", MINUTE, 40_000), Draw("b", SLOTS, 1000))
    assert isinstance(await reserve(store, draws, 1), Granted)
    back(store, [Draw("a", MINUTE, 30_000), Draw("b", SLOTS, 1000)])
    await levels(store, draws, [50_000, 0])
    back(store, [Draw("a", MINUTE, -100_000)])
    await levels(store, draws, [-50_000, 0])


async def test_slots_come_back_only_by_being_given_back(store: Store, clock: Clock) -> None:
    slot = (Draw("b", SLOTS, 1000),)
    for who in (1, 2):
        assert isinstance(await reserve(store, slot, who), Granted)
    clock.now += 3600 * SECOND
    assert isinstance(await reserve(store, slot, 3), Refused)
    back(store, slot)
    await levels(store, slot, [-1000])
    assert isinstance(await reserve(store, slot, 3), Granted)


async def test_who_asks_in_turn_is_never_in_its_own_way(store: Store) -> None:
    """What was just given back counts for whoever asks next, and what is owed is paid before anybody is let in."""
    slot, all_of_it = (Draw("s", SLOTS, 2000),), Draw("m", MINUTE, 60_000)
    for who in range(1, 20):
        assert isinstance(await reserve(store, slot, who), Granted)
        back(store, slot)
    assert isinstance(await reserve(store, [all_of_it], 20), Granted)
    back(store, [all_of_it])
    back(store, [Draw("m", MINUTE, -1000)])
    refused = await reserve(store, [all_of_it], 21)
    assert isinstance(refused, Refused)
    assert (refused.wait, refused.buckets[0].level) == (SECOND + 1, 59_000)


async def test_who_left_while_waiting_gives_back_what_it_is_granted(store: Store) -> None:
    draws = (Draw("a", MINUTE, 10_000), Draw("b", SLOTS, 1000))
    verdicts = [take(store, draws, who) for who in (1, 2)]
    for verdict in verdicts:
        if isinstance(verdict, asyncio.Future):
            assert verdict.cancel()
        else:
            assert isinstance(verdict, Granted)
            back(store, draws)
    await levels(store, draws, [60_000, 0])
