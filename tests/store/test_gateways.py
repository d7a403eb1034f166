"""Gateways that share limits through a real server, as their clients and their operators meet them, on both faces."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections import Counter
from typing import Any

import pytest
from pydantic import SecretStr

from gateway.limits import Limits
from gateway.policy.limits import UNIT
from gateway.policy.token_bucket import spare
from gateway.settings import KeySettings
from gateway.store.redis import RedisStore
from tests.conftest import Connect
from tests.store.servers import Deaf, Server
from tests.support.client import Response
from tests.support.gateway import AUTH, CHAT, KEY, Gateway, StartGateway, chat, post_bytes, relayed, serving, until
from tests.support.recordings import load
from tests.support.script import Gate, json_answer, play
from tests.support.sockets import free_port
from tests.support.upstream import ScriptedUpstream

STREAM = play(load("vllm", "chat_stream_usage"))
names = itertools.count()
ALICE, BOB = (KeySettings(name=name, key=SecretStr(key)) for name, key in (("alice", KEY), ("bob", "b")))


def answer(prompt: int = 100, output: int = 50) -> Any:
    """Return what an engine answers that used so many tokens."""
    usage = {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}
    body = {"id": "x", "object": "chat.completion", "model": "smollm2", "choices": [], "usage": usage}
    return json_answer(json.dumps(body).encode())


def shared(url: str, store: dict[str, object] | None = None, **key: Any) -> Limits:
    """Return limits of each key that are kept in a server, in a namespace of the test's own."""
    # Nobody waits so long: it is what a busy machine may take.
    kept = {"url": url, "namespace": f"gateways{next(names)}", "timeout": 5, **(store or {})}
    return Limits.model_validate({"store": kept, "defaults": {"key": key}})


def told(response: Response, name: str) -> str:
    (value,) = response.header_values(name)
    return value


