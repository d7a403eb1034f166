"""The simulated engine behind the gateway, and started by it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx

from engines.simulation.speech import read_identity
from gateway.settings import Stream, StreamResume, Upstream
from tests.engines.simulated.conftest import RunningEngine, Start, make_adapter
from tests.support.client import RawClient
from tests.support.gateway import AUTH, CHAT, StartGateway, give_database, until
from tests.support.served import Served
from tests.support.sockets import free_port

ASK: dict[str, Any] = {"model": "smollm2", "messages": [{"role": "user", "content": "Tell me a story"}]}


def upstream(engine: RunningEngine, **more: Any) -> Upstream:
    return Upstream(url=engine.url, engine="simulated", **more)


async def test_models_are_found_and_answers_come_through(start: Start, start_gateway: StartGateway) -> None:
    """Whole and streamed: the same text, told by whom, with usage."""
    gateway = await start_gateway(upstream(await start()))
    whole = json.loads((await gateway.ask(ASK)).body)
    text = whole["choices"][0]["message"]["content"]
    identity = read_identity(text)
    assert identity is not None
    assert identity.model == "smollm2"
    stream = (await gateway.ask({**ASK, "stream": True})).body.decode()
    chunks = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == text
    line = await gateway.line(index=1)
    assert line["tokens_out"] == whole["usage"]["completion_tokens"]


async def test_an_engine_that_refuses_is_passed_over(start: Start, start_gateway: StartGateway) -> None:
    """Its 503 and its reset before the first byte are not seen by the client: the other engine answers."""
    engines = [await start("--faults"), await start("--faults")]
    gateway = await start_gateway(*(upstream(engine) for engine in engines))
    for fault in (
        {"kind": "refuse", "status": 503, "message": "overloaded", "count": 1},
        {"kind": "reset", "count": 1},
    ):
        await engines[0].client.post("/faults", json=fault)
        answers = [await gateway.ask(ASK) for _ in range(2)]
        assert [answer.status for answer in answers] == [200, 200]
    assert [fault["hits"] for fault in (await engines[0].client.get("/faults")).json()] == [1, 1]


async def test_an_engine_that_breaks_ends_the_stream_with_an_error(start: Start, start_gateway: StartGateway) -> None:
    """After three tokens: they arrive, then the gateway's error event."""
    engine = await start("--faults")
    gateway = await start_gateway(upstream(engine))
    await engine.client.post("/faults", json={"kind": "close", "after_tokens": 3, "count": 1})
    stream = (await gateway.ask({**ASK, "stream": True})).body.decode()
    assert stream.count('"content":"') == 4
    assert '"error":' in stream


async def test_streams_outlive_engines_that_break(start: Start, start_gateway: StartGateway) -> None:
    """Eight engines, each of which cuts off four streams: every client gets the text that an engine tells undisturbed,
    and the usage of one answer."""
    engines = [await start("--faults") for _ in range(8)]
    gateway = await start_gateway(
        *(upstream(engine) for engine in engines), stream=Stream(resume=StreamResume(attempts=7))
    )
    bodies = [
        {
            **ASK,
            "messages": [{"role": "user", "content": f"Tell me story {number}"}],
            "max_tokens": 40 + number,
            "ignore_eos": number % 2 == 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for number in range(24)
    ]
    whole = [told((await gateway.ask(body)).body) for body in bodies]
    for place, engine in enumerate(engines):
        fault = {"kind": ("close", "reset")[place % 2], "after_tokens": 3 + place, "count": 4}
        await engine.client.post("/faults", json=fault)
    broken = [told(answer.body) for answer in await asyncio.gather(*(gateway.ask(body) for body in bodies))]
    assert broken == whole
    assert [fault["hits"] for engine in engines for fault in (await engine.client.get("/faults")).json()] == [4] * 8
    lines = gateway.lines("request")[24:]
    assert sum(line.get("resumed", 0) for line in lines) == 4 * 8
    assert {line["outcome"] for line in lines} == {"ok"}


def told(stream: bytes) -> tuple[str, list[str], dict[str, int]]:
    """Return the text of a stream, how it ended, and its usage without what was cached."""
    chunks = [json.loads(line[6:]) for line in stream.decode().splitlines() if line.startswith("data: {")]
    choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    usage = {name: count for name, count in chunks[-1]["usage"].items() if name.endswith("_tokens")}
    text = "".join(choice["delta"].get("content", "") for choice in choices)
    return text, [choice["finish_reason"] for choice in choices if choice["finish_reason"]], usage


async def test_an_adapter_is_a_model_of_its_own(start: Start, start_gateway: StartGateway, tmp_path: Path) -> None:
    engine = await start()
    call = {"lora_name": "support@1", "lora_path": str(make_adapter(tmp_path / "adapter"))}
    await engine.client.post("/v1/load_lora_adapter", json=call)
    gateway = await start_gateway(upstream(engine, models={"support": "support@1"}))
    answer = json.loads((await gateway.ask({**ASK, "model": "support"})).body)
    identity = read_identity(answer["choices"][0]["message"]["content"])
    assert identity is not None
    assert (answer["model"], identity.adapter) == ("support", "support@1")


async def test_a_client_that_leaves_frees_the_engine(start: Start, start_gateway: StartGateway) -> None:
    engine = await start("--profile", "h100-8b")
    gateway = await start_gateway(upstream(engine))
    async with await RawClient.connect(gateway.url) as client:
        client.post(CHAT, {**ASK, "stream": True, "max_tokens": 1500, "ignore_eos": True}, AUTH)
        await until(lambda: engine.under_way == 1, "the request did not reach the engine")
    await until(lambda: engine.under_way == 0, "the engine works on")
    await gateway.idle()


def test_the_configuration_starts_one(tmp_path: Path) -> None:
    """`engines: [{kind: simulated, …}]`: nothing is installed, and it answers under its name."""
    config = tmp_path / "forebay.yaml"
    config.write_text("engines: [{name: pretender, kind: simulated, profile: instant, served_name: pretended}]\n")
    give_database(tmp_path / "forebay.db")
    arguments = ("--config", str(config))
    with Served(arguments, tmp_path, (free_port(), free_port()), FOREBAY_HOME=str(tmp_path)) as served:
        served.wait_ready(30)
        answer = httpx.post(
            f"{served.url}/v1/chat/completions",
            json={**ASK, "model": "pretended"},
            headers={"authorization": f"Bearer {served.key}"},
        )
        identity = read_identity(answer.json()["choices"][0]["message"]["content"])
        assert served.interrupt() == 0
    assert identity is not None
    assert identity.model == "pretended"
    assert not (tmp_path / "engines").exists()
