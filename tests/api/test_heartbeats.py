"""Comments that keep a waiting stream's connection alive, and what they commit the gateway to."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from gateway.settings import Stream, Timeouts
from tests.conftest import Connect
from tests.support.client import RawClient
from tests.support.gateway import AUTH, CHAT, Gateway, StartGateway, chat, relayed
from tests.support.journal import Journal
from tests.support.recordings import load
from tests.support.script import DONE, Do, Gate, Script, event_stream, json_answer, nothing, play
from tests.support.upstream import ScriptedUpstream, SeenRequest

HEARTBEAT = b": keep-alive\n\n"
EVENTS = [event.replace(b'"smollm2"', b'"public/model"') for event in load("vllm", "chat_stream").events()]


async def waiting(
    gateway: Gateway, upstream: ScriptedUpstream, connect: Connect, script: Script, path: str = CHAT
) -> tuple[RawClient, Gate]:
    """Ask for a stream whose engine stands at a gate before its first byte."""
    gate = Gate()
    upstream.always(replace(script, actions=((0, gate), *script.actions)), path=path)
    client = await connect(gateway.url)
    client.post(path, chat(stream=True), AUTH)
    await upstream.saw("gate")
    return client, gate


def error_of(event: bytes | None) -> dict[str, Any]:
    assert event is not None
    error: dict[str, Any] = json.loads(event.removeprefix(b"data: "))["error"]
    return error


async def test_none_comes_before_its_time(gateway: Gateway, upstream: ScriptedUpstream, connect: Connect) -> None:
    """An engine that answers within ``heartbeat_after`` is not preceded by a comment."""
    client, gate = await waiting(gateway, upstream, connect, play(load("vllm", "chat_stream")))
    gateway.advance(14.9)
    gate.open()
    assert (await client.response()).events() == EVENTS


async def test_a_silent_prefill_is_bridged(gateway: Gateway, upstream: ScriptedUpstream, connect: Connect) -> None:
    """The status goes out with the first comment, one comes for each ``heartbeat_after``, then the stream as it is."""
    client, gate = await waiting(gateway, upstream, connect, play(load("vllm", "chat_stream")))
    for _ in range(3):
        gateway.advance(15)
    head = await client.head()
    assert (head.status, head.header("content-type")) == (200, "text/event-stream; charset=utf-8")
    assert [await client.event() for _ in range(3)] == [HEARTBEAT] * 3
    gate.open()
    assert await client.events() == EVENTS
    line = await gateway.line()
    assert (line["outcome"], line["ttft_ms"]) == ("ok", 45_000.0)


async def test_a_pause_in_the_middle_is_bridged(gateway: Gateway, upstream: ScriptedUpstream, connect: Connect) -> None:
    """Also after the first event a comment comes, counted from the last thing that was written."""
    gate = Gate()
    script = event_stream(load("vllm", "chat_stream").events())
    upstream.always(script.do(gate, script.after_frame(1)), path=CHAT)
    client = await connect(gateway.url)
    client.post(CHAT, chat(stream=True), AUTH)
    await client.head()
    assert [await client.event() for _ in range(2)] == EVENTS[:2]
    gateway.advance(14)
    gateway.advance(1)
    assert await client.event() == HEARTBEAT
    gate.open()
    assert await client.events() == EVENTS[2:]


async def test_they_can_be_switched_off(
    start_gateway: StartGateway, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """With 0 the status stays open until the engine says something."""
    gateway = await start_gateway(upstream, stream=Stream(heartbeat_after=0))
    client, gate = await waiting(gateway, upstream, connect, play(load("vllm", "err_temperature_neg")))
    gateway.advance(500)
    gate.open()
    assert (await client.response()).status == 400


async def test_an_answer_that_is_no_stream_gets_none(
    gateway: Gateway, upstream: ScriptedUpstream, connect: Connect
) -> None:
    gate = Gate()
    upstream.always(play(load("vllm", "chat_basic")).do(gate, 0), path=CHAT)
    client = await connect(gateway.url)
    client.post(CHAT, chat(), AUTH)
    await upstream.saw("gate")
    gateway.advance(500)
    gate.open()
    answer = await client.response()
    assert (answer.status, answer.json()["object"]) == (200, "chat.completion")


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
async def test_every_dialect_is_bridged_by_a_comment(
    gateway: Gateway, upstream: ScriptedUpstream, connect: Connect, path: str
) -> None:
    """A comment is no event in any dialect: it has no type and no sequence number."""
    recording = load("vllm", f"{path[4:]}_stream")
    client, gate = await waiting(gateway, upstream, connect, play(recording), path)
    gateway.advance(15)
    gate.open()
    events = (await client.response()).events()
    assert events[0] == HEARTBEAT
    assert events[1:] == [event.replace(b'"smollm2"', b'"public/model"') for event in recording.events()]


@pytest.mark.parametrize(
    ("script", "kind", "code"),
    [
        (nothing().do(Do.CLOSE), "server_error", "engine_failed"),
        (play(load("vllm", "err_temperature_neg")), "invalid_request_error", None),
        (play(load("vllm", "err_prompt_too_long")), "invalid_request_error", "context_length_exceeded"),
        (play(load("vllm", "s2_over_4")), "service_unavailable_error", "server_is_overloaded"),
        (play(load("vllm", "auth_wrong")), "server_error", "engine_failed"),
        (play(load("sglang", "q_full_stream")), "service_unavailable_error", "server_is_overloaded"),
        (play(load("vllm", "chat_basic")), "server_error", "engine_failed"),
    ],
    ids=["died", "refused", "too long", "busy", "key", "busy in 200", "not streamed"],
)
async def test_a_failure_after_one_is_an_error_event(
    gateway: Gateway, upstream: ScriptedUpstream, connect: Connect, script: Script, kind: str, code: str | None
) -> None:
    """The status is spent: what goes wrong now, even with an HTTP status of its own, can only be told as an event."""
    client, gate = await waiting(gateway, upstream, connect, script)
    gateway.advance(15)
    gate.open()
    assert (await client.head()).status == 200
    assert await client.event() == HEARTBEAT
    error = error_of(await client.event())
    assert (error["type"], error["code"]) == (kind, code)
    assert await client.events() == []
    assert await client.ended() == "close"
    await gateway.idle()


async def test_another_engine_may_still_be_asked_after_one(
    start_gateway: StartGateway, upstream: ScriptedUpstream, connect: Connect, journal: Journal
) -> None:
    """A comment is not an answer: until the first data event a retry is invisible."""
    async with ScriptedUpstream(journal=journal, name="other") as other:
        gateway = await start_gateway(upstream, other)
        gate = Gate()
        asked: list[SeenRequest] = []

        def answer(request: SeenRequest) -> Script:
            asked.append(request)
            return play(load("vllm", "s2_over_4")).do(gate, 0) if len(asked) == 1 else play(load("vllm", "chat_stream"))

        upstream.always(answer, path=CHAT)
        other.always(answer, path=CHAT)
        client = await connect(gateway.url)
        client.post(CHAT, chat(stream=True), AUTH)
        await journal.saw("gate")
        gateway.advance(15)
        gate.open()
        assert (await client.response()).events() == [HEARTBEAT, *EVENTS]
        assert (len(relayed(upstream)), len(relayed(other))) == (1, 1)
        line = await gateway.line()
        assert (line["outcome"], line["attempts"]) == ("ok", 2)


async def test_no_other_engine_is_asked_after_the_first_event(
    start_gateway: StartGateway, upstream: ScriptedUpstream, journal: Journal
) -> None:
    """Its beginning is with the client, and with a seed the rest of another engine's answer would not fit."""
    async with ScriptedUpstream(journal=journal, name="other") as other:
        gateway = await start_gateway(upstream, other)
        for one in (upstream, other):
            script = event_stream(load("vllm", "chat_stream").events())
            one.always(script.do(Do.CLOSE, script.after_frame(0)), path=CHAT)
        answer = await gateway.ask(chat(stream=True, seed=1))
        assert answer.events()[0] == EVENTS[0]
        assert error_of(answer.events()[1])["code"] == "engine_failed"
        assert len(relayed(upstream)) + len(relayed(other)) == 1


