"""Requests that wait for an engine, over sockets and on both faces: order, patience, refusals, what is seen of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from pydantic import SecretStr

from gateway.limits import Limits, TenantLimits
from gateway.serving.explain import explanation, row_of
from gateway.settings import Capacity, Caps, KeySettings, Queue, QueueClass, QueueClasses
from tests.conftest import Connect
from tests.support.gateway import AUTH, CHAT, KEY, MODEL, Gateway, StartGateway, chat, relayed, serving, until
from tests.support.journal import Journal
from tests.support.script import Gate, json_answer
from tests.support.upstream import ScriptedUpstream

ASKED = f"/admin/route?model={MODEL}"
ANSWER = b'{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}'
BOB = (("authorization", "Bearer fb-bob-secret"),)
KEYS = (
    KeySettings(name="alice", key=SecretStr(KEY), caps=Caps(tier="priority")),
    KeySettings(name="bob", key=SecretStr("fb-bob-secret")),
)


def waiting(gateway: Gateway) -> int:
    return gateway.replica.admission.queue.count


async def held(start: StartGateway, upstream: ScriptedUpstream, **more: Any) -> tuple[Gateway, Gate]:
    """Start a gateway whose only engine takes one request at once and answers when the gate opens."""
    gateway = await start(serving(upstream, max_running=1), keys=KEYS, **more)
    gate = Gate()
    upstream.always(json_answer(ANSWER).do(gate, 0), path=CHAT)
    return gateway, gate


def who(upstream: ScriptedUpstream) -> list[str]:
    return [json.loads(request.body)["user"] for request in relayed(upstream)]


async def test_tenants_take_turns_and_a_better_class_goes_first(
    start_gateway: StartGateway, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """One that came with four requests before another's two is served no more often; asking for a better class works
    for the key that may."""
    gateway, gate = await held(start_gateway, upstream)
    asked = [("a0", AUTH, "default")]
    asked += [(f"a{number}", AUTH, "default") for number in (1, 2, 3)]
    asked += [("b1", BOB, "priority"), ("b2", BOB, "default"), ("vip", AUTH, "priority")]
    clients = []
    for count, (user, headers, tier) in enumerate(asked):
        client = await connect(gateway.url)
        client.post(CHAT, chat(user=user, service_tier=tier, max_tokens=4), headers)
        clients.append(client)
        await until(lambda count=count: waiting(gateway) == count, f"request {count} does not wait")
    assert who(upstream) == ["a0"]
    gate.open()
    for client in clients:
        assert (await client.response()).status == 200
    assert who(upstream) == ["a0", "vip", "a1", "b1", "a2", "b2", "a3"]
    lines = [await gateway.line("request", index) for index in range(7)]
    assert ["queued_ms" in line for line in lines].count(True) in (0, 6)


async def test_patience_is_the_clients_own(
    start_gateway: StartGateway, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """A client that says how long it waits is answered by then, in its dialect, with when to come again."""
    gateway, gate = await held(start_gateway, upstream)
    first, second, third = [await connect(gateway.url) for _ in range(3)]
    first.post(CHAT, chat(), AUTH)
    await until(lambda: len(relayed(upstream)) == 1, "the engine was not asked")
    second.post(CHAT, chat(), (*AUTH, ("x-request-timeout", "2.5")))
    third.post(CHAT, chat(), (*AUTH, ("x-stainless-read-timeout", "600")))
    await until(lambda: waiting(gateway) == 2, "nobody waits")
    gateway.advance(2.5)
    refused = await second.response()
    assert (refused.status, refused.json()["error"]["code"]) == (429, "slow_down")
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert int(refused.header("retry-after-ms") or 0) > 0
    assert waiting(gateway) == 1
    gate.open()
    assert (await first.response()).status == 200
    assert (await third.response()).status == 200
    line = await gateway.line("request", 0)
    assert (line["outcome"], line["status"], line["queued_ms"]) == ("busy", 429, 2500.0)
    wrong = await gateway.ask(chat(), headers=(*AUTH, ("x-request-timeout", "soon")))
    assert (wrong.status, wrong.json()["error"]["type"]) == (400, "invalid_request_error")


async def test_who_cannot_be_served_in_time_is_refused_before_anything_is_reserved(
    start_gateway: StartGateway, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """The pace at which the line empties says so; the refusal takes nothing of a limit."""
    limits = Limits(tenants={"alice": TenantLimits.model_validate({"limits": {"requests": "100/m"}})})
    gateway = await start_gateway(serving(upstream, max_running=1), keys=KEYS, limits=limits)
    gates = [Gate() for _ in range(12)]
    for gate in gates:
        upstream.queue(json_answer(ANSWER).do(gate, 0), path=CHAT)
    clients = [await connect(gateway.url) for _ in gates]
    for count, client in enumerate(clients):
        client.post(CHAT, chat(max_tokens=4, service_tier="default"), AUTH)
        await until(lambda count=count: waiting(gateway) == count, "does not wait")
    for number in range(6):
        # Ten seconds each.
        gateway.clock.advance(10)
        gates[number].open()
        assert (await clients[number].response()).status == 200
        await until(lambda number=number: len(relayed(upstream)) == number + 2, "nobody had his turn")
    before = gateway.replica.limiter.store
    held = [cell.bucket(0).level for cell in before._cells.values()]  # type: ignore[attr-defined]
    refused = await gateway.ask(
        chat(max_tokens=4, service_tier="default"), headers=(*AUTH, ("x-request-timeout", "20"))
    )
    assert (refused.status, refused.json()["error"]["code"]) == (429, "slow_down")
    assert "would have to wait for about 50 s" in refused.json()["error"]["message"]
    assert [cell.bucket(0).level for cell in before._cells.values()] == held  # type: ignore[attr-defined]
    # Another tenant shares the engine with this one, and its first request is not behind all of it.
    other = await connect(gateway.url)
    other.post(CHAT, chat(max_tokens=4, service_tier="default"), (*BOB, ("x-request-timeout", "20")))
    await until(lambda: waiting(gateway) == 6, "a tenant without anything waiting is refused")
    for gate in gates:
        gate.open()
    upstream.always(json_answer(ANSWER), path=CHAT)
    for client in (*clients[6:], other):
        assert (await client.response()).status == 200


async def test_a_client_that_leaves_gives_everything_back(
    start_gateway: StartGateway, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """Its place in the queue and what was reserved for it; the engine never hears of it."""
    limits = Limits(tenants={"alice": TenantLimits.model_validate({"limits": {"concurrent": 5}})})
    gateway, gate = await held(start_gateway, upstream, limits=limits)
    first, second = [await connect(gateway.url) for _ in range(2)]
    first.post(CHAT, chat(user="first"), AUTH)
    await until(lambda: len(relayed(upstream)) == 1, "the engine was not asked")
    second.post(CHAT, chat(user="second"), AUTH)
    await until(lambda: waiting(gateway) == 1, "nobody waits")
    await second.close()
    await until(lambda: waiting(gateway) == 0, "it still waits")
    line = await gateway.line()
    assert (line["outcome"], line["settlement"]) == ("client_gone", "void")
    assert "attempts" not in line
    gate.open()
    assert (await first.response()).status == 200
    assert who(upstream) == ["first"]


async def test_whoever_waits_costs_no_task(
    start_gateway: StartGateway, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """He is an entry in a heap: as many tasks run for those who wait as for those who are served."""
    gateway, gate = await held(start_gateway, upstream)
    clients = [await connect(gateway.url) for _ in range(22)]
    clients[0].post(CHAT, chat(), AUTH)
    await until(lambda: len(relayed(upstream)) == 1, "the engine was not asked")
    served = requests_tasks()
    for client in clients[1:]:
        client.post(CHAT, chat(), AUTH)
    await until(lambda: waiting(gateway) == 21, "they do not wait")
    assert requests_tasks() == 22 * served
    assert served == 0 or gateway.face == "asgi"
    gate.open()
    for client in clients:
        assert (await client.response()).status == 200


def requests_tasks() -> int:
    """Return how many tasks run for requests: those without a name that somebody gave them."""
    return sum(task.get_name().startswith("Task-") and "asgi" in repr(task) for task in asyncio.all_tasks())


async def test_rules_change_while_requests_wait(
    start_gateway: StartGateway, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """More room for an engine lets those in who wait, and their patience is what it was."""
    gateway, gate = await held(start_gateway, upstream)
    first, second = [await connect(gateway.url) for _ in range(2)]
    first.post(CHAT, chat(), AUTH)
    await until(lambda: len(relayed(upstream)) == 1, "the engine was not asked")
    second.post(CHAT, chat(), AUTH)
    await until(lambda: waiting(gateway) == 1, "nobody waits")
    changed = gateway.replica.settings.model_copy(
        update={
            "upstreams": (gateway.replica.settings.upstreams[0].model_copy(update={"max_running": 2}),),
            "queue": Queue(classes=QueueClasses(default=QueueClass(max_wait=1.0))),
            "capacity": Capacity(most=8),
        }
    )
    gateway.replica._apply(changed)
    assert waiting(gateway) == 1
    assert gateway.replica.admission.rules.patience == (60.0, 1.0, 600.0)
    gate.open()
    assert (await first.response()).status == (await second.response()).status == 200


async def test_what_waits_can_be_seen(
    start_gateway: StartGateway, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """How many wait, for how long they did, who was refused why, and what each engine is given at once."""
    gateway, gate = await held(start_gateway, upstream)
    first, second = [await connect(gateway.url) for _ in range(2)]
    first.post(CHAT, chat(), AUTH)
    await until(lambda: len(relayed(upstream)) == 1, "the engine was not asked")
    second.post(CHAT, chat(service_tier="flex"), AUTH)
    await until(lambda: waiting(gateway) == 1, "nobody waits")
    metrics = (await gateway.get("/metrics", admin=True)).body.decode()
    assert 'forebay_queue_waiting{class="flex"} 1.0' in metrics
    assert f'forebay_endpoint_limit{{endpoint="{upstream.url}"}} 1.0' in metrics
    gateway.advance(3)
    gate.open()
    assert (await second.response()).status == 200
    assert (await first.response()).status == 200
    metrics = (await gateway.get("/metrics", admin=True)).body.decode()
    assert 'forebay_queue_waiting{class="flex"} 0.0' in metrics
    assert 'forebay_queue_seconds_sum{class="flex"} 3.0' in metrics
    split = explanation(row_of(gateway.replica.edge.recent[-1], 0.0), "memory")["time"]["split_ms"]
    assert split["queue"] == 3000.0
    assert split["connect"] < 1000.0


@pytest.fixture
async def other_upstream(journal: Journal) -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream(journal=journal, name="other") as scripted:
        yield scripted


async def test_where_a_request_would_be_sent_is_told_without_sending_it(
    start_gateway: StartGateway, upstream: ScriptedUpstream, other_upstream: ScriptedUpstream
) -> None:
    """The engine that has read the beginning of a prompt is named, with what is thought of each; nothing is learnt."""
    admin = KeySettings(name="root", key=SecretStr("fb-root-secret"), admin=True)
    first, other = serving(upstream, name="first"), serving(other_upstream, name="other")
    gateway = await start_gateway(first, other, keys=(*KEYS, admin))
    for engine in (upstream, other_upstream):
        engine.always(json_answer(ANSWER), path=CHAT)
    body = chat(messages=[{"role": "user", "content": "word " * 400}])
    assert (await gateway.ask(body)).status == 200
    home = (await gateway.line())["endpoint"]
    for _ in range(2):
        told = (await gateway.admin("POST", ASKED, body, key="fb-root-secret")).json()
        assert told["endpoint"] == home
        cached = {one["name"]: one["blocks_cached"] for one in told["data"]}
        assert cached == {home: told["blocks"], "first" if home == "other" else "other": 0}
        assert {one["state"] for one in told["data"]} == {"ready"}
    gateway.replica.pool.endpoints[0].holds.add("operator")
    gateway.replica.pool.endpoints[1].down("as the test says")
    told = (await gateway.admin("POST", ASKED, body, key="fb-root-secret")).json()
    assert (told["endpoint"], sorted(one["state"] for one in told["data"])) == (None, ["down", "kept out"])
    wrong = await gateway.admin("POST", "/admin/route?model=no", key="fb-root-secret")
    assert wrong.status == 404
    wrong = await gateway.admin("POST", f"{ASKED}&path=/x", key="fb-root-secret")
    assert wrong.status == 400
    wrong = await gateway.admin("POST", ASKED, [1], key="fb-root-secret")
    assert wrong.status == 400
    assert (await gateway.admin("POST", ASKED, body, key=KEY)).status == 403
