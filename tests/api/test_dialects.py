"""Recorded exchanges with vLLM, played through the gateway: what the engine is asked, and every byte the client gets.

The client sends what was recorded, with the public name; the engine answers what was recorded. Nothing else may differ
but the model's name, the usage chunk that only the gateway asked for, and the engine's own keep-alives.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.api.peek import FORBIDDEN
from gateway.api.routes import RELAYED
from tests.support.gateway import ENGINE_MODEL, MODEL, Gateway, StartGateway, relayed, serving
from tests.support.recordings import Recording, all_recordings, load
from tests.support.script import play
from tests.support.table import each, named
from tests.support.upstream import ScriptedUpstream

ANSWERED = [r for r in all_recordings("vllm") if r.status == 200 and r.method == "POST" and r.path in RELAYED]
SERVED = [r for r in ANSWERED if not FORBIDDEN.intersection(r.request_json()) and "model" in r.request_json()]
STREAMS_WITH_USAGE = ["chat_stream_usage", "chat_stream_continuous_usage", "comp_stream_usage", "s2_stream_reqid"]


def renamed(body: bytes, engine_model: str, public: str = MODEL) -> bytes:
    """Return an answer with the public name (no recorded text holds the needle), without the engine's keep-alives."""
    body = body.replace(b": keep-alive\n\n", b"")
    return body.replace(b'"model":"%b"' % engine_model.encode(), b'"model":"%b"' % public.encode())


def without_usage_chunk(body: bytes) -> bytes:
    """Return a stream without its chunk of usage and no choices."""
    events = [event for event in body.split(b"\n\n") if event]
    kept = [event for event in events if b'"choices":[]' not in event]
    assert len(kept) == len(events) - 1, "the recording has exactly one usage chunk"
    return b"".join(event + b"\n\n" for event in kept)


def asks_for_usage(request: dict[str, Any]) -> bool:
    return bool((request.get("stream_options") or {}).get("include_usage"))


def as_asked_of_the_engine(request: dict[str, Any], recording: Recording) -> dict[str, Any]:
    """Return the body the engine should get: its own name of the model, and usage asked of OpenAI's streams."""
    body = {**request, "model": recording.request_json()["model"]}
    if request.get("stream") and recording.path in ("/v1/chat/completions", "/v1/completions"):
        body["stream_options"] = {**(request.get("stream_options") or {}), "include_usage": True}
    return body


async def exchange(
    start: StartGateway, upstream: ScriptedUpstream, recording: Recording, request: dict[str, Any]
) -> tuple[Gateway, Any]:
    """Play one exchange and return the gateway and the client's answer."""
    engine_model = recording.request_json()["model"]
    upstream.always(play(recording), path=recording.path)
    gateway = await start(serving(upstream, models={MODEL: engine_model}))
    return gateway, await gateway.ask(request, recording.path)


def test_every_relayed_path_has_a_recording() -> None:
    """A row stands in the table only when real vLLM was recorded on it, streamed too where the row says that it is."""
    assert {recording.path for recording in SERVED} == set(RELAYED)
    streamed = {recording.path for recording in SERVED if recording.is_stream}
    assert streamed == {path for path, route in RELAYED.items() if route.streams}


async def test_what_was_recorded_comes_through_byte_for_byte(
    start_gateway: StartGateway, upstream: ScriptedUpstream
) -> None:
    """The engine gets the recorded request, the client the recorded answer under the name it used."""
    names = {engine: f"public/{engine}" for engine in sorted({r.request_json()["model"] for r in SERVED})}
    gateway = await start_gateway(serving(upstream, models={public: engine for engine, public in names.items()}))
    for index, recording in enumerate(SERVED):
        with named(recording=recording):
            engine_model = recording.request_json()["model"]
            request = {**recording.request_json(), "model": names[engine_model]}
            upstream.always(play(recording), path=recording.path)
            answer = await gateway.ask(request, recording.path)
            assert answer.status == 200
            assert answer.complete
            assert answer.body == renamed(recording.body, engine_model, names[engine_model])
            assert relayed(upstream)[index].target == recording.path
            assert relayed(upstream)[index].json() == as_asked_of_the_engine(request, recording)
            kind = "text/event-stream; charset=utf-8" if recording.is_stream else "application/json"
            assert answer.header("content-type") == kind
            line = await gateway.line(index=index)
            assert (line["outcome"], line["model"], line["path"]) == ("ok", request["model"], recording.path)
            await gateway.idle()