async def left(gateway: Gateway) -> list[int]:
    """Return what the server has of each limit of the only key."""
    limiter = gateway.replica.limiter
    (plan,) = limiter._plans.values()
    return [spare(limit.shape, bucket) // UNIT for limit, bucket in await limiter.explain(plan)]


async def given_back(gateway: Gateway) -> RedisStore:
    """Wait until no request runs and the server has been told of all that came back, or was owed."""
    await gateway.idle()
    store = gateway.replica.limiter.store
    assert isinstance(store, RedisStore)
    await until(lambda: not (store._outbox or store._outbox.batch), "what came back never reached the server")
    return store


async def spoken(gateway: Gateway) -> None:
    """Have a gateway tell the others what it has to, and hear what they told."""
    store = gateway.replica.limiter.store
    assert isinstance(store, RedisStore)
    exchange = store._exchange
    await until(lambda: not exchange._asking, "it never ends")
    exchange.speak()
    await until(lambda: not exchange._asking, "it never ends")


async def test_an_engine_gets_no_more_from_several_gateways_than_from_one(
    start_gateway: StartGateway, upstream: ScriptedUpstream, shared_server: Server, connect: Connect
) -> None:
    """A busy one has what an idle one does not need, but for the one request that this can answer at once; when both
    are busy they have the same; and when one ends the other has all of it."""
    limits = shared(shared_server.url, requests="100/day")
    engine = serving(upstream, max_running=4)
    gateways = busy, idle = [await start_gateway(engine, limits=limits) for _ in range(2)]
    endpoints = [gateway.replica.pool.endpoints[0] for gateway in gateways]
    await until(lambda: [endpoint.share for endpoint in endpoints] == [1, 1], "not shared")
    gate = Gate()
    upstream.always(answer().do(gate, 0), path=CHAT)
    clients: list[Any] = []

    async def ask(gateway: Gateway, count: int) -> None:
        for _ in range(count):
            client = await connect(gateway.url)
            client.post(CHAT, chat(user=str(len(clients))), AUTH)
            clients.append(client)

    await ask(busy, 6)
    await until(lambda: len(relayed(upstream)) == 3, "the busy one has not what the idle one does not need")
    await ask(idle, 4)
    await until(lambda: idle.replica.admission.queue.count == 3, "the idle one does not answer at once")
    for gateway in gateways * 2:
        await spoken(gateway)
    assert (len(relayed(upstream)), [endpoint.in_flight for endpoint in endpoints]) == (4, [3, 1])
    opened, gate = gate, Gate()
    upstream.always(answer().do(gate, 0), path=CHAT)
    opened.open()
    both = lambda: [endpoint.in_flight for endpoint in endpoints] == [2, 2] and len(relayed(upstream)) == 8  # noqa: E731
    await until(both, "both want as much and have not")
    gate.open()
    for client in clients:
        assert (await client.response()).status == 200
    await busy.idle()
    await busy.replica.close()
    await until(lambda: endpoints[1].share == 4, "what it held is nobody's")


@pytest.mark.parametrize("face", ["protocol"])
async def test_tenants_share_fairly_over_four_gateways(
    start_gateway: StartGateway, upstream: ScriptedUpstream, shared_server: Server, connect: Connect
) -> None:
    """A balancer that leaves it to chance, and a tenant that sends ten times as much as the other. Each round the
    engine answers all it has and the gateways talk: the two differ by no more than a request each, and what is served
    in a round of each."""
    limits = shared(shared_server.url, requests="1000/day")
    engine, keys = serving(upstream, max_running=8), (ALICE, BOB)
    gateways = [await start_gateway(engine, limits=limits, keys=keys) for _ in range(4)]
    chance, clients = random.Random(3), []

    async def send(user: str) -> None:
        client = await connect(chance.choice(gateways).url)
        client.post(CHAT, chat(user=user, max_tokens=50), AUTH if user == "alice" else (("authorization", "Bearer b"),))
        clients.append(client)

    def served() -> Counter[str]:
        return Counter(json.loads(request.body)["user"] for request in relayed(upstream))

    def waiting() -> int:
        return sum(gateway.replica.admission.queue.count for gateway in gateways)

    sent: Counter[str] = Counter()
    gate, gaps = Gate(), []
    upstream.always(answer().do(gate, 0), path=CHAT)
    for _ in range(16):
        for user, most in (("alice", 60), ("bob", 6)):
            while sent[user] - served()[user] < most:
                sent[user] += 1
                await send(user)
        await until(lambda: waiting() == sent.total() - served().total(), "somebody is on the way")
        # The first of them were served at once, as nobody waited then.
        gaps.append(served()["alice"] - served()["bob"])
        for gateway in [*gateways, *gateways]:
            await spoken(gateway)
        before = served().total()
        opened, gate = gate, Gate()
        upstream.always(answer().do(gate, 0), path=CHAT)
        opened.open()
        await until(lambda before=before: served().total() == before + 8, "the engine is not used")
    gate.open()
    for client in clients:
        assert (await client.response()).status == 200
    assert max(gaps) - min(gaps) <= 2 * (1 + 8)


async def test_two_gateways_let_in_together_what_one_may(
    start_gateway: StartGateway, upstream: ScriptedUpstream, shared_server: Server
) -> None:
    """An answer, a stream and a refusal have rate headers; both know what was promised, and give back to the same."""
    limits = shared(shared_server.url, requests="8/day", tokens={"rate": "1k/day", "burst": 1_000_000}, concurrent=12)
    gateways = [await start_gateway(upstream, limits=limits) for _ in range(2)]
    upstream.always(answer(), path=CHAT)
    upstream.queue(STREAM)
    streamed = await gateways[0].ask(chat(stream=True))
    assert (streamed.status, told(streamed, "x-ratelimit-remaining-requests")) == (200, "7")
    assert told(streamed, "x-ratelimit-limit-tokens") == "1000000"
    found = [await gateways[turn % 2].ask(chat(user=str(turn))) for turn in range(11)]
    assert [response.status for response in found] == [200] * 7 + [429] * 4
    for response in found:
        assert told(response, "x-ratelimit-limit-requests") == "8"
        assert response.header("x-forebay-limits") is None
    assert [told(response, "x-ratelimit-remaining-requests") for response in found[7:]] == ["0"] * 4
    assert "Limit 8, Used 8, Requested 1." in found[-1].json()["error"]["message"]
    assert len(relayed(upstream)) == 8
    for gateway in gateways:
        await given_back(gateway)
        # As it ends: what is leased goes back.
        await gateway.replica.close()
    again = await start_gateway(upstream, limits=limits)
    refused = await again.ask(chat(user="again"))
    assert (refused.status, await left(again)) == (429, [0, 1_000_000 - (37 + 8) - 7 * (100 + 50), 12])


async def test_whoever_leaves_while_its_verdict_is_on_the_way_gets_it_back(
    start_gateway: StartGateway, upstream: ScriptedUpstream, shared_server: Server, connect: Connect
) -> None:
    async with Deaf(shared_server) as way:
        limits = shared(way.url, {"mode": "exact"}, requests="5/day", concurrent=1)
        gateway = await start_gateway(upstream, limits=limits)
        upstream.queue(answer())
        assert (await gateway.ask(chat())).status == 200
        store = await given_back(gateway)
        way.deaf = True
        client = await connect(gateway.url)
        client.send(post_bytes(chat(user="leaves")))
        await until(lambda: bool(store._asks), "nobody waits for a verdict")
        await client.close()
        await gateway.idle()
        assert gateway.lines("request")[-1]["outcome"] == "client_gone"
        way.cut()
        upstream.queue(answer())
        # It has the only slot, if it was given back, and the third request of five.
        stays = await gateway.ask(chat(user="stays"))
        assert (stays.status, told(stays, "x-ratelimit-remaining-requests")) == (200, "3")
        # Now, while there is a way to say farewell on.
        await gateway.replica.close()
    assert len(relayed(upstream)) == 2


@pytest.mark.parametrize("when_lost", ["degraded", "closed", "open"])
async def test_while_the_server_is_frozen_the_policy_decides_and_everybody_is_told(
    start_gateway: StartGateway, upstream: ScriptedUpstream, own_server: Server, when_lost: str
) -> None:
    kept: dict[str, object] = {"when_lost": when_lost, "timeout": "40ms", "mode": "exact"}
    gateway = await start_gateway(upstream, limits=shared(own_server.url, kept, requests="3/day"))
    upstream.always(answer(), path=CHAT)
    assert (await gateway.ask(chat(user="before"))).status == 200
    own_server.freeze()
    loop = asyncio.get_running_loop()
    began = loop.time()
    found = [await gateway.ask(chat(user=str(turn))) for turn in range(3)]
    assert loop.time() - began < 2, "requests waited for the server"
    assert {told(response, "x-forebay-limits") for response in found} == {when_lost}
    expected = {"degraded": [200, 200, 429], "closed": [503] * 3, "open": [200] * 3}[when_lost]
    assert [response.status for response in found] == expected
    refused = found[-1]
    if when_lost == "degraded":
        assert "this one's share of this limit is used up" in refused.json()["error"]["message"]
    elif when_lost == "closed":
        assert refused.json()["error"]["code"] == "limits_unavailable"
        assert (told(refused, "retry-after"), refused.header("x-ratelimit-limit-requests")) == ("1", None)
        assert gateway.lines("request")[-1]["outcome"] == "limits_away"
    ready = await gateway.get("/health/ready")
    status, word = (503, "limits cannot be checked") if when_lost == "closed" else (200, "ok")
    assert (ready.status, ready.json()["status"], ready.json()["limits"]) == (status, word, when_lost)
    metrics = (await gateway.get("/metrics", admin=True)).body.decode()
    assert f'forebay_limits_standing{{standing="{when_lost}"}} 1.0' in metrics
    assert 'forebay_limits_standing{standing="store"} 0.0' in metrics
    assert "forebay_limits_lost_total 1.0" in metrics
    assert ("forebay_limit_refusals_total{" in metrics) is (when_lost == "degraded")
    own_server.thaw()
    await until(lambda: gateway.replica.limiter.standing == "store", "it was never found again")
    (lost,), (back,) = gateway.lines("limits_lost"), gateway.lines("limits_found")
    assert (lost["level"], lost["when_lost"], lost["why"]) == ("error", when_lost, "no answer within 40 ms")
    assert lost["store"] == back["store"] == own_server.url
    await given_back(gateway)
    healed = await gateway.ask(chat(user="after"))
    assert healed.header("x-forebay-limits") is None
    assert healed.status == (200 if when_lost == "closed" else 429), "what was let in meanwhile was not charged"
    assert (await gateway.get("/health/ready")).json()["limits"] == "store"
    await given_back(gateway)
    own_server.command("FLUSHALL")
    assert (await gateway.ask(chat(user="afterwards"))).status == 429, "what was forgotten was given out once more"
    assert (await gateway.line("limits_emptied"))["store"] == own_server.url


@pytest.mark.parametrize("face", ["protocol"])
async def test_a_server_that_is_not_there_at_the_start_is_a_standing(
    start_gateway: StartGateway, upstream: ScriptedUpstream
) -> None:
    url = f"redis://forebay:sesame@127.0.0.1:{free_port()}"
    engine = serving(upstream, max_running=5)
    gateway = await start_gateway(engine, limits=shared(url, {"timeout": "20ms", "replicas": 2}, requests="4/day"))
    assert gateway.replica.pool.endpoints[0].share == 2, "an engine is not shared without a server"
    upstream.always(answer(), path=CHAT)
    found = [await gateway.ask(chat(user=str(turn))) for turn in range(3)]
    assert [response.status for response in found] == [200, 200, 429]
    assert {told(response, "x-forebay-limits") for response in found} == {"degraded"}
    (lost,) = gateway.lines("limits_lost")
    assert (lost["why"], lost["store"]) == ("ConnectionError", url.replace("forebay:sesame@", ""))
    assert b"forebay_limits_lost_total 1.0" in (await gateway.get("/metrics", admin=True)).body
    assert gateway.log_file is not None
    assert "sesame" not in gateway.log_file.read_text()
