"""Pools whose engines are started when somebody waits for them: requests wait for that, and are counted meanwhile."""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import urlsplit

import pytest

from engines import discovery
from gateway import finder
from gateway.models import PublicModel
from gateway.serving.pool import Endpoint
from gateway.settings import Upstream
from tests.conftest import Connect
from tests.support.gateway import (
    AUTH,
    CHAT,
    ENGINE_MODEL,
    MODEL,
    Gateway,
    StartGateway,
    chat,
    relayed,
    serving,
    until,
)
from tests.support.recordings import load
from tests.support.script import event_stream, json_answer
from tests.support.upstream import ScriptedUpstream

ANSWER = b'{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}'


def waiting(gateway: Gateway) -> dict[str, int]:
    """What an autoscaler reads."""
    (family,) = [one for one in gateway.replica.metrics.collect() if one.name == "forebay_pool_waiting"]
    return {sample.labels["pool"]: int(sample.value) for sample in family.samples}


def endpoint(gateway: Gateway) -> Endpoint:
    return gateway.replica.pool.endpoints[0]


async def asleep(start: StartGateway, upstream: ScriptedUpstream, **more: Any) -> Gateway:
    """Start a gateway whose only engine is not there."""
    upstream.always(json_answer(ANSWER), path=CHAT)
    spec = serving(upstream, wakeable=True, wake_timeout=200, pool="rack")
    upstream.refuse()
    gateway = await start(spec, **more)
    assert not endpoint(gateway).healthy
    return gateway


async def awake(gateway: Gateway, upstream: ScriptedUpstream) -> None:
    """Have the engine come up, and be found."""
    await upstream.accept()
    await gateway.replica.watcher.look(endpoint(gateway))
    gateway.advance(0.1)


async def test_requests_wait_for_an_engine_to_start(
    start_gateway: StartGateway, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """Longer than they may wait for one that is busy; streams are kept alive, and the pool's gauge says how many."""
    gateway = await asleep(start_gateway, upstream)
    assert (await gateway.get("/health/ready")).status == 200
    assert waiting(gateway) == {"rack": 0}
    upstream.queue(event_stream(load("vllm", "chat_stream").events()), path=CHAT)
    clients = []
    for count in range(6):
        client = await connect(gateway.url)
        client.post(CHAT, chat(stream=not count), AUTH)
        clients.append(client)
        await until(lambda count=count: waiting(gateway) == {"rack": count + 1}, "it does not wait")
        gateway.advance(15.1)
    assert (await clients[0].head()).status == 200
    gateway.advance(60)
    await awake(gateway, upstream)
    for client in clients:
        assert (await client.response()).status == 200
    assert waiting(gateway) == {"rack": 0}
    # A line that nobody was served in for minutes says nothing of how long newcomers would wait.
    assert (await gateway.ask(chat(), headers=(*AUTH, ("x-request-timeout", "2")))).status == 200
    line = await gateway.line()
    assert line["queued_ms"] > 60_000
    assert "attempts" in line


async def test_they_wait_no_longer_than_the_pool_may_take_or_their_clients_will(
    start_gateway: StartGateway, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """The refusal says that no engine is there, and not that one is busy."""
    gateway = await asleep(start_gateway, upstream)
    clients = [await connect(gateway.url) for _ in range(2)]
    clients[0].post(CHAT, chat(), (*AUTH, ("x-request-timeout", "30")))
    clients[1].post(CHAT, chat(), AUTH)
    await until(lambda: waiting(gateway) == {"rack": 2}, "they do not wait")
    gateway.advance(30)
    assert (await clients[0].response()).status == 503
    gateway.advance(169)
    assert waiting(gateway) == {"rack": 1}
    gateway.advance(1)
    refused = await clients[1].response()
    assert (refused.status, refused.json()["error"]["code"]) == (503, "server_is_overloaded")
    assert "No healthy engine" in refused.json()["error"]["message"]


async def test_one_that_goes_to_sleep_under_a_request_is_waited_for(
    start_gateway: StartGateway, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """A connection that fails is no attempt; an engine that breaks over the request is not waited for."""
    upstream.always(json_answer(ANSWER), path=CHAT)
    gateway = await start_gateway(serving(upstream, wakeable=True, pool="rack"))
    upstream.refuse()
    client = await connect(gateway.url)
    client.post(CHAT, chat(), AUTH)
    await until(lambda: waiting(gateway) == {"rack": 1}, "it does not wait")
    await awake(gateway, upstream)
    assert (await client.response()).status == 200
    upstream.always(json_answer(b"{}", status=500), path=CHAT)
    assert (await gateway.ask(chat())).status == 502
    assert (await gateway.ask(chat(model="another"))).status == 404


async def test_engines_that_are_found_only_when_they_run(
    start_gateway: StartGateway, upstream: ScriptedUpstream, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scaled to zero there is no endpoint at all: their model is known, and whoever waits is sent to the first that
    comes."""
    addresses: list[str] = []
    turn = asyncio.Event()

    async def ask(name: str, port: int) -> list[str]:
        return addresses

    async def sleep(seconds: float) -> None:
        await turn.wait()
        turn.clear()

    def source(name: str, port: int, interval: float, tell: discovery.Tell) -> discovery.DnsSource:
        return discovery.DnsSource(name, port, interval, tell, ask, sleep)

    monkeypatch.setattr(finder, "DnsSource", source)
    upstream.always(json_answer(ANSWER), path=CHAT)
    url = f"http://engines.example:{urlsplit(serving(upstream).url).port}"
    named = {MODEL: ENGINE_MODEL}
    gateway = await start_gateway(Upstream(url=url, discover="dns", models=named, wakeable=True, pool="rack"))
    assert [model["id"] for model in (await gateway.get("/v1/models", AUTH)).json()["data"]] == [MODEL]
    client = await connect(gateway.url)
    client.post(CHAT, chat(), AUTH)
    await until(lambda: waiting(gateway) == {"rack": 1}, "it does not wait")
    assert gateway.replica.pool.endpoints == []
    addresses.append("127.0.0.1")
    turn.set()
    assert (await client.response()).status == 200
    assert [request.json()["model"] for request in relayed(upstream)] == [ENGINE_MODEL]


async def test_where_there_is_a_model_to_fall_back_on_nobody_waits(
    start_gateway: StartGateway, upstream: ScriptedUpstream
) -> None:
    """The client is served at once, and the fall is counted: an autoscaler can go by that."""
    upstream.always(json_answer(ANSWER), path=CHAT)
    gateway = await start_gateway(
        Upstream(url="http://127.0.0.1:9", models={"large": "x"}, wakeable=True, pool="rack", name="rack"),
        serving(upstream, models={"small": "small"}),
        models={"large": PublicModel(fallback=("small",))},
    )
    assert (await gateway.ask(chat(model="large"))).header("x-forebay-model") == "small"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"pool": "a"}, "wakeable needs models"),
        ({"models": {"a": "b"}}, "wakeable needs a pool"),
        ({"wakeable": False, "wake_timeout": 5}, "wake_timeout has no effect without wakeable"),
    ],
)
def test_what_must_be_known_of_a_pool_that_sleeps(more: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Upstream.model_validate({"url": "http://a:1", "wakeable": True, **more})