@pytest.mark.parametrize("name", STREAMS_WITH_USAGE)
async def test_usage_nobody_asked_for_is_counted_and_hidden(
    start_gateway: StartGateway, upstream: ScriptedUpstream, name: str
) -> None:
    """The chunk that only the gateway wanted is left out, and its figures are in the log."""
    recording = load("vllm", name)
    request = {key: value for key, value in recording.request_json().items() if key != "stream_options"}
    request["model"] = MODEL
    gateway, answer = await exchange(start_gateway, upstream, recording, request)
    assert answer.body == without_usage_chunk(renamed(recording.body, ENGINE_MODEL))
    assert relayed(upstream)[0].json()["stream_options"] == {"include_usage": True}
    usage = json.loads(recording.events()[-2].removeprefix(b"data: "))["usage"]
    line = await gateway.line()
    assert (line["tokens_in"], line["tokens_out"]) == (usage["prompt_tokens"], usage["completion_tokens"])


@pytest.mark.parametrize(
    "options",
    [{"include_usage": False}, {}, None, {"continuous_usage_stats": True}],
    ids=["false", "{}", "null", "other"],
)
async def test_usage_is_hidden_however_the_client_leaves_it_out(
    start_gateway: StartGateway, upstream: ScriptedUpstream, options: dict[str, Any] | None
) -> None:
    """Every way of not asking is the same, and the client's other stream options reach the engine."""
    recording = load("vllm", "chat_stream_usage")
    request = {**recording.request_json(), "model": MODEL, "stream_options": options}
    _, answer = await exchange(start_gateway, upstream, recording, request)
    assert answer.body == without_usage_chunk(renamed(recording.body, ENGINE_MODEL))
    assert relayed(upstream)[0].json()["stream_options"] == {**(options or {}), "include_usage": True}


async def test_usage_the_client_asked_for_is_not_hidden(
    start_gateway: StartGateway, upstream: ScriptedUpstream
) -> None:
    """With include_usage the last chunk before the end mark has no choices and the usage."""
    recording = load("vllm", "chat_stream_usage")
    _, answer = await exchange(start_gateway, upstream, recording, {**recording.request_json(), "model": MODEL})
    last = json.loads(answer.events()[-2].removeprefix(b"data: "))
    assert (last["choices"], last["usage"]["prompt_tokens"], last["model"]) == ([], 37, MODEL)


@pytest.mark.parametrize("name", ["messages", "messages_stream", "responses", "responses_stream", "chat_basic"])
async def test_usage_of_every_dialect_is_found(
    start_gateway: StartGateway, upstream: ScriptedUpstream, name: str
) -> None:
    """Wherever a dialect puts its usage, the log has it."""
    recording = load("vllm", name)
    gateway, _ = await exchange(start_gateway, upstream, recording, {**recording.request_json(), "model": MODEL})
    line = await gateway.line()
    assert line["tokens_in"] == 37
    assert line["tokens_out"] == (4 if recording.is_stream else 8)


async def test_the_first_event_of_a_full_queue_is_no_answer(
    start_gateway: StartGateway, upstream: ScriptedUpstream
) -> None:
    """SGLang reports a full queue as a stream of status 200: the status is not committed by it."""
    recording = load("sglang", "q_full_stream")
    gateway, answer = await exchange(start_gateway, upstream, recording, {**recording.request_json(), "model": MODEL})
    assert answer.status == 503
    assert answer.json()["error"]["code"] == "server_is_overloaded"
    assert answer.json()["error"]["message"] == "The request queue is full."
    assert answer.header("retry-after") == "1"
    assert (await gateway.line())["outcome"] == "busy"


@each("recording", [r for r in ANSWERED if r not in SERVED])
async def test_what_a_client_may_not_send_never_reaches_an_engine(
    gateway: Gateway, upstream: ScriptedUpstream, recording: Recording
) -> None:
    """vLLM answered these: a request without a model, and ones that set the scheduler's priority."""
    request = recording.request_json()
    if "model" in request:
        request["model"] = MODEL
    answer = await gateway.ask(request, recording.path)
    assert answer.status == 400
    assert answer.json()["error"]["param"] == ("priority" if "model" in request else "model")
    assert relayed(upstream) == []
