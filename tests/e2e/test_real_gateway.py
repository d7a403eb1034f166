"""The gateway in front of a real vLLM, on both faces: every relayed path, every way to leave, every kind of refusal.

What an engine says is asserted only as far as it is the wire contract; how fast it says it is measured, not judged.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from pydantic import SecretStr

from gateway.api.routes import RELAYED
from gateway.settings import Caps, KeySettings, Upstream
from tests.conftest import Connect
from tests.e2e.conftest import Measure
from tests.e2e.forwarder import forwarding
from tests.e2e.watched import WatchedEngine
from tests.support.client import RawClient, Response
from tests.support.gateway import AUTH, CHAT, KEY, MODEL, Gateway, StartGateway, chat, until
from tests.support.real_engine import RealEngine
from tests.support.script import DONE
from tests.support.sockets import unread_by_peer

pytestmark = pytest.mark.real_engine

QUESTION = "What is the capital of France?"
TURNS = [{"role": "user", "content": QUESTION}]

# What is asked on each relayed path; of those that generate, four tokens.
ASKED: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": TURNS, "max_tokens": 4},
    "/v1/completions": {"prompt": QUESTION, "max_tokens": 4, "ignore_eos": True},
    "/v1/responses": {"input": QUESTION, "max_output_tokens": 4},
    "/v1/messages": {"messages": TURNS, "max_tokens": 4},
    "/v1/embeddings": {"input": QUESTION},
    "/v1/rerank": {"query": QUESTION, "documents": ["Paris", "Rome"]},
    "/v1/score": {"text_1": QUESTION, "text_2": "Paris"},
    "/tokenize": {"prompt": QUESTION},
}
NOT_SERVED = frozenset({"/v1/embeddings", "/v1/rerank", "/v1/score"})
"""What a model that generates does not offer; recordings of a pooling model show these paths at work."""
ENDS = {"openai": DONE, "responses": b"event: response.completed\n", "anthropic": b"event: message_stop\n"}

# Far more tokens than are ever waited for: an engine that finishes this was not told to stop.
ENDLESS = {"max_tokens": 1500, "ignore_eos": True}


def request(path: str, **more: Any) -> dict[str, Any]:
    return {"model": MODEL, "temperature": 0, **ASKED[path], **more}


def error_of(answer: Response) -> dict[str, Any]:
    error: dict[str, Any] = answer.json()["error"]
    return error


# --- every relayed path ------------------------------------------------------------------------------------------


async def test_every_relayed_path(gateway: Gateway, vllm_engine: RealEngine) -> None:
    """Served, or refused in words that help; and the engine's own name of the model shows nowhere."""
    assert set(ASKED) == set(RELAYED)
    for path, route in RELAYED.items():
        answer = await gateway.ask(request(path), path)
        if path in NOT_SERVED:
            assert (answer.status, error_of(answer)["code"]) == (400, "unsupported_operation")
            assert error_of(answer)["message"] == f"The engine that serves {MODEL!r} does not offer {path}."
            continue
        assert answer.status == 200, (path, answer.body)
        assert vllm_engine.model.encode() not in answer.body
        assert path == "/tokenize" or answer.json()["model"] == MODEL
        if route.streams:
            streamed = await gateway.ask(request(path, stream=True), path)
            assert (streamed.status, streamed.complete) == (200, True)
            assert vllm_engine.model.encode() not in streamed.body
            assert b'"model":"%b"' % MODEL.encode() in streamed.body
            assert streamed.events()[-1].startswith(ENDS[route.dialect.name])
    await gateway.idle()
    lines = gateway.lines("request")
    assert {line["outcome"] for line in lines} == {"ok", "refused"}
    generating = [line for line in lines if line["status"] == 200 and line["path"] != "/tokenize"]
    assert [line["tokens_out"] for line in generating] == [4] * 8


async def test_an_answer_carries_the_ids_of_its_request(gateway: Gateway) -> None:
    """The engine's log, the gateway's and the client's are about one request when they name one id."""
    for path, prefix in {CHAT: "chatcmpl-", "/v1/completions": "cmpl-", "/v1/messages": "chatcmpl-"}.items():
        headers = [*AUTH, ("x-client-request-id", f"mine {path}")]
        answer = await gateway.ask(request(path), path, headers)
        assert answer.json()["id"] == f"{prefix}{answer.header('x-request-id')}"
        line = gateway.lines("request")[-1]
        assert (line["request_id"], line["client_request_id"]) == (answer.header("x-request-id"), f"mine {path}")


async def test_usage_is_seen_by_those_who_ask_and_counted_for_the_others(gateway: Gateway) -> None:
    for path in (CHAT, "/v1/completions"):
        asked = (await gateway.ask(request(path, stream=True, stream_options={"include_usage": True}), path)).events()
        hidden = (await gateway.ask(request(path, stream=True), path)).events()
        last = json.loads(asked[-2].removeprefix(b"data: "))
        assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 4)
        assert all(json.loads(event.removeprefix(b"data: "))["choices"] for event in hidden[:-1])
        assert b'"usage":{' not in b"".join(hidden)
        seen, unseen = gateway.lines("request")[-2:]
        assert seen["tokens_in"] == unseen["tokens_in"] == last["usage"]["prompt_tokens"]
        assert seen["tokens_out"] == unseen["tokens_out"] == 4


