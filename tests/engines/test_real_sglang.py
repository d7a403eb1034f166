"""A real SGLang behind the gateway, installed and started as ``forebay serve`` does it: HTTP server, scheduler and LoRA
manager are SGLang's own, its kernels are plain PyTorch (``engines/shims/sglang``).

One engine for all: two requests run, eight wait, and an adapter is there from the start. What a capability of
``engines.sglang`` claims is shown here.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import psutil
import pytest
from pydantic import SecretStr

from engines.launch import AdapterSlots
from engines.sglang import Sglang
from gateway.settings import Upstream
from tests.support.adapters import make_adapter
from tests.support.client import error_of, text_of
from tests.support.gateway import CHAT, Gateway, StartGateway, face, start_gateway
from tests.support.real_engine import ANSWER_WITHIN, RealEngine, free, patience, running
from tests.support.script import DONE

__all__ = ["face", "patience", "start_gateway"]

pytestmark = pytest.mark.all_engines

BASE = "smollm2-135m-instruct"
ADAPTER = "loud@1"
QUESTION = "What is the capital of France?"
TURNS = [{"role": "user", "content": QUESTION}]
PARIS = "The capital of France is Paris."
ENDLESS = {"max_tokens": 1500, "ignore_eos": True}
JSON = {"content-type": "application/json"}
SGLANG = Sglang()


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealEngine]:
    """A SGLang with a key, an adapter, and room for ten requests, of which two run."""
    directory = make_adapter(tmp_path_factory.mktemp("adapters") / "loud", 8, 1)
    slots = AdapterSlots(active=2, rank=8, targets=("q_proj", "v_proj"), at_start=((ADAPTER, str(directory)),))
    key = secrets.token_hex(32)
    with running("sglang", adapters=slots, api_key=key, max_running=2, max_queued=8) as started:
        yield started


@pytest.fixture
def direct(engine: RealEngine) -> Iterator[httpx.Client]:
    """The engine past the gateway."""
    with engine.client() as client:
        yield client


def upstream(engine: RealEngine, models: dict[str, str] | None = None) -> Upstream:
    assert engine.api_key is not None
    return Upstream(url=engine.url, engine="sglang", api_key=SecretStr(engine.api_key), models=models)


@pytest.fixture
async def gateway(start_gateway: StartGateway, engine: RealEngine, patience: None) -> AsyncIterator[Gateway]:
    """A gateway that asks the engine what it serves, in front of an engine that does nothing else."""
    started = await start_gateway(upstream(engine))
    await free(engine)
    yield started


def ask(**fields: Any) -> dict[str, Any]:
    return {"model": BASE, "messages": TURNS, "temperature": 0, "max_tokens": 12, **fields}


# --- answers -----------------------------------------------------------------------------------------------------


async def test_every_path_that_it_serves(gateway: Gateway) -> None:
    asked: dict[str, dict[str, Any]] = {
        CHAT: ask(max_tokens=4),
        "/v1/completions": {"model": BASE, "prompt": QUESTION, "max_tokens": 4, "ignore_eos": True},
        "/v1/responses": {"model": BASE, "input": QUESTION, "max_output_tokens": 4},
        "/v1/messages": {"model": BASE, "messages": TURNS, "max_tokens": 4},
    }
    # Four tokens are not all it would have said.
    ends = {"/v1/responses": b"event: response.incomplete\n", "/v1/messages": b"event: message_stop\n"}
    for path, body in asked.items():
        answer = await gateway.ask(body, path)
        assert (answer.status, answer.json()["model"]) == (200, BASE), (path, answer.body)
        streamed = await gateway.ask({**body, "stream": True}, path)
        assert (streamed.status, streamed.complete) == (200, True), path
        assert streamed.events()[-1].startswith(ends.get(path, DONE)), path
    counted = await gateway.ask({"model": BASE, "prompt": QUESTION}, "/tokenize")
    assert (counted.status, counted.json()["count"]) == (200, 7)
    await gateway.idle()
    lines = [line for line in gateway.lines("request") if line["path"] != "/tokenize"]
    # Its Responses API gives two tokens where it is allowed four.
    assert [line["tokens_out"] for line in lines] == [4, 4, 4, 4, 2, 2, 4, 4]


async def test_a_path_that_it_does_not_serve(gateway: Gateway) -> None:
    """Whatever kind of engine is behind, the words are the same."""
    asked: dict[str, dict[str, Any]] = {
        "/v1/embeddings": {"input": QUESTION},
        "/v1/rerank": {"query": QUESTION, "documents": ["a"]},
        "/v1/score": {"text_1": QUESTION, "text_2": "a"},
    }
    for path, body in asked.items():
        answer = await gateway.ask({"model": BASE, **body}, path)
        assert (answer.status, error_of(answer)["code"]) == (400, "unsupported_operation"), (path, answer.body)


async def test_a_stream_is_the_answer_and_its_usage(gateway: Gateway) -> None:
    shown = await gateway.ask(ask(stream=True, stream_options={"include_usage": True}))
    hidden = await gateway.ask(ask(stream=True))
    chunks = [json.loads(event.removeprefix(b"data: ")) for event in shown.events()[:-1]]
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"])
    assert text == PARIS == text_of(await gateway.ask(ask()))
    assert (chunks[-1]["choices"], chunks[-1]["usage"]["completion_tokens"]) == ([], 8)
    assert b'"usage":{' not in hidden.body
    await gateway.idle()
    assert [line["tokens_out"] for line in gateway.lines("request")] == [8] * 3


async def test_several_answers(gateway: Gateway) -> None:
    answer = await gateway.ask(ask(n=2, max_tokens=3, temperature=1.0))
    assert [choice["index"] for choice in answer.json()["choices"]] == [0, 1]
    streamed = await gateway.ask(ask(n=2, max_tokens=3, stream=True))
    chunks = [json.loads(event.removeprefix(b"data: ")) for event in streamed.events()[:-1]]
    assert {choice["index"] for chunk in chunks for choice in chunk["choices"]} == {0, 1}


async def test_probabilities_schemas_and_tools(gateway: Gateway) -> None:
    answer = await gateway.ask(ask(max_tokens=2, logprobs=True, top_logprobs=2))
    tokens = answer.json()["choices"][0]["logprobs"]["content"]
    assert [len(token["top_logprobs"]) for token in tokens] == [2, 2]

    schema = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema, "strict": True}}
    held = json.loads(text_of(await gateway.ask(ask(max_tokens=20, response_format=form))))
    assert held["city"] in ("Paris", "Rome")

    # Without "strict" the arguments are JSON, but of any form.
    named: dict[str, Any] = {"name": "find_city", "strict": True, "parameters": {**schema}}
    named["parameters"]["additionalProperties"] = False
    tool = {"type": "function", "function": named}
    choices: list[Any] = ["required", {"type": "function", "function": {"name": "find_city"}}]
    for choice in choices:
        answer = await gateway.ask(ask(max_tokens=60, tools=[tool], tool_choice=choice))
        [call] = answer.json()["choices"][0]["message"]["tool_calls"]
        assert call["function"]["name"] == "find_city"
        assert json.loads(call["function"]["arguments"])["city"] in ("Paris", "Rome")


async def test_what_the_engine_refuses(gateway: Gateway) -> None:
    for what, fields, param in (
        ("a value", {"temperature": -1}, "temperature"),
        ("a type", {"temperature": "warm"}, "temperature"),
        ("a form", {"response_format": {"type": "no-such-type"}}, "response_format"),
    ):
        for stream in (False, True):
            answer = await gateway.ask(ask(stream=stream, **fields))
            assert (answer.status, error_of(answer)["type"]) == (400, "invalid_request_error"), what
            assert error_of(answer)["param"] == param
            assert ".py" not in error_of(answer)["message"]
    long: dict[str, Any] = {"messages": [{"role": "user", "content": "word " * 2500}]}
    for more in (long, {"max_tokens": 5000}):
        answer = await gateway.ask(ask(**more))
        assert (answer.status, error_of(answer)["code"]) == (400, "context_length_exceeded")
    refused = await gateway.ask(ask(lora_path=ADAPTER))
    assert (refused.status, error_of(refused)["code"]) == (400, "field_not_allowed")


# --- names and adapters ------------------------------------------------------------------------------------------


async def test_a_name_means_one_thing(gateway: Gateway, direct: httpx.Client) -> None:
    """Asked by the bare name, SGLang itself answers from the base model; the gateway never does."""
    assert direct.post(CHAT, json=ask(model=ADAPTER)).json()["choices"][0]["message"]["content"] == PARIS
    assert direct.post(CHAT, json=ask(model="no-such-model")).status_code == 200
    unknown = await gateway.ask(ask(model="no-such-model"))
    assert (unknown.status, error_of(unknown)["code"]) == (404, "model_not_found")
    assert text_of(await gateway.ask(ask())) == PARIS
    answer = await gateway.ask(ask(model=ADAPTER))
    assert answer.json()["model"] == ADAPTER
    loud = text_of(answer)
    assert loud != PARIS
    streamed = await gateway.ask(ask(model=ADAPTER, stream=True))
    chunks = [json.loads(event.removeprefix(b"data: ")) for event in streamed.events()[:-1]]
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"]) == loud


@pytest.mark.parametrize("own", [ADAPTER, f"{BASE}:{ADAPTER}"])
async def test_a_configured_name_means_that_adapter(
    start_gateway: StartGateway, engine: RealEngine, patience: None, own: str
) -> None:
    gateway = await start_gateway(upstream(engine, {"support": own, "plain": BASE}))
    assert text_of(await gateway.ask(ask(model="plain"))) == PARIS
    assert text_of(await gateway.ask(ask(model="support"))) != PARIS


# --- its processes -----------------------------------------------------------------------------------------------


def test_its_key_is_in_no_command_line_and_guards_everything(engine: RealEngine) -> None:
    assert engine.api_key is not None
    leader = psutil.Process(engine.pid)
    family = [leader, *leader.children(recursive=True)]
    assert len(family) > 2
    assert not any(engine.api_key in " ".join(process.cmdline()) for process in family)
    assert engine.api_key not in engine.log_path.read_text()
    with httpx.Client(base_url=engine.url) as stranger:
        for method, path in (
            ("POST", CHAT),
            ("GET", "/v1/models"),
            ("POST", "/load_lora_adapter"),
            ("GET", "/server_info"),
        ):
            assert stranger.request(method, path, json={}).status_code == 401, path
        assert stranger.get(SGLANG.ready_path).status_code == 200


def test_when_the_process_that_computes_dies_nothing_is_left(engine: RealEngine) -> None:
    """SGLang then ends itself, all of it. After this the engine is gone."""
    family = engine.family()
    [scheduler] = [process for process in family if "scheduler" in " ".join(process.cmdline())]
    scheduler.kill()
    _, alive = psutil.wait_procs(family, timeout=ANSWER_WITHIN)
    assert alive == []
