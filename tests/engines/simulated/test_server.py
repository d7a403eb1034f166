"""The simulated engine over sockets: what it says, who it says it is, adapters, aborts and faults."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from engines.registry import ENGINES
from engines.simulation.speech import read_identity
from engines.vllm import Vllm
from tests.engines.simulated.conftest import RunningEngine, Start, make_adapter
from tests.support.sockets import free_port

if TYPE_CHECKING:
    import openai

ASK: dict[str, Any] = {"model": "smollm2", "messages": [{"role": "user", "content": "Tell me a story"}]}
CHAT = "/v1/chat/completions"
PATIENCE = 5.0


async def say(engine: RunningEngine, **fields: Any) -> dict[str, Any]:
    answer = await engine.client.post(CHAT, json={**ASK, **fields})
    assert answer.status_code == 200, answer.text
    whole: dict[str, Any] = answer.json()
    return whole


def text_of(answer: dict[str, Any]) -> str:
    return str(answer["choices"][0]["message"]["content"])


async def streamed(engine: RunningEngine, **fields: Any) -> list[dict[str, Any]]:
    answer = await engine.client.post(CHAT, json={**ASK, "stream": True, **fields})
    assert answer.text.endswith("data: [DONE]\n\n")
    return [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]


def told(chunks: list[dict[str, Any]]) -> str:
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


@pytest.fixture
async def client(start: Start) -> AsyncIterator[openai.AsyncOpenAI]:
    engine = await start()
    import openai

    async with openai.AsyncOpenAI(base_url=f"{engine.url}/v1", api_key="none", max_retries=0) as made:
        yield made


async def test_the_official_client_reads_it(client: openai.AsyncOpenAI) -> None:
    """Whole, streamed with usage, two choices, log-probabilities, a forced tool, a schema."""
    whole = await client.chat.completions.create(**ASK, max_tokens=40, n=2, logprobs=True, top_logprobs=2)
    assert [read_identity(choice.message.content or "") is not None for choice in whole.choices] == [True, True]
    assert whole.choices[0].message.content != whole.choices[1].message.content
    assert whole.choices[0].logprobs is not None
    assert len(whole.choices[0].logprobs.content or ()) == 40
    stream = await client.chat.completions.create(
        **ASK, max_tokens=40, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 40
    models = await client.models.list()
    assert [model.id for model in models.data] == ["smollm2"]


async def test_an_answer_tells_who_gave_it(start: Start, tmp_path: Path) -> None:
    """Model, adapter, version of its files and prompt; other files under the same name are another version."""
    engine = await start()
    versions = []
    for text in ("one", "two"):
        folder = make_adapter(tmp_path / text, text)
        call = {"lora_name": "support@1", "lora_path": str(folder), "load_inplace": True}
        assert (await engine.client.post("/v1/load_lora_adapter", json=call)).status_code == 200
        identity = read_identity(text_of(await say(engine, model="support@1")))
        assert identity is not None
        assert (identity.model, identity.adapter) == ("smollm2", "support@1")
        versions.append((identity.version, identity.prompt))
    assert versions[0][0] != versions[1][0]
    base = read_identity(text_of(await say(engine)))
    assert base is not None
    assert (base.adapter, base.version, base.prompt) == (None, None, versions[0][1])


async def test_a_stream_is_what_the_whole_answer_is_whatever_ends_it(start: Start) -> None:
    """Length, the natural end, and a stop string in the middle of a token."""
    engine = await start()
    natural = text_of(await say(engine))
    ends: list[dict[str, Any]] = [{}, {"max_tokens": 7}, {"stop": [natural[101:104]]}, {"stop": [natural[60:64], "zz"]}]
    for fields in ends:
        whole = await say(engine, **fields)
        chunks = await streamed(engine, **fields)
        assert told(chunks) == text_of(whole)
        last = chunks[-1]["choices"][0]
        assert (last["finish_reason"], last["stop_reason"]) == (
            whole["choices"][0]["finish_reason"],
            whole["choices"][0]["stop_reason"],
        )
    assert text_of(await say(engine, stop=[natural[101:104]])) == natural[: natural.find(natural[101:104])]


@pytest.mark.parametrize("cut", [3, 40, 111, 150])
async def test_a_continuation_is_what_would_have_come(start: Start, cut: int) -> None:
    """Asked to go on from a text it said itself, wherever it was cut, it says the rest: as a chat and as a completion
    of the rendered chat."""
    engine, other = await start(), await start()
    whole = text_of(await say(engine))
    begun = whole[:cut]
    going_on = {
        "messages": [*ASK["messages"], {"role": "assistant", "content": begun}],
        "continue_final_message": True,
        "add_generation_prompt": False,
    }
    assert begun + text_of(await say(other, **going_on)) == whole
    rendered = f"<|im_start|>user\n{ASK['messages'][0]['content']}<|im_end|>\n<|im_start|>assistant\n{begun}"
    answer = await other.client.post("/v1/completions", json={"prompt": rendered, "max_tokens": 1000})
    assert begun + answer.json()["choices"][0]["text"] == whole


async def test_a_prefix_is_cached_per_salt(start: Start) -> None:
    """The same prompt is found cached, another salt's is not; usage tells."""
    engine = await start("--enable-prompt-tokens-details")
    long = [{"role": "user", "content": "lorem ipsum " * 100}]
    cached = []
    for salt in ("a", "a", "b"):
        answer = await say(engine, messages=long, max_tokens=2, cache_salt=salt)
        cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert cached[0] == cached[2] == 0
    assert cached[1] > 100
    load = Vllm().read_load((await engine.client.get("/metrics")).content)
    assert load is not None
    assert (load.running, load.waiting, load.cache_used) == (0, 0, 0.0)