async def test_an_engines_own_comments_commit_nothing(gateway: Gateway, upstream: ScriptedUpstream) -> None:
    """vLLM keeps its connections alive with comments of its own: they end here, and the status stays open."""
    script = event_stream([HEARTBEAT, b": 2\n\n", b"data: "])
    upstream.queue(script.do(Do.CLOSE, script.after_frame(1)), path=CHAT)
    answer = await gateway.ask(chat(stream=True))
    assert (answer.status, answer.json()["error"]["code"]) == (502, "engine_failed")
    upstream.queue(event_stream([HEARTBEAT, b'data: {"error":{"message":"full","code":503}}\n\n', DONE]), path=CHAT)
    answer = await gateway.ask(chat(stream=True))
    assert (answer.status, answer.json()["error"]["code"]) == (503, "server_is_overloaded")


async def test_a_silent_engine_is_given_up_with_an_event(
    start_gateway: StartGateway, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """The time-out for the first byte runs on while comments keep the client's connection alive."""
    gateway = await start_gateway(upstream, timeouts=Timeouts(first_byte=40))
    client, _ = await waiting(gateway, upstream, connect, nothing().do(Do.HANG))
    for _ in range(4):
        gateway.advance(10)
    answer = await client.response()
    assert answer.events()[:-1] == [HEARTBEAT]
    assert error_of(answer.events()[-1])["code"] == "engine_timeout"
    await upstream.saw("closed", request=1)
    assert await client.ended() == "close"


async def test_a_late_json_error_needs_no_event_before_the_first_comment(
    start_gateway: StartGateway, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """Without a comment the same time-out is an honest 504."""
    gateway = await start_gateway(upstream, timeouts=Timeouts(first_byte=10))
    client, _ = await waiting(gateway, upstream, connect, nothing().do(Do.HANG))
    gateway.advance(10)
    answer = await client.response()
    assert (answer.status, answer.json()["error"]["code"]) == (504, "engine_timeout")
    assert (await gateway.line())["outcome"] == "engine_slow"


async def test_a_stream_that_came_as_json_is_an_error_without_a_comment_too(
    gateway: Gateway, upstream: ScriptedUpstream
) -> None:
    """An engine that does not stream although it was asked to: its answer is passed on while the status is open."""
    upstream.always(json_answer(load("vllm", "chat_basic").body), path=CHAT)
    answer = await gateway.ask(chat(stream=True))
    assert (answer.status, answer.header("content-type")) == (200, "application/json")
