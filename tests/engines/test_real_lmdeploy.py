"""A real LMDeploy behind the gateway, installed and started as ``forebay serve`` does it: HTTP server, engine process,
scheduler and adapters are LMDeploy's own, its kernels are plain PyTorch (``engines/shims/lmdeploy``).

One engine for all, with two adapters from the start; the last tests break a part of it, and end it. What a capability
of ``engines.lmdeploy`` claims is shown here.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import signal
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import psutil
import pytest
from pydantic import SecretStr

from engines.launch import AdapterSlots
from engines.lmdeploy import LmDeploy
from engines.protocol import Fault
from gateway.settings import Upstream
from tests.support.adapters import make_adapter
from tests.support.client import Response, error_of, text_of
from tests.support.gateway import CHAT, Gateway, StartGateway, face, start_gateway
from tests.support.real_engine import FREE_WITHIN, LOOK, RealEngine, patience, running
from tests.support.script import DONE

__all__ = ["face", "patience", "start_gateway"]

pytestmark = pytest.mark.all_engines

BASE = "smollm2-135m-instruct"
ADAPTERS = ("loud@1", "other@2")
QUESTION = "What is the capital of France?"
TURNS = [{"role": "user", "content": QUESTION}]
PARIS = "The capital of France is Paris."
ENDLESS = {"max_tokens": 1500, "ignore_eos": True}
LMDEPLOY = LmDeploy()


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealEngine]:
    """An LMDeploy with a key and two adapters."""
    folder = tmp_path_factory.mktemp("adapters")
    at_start = tuple((name, str(make_adapter(folder / name, 8, seed))) for seed, name in enumerate(ADAPTERS))
    with running("lmdeploy", adapters=AdapterSlots(at_start=at_start), api_key=secrets.token_hex(32)) as started:
        yield started


@pytest.fixture
def direct(engine: RealEngine) -> Iterator[httpx.Client]:
    """The engine past the gateway."""
    with engine.client() as client:
        yield client


def upstream(engine: RealEngine) -> Upstream:
    assert engine.api_key is not None
    return Upstream(url=engine.url, engine="lmdeploy", api_key=SecretStr(engine.api_key))


@pytest.fixture
async def gateway(start_gateway: StartGateway, engine: RealEngine, patience: None) -> AsyncIterator[Gateway]:
    """A gateway that asks the engine what it serves."""
    yield await start_gateway(upstream(engine))


def ask(**fields: Any) -> dict[str, Any]:
    return {"model": BASE, "messages": TURNS, "temperature": 0, "max_tokens": 12, **fields}


def chunks_of(answer: Response) -> list[dict[str, Any]]:
    assert (answer.status, answer.complete) == (200, True), answer.body
    *events, end = answer.events()
    assert end == DONE
    return [json.loads(event.removeprefix(b"data: ")) for event in events]


def streamed_text(answer: Response) -> str:
    choices = [choice for chunk in chunks_of(answer) for choice in chunk["choices"]]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


# --- answers -----------------------------------------------------------------------------------------------------


async def test_every_path_that_it_serves(gateway: Gateway) -> None:
    asked: dict[str, dict[str, Any]] = {
        CHAT: ask(max_tokens=4),
        "/v1/completions": {"model": BASE, "prompt": QUESTION, "max_tokens": 4, "ignore_eos": True},
        "/v1/responses": {"model": BASE, "input": QUESTION, "max_output_tokens": 4},
        "/v1/messages": {"model": BASE, "messages": TURNS, "max_tokens": 4},
    }
    # Sampled, an answer may end before its bound.
    asked = {path: {**body, "temperature": 0} for path, body in asked.items()}
    assert set(asked) == set(LMDEPLOY.paths)
    ends = {"/v1/responses": b"event: response.", "/v1/messages": b"event: message_stop\n"}
    for path, body in asked.items():
        answer = await gateway.ask(body, path)
        assert (answer.status, answer.json()["model"]) == (200, BASE), (path, answer.body)
        streamed = await gateway.ask({**body, "stream": True}, path)
        assert (streamed.status, streamed.complete) == (200, True), path
        assert streamed.events()[-1].startswith(ends.get(path, DONE)), path
    await gateway.idle()
    assert [line["tokens_out"] for line in gateway.lines("request")] == [4] * 8


async def test_a_path_that_it_does_not_serve(gateway: Gateway) -> None:
    """Whatever kind of engine is behind, the words are the same."""
    asked: dict[str, dict[str, Any]] = {
        "/v1/embeddings": {"input": QUESTION},
        "/v1/rerank": {"query": QUESTION, "documents": ["a"]},
        "/v1/score": {"text_1": QUESTION, "text_2": "a"},
        "/tokenize": {"prompt": QUESTION},
    }
    for path, body in asked.items():
        answer = await gateway.ask({"model": BASE, **body}, path)
        assert (answer.status, error_of(answer)["code"]) == (400, "unsupported_operation"), (path, answer.body)


async def test_a_stream_is_the_answer_and_its_usage(gateway: Gateway) -> None:
    shown = await gateway.ask(ask(stream=True, stream_options={"include_usage": True}))
    hidden = await gateway.ask(ask(stream=True))
    assert streamed_text(shown) == streamed_text(hidden) == PARIS == text_of(await gateway.ask(ask()))
    last = chunks_of(shown)[-1]
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 7)
    assert b'"completion_tokens"' not in hidden.body
    await gateway.idle()
    assert [line["tokens_out"] for line in gateway.lines("request")] == [7] * 3


async def test_several_answers(gateway: Gateway) -> None:
    answer = await gateway.ask(ask(n=2, max_tokens=3, temperature=1.0))
    assert [choice["index"] for choice in answer.json()["choices"]] == [0, 1]
    streamed = await gateway.ask(ask(n=2, max_tokens=3, stream=True))
    assert {choice["index"] for chunk in chunks_of(streamed) for choice in chunk["choices"]} == {0, 1}


async def test_a_seed_repeats_an_answer(gateway: Gateway) -> None:
    """Drawing a token is the shim's own work."""
    said = [text_of(await gateway.ask(ask(temperature=1.5, seed=seed, ignore_eos=True))) for seed in (1, 1, 2)]
    assert said[0] == said[1] != said[2]