async def test_a_client_that_leaves_frees_the_engine(start: Start) -> None:
    """At once, streaming or not."""
    engine = await start("--profile", "h100-8b")
    for stream in (True, False):
        task = asyncio.ensure_future(
            engine.client.post(CHAT, json={**ASK, "max_tokens": 1500, "ignore_eos": True, "stream": stream})
        )
        await until(lambda: engine.under_way == 1)
        task.cancel()
        await until(lambda: engine.under_way == 0)
        assert engine.server.driver.model.cache.used == 0


async def until(condition: Any) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.001)


async def test_it_keeps_the_pace_of_its_profile(start: Start) -> None:
    """A token's time is its model time divided by the speed."""
    engine = await start("--profile", "h100-8b", "--speed", "20")
    loop = asyncio.get_running_loop()
    began = loop.time()
    await say(engine, max_tokens=200, ignore_eos=True)
    took = loop.time() - began
    assert took >= 200 * 0.0069 / 20


async def test_an_abort_ends_the_stream_as_vllm_does(start: Start) -> None:
    engine = await start("--profile", "h100-8b", "--dev")
    fields = {**ASK, "stream": True, "max_tokens": 1500, "ignore_eos": True}
    async with engine.client.stream("POST", CHAT, json=fields, headers={"x-request-id": "kill-me"}) as answer:
        lines = answer.aiter_lines()
        while "content" not in await anext(lines):
            pass
        told_back = await engine.client.post("/abort_requests", json={"request_ids": ["chatcmpl-kill-me"]})
        assert told_back.json() == {"status": "aborted", "aborted": 1}
        rest = [line async for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert '"finish_reason":"abort"' in rest[-2]
    assert engine.under_way == 0


FAULTS: list[tuple[dict[str, Any], Any]] = [
    ({"kind": "reset", "after_tokens": 0}, httpx.ReadError),
    ({"kind": "reset", "after_tokens": 3}, httpx.ReadError),
    ({"kind": "close", "after_tokens": 3}, httpx.RemoteProtocolError),
    ({"kind": "hang", "after_tokens": 3}, httpx.ReadTimeout),
]


@pytest.mark.parametrize(("fault", "error"), FAULTS, ids=str)
async def test_connections_break_on_demand(start: Start, fault: dict[str, Any], error: type[Exception]) -> None:
    """After exactly so many tokens, for one request, and nothing stays behind."""
    engine = await start("--faults")
    assert (await engine.client.post("/faults", json={**fault, "count": 1})).status_code == 200
    text = ""
    with pytest.raises(error):
        async with engine.client.stream("POST", CHAT, json={**ASK, "stream": True}, timeout=0.3) as answer:
            async for part in answer.aiter_text():
                text += part
    assert text.count('"content":"') == (fault["after_tokens"] + 1 if fault["after_tokens"] and text else 0)
    assert engine.under_way == 0
    assert (await say(engine, max_tokens=3))["usage"]["completion_tokens"] == 3
    assert (await engine.client.get("/faults")).json()[0]["hits"] == 1


async def test_requests_are_refused_and_misanswered_on_demand(start: Start, tmp_path: Path) -> None:
    """A status of choice, an error event, a late answer, another adapter's answer; only for the prompt that matches."""
    engine = await start("--faults")
    call = {"lora_name": "other", "lora_path": str(make_adapter(tmp_path / "a"))}
    await engine.client.post("/v1/load_lora_adapter", json=call)
    for fault in (
        {"kind": "refuse", "status": 503, "message": "overloaded", "count": 1, "match": "story"},
        {"kind": "error_event", "after_tokens": 2, "count": 1},
        {"kind": "impostor", "adapter": "other", "count": 1},
        {"kind": "delay", "seconds": 0.05, "count": 1},
    ):
        await engine.client.post("/faults", json=fault)
    hello = {"messages": [{"role": "user", "content": "Hello"}]}
    broken = await engine.client.post(CHAT, json={**ASK, **hello, "stream": True})
    assert '"type":"InternalServerError"' in broken.text
    assert broken.text.endswith("data: [DONE]\n\n")
    assert (await engine.client.post(CHAT, json=ASK)).status_code == 503
    identity = read_identity(text_of(await say(engine)))
    assert identity is not None
    assert identity.adapter == "other"
    assert (await say(engine, max_tokens=2))["usage"]["completion_tokens"] == 2
    assert (await engine.client.post("/faults", json={"kind": "reset"})).status_code == 400
    assert (await engine.client.delete("/faults")).status_code == 200
    assert (await engine.client.get("/faults")).json() == []


async def test_faults_are_not_there_unless_asked_for(start: Start) -> None:
    engine = await start()
    assert (await engine.client.post("/faults", json={"kind": "exit", "count": 1})).status_code == 404


async def test_a_slow_reader_gets_it_all(start: Start) -> None:
    """What a client is too slow for is kept until it reads, and nothing is lost."""
    engine = await start("--max-model-len", "32768")
    fields = {**ASK, "stream": True, "max_tokens": 20_000, "ignore_eos": True}
    async with engine.client.stream("POST", CHAT, json=fields) as answer:
        await until(lambda: engine.under_way == 0)
        lines = [line async for line in answer.aiter_lines() if line]
    assert len(lines) == 20_000 + 2
    assert lines[-1] == "data: [DONE]"


async def test_embeddings_where_it_is_a_pooling_engine(start: Start) -> None:
    engine = await start("--runner", "pooling")
    answer = await engine.client.post("/v1/embeddings", json={"model": "smollm2", "input": ["a", "b", "a"]})
    first, second, third = (one["embedding"] for one in answer.json()["data"])
    assert first == third != second
    assert (await engine.client.post(CHAT, json=ASK)).status_code == 404


@pytest.mark.parametrize("finishing", [False, True])
def test_a_signal_ends_it_as_vllm_ends(finishing: bool) -> None:
    """Open answers hang until their clients leave; with a time-out they are finished and new ones get a 500."""
    port = free_port()
    chat = {**ASK, "model": ""}
    more = ["--shutdown-timeout", "20"] if finishing else []
    command = [sys.executable, "-m", "engines.simulation", "--profile", "h100-8b", "--speed", "3"]
    with subprocess.Popen([*command, "--port", str(port), *more], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert "Starting simulated engine" in process.stderr.readline()
        with (
            httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE, verify=False) as client,
            client.stream("POST", CHAT, json={**chat, "stream": True, "max_tokens": 150, "ignore_eos": True}) as answer,
        ):
            lines = answer.iter_lines()
            next(lines)
            client.get("/health")
            os.kill(process.pid, signal.SIGTERM)
            if finishing:
                while client.get("/health").status_code == 200 and client.post(CHAT, json=chat).status_code != 500:
                    pass
                assert [line for line in lines if line][-1] == "data: [DONE]"
            else:
                while True:
                    try:
                        httpx.get(f"http://127.0.0.1:{port}/health", verify=False)
                    except httpx.ConnectError:
                        break
                    except httpx.TransportError:
                        continue  # let in a moment before the door closed
                assert process.poll() is None
        assert process.wait(PATIENCE) == 0


def test_it_is_a_kind_of_engine() -> None:
    """Spoken to as vLLM is, started by this interpreter."""
    simulated = ENGINES["simulated"]
    assert simulated.capabilities == ENGINES["vllm"].capabilities
    assert simulated.control_fields == ENGINES["vllm"].control_fields
