"""A stream that broke off goes on at a real vLLM, which says after the seam what it says when it is asked to go on."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from gateway.settings import Upstream
from tests.support.gateway import CHAT, MODEL, StartGateway, serving
from tests.support.real_engine import RealEngine
from tests.support.script import Do, Script, event_stream
from tests.support.upstream import ScriptedUpstream, SeenRequest

pytestmark = pytest.mark.real_engine

COMPLETIONS = "/v1/completions"
QUESTION = "Tell me about the city of Paris."
BEGUN = {
    CHAT: ["Paris", " is", " the", " capital", " of"],
    COMPLETIONS: [" Paris", " is", " the", " capital", " of"],
}
"""A token each."""
LIMIT = 20
ASKED: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": QUESTION}]},
    COMPLETIONS: {"prompt": "The city of lights.", "ignore_eos": True},
}


def begins(request: SeenRequest, words: list[str]) -> Script:
    """Say these words, each in a chunk, and break off."""
    chatty = "messages" in request.json()
    choices: list[dict[str, Any]] = [{"delta": {"role": "assistant", "content": ""}}] if chatty else []
    choices += [{"delta": {"content": word}} if chatty else {"text": word} for word in words]
    named = {"id": "begun-elsewhere", "created": 1, "model": request.json()["model"]}
    events = [{**named, "choices": [{"index": 0, **choice, "finish_reason": None}]} for choice in choices]
    script = event_stream([b"data: " + json.dumps(event).encode() + b"\n\n" for event in events])
    return script.do(Do.UNTIL_READ, script.before_last_chunk).do(Do.RESET, script.before_last_chunk)


def going_on(path: str, words: list[str]) -> dict[str, Any]:
    """Return the request for what follows these words, as any client may send it."""
    begun, asked = "".join(words), {**ASKED[path], "max_tokens": LIMIT - len(words)}
    if path == COMPLETIONS:
        return {**asked, "prompt": asked["prompt"] + begun}
    turns = [*asked["messages"], {"role": "assistant", "content": begun}]
    return {**asked, "messages": turns, "continue_final_message": True, "add_generation_prompt": False}


def told(engine: RealEngine, path: str, body: dict[str, Any]) -> Any:
    with engine.client() as client:
        answer = client.post(path, json={"model": engine.model, "temperature": 0, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize("path", ASKED)
async def test_what_follows_the_seam_is_what_the_engine_says_itself(
    start_gateway: StartGateway, upstream: ScriptedUpstream, vllm_engine: RealEngine, patience: None, path: str
) -> None:
    """At three places; and the usage is that of one answer to the request as it was sent."""
    real = Upstream(url=vllm_engine.url, models={MODEL: vllm_engine.model})
    gateway = await start_gateway(serving(upstream), real)
    plain = await asyncio.to_thread(told, vllm_engine, path, {**ASKED[path], "max_tokens": 1})
    second = gateway.replica.pool.endpoints[1]
    for index, cut in enumerate((1, 3, 5)):
        words = BEGUN[path][:cut]

        def respond(request: SeenRequest, words: list[str] = words) -> Script:
            second.holds.discard("test")
            return begins(request, words)

        upstream.queue(respond, path=path)
        second.holds.add("test")
        options = {"stream": True, "stream_options": {"include_usage": True}}
        body = {"model": MODEL, "temperature": 0, **ASKED[path], "max_tokens": LIMIT, **options}
        *events, done = (await gateway.ask(body, path)).events()
        assert done == b"data: [DONE]\n\n"
        chunks = [json.loads(event.removeprefix(b"data: ")) for event in events]
        assert {(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks} == {("begun-elsewhere", 1, MODEL)}
        choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
        text = "".join(one["text"] if "text" in one else one["delta"].get("content") or "" for one in choices)
        itself = await asyncio.to_thread(told, vllm_engine, path, going_on(path, words))
        rest = itself["choices"][0]
        assert text == "".join(words) + (rest["text"] if "text" in rest else rest["message"]["content"])
        assert choices[-1]["finish_reason"] == rest["finish_reason"]
        usage = chunks[-1]["usage"]
        assert usage["prompt_tokens"] == plain["usage"]["prompt_tokens"]
        assert usage["completion_tokens"] == cut + itself["usage"]["completion_tokens"]
        assert (await gateway.line(index=index))["resumed"] == 1