async def test_probabilities_schemas_and_tools(gateway: Gateway) -> None:
    answer = await gateway.ask(ask(max_tokens=2, logprobs=True, top_logprobs=3))
    for token in answer.json()["choices"][0]["logprobs"]["content"]:
        # The likeliest three, of which it leaves out the one that was drawn.
        others = [other["logprob"] for other in token["top_logprobs"]]
        assert len(others) == 2
        assert max(others) < token["logprob"] < 0

    schema = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema, "strict": True}}
    held = json.loads(text_of(await gateway.ask(ask(max_tokens=20, response_format=form))))
    assert held["city"] in ("Paris", "Rome")

    tool = {"type": "function", "function": {"name": "find_city", "parameters": schema}}
    answer = await gateway.ask(ask(max_tokens=60, tools=[tool], tool_choice="required"))
    [call] = answer.json()["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "find_city"
    assert json.loads(call["function"]["arguments"])["city"] in ("Paris", "Rome")


# --- what it refuses, and what it does not -----------------------------------------------------------------------


async def test_what_the_engine_refuses(gateway: Gateway) -> None:
    wrong: list[tuple[str, dict[str, Any], str]] = [
        ("a value", {"temperature": 9}, "temperature"),
        ("a type", {"max_tokens": "many"}, "max_tokens"),
        ("a form", {"response_format": {"type": "no-such-type"}}, "response_format"),
    ]
    for what, fields, param in wrong:
        for stream in (False, True):
            answer = await gateway.ask(ask(stream=stream, **fields))
            assert (answer.status, error_of(answer)["type"]) == (400, "invalid_request_error"), (what, answer.body)
            assert error_of(answer)["param"] == param
    for stream in (False, True):
        answer = await gateway.ask(ask(stream=stream, messages=[{"role": "user", "content": "word " * 2500}]))
        assert (answer.status, error_of(answer)["code"]) == (400, "context_length_exceeded")
    for field in ("session_id", "migration_request", "input_ids"):
        refused = await gateway.ask(ask(**{field: 1}))
        assert (refused.status, error_of(refused)["code"]) == (400, "field_not_allowed")


async def test_more_output_than_fits_is_cut_without_a_word(gateway: Gateway) -> None:
    """Why ``LENGTH_CHECKED`` is not declared."""
    long = [{"role": "user", "content": "word " * 2000}]
    answer = await gateway.ask(ask(messages=long, max_tokens=1500, ignore_eos=True))
    assert answer.status == 200
    assert (answer.json()["choices"][0]["finish_reason"], answer.json()["usage"]["total_tokens"]) == ("length", 2048)


# --- names and adapters ------------------------------------------------------------------------------------------


async def test_a_name_means_one_thing(gateway: Gateway, direct: httpx.Client) -> None:
    """An unknown one is a 404 of the engine too, so a name that is configured need not be listed."""
    assert direct.post(CHAT, json=ask(model="no-such-model")).status_code == 404
    unknown = await gateway.ask(ask(model="no-such-model"))
    assert (unknown.status, error_of(unknown)["code"]) == (404, "model_not_found")
    said = []
    for adapter in ADAPTERS:
        answer = await gateway.ask(ask(model=adapter))
        assert answer.json()["model"] == adapter
        said.append(text_of(answer))
        assert streamed_text(await gateway.ask(ask(model=adapter, stream=True))) == said[-1]
    assert text_of(await gateway.ask(ask())) == PARIS
    assert len({PARIS, *said}) == 3


async def test_an_adapter_answers_on_every_path(gateway: Gateway) -> None:
    """None of them forgets which adapter was named."""
    asked: dict[str, dict[str, Any]] = {
        "/v1/completions": {"prompt": QUESTION, "max_tokens": 6, "temperature": 0},
        "/v1/responses": {"input": QUESTION, "max_output_tokens": 6, "temperature": 0},
        "/v1/messages": {"messages": TURNS, "max_tokens": 6, "temperature": 0},
    }
    texts = {
        "/v1/completions": lambda answer: answer["choices"][0]["text"],
        "/v1/responses": lambda answer: answer["output"][0]["content"][0]["text"],
        "/v1/messages": lambda answer: answer["content"][0]["text"],
    }
    for path, body in asked.items():
        said = [texts[path]((await gateway.ask({"model": name, **body}, path)).json()) for name in (BASE, *ADAPTERS)]
        assert len(set(said)) == 3, (path, said)


async def test_models_of_one_batch_do_not_mix(gateway: Gateway) -> None:
    """Base and both adapters computed together say what each says alone."""
    names = (BASE, *ADAPTERS)
    alone = [text_of(await gateway.ask(ask(model=name))) for name in names]
    together = await asyncio.gather(*(gateway.ask(ask(model=name)) for name in names * 2))
    assert [text_of(answer) for answer in together] == alone * 2


def test_the_list_of_models_names_no_base(direct: httpx.Client) -> None:
    listed = {model.name: model.base for model in LMDEPLOY.read_models(direct.get(LMDEPLOY.models_path).content)}
    assert listed == dict.fromkeys((BASE, *ADAPTERS))


# --- load and leaving --------------------------------------------------------------------------------------------


# --- its processes -----------------------------------------------------------------------------------------------


def test_its_key_is_in_no_command_line_and_guards_everything(engine: RealEngine) -> None:
    assert engine.api_key is not None
    leader = psutil.Process(engine.pid)
    family = [leader, *leader.children(recursive=True)]
    assert len(family) > 1
    assert not any(engine.api_key in " ".join(process.cmdline()) for process in family)
    with httpx.Client(base_url=engine.url) as stranger:
        for method, path in (("POST", CHAT), ("GET", "/v1/models"), ("GET", "/metrics"), ("POST", "/sleep")):
            answer = stranger.request(method, path, json={})
            assert answer.status_code == 401, path
            assert LMDEPLOY.read_error(answer.status_code, answer.content).fault is Fault.CREDENTIALS
        assert stranger.get(LMDEPLOY.ready_path).status_code == 200


def test_told_to_stop_it_finishes_what_it_began(engine: RealEngine, direct: httpx.Client) -> None:
    """After this the engine is gone."""
    leader = psutil.Process(engine.pid)
    with direct.stream("POST", CHAT, json=ask(stream=True, max_tokens=60, ignore_eos=True)) as answer:
        events = answer.iter_lines()
        assert next(events).startswith("data: ")
        leader.send_signal(signal.SIGTERM)
        *_, last = (line for line in events if line)
    assert last == "data: [DONE]"
    assert leader.wait(FREE_WITHIN) in (0, None)


def test_when_the_process_that_computes_dies_it_is_not_healthy() -> None:
    """Its server lives on and would let requests wait for ever; the gateway asks its health and sends it none."""
    with running("lmdeploy") as engine, engine.client() as direct:
        [computing] = [
            process
            for process in psutil.Process(engine.pid).children(recursive=True)
            if "spawn_main" in " ".join(process.cmdline())
        ]
        computing.kill()
        deadline = time.monotonic() + FREE_WITHIN
        while (status := direct.get(LMDEPLOY.ready_path).status_code) == 200:
            assert time.monotonic() < deadline
            time.sleep(LOOK)
        assert status == 503
        assert psutil.Process(engine.pid).is_running()
