"""Several replicas on one real server, under load and under what servers do to their clients."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from gateway.policy.token_bucket import SECOND, Shape, rate_shape
from gateway.store.protocol import Draw, Granted, Refused, Standing, Verdict
from gateway.store.redis import LIFETIME, Mode, RedisStore
from tests.store.drawing import back, look, take
from tests.store.servers import Deaf, Server, until

names = itertools.count()
BUDGET = Shape(10**9)
"""Never refilled, so that every unit must be accounted for."""
SLOTS = Shape(50_000, slots=True)


def wall() -> int:
    return time.time_ns() // 1000


class Clock:
    now = 1_790_000_000 * SECOND

    def __call__(self) -> int:
        return self.now


def a_store(server: Server, namespace: str, **options: object) -> RedisStore:
    settings: dict[str, object] = {
        "url": server.url,
        "replica_id": f"replica{next(names)}",
        "clock": wall,
        "namespace": namespace,
        "timeout": 1.0,
        **options,
    }
    return RedisStore(**settings)  # type: ignore[arg-type]


@asynccontextmanager
async def fleet(server: Server, count: int, **options: object) -> AsyncIterator[list[RedisStore]]:
    namespace = f"fleet{next(names)}"
    stores = [a_store(server, namespace, **options) for _ in range(count)]
    await asyncio.gather(*(store.start() for store in stores))
    try:
        yield stores
    finally:
        await asyncio.gather(*(store.stop() for store in stores))


async def reserve(store: RedisStore, draws: Sequence[Draw], who: int, *, first: bool = False) -> Verdict:
    verdict = take(store, draws, who, first=first)
    return verdict if isinstance(verdict, Granted | Refused) else await verdict


async def level(
    server: Server, namespace_of: RedisStore, shape: Shape, bucket: str = "a", clock: Clock | None = None
) -> int:
    """What a bucket holds by the word of somebody who holds nothing of it."""
    namespace = namespace_of._session.prefix[1:].partition("}")[0]
    observer = a_store(server, namespace, server_clock=clock)
    await observer.start()
    (found,) = await look(observer, [Draw(bucket, shape, 0)])
    await observer.stop()
    return found.level


# --- together never more than the limit, and nearly all of it -------------------------------------------------------


async def client(store: RedisStore, draws: Sequence[Draw], who: int, pause: float, until_: float) -> tuple[int, int]:
    """Ask on and on, and come back when told; returns how much was let in, and when it asked last."""
    granted = asked = 0
    while time.monotonic() < until_:
        asked = wall()
        verdict = await reserve(store, draws, who)
        if isinstance(verdict, Granted):
            granted += draws[0].amount
            who += 1000
            await asyncio.sleep(pause)
        else:
            assert verdict.standing is Standing.STORE
            await asyncio.sleep(min(verdict.wait / SECOND, max(0.0, until_ - time.monotonic())))
    return granted, asked


@pytest.mark.parametrize(("count", "mode"), [(3, Mode.LEASED), (20, Mode.LEASED), (3, Mode.EXACT)])
async def test_together_they_let_in_the_limit_and_no_unit_more(shared_server: Server, count: int, mode: Mode) -> None:
    """Some replicas get a hundred times the load of others. Whatever was let in is accounted for to the unit."""
    shape = rate_shape(400, 1, 100)
    draws = (Draw("a", shape, 1000),)
    async with fleet(shared_server, count, mode=mode) as stores:
        # So much that it is not full again before the load is there.
        assert isinstance(await reserve(stores[0], (Draw("a", shape, 50_000),), 1), Granted)
        known = stores[0]._leases["a"].known
        assert known is not None
        began = known.at
        ends = time.monotonic() + 1.5
        clients = [
            client(store, draws, who * 17 + at + 2, 0.0005 * (1 + at), ends)
            for at, store in enumerate(stores)
            for who in range(max(1, 12 // (at + 1)))
        ]
        found = await asyncio.gather(*clients)
        granted = 50_000 + sum(units for units, _ in found)

        def allowed(at: int) -> int:
            return shape.capacity + (at - began) * shape.rate // shape.per

        assert granted <= allowed(wall())
        # A machine that is held up at the end holds up the clients, too.
        assert granted >= 0.97 * allowed(max(asked for _, asked in found))
        await asyncio.gather(*(store.stop() for store in stores))
        with shared_server.client() as plain:
            kept = plain.get(stores[0]._session.prefix + "a")
        assert isinstance(kept, bytes)
        left, at, part = map(int, kept.split()[:3])
        # Since the first call the bucket was never full: what came in is what went out and what is left.
        whole, rest = divmod((at - began) * shape.rate, shape.per)
        assert (left, part) == (shape.capacity + whole - granted, rest)


async def test_a_minute_limit_of_sixty_serves_twenty_replicas(shared_server: Server) -> None:
    draws = (Draw("a", rate_shape(60, 60), 1000),)
    async with fleet(shared_server, 20) as stores:

        async def three(store: RedisStore, at: int) -> int:
            return sum([isinstance(await reserve(store, draws, at * 10 + n + 1), Granted) for n in range(3)])

        granted = sum(await asyncio.gather(*(three(store, at) for at, store in enumerate(stores))))
        assert granted >= 58
        deadline = time.monotonic() + 2
        while granted < 60 and time.monotonic() < deadline:
            for store in stores:
                granted += isinstance(await reserve(store, draws, 0), Granted)
            await asyncio.sleep(0.05)
        assert granted >= 60


# --- what servers do to their clients -------------------------------------------------------------------------------


async def busy(store: RedisStore, tally: list[int], until_: float, chance: random.Random) -> None:
    """Take, settle part of it, sometimes leave before the answer."""
    slot = Draw("s", SLOTS, 1000)
    while time.monotonic() < until_:
        amount = chance.randint(1, 500) * 10
        verdict = take(store, (Draw("a", BUDGET, amount), slot), chance.getrandbits(40) + 1)
        if isinstance(verdict, asyncio.Future):
            if chance.random() < 0.2:
                await asyncio.sleep(0)
                if verdict.cancel():
                    continue
            verdict = await verdict
        await asyncio.sleep(0.001)
        if isinstance(verdict, Granted):
            tally[0] += amount
            unused = amount // 2
            tally[0] -= unused
            back(store, [Draw("a", BUDGET, unused), slot])


@pytest.mark.parametrize("mode", list(Mode))
async def test_connections_killed_over_and_over_lose_and_double_nothing(own_server: Server, mode: Mode) -> None:
    """Answers are lost at any point; at the end every unit and every slot is where it belongs."""
    chance, tally = random.Random(7), [0]
    async with fleet(own_server, 3, mode=mode) as stores:
        ends = time.monotonic() + 0.8
        workers = [asyncio.create_task(busy(store, tally, ends, chance)) for store in stores for _ in range(6)]
        kills = 0
        with own_server.client() as plain:
            while time.monotonic() < ends:
                await asyncio.sleep(0.03)
                kills += sum(
                    plain.client_kill_filter(_id=one["id"]) for one in plain.client_list() if "eval" in one["cmd"]
                )
        await asyncio.gather(*workers)
        assert kills >= 10
        assert tally[0] > 20_000
        await until(lambda: all(store.standing is Standing.STORE for store in stores))
        await asyncio.gather(*(store.stop() for store in stores))
        assert await level(own_server, stores[0], BUDGET) == BUDGET.capacity - tally[0]
        assert await level(own_server, stores[0], SLOTS, "s") == 0


@pytest.mark.parametrize("mode", list(Mode))
async def test_what_was_done_and_not_answered_is_not_done_twice(own_server: Server, mode: Mode) -> None:
    """A call is undone and made again; a batch is known by its number."""
    draws, slot = (Draw("a", BUDGET, 1000), Draw("s", SLOTS, 1000)), Draw("s", SLOTS, 1000)
    async with Deaf(own_server) as way, fleet(own_server, 1, mode=mode, url=way.url, timeout=5.0) as (store,):
        assert isinstance(await reserve(store, draws, 1), Granted)
        way.deaf = True
        before = _calls(own_server)
        verdict = take(store, draws, 2)
        assert isinstance(verdict, asyncio.Future)
        back(store, [Draw("a", BUDGET, 300), slot])
        await until(lambda: _calls(own_server) == before + 2, "the call and the batch")
        way.cut()
        granted = await verdict
        assert isinstance(granted, Granted)
        assert granted.standing is Standing.STORE
        await until(lambda: not store._outbox.batch and not store._outbox and not store._leases.holding)
        assert await level(own_server, store, BUDGET) == BUDGET.capacity - 1700
        assert await level(own_server, store, SLOTS, "s") == -1000
        back(store, [slot])
        await store.stop()
        assert await level(own_server, store, SLOTS, "s") == 0


async def test_a_frozen_server_holds_nobody_up_and_nothing_is_charged_twice(own_server: Server) -> None:
    draws = (Draw("a", BUDGET, 1000),)
    async with fleet(own_server, 2, mode=Mode.EXACT, timeout=0.05) as stores:
        for store in stores:
            assert isinstance(await reserve(store, draws, 1), Granted)
        own_server.freeze()
        try:
            began = time.monotonic()
            verdicts = await asyncio.gather(*(reserve(store, draws, 2) for store in stores))
            assert time.monotonic() - began < 0.3
            assert [verdict.standing for verdict in verdicts] == [Standing.DEGRADED] * 2
            assert all(isinstance(verdict, Granted) for verdict in verdicts)
            assert isinstance(take(stores[0], draws, 3), Granted), "then at once"
            back(stores[0], draws)
        finally:
            own_server.thaw()
        await until(lambda: all(store.standing is Standing.STORE for store in stores))
        await asyncio.gather(*(store.stop() for store in stores))
        assert await level(own_server, stores[0], BUDGET) == BUDGET.capacity - 4000


async def test_each_replica_gives_out_its_part_while_the_server_is_gone(own_server: Server) -> None:
    """Together no more than the limit once more; a server that comes back empty begins at nothing plus refill."""
    shape = rate_shape(60, 3600, 40)
    draws, slot = (Draw("a", shape, 1000),), Draw("s", SLOTS, 1000)
    async with fleet(own_server, 2, timeout=0.05) as stores:
        for store in stores:
            await reserve(store, (Draw("a", shape, 0), slot), 0)
        own_server.kill()
        await until(lambda: all(store.standing is Standing.DEGRADED for store in stores))
        granted = [sum(isinstance(take(store, draws, 0), Granted) for _ in range(50)) for store in stores]
        assert granted == [20, 20]
        own_server.start()
        await until(lambda: all(store.standing is Standing.STORE for store in stores))
        for store in stores:
            await until(lambda store=store: not store._outbox.batch and not store._outbox)
        (bucket,) = await look(stores[0], draws)
        assert -40_000 <= bucket.level <= -39_800
        (slots,) = await look(stores[0], [slot])
        assert slots.level == -2000, "what is in use was said again"
        for store in stores:
            back(store, [slot])


async def test_an_emptied_server_gives_no_second_burst(own_server: Server) -> None:
    shape = rate_shape(60, 3600, 40)
    draws, slot = (Draw("a", shape, 40_000),), (Draw("s", SLOTS, 1000),)
    async with fleet(own_server, 2) as stores:
        assert isinstance(await reserve(stores[0], slot, 1), Granted)
        assert isinstance(await reserve(stores[1], draws, 1), Granted)
        with own_server.client() as plain:
            plain.flushall()
        refused = await reserve(stores[1], draws, 2)
        assert isinstance(refused, Refused)
        assert refused.standing is Standing.STORE
        await look(stores[0], draws)
        await until(lambda: stores[0]._serving)
        for _ in range(200):
            await look(stores[0], slot)
            (slots,) = await look(stores[1], slot)
            if slots.level == -1000:
                break
            await asyncio.sleep(0.01)
        assert slots.level == -1000
        back(stores[0], slot)


@pytest.mark.parametrize(("policy", "let_in"), [(Standing.OPEN, True), (Standing.CLOSED, False)])
async def test_without_a_server_the_policy_decides_at_once(policy: Standing, let_in: bool) -> None:
    nowhere = Server()
    store = a_store(nowhere, "nowhere", when_lost=policy, timeout=0.05)
    started = asyncio.create_task(store.start())
    await asyncio.sleep(0)
    verdict = take(store, (Draw("a", rate_shape(1, 60), 1000),), 1)
    assert isinstance(verdict, Granted if let_in else Refused)
    assert verdict.standing is policy is store.standing
    await started
    await store.stop()
    nowhere.close()


async def test_a_replica_that_dies_frees_its_slots_within_seconds(shared_server: Server) -> None:
    clock = Clock()
    slot = Shape(1000, slots=True)
    draws = (Draw("s", slot, 1000),)
    namespace = f"fleet{next(names)}"
    dead, other = (a_store(shared_server, namespace, clock=clock, server_clock=clock) for _ in range(2))
    await dead.start()
    await other.start()
    assert isinstance(await reserve(dead, draws, 1), Granted)
    await dead._link.close()
    clock.now += LIFETIME - 1
    assert isinstance(await reserve(other, draws, 2), Refused)
    clock.now += 2
    assert isinstance(await reserve(other, draws, 2), Granted)
    back(other, draws)
    await other.stop()
    await dead.stop()


async def test_whoever_was_taken_for_dead_gives_out_no_slot_that_was_given_to_others(shared_server: Server) -> None:
    """A process that stood still goes on where it was; what it held for later others have now."""
    clock = Clock()
    slot = (Draw("s", SLOTS, 1000),)
    namespace = f"fleet{next(names)}"
    still, other = (a_store(shared_server, namespace, clock=clock, server_clock=clock) for _ in range(2))
    await still.start()
    await other.start()
    for who in range(4):
        assert isinstance(await reserve(still, slot, who + 1), Granted)
    assert still._leases["s"].held > 0
    still._cancel("tick")
    clock.now += LIFETIME + 1
    other._link.drop()
    await until(lambda: clock.now + LIFETIME == other._session.alive_until)
    assert isinstance(await reserve(other, (Draw("s", SLOTS, 45_000),), 1), Granted)
    assert not isinstance(take(still, slot, 5), Granted), "it asks"
    still._beaten = 0.0
    still._tick()
    await until(lambda: clock.now + LIFETIME == still._session.alive_until)
    await until(lambda: still._serving and not still._outbox and not still._outbox.batch)
    in_use = still._leases["s"].used + 45_000
    assert await level(shared_server, other, SLOTS, "s", clock) == -in_use
    back(still, [Draw("s", SLOTS, still._leases["s"].used)])
    back(other, [Draw("s", SLOTS, 45_000)])
    await still.stop()
    await other.stop()
    assert await level(shared_server, other, SLOTS, "s", clock) == 0


@pytest.mark.parametrize("step", [-3600, 3600])
async def test_a_clock_that_jumps_changes_no_answer(shared_server: Server, step: int) -> None:
    """Between two answers time is reckoned by a clock that nobody sets."""
    shift = 0
    draws = (Draw("a", rate_shape(60, 60, 1), 1000),)
    async with fleet(shared_server, 1, clock=lambda: wall() + shift) as (store,):
        assert isinstance(await reserve(store, draws, 1), Granted)
        assert isinstance(await reserve(store, draws, 2), Refused)
        shift = step * SECOND
        again = await reserve(store, draws, 2)
        assert isinstance(again, Refused)
        assert again.early
        assert 0 < again.wait <= SECOND + 1


@pytest.mark.parametrize("mode", list(Mode))
async def test_a_replica_that_was_held_up_itself_does_not_take_the_server_for_lost(
    own_server: Server, mode: Mode
) -> None:
    async with fleet(own_server, 1, mode=mode, timeout=0.05) as (store,):
        asked = take(store, (Draw("a", BUDGET, 1000),), 1)
        assert isinstance(asked, asyncio.Future)
        for _ in range(3):
            time.sleep(0.06)
            await asyncio.sleep(0)
        verdict = await asked
        assert isinstance(verdict, Granted)
        assert verdict.standing is Standing.STORE


async def test_nobody_is_left_waiting_when_a_replica_ends(own_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.store.redis.LEAVING", 0.05)
    draws = (Draw("a", BUDGET, 1000),)
    async with fleet(own_server, 1, timeout=60.0) as (store,):
        own_server.freeze()
        waiting = [take(store, draws, who) for who in (1, 2)]
        await store.stop()
        for verdict in [*waiting, take(store, draws, 3)]:
            found = await asyncio.wait_for(verdict, 1) if isinstance(verdict, asyncio.Future) else verdict
            assert found.standing is Standing.DEGRADED
        own_server.thaw()


@pytest.mark.usefixtures("unhandled")
async def test_a_bucket_that_is_forgotten_is_asked_for_again(
    shared_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.store.redis.MOST_LEASES", 10)
    draws = (Draw("a", BUDGET, 1000),)
    async with fleet(shared_server, 1) as (store,):
        for who in range(100):
            await reserve(store, draws, who + 1)
            if "a" in store._leases.holding and not store._leases["a"].held:
                break
        assert "a" in store._leases.holding
        for number in range(30):
            await reserve(store, (Draw(f"b{number}", BUDGET, 1000),), 1)
        store._tick()
        await until(lambda: not store._outbox and not store._outbox.batch)
        assert len(store._leases) <= 12
        assert isinstance(await reserve(store, draws, 1), Granted)


@pytest.mark.parametrize("shape", [rate_shape(1000, 1), rate_shape(60, 3600)])
async def test_what_is_known_of_addresses_while_the_server_is_gone_stays_within_bounds(
    shape: Shape, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.store.redis.MOST_LEASES", 100)
    clock = Clock()
    store = a_store(Server(), "nowhere", clock=clock, server_clock=clock)
    assert isinstance(take(store, (Draw("held", Shape(10_000, slots=True), 1000),), 1), Granted)
    for number in range(2000):
        assert isinstance(take(store, (Draw(f"client:{number}", shape, 1000),), 1), Granted)
        clock.now += 1000
    assert max(len(store._leases), len(store._shares)) <= (110 if shape.capacity == 10**6 else 210)
    assert store._leases["held"].used == 1000


@pytest.mark.parametrize("namespace", ["", "a}b", "{a", "}"])
def test_a_name_that_would_scatter_the_keys_over_a_cluster_is_none(namespace: str) -> None:
    with pytest.raises(ValueError, match="namespace"):
        a_store(Server(), namespace)


# --- cheap ----------------------------------------------------------------------------------------------------------


def _calls(server: Server) -> int:
    with server.client() as plain:
        return int(plain.info("commandstats").get("cmdstat_evalsha", {}).get("calls", 0))


async def test_a_busy_replica_seldom_asks_and_returns_what_lies_idle(own_server: Server) -> None:
    shape = rate_shape(10**6, 1)
    draws = (Draw("a", shape, 1000), Draw("s", SLOTS, 1000))
    async with fleet(own_server, 2) as stores:
        before = _calls(own_server)
        for who in range(2000):
            assert isinstance(await reserve(stores[0], draws, who + 1), Granted)
            back(stores[0], draws[1:])
        assert _calls(own_server) - before < 200
        # Without a word from anybody.
        await until(lambda: not stores[0]._leases.holding and not stores[0]._outbox and not stores[0]._outbox.batch)
        found = await look(stores[1], [Draw("a", shape, 0), Draw("s", SLOTS, 0)])
        assert [bucket.level for bucket in found] == [shape.capacity, 0]


async def test_many_at_once_wait_for_one_call_and_then_ask_together(own_server: Server) -> None:
    """All calls of a turn leave in one write, and each is answered."""
    draws = (Draw("a", BUDGET, 1000),)
    async with fleet(own_server, 1) as (store,):
        verdicts = await asyncio.gather(*(reserve(store, draws, who + 1) for who in range(300)))
        assert all(isinstance(verdict, Granted) for verdict in verdicts)
        assert not store._asks.busy
        assert not store._asks
    assert await level(own_server, store, BUDGET) == BUDGET.capacity - 300_000


async def test_a_replica_asked_by_many_at_once_leases_no_more_than_half_its_part(own_server: Server) -> None:
    """Else the others are refused what lies idle there."""
    shape = Shape(100_000)
    async with fleet(own_server, 2) as stores:
        for store in stores:
            await look(store, (Draw("a", shape, 0),))
        verdicts = await asyncio.gather(*(reserve(stores[0], (Draw("a", shape, 1000),), who + 1) for who in range(40)))
        assert all(isinstance(verdict, Granted) for verdict in verdicts)
        most = 100_000 // (2 * 2)
        assert stores[0]._leases["a"].held <= most
        for who in range(100):
            if not isinstance(await reserve(stores[1], (Draw("a", shape, 1000),), who + 100), Granted):
                break
        assert who >= 100 - 40 - most // 1000


async def test_who_comes_back_takes_what_was_promised_though_there_is_a_lease(own_server: Server) -> None:
    """Else the store keeps it for nobody, for two seconds."""
    shape = rate_shape(4, 1, 10)
    draws = (Draw("a", shape, 1000),)
    async with fleet(own_server, 1) as (store,):
        assert isinstance(await reserve(store, (Draw("a", shape, 10_000),), 1), Granted)
        refused = await reserve(store, draws, 2)
        assert isinstance(refused, Refused)
        store._leases["a"].held = 5000
        early = await reserve(store, draws, 2)
        assert isinstance(early, Refused)
        assert early.early
        deadline = time.monotonic() + 2
        while not isinstance(await reserve(store, draws, 2), Granted):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.002)
        (bucket,) = await look(store, draws)
        assert bucket.promises == ()
        assert isinstance(take(store, draws, 3), Granted), "the others have the lease"


async def test_who_comes_back_in_time_is_not_told_to_wait_by_a_clock_that_is_behind(shared_server: Server) -> None:
    """The server's clock is known by its last answer, which may have been late."""
    shape = rate_shape(50, 1, 1)
    draws = (Draw("a", shape, 1000),)
    async with fleet(shared_server, 1, mode=Mode.EXACT) as (store,):
        assert isinstance(await reserve(store, draws, 1), Granted)
        refused = await reserve(store, draws, 2)
        assert isinstance(refused, Refused)
        due = time.monotonic() + refused.wait / SECOND
        await until(lambda: time.monotonic() > due)
        store._session.ahead -= 60_000
        assert isinstance(await reserve(store, draws, 2), Granted)


async def test_twenty_replicas_come_back_to_a_server_without_a_stampede(own_server: Server) -> None:
    async with fleet(own_server, 20, timeout=0.05) as stores:
        own_server.kill()
        await until(lambda: all(store.standing is Standing.DEGRADED for store in stores))
        await until(lambda: all(store._link._attempts > 4 for store in stores))
        own_server.start()
        came: list[float] = []
        for _ in range(4000):
            back = sum(store.standing is Standing.STORE for store in stores)
            came.extend([time.monotonic()] * (back - len(came)))
            if back == 20:
                break
            await asyncio.sleep(0.002)
        assert len(came) == 20
        assert came[-1] - came[0] > 0.05, "not all at once"
        with own_server.client() as plain:
            assert plain.info("stats")["total_connections_received"] < 45