async def test_eight_streams_at_once_are_kept_apart(gateway: Gateway, connect: Connect) -> None:
    # Long enough that on a busy machine none has ended before the last has begun.
    tokens = 96
    clients = [await connect(gateway.url, name=f"client {number}") for number in range(8)]
    for client in clients:
        client.post(CHAT, chat(stream=True, temperature=0, max_tokens=tokens, ignore_eos=True), AUTH)
    heads = [await client.head() for client in clients]
    firsts = [await client.event() for client in clients]
    assert gateway.replica.pool.endpoints[0].in_flight == 8
    for head, first, client in zip(heads, firsts, clients, strict=True):
        *events, end = [first, *await client.events()]
        assert end == DONE
        chunks = [json.loads(event.removeprefix(b"data: ")) for event in events if event is not None]
        assert {chunk["id"] for chunk in chunks} == {f"chatcmpl-{head.header('x-request-id')}"}
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    await gateway.idle()
    assert [line["tokens_out"] for line in gateway.lines("request")] == [tokens] * 8


# --- refusals ----------------------------------------------------------------------------------------------------


async def test_what_is_refused_changes_nothing(gateway: Gateway, engine: WatchedEngine) -> None:
    generated = await engine.generated()
    for what, fields, code in (
        ("steers the engine", {"priority": 1}, "field_not_allowed"),
        ("another's cache", {"cache_salt": "x"}, "field_not_allowed"),
        ("half a character", {"stop": ["\ud800"]}, None),
    ):
        answer = await gateway.ask(request(CHAT, **fields))
        assert (answer.status, error_of(answer)["code"]) == (400, code), what
    assert gateway.replica.pool.endpoints[0].connections.accepted == 0
    by_the_engine = {"temperature": -1, "top_p": 7, "logit_bias": "x", "response_format": {"type": "no-such-type"}}
    for name, value in by_the_engine.items():
        answer = await gateway.ask(request(CHAT, **{name: value}))
        assert (answer.status, error_of(answer)["type"]) == (400, "invalid_request_error"), name
        assert name in error_of(answer)["message"]
    await gateway.idle()
    assert await engine.generated() == generated
    assert (await gateway.ask(request(CHAT))).status == 200


async def test_too_long_a_prompt_is_said_before_any_stream(gateway: Gateway) -> None:
    long = "word " * 2500
    prompts: dict[str, dict[str, Any]] = {
        CHAT: {"messages": [{"role": "user", "content": long}]},
        "/v1/completions": {"prompt": long},
        "/v1/responses": {"input": long},
        "/v1/messages": {"messages": [{"role": "user", "content": long}]},
    }
    for path, prompt in prompts.items():
        answer = await gateway.ask(request(path, stream=True, **prompt), path)
        assert (answer.status, answer.header("content-type")) == (400, "application/json"), path
        assert error_of(answer)["type"] == "invalid_request_error"
        assert "maximum context length is 2048 tokens" in error_of(answer)["message"]
        assert path == "/v1/messages" or error_of(answer)["code"] == "context_length_exceeded"


async def test_a_key_s_context_is_exact_to_the_token(
    start_gateway: StartGateway, upstream_of_engine: Upstream, engine: WatchedEngine, patience: None
) -> None:
    """The engine's tokenizer counts: what just fits is served, one token more is not, and no limit means what fits."""
    room = 3
    counted = {
        CHAT: await engine.count({"messages": TURNS}),
        "/v1/completions": await engine.count({"prompt": QUESTION}),
        "/v1/responses": await engine.count({"messages": TURNS}),
        "/v1/messages": await engine.count({"messages": TURNS}),
    }
    keys = {path: f"fb-capped-{number}" for number, path in enumerate(counted)}
    gateway = await start_gateway(
        upstream_of_engine,
        keys=tuple(
            KeySettings(name=path, key=SecretStr(keys[path]), caps=Caps(context=count + room))
            for path, count in counted.items()
        ),
    )
    for path, count in counted.items():
        headers, limit = [("authorization", f"Bearer {keys[path]}")], RELAYED[path].token_fields[-1]
        fits = await gateway.ask(request(path, ignore_eos=True, **{limit: room}), path, headers)
        assert fits.status == 200, (path, fits.body)
        line = gateway.lines("request")[-1]
        assert (line["tokens_in"], line["tokens_out"]) == (count, room), path
        too_much = await gateway.ask(request(path, **{limit: room + 1}), path, headers)
        assert too_much.status == 400, path
        assert f"at most {count + room} tokens of context; the prompt has {count}" in error_of(too_much)["message"]
        unlimited = request(path, ignore_eos=True)
        del unlimited[limit]
        assert (await gateway.ask(unlimited, path, headers)).status == 200, path
        assert gateway.lines("request")[-1]["tokens_out"] == room, path


# --- the client leaves -------------------------------------------------------------------------------------------


