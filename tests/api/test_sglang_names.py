"""In front of SGLang, which answers from its base model under any name it does not know, a name means one thing.

The engine is a script that lists the models of a recording: base ``smollm2``, adapter ``a``.
"""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import SecretStr

from gateway.settings import KeySettings, Upstream
from tests.support.gateway import CHAT, KEY, MODEL, Gateway, StartGateway, chat, relayed
from tests.support.recordings import load
from tests.support.script import Do, Script, play
from tests.support.upstream import ScriptedUpstream

NOTHING = Script(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")


def sglang(upstream: ScriptedUpstream, models: dict[str, str] | None = None) -> Upstream:
    upstream.always(NOTHING, path="/ready")
    upstream.always(play(load("sglang", "models")), path="/v1/models")
    upstream.always(play(load("sglang", "chat_nonstream")), path=CHAT)
    return Upstream(url=upstream.url, engine="sglang", models=models)


def error_code(answer: Any) -> str:
    code: str = answer.json()["error"]["code"]
    return code


async def asked_for(gateway: Gateway, upstream: ScriptedUpstream, model: str) -> dict[str, Any]:
    answer = await gateway.ask(chat(model=model))
    assert (answer.status, answer.json()["model"]) == (200, model)
    body: dict[str, Any] = relayed(upstream)[-1].json()
    return {name: value for name, value in body.items() if name != "messages"}


async def test_names_that_it_lists(start_gateway: StartGateway, upstream: ScriptedUpstream) -> None:
    gateway = await start_gateway(sglang(upstream))
    assert await asked_for(gateway, upstream, "smollm2") == {"model": "smollm2"}
    assert await asked_for(gateway, upstream, "a") == {"model": "smollm2", "lora_path": "a"}
    sent = len(relayed(upstream))
    for unknown in ("no-such-model", "smollm2:a", "smollm2:b"):
        answer = await gateway.ask(chat(model=unknown))
        assert (answer.status, error_code(answer)) == (404, "model_not_found")
    answer = await gateway.ask(chat(model="smollm2", lora_path="a"))
    assert (answer.status, error_code(answer)) == (400, "field_not_allowed")
    assert len(relayed(upstream)) == sent


@pytest.mark.parametrize(
    ("own", "sent"),
    [
        ("smollm2", {"model": "smollm2"}),
        ("a", {"model": "smollm2", "lora_path": "a"}),
        ("smollm2:a", {"model": "smollm2", "lora_path": "a"}),
    ],
)
async def test_names_that_the_configuration_gives(
    start_gateway: StartGateway, upstream: ScriptedUpstream, own: str, sent: dict[str, str]
) -> None:
    """An adapter may be written with its base or alone, and never reaches the engine as a model."""
    gateway = await start_gateway(sglang(upstream, {MODEL: own}))
    assert await asked_for(gateway, upstream, MODEL) == sent
    assert (await gateway.ask(chat(model="smollm2"))).status == 404


async def test_a_name_that_it_does_not_list_reaches_it_never(
    start_gateway: StartGateway, upstream: ScriptedUpstream
) -> None:
    gateway = await start_gateway(sglang(upstream, {MODEL: "gone", "other": "smollm2:gone", "here": "smollm2"}))
    for lost in (MODEL, "other"):
        answer = await gateway.ask(chat(model=lost))
        assert (answer.status, error_code(answer)) == (503, "server_is_overloaded")
    assert relayed(upstream) == []
    assert (await gateway.ask(chat(model="here"))).status == 200
    assert gateway.lines("models_missing")[0]["models"] == ["other", MODEL]


async def test_a_path_on_which_it_knows_no_adapters_is_not_tried_for_one(
    start_gateway: StartGateway, upstream: ScriptedUpstream
) -> None:
    """Its Responses API takes the name and answers from the base model."""
    gateway = await start_gateway(sglang(upstream))
    answer = await gateway.ask({"model": "a", "input": "Hi"}, "/v1/responses")
    assert (answer.status, error_code(answer)) == (400, "unsupported_operation")
    assert answer.json()["error"]["message"] == "No engine that serves 'a' offers /v1/responses."
    assert relayed(upstream) == []
    upstream.always(play(load("sglang", "messages")), path="/v1/messages")
    body = {"model": "a", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
    assert (await gateway.ask(body, "/v1/messages")).status == 200
    assert relayed(upstream)[-1].json()["model"] == "smollm2:a"


async def test_a_path_on_which_it_knows_no_salt_is_not_tried_for_a_trust_domain(
    start_gateway: StartGateway, upstream: ScriptedUpstream
) -> None:
    """What one team asked could be told from how soon another's answer comes."""
    keys = (KeySettings(name="apart", key=SecretStr(KEY), trust_domain="team a"),)
    gateway = await start_gateway(sglang(upstream), keys=keys)
    body = {"model": "smollm2", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
    answer = await gateway.ask(body, "/v1/messages")
    assert (answer.status, answer.json()["error"]["type"]) == (400, "invalid_request_error")
    assert relayed(upstream) == []
    assert await asked_for(gateway, upstream, "smollm2") == {"model": "smollm2", "cache_salt": "team a"}


async def test_before_it_has_said_what_it_serves_it_is_asked_nothing(
    start_gateway: StartGateway, upstream: ScriptedUpstream
) -> None:
    configured = sglang(upstream, {MODEL: "smollm2"})
    upstream.always(Script(b"HTTP/1.1 503 Loading\r\ncontent-length: 0\r\n\r\n"), path="/ready")
    gateway = await start_gateway(configured)
    assert (await gateway.ask(chat())).status == 503
    upstream.always(NOTHING, path="/ready")
    [endpoint] = gateway.replica.pool.endpoints
    await gateway.replica.watcher.look(endpoint)
    assert (await gateway.ask(chat())).status == 200


@pytest.mark.parametrize(
    ("path", "full", "good"),
    [
        (CHAT, "sglang/q_full_stream", "sglang/chat_stream_usage"),
        ("/v1/messages", "sglang/q_full_messages_stream", "vllm/messages_stream"),
        ("/v1/responses", "sglang/q_full_responses_stream", "vllm/responses_stream"),
    ],
)
async def test_an_answer_that_was_only_announced_is_given_elsewhere(
    start_gateway: StartGateway, upstream: ScriptedUpstream, path: str, full: str, good: str
) -> None:
    """SGLang announces an answer before it finds its queue full; nothing of that reaches the client."""
    recording = load(*full.split("/"))
    # One event a read, as SGLang writes them.
    script = play(recording, pieces=recording.events())
    for frame in range(len(recording.events())):
        script = script.do(Do.UNTIL_READ, script.after_frame(frame))
    async with ScriptedUpstream() as second:
        gateway = await start_gateway(sglang(upstream), sglang(second))
        upstream.always(script, path=path)
        second.always(play(load(*good.split("/"))), path=path)
        body = {"model": "smollm2", "stream": True, "messages": [{"role": "user", "content": "Hi"}], "input": "Hi"}
        for _ in range(2):
            answer = await gateway.ask(body, path)
            assert (answer.status, answer.complete) == (200, True)
            assert b"queue is full" not in answer.body
        assert (len(relayed(upstream)), len(relayed(second))) == (1, 2)
        second.always(script, path=path)
        answer = await gateway.ask(body, path)
        assert (answer.status, answer.header("retry-after")) == (529 if path == "/v1/messages" else 503, "1")
        assert answer.json()["error"]["message"] == "The request queue is full."