def long_prompt() -> list[dict[str, str]]:
    """Return a prompt that takes an engine on the CPU a while to read, with nothing of it in its cache."""
    return [{"role": "user", "content": f"{uuid.uuid4().hex} " + "word " * 1700}]


async def while_it_writes_a_whole_answer(gateway: Gateway, engine: WatchedEngine, client: RawClient) -> None:
    """Not a byte has come back, not even a head."""
    client.post(CHAT, chat(**ENDLESS), AUTH)
    await engine.works()
    assert not client.received


async def while_it_reads_the_prompt(gateway: Gateway, engine: WatchedEngine, client: RawClient) -> None:
    """The engine has the request and is silent."""
    client.post(CHAT, chat(stream=True, messages=long_prompt(), ignore_eos=True, max_tokens=200), AUTH)
    connections = gateway.replica.pool.endpoints[0].connections
    await until(lambda: connections.open == 1, "the request was not sent on")
    [connection] = connections._all
    await until(
        lambda: (
            connection._transport is not None and unread_by_peer(connection._transport.get_extra_info("socket")) == 0
        ),
        "the engine does not read the request",
    )
    # Its front answers in turn: when this has come, it has taken the request too.
    await engine.working()
    assert not client.received


async def while_it_streams(gateway: Gateway, engine: WatchedEngine, client: RawClient) -> None:
    """Some tokens have come."""
    client.post(CHAT, chat(stream=True, **ENDLESS), AUTH)
    await client.head()
    for _ in range(5):
        assert await client.event()


Stage = Callable[[Gateway, WatchedEngine, RawClient], Awaitable[None]]
STAGES: tuple[Stage, ...] = (while_it_writes_a_whole_answer, while_it_reads_the_prompt, while_it_streams)


async def test_a_client_that_leaves_stops_the_engine(
    gateway: Gateway, engine: WatchedEngine, connect: Connect, measure: Measure
) -> None:
    """The request is settled and the engine's connection closed in one go; the engine itself stops soon after."""
    endpoint, loop = gateway.replica.pool.endpoints[0], asyncio.get_running_loop()
    for number, reach in enumerate(STAGES):
        what = reach.__name__.replace("_", " ")
        generated = await engine.generated()
        client = await connect(gateway.url)
        await reach(gateway, engine, client)
        left_at = loop.time()
        await client.close()
        await until(lambda: not gateway.replica.edge.active, "the request lives on")
        # No turn of the event loop lies between these and the end of the request.
        assert (endpoint.in_flight, endpoint.connections.open) == (0, 0), what
        if reach is while_it_reads_the_prompt:
            # vLLM counts a request once its prompt is read, so figures of before that would say that it does nothing.
            await engine.turns()
        await engine.stops()
        measure(f"vLLM stopped after the client left {what} ({gateway.face} face)", loop.time() - left_at)
        line = await gateway.line(index=number)
        assert (line["outcome"], line["status"]) == ("client_gone", 499), what
        assert bool(line.get("events")) is (reach is while_it_streams), what
        assert await engine.generated() - generated < 200, f"{what}: the engine wrote the whole answer"


async def test_a_client_that_leaves_after_the_end_mark_stops_nothing(
    gateway: Gateway, engine: WatchedEngine, connect: Connect
) -> None:
    """As SDKs do: the request went well, the engine is through, and its connection serves the next request."""
    client = await connect(gateway.url)
    client.post(CHAT, request(CHAT, stream=True), AUTH)
    await client.head()
    while await client.event() != DONE:
        continue
    await client.close()
    assert (await gateway.line())["outcome"] == "ok"
    await gateway.idle()
    assert await engine.working() == 0
    connections = gateway.replica.pool.endpoints[0].connections
    await until(lambda: all(connection.idle for connection in connections._all), "the engine's stream did not end")
    assert (await gateway.ask(request(CHAT))).status == 200
    assert connections.accepted == 1


# --- the engine dies ---------------------------------------------------------------------------------------------


async def test_an_engine_killed_mid_stream_is_an_error_event_and_then_503(
    start_gateway: StartGateway, vllm_engine: RealEngine, engine: WatchedEngine, connect: Connect, patience: None
) -> None:
    """The kernel closes a killed process's connections, which is all that a gateway sees of its death."""
    with forwarding(vllm_engine) as (url, process):
        gateway = await start_gateway(Upstream(url=url, models={MODEL: vllm_engine.model}))
        client = await connect(gateway.url)
        client.post(CHAT, chat(stream=True, **ENDLESS), AUTH)
        await client.head()
        first = await client.event()
        process.kill()
        process.wait()
        *_, last = [first, *await client.events()]
        assert last is not None
        assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "engine_failed"
        assert await client.ended() == "close"
        assert (await gateway.line())["outcome"] == "engine_failed"
        for path in (CHAT, "/v1/messages"):
            refused = await gateway.ask(request(path), path)
            assert refused.status == (529 if path == "/v1/messages" else 503)
            assert refused.header("retry-after") == "1"
        assert (await gateway.get("/health/ready", [("authorization", f"Bearer {KEY}")])).status == 503
        await gateway.idle()
    await engine.stops()
