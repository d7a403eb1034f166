"""What a key may ask for at most, what no client may set, and what the gateway adds for the engine."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from pydantic import SecretStr

from gateway.api.routes import RELAYED
from gateway.settings import Caps, KeySettings
from tests.conftest import Connect
from tests.support.client import Response
from tests.support.gateway import (
    AUTH,
    CHAT,
    ENGINE_MODEL,
    KEY,
    MODEL,
    Gateway,
    StartGateway,
    chat,
    relayed,
)
from tests.support.recordings import load
from tests.support.script import Do, Gate, json_answer, nothing, play
from tests.support.table import each, named
from tests.support.upstream import ScriptedUpstream

COMPLETIONS, RESPONSES, MESSAGES = "/v1/completions", "/v1/responses", "/v1/messages"
ANSWERS = {CHAT: "chat_basic", COMPLETIONS: "comp_basic", RESPONSES: "responses", MESSAGES: "messages"}


def body_for(path: str, **fields: Any) -> dict[str, Any]:
    """Return a small request for a path, with more fields."""
    messages = [{"role": "user", "content": "Hi"}]
    own: dict[str, dict[str, Any]] = {
        CHAT: {"messages": messages},
        MESSAGES: {"messages": messages},
        COMPLETIONS: {"prompt": "Hi"},
        RESPONSES: {"input": "Hi"},
    }
    return {"model": MODEL, **own.get(path, {"input": "Hi", "prompt": "Hi"}), **fields}


async def capped(start: StartGateway, upstream: ScriptedUpstream, **caps: int) -> Gateway:
    """Start a gateway whose only key has these caps, in front of an engine that answers everything well."""
    for path, name in ANSWERS.items():
        upstream.always(play(load("vllm", name)), path=path)
    return await start(upstream, keys=(KeySettings(name="alice", key=SecretStr(KEY), caps=Caps(**caps)),))


def refusal(answer: Response) -> tuple[int, Any, Any]:
    """Return status, code (Anthropic's dialect: type) and param of a refusal."""
    error = answer.json()["error"]
    return answer.status, error.get("code", error.get("type")), error.get("param")


# --- answers and output tokens ---------------------------------------------------------------------------------------

ANSWERS_ASKED_FOR: list[tuple[str, dict[str, Any], bool]] = [
    (CHAT, {}, True),
    (CHAT, {"n": 1}, True),
    (CHAT, {"n": 3}, True),
    (CHAT, {"n": 4}, False),
    (CHAT, {"n": None}, True),
    (CHAT, {"n": 10**30}, False),
    (CHAT, {"n": "3"}, False),
    (COMPLETIONS, {"n": 3}, True),
    (COMPLETIONS, {"n": 4}, False),
    (COMPLETIONS, {"best_of": 4}, False),
    (COMPLETIONS, {"prompt": ["a", "b", "c"]}, True),
    (COMPLETIONS, {"prompt": ["a", "b", "c", "d"]}, False),
    (COMPLETIONS, {"prompt": ["a", "b"], "n": 2}, False),
    (COMPLETIONS, {"prompt": [[1, 2], [3]], "n": 2}, False),
    (COMPLETIONS, {"prompt": [1, 2, 3, 4, 5, 6]}, True),
]


async def test_answers_in_one_request_are_capped(start_gateway: StartGateway, upstream: ScriptedUpstream) -> None:
    """Over all prompts of the request: a list of prompts is that many answers."""
    gateway = await capped(start_gateway, upstream, n=3)
    for path, fields, passes in ANSWERS_ASKED_FOR:
        with named(path=path, **fields):
            before = len(relayed(upstream))
            answer = await gateway.ask(body_for(path, **fields), path)
            assert answer.status == (200 if passes else 400)
            assert len(relayed(upstream)) - before == (1 if passes else 0)
            if not passes:
                assert refusal(answer)[2] in ("n", "best_of")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (CHAT, "max_tokens"),
        (CHAT, "max_completion_tokens"),
        (COMPLETIONS, "max_tokens"),
        (RESPONSES, "max_output_tokens"),
        (MESSAGES, "max_tokens"),
    ],
)
async def test_output_tokens_are_capped(
    start_gateway: StartGateway, upstream: ScriptedUpstream, path: str, name: str
) -> None:
    """What is stated passes as it is or is refused; it is never made smaller behind the client's back."""
    gateway = await capped(start_gateway, upstream, max_tokens=100)
    assert (await gateway.ask(body_for(path, **{name: 100}), path)).status == 200
    assert relayed(upstream)[0].json()[name] == 100
    answer = await gateway.ask(body_for(path, **{name: 101}), path)
    assert answer.status == 400
    assert "at most 100 output tokens" in answer.json()["error"]["message"]
    if path != MESSAGES:
        assert refusal(answer) == (400, None, name)
    assert len(relayed(upstream)) == 1


@pytest.mark.parametrize(
    ("path", "name", "cap", "written"),
    [
        (CHAT, "max_tokens", 100, 100),
        (RESPONSES, "max_output_tokens", 100, 100),
        (MESSAGES, "max_tokens", 100, 100),
        # OpenAI's own default for completions is 16: a cap above it makes no answer longer.
        (COMPLETIONS, "max_tokens", 100, 16),
        (COMPLETIONS, "max_tokens", 5, 5),
    ],
)
async def test_where_nothing_is_stated_the_cap_is_written(
    start_gateway: StartGateway, upstream: ScriptedUpstream, path: str, name: str, cap: int, written: int
) -> None:
    """Otherwise the engine would take what is left of the model's context."""
    gateway = await capped(start_gateway, upstream, max_tokens=cap)
    for fields in ({}, {name: None}):
        assert (await gateway.ask(body_for(path, **fields), path)).status == 200
        assert relayed(upstream)[-1].json()[name] == written


async def test_without_a_cap_nothing_is_written(gateway: Gateway, upstream: ScriptedUpstream) -> None:
    upstream.always(play(load("vllm", "chat_basic")), path=CHAT)
    await gateway.ask(chat())
    assert relayed(upstream)[0].json() == chat(model=ENGINE_MODEL)


# --- context ---------------------------------------------------------------------------------------------------------

LONG = "word " * 400
"""2,000 bytes: more than any cap below, so an engine must count."""


def counts(upstream: ScriptedUpstream, count: int) -> None:
    """Have the engine count every prompt as so many tokens."""
    upstream.always(json_answer(b'{"count":%d,"max_model_len":2048,"tokens":[]}' % count), path="/tokenize")


def asked(upstream: ScriptedUpstream, path: str) -> list[dict[str, Any]]:
    return [request.json() for request in relayed(upstream) if request.target == path]


async def test_a_small_request_fits_without_counting(start_gateway: StartGateway, upstream: ScriptedUpstream) -> None:
    """No token is shorter than a byte: far fewer bytes than the cap need no tokenizer; the rest is the output's."""
    gateway = await capped(start_gateway, upstream, context=8192)
    assert (await gateway.ask(chat())).status == 200
    assert (await gateway.ask(chat(max_tokens=7000))).status == 200
    assert asked(upstream, "/tokenize") == []
    assert [8192 // 2 < body["max_tokens"] < 8192 for body in asked(upstream, CHAT)] == [True, True]


@pytest.mark.parametrize(
    ("path", "fields", "counted"),
    [
        (CHAT, {"messages": [{"role": "user", "content": LONG}]}, {"messages": [{"role": "user", "content": LONG}]}),
        (COMPLETIONS, {"prompt": LONG}, {"prompt": LONG}),
        (
            MESSAGES,
            {"messages": [{"role": "user", "content": LONG}], "system": "Be brief."},
            {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": LONG}]},
        ),
        (RESPONSES, {"input": LONG}, {"messages": [{"role": "user", "content": LONG}]}),
    ],
)
async def test_a_long_prompt_is_counted_by_the_engine(
    start_gateway: StartGateway, upstream: ScriptedUpstream, path: str, fields: dict[str, Any], counted: dict[str, Any]
) -> None:
    """Exactly, with the model's own tokenizer; what is left becomes the output limit where none was stated."""
    gateway = await capped(start_gateway, upstream, context=500)
    counts(upstream, 405)
    assert (await gateway.ask(body_for(path, **fields), path)).status == 200
    assert asked(upstream, "/tokenize") == [{**counted, "model": ENGINE_MODEL}]
    limit = RELAYED[path].token_fields[-1]
    assert asked(upstream, path)[0][limit] == (16 if path == COMPLETIONS else 95)


async def test_prompt_and_output_together_are_capped(start_gateway: StartGateway, upstream: ScriptedUpstream) -> None:
    """To the token; the refusal is the one of a prompt too long for the model."""
    gateway = await capped(start_gateway, upstream, context=500)
    passing: list[tuple[int, int | None]] = [(400, 100), (499, None)]
    for count, output in passing:
        with named(passes=True, count=count, output=output):
            counts(upstream, count)
            answer = await gateway.ask(chat(messages=[{"role": "user", "content": LONG}], max_tokens=output))
            assert answer.status == 200
            assert asked(upstream, CHAT)[-1]["max_tokens"] == (output or 500 - count)
    refused: list[tuple[int, int | None]] = [(401, 100), (500, None), (9000, None), (1, 501)]
    for count, output in refused:
        with named(passes=False, count=count, output=output):
            counts(upstream, count)
            answer = await gateway.ask(chat(messages=[{"role": "user", "content": LONG}], max_tokens=output))
            assert refusal(answer) == (400, "context_length_exceeded", None)
            assert "at most 500 tokens of context" in answer.json()["error"]["message"]
            assert len(asked(upstream, CHAT)) == len(passing)


@pytest.mark.parametrize(
    ("prompt", "count", "passes"),
    [
        (list(range(1000, 1484)), 0, True),
        (list(range(1000, 1485)), 0, False),
        ([[1] * 400, [2] * 484], 0, True),
        ([[1] * 400, [2] * 485], 0, False),
        (["a", LONG], 484, True),
        (["a", LONG], 485, False),
    ],
)
async def test_the_longest_of_several_prompts_counts(
    start_gateway: StartGateway, upstream: ScriptedUpstream, prompt: Any, count: int, passes: bool
) -> None:
    """Token ids are counted here, without asking anybody; each prompt has the context for itself."""
    gateway = await capped(start_gateway, upstream, context=500)
    counts(upstream, count)
    answer = await gateway.ask(body_for(COMPLETIONS, prompt=prompt, max_tokens=16), COMPLETIONS)
    assert answer.status == (200 if passes else 400)
    assert len(asked(upstream, "/tokenize")) == (2 if isinstance(prompt[0], str) else 0)


@pytest.mark.parametrize(
    "script",
    [
        nothing().do(Do.CLOSE),
        json_answer(b"{}", status=500),
        json_answer(b'{"detail":"Not Found"}', status=404),
        json_answer(b"not json"),
        json_answer(b'{"count":"many"}'),
    ],
    ids=["closed", "failed", "not offered", "no JSON", "no number"],
)
async def test_what_cannot_be_counted_is_not_let_through(
    start_gateway: StartGateway, upstream: ScriptedUpstream, script: Any
) -> None:
    """A cap that holds only while the engine counts would be none: the client is told to come back."""
    gateway = await capped(start_gateway, upstream, context=500)
    upstream.always(script, path="/tokenize")
    answer = await gateway.ask(chat(messages=[{"role": "user", "content": LONG}]))
    assert refusal(answer)[:2] == (503, "server_is_overloaded")
    assert answer.header("retry-after") == "1"
    assert asked(upstream, CHAT) == []
    await gateway.idle()


async def test_a_client_that_leaves_while_its_prompt_is_counted(
    start_gateway: StartGateway, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """The count is stopped, and nobody asks for the answer any more."""
    gateway = await capped(start_gateway, upstream, context=500)
    upstream.always(json_answer(b'{"count":1}').do(Gate(), 0), path="/tokenize")
    client = await connect(gateway.url)
    client.post(CHAT, chat(messages=[{"role": "user", "content": LONG}]), AUTH)
    await upstream.saw("gate")
    await client.close()
    await upstream.saw("closed", request=1)
    await gateway.idle()
    assert (await gateway.line())["outcome"] == "client_gone"
    assert asked(upstream, CHAT) == []


# --- fields ----------------------------------------------------------------------------------------------------------

CONTROL = [
    "cache_salt",
    "priority",
    "request_id",
    "session_id",
    "kv_transfer_params",
    "vllm_xargs",
    "chat_template",
    "logits_processors",
    "mm_payload",
    "prompt_embeds",
]


async def test_what_steers_the_engine_is_not_for_clients(
    gateway: Gateway, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """On every path, whatever the value, null included: the answer names the field."""
    client = await connect(gateway.url)
    for path, name, value in product(sorted(RELAYED), CONTROL, (None, 1, "x", {"a": 1})):
        client.post(path, body_for(path, **{name: value}), AUTH)
        answer = await client.response()
        assert answer.status == 400, (path, name, value)
        assert f"'{name}' is not for clients to set" in answer.json()["error"]["message"]
        if path != MESSAGES:
            assert refusal(answer)[1:] == ("field_not_allowed", name)
    assert relayed(upstream) == []


async def test_a_template_is_not_steered_through_its_arguments(gateway: Gateway, upstream: ScriptedUpstream) -> None:
    """The engine hands these on to the template's own function, where they would take its parameters' places."""
    for name in ("chat_template", "tokenize", "conversation", "tools", "documents"):
        answer = await gateway.ask(chat(chat_template_kwargs={"enable_thinking": True, name: "x"}))
        assert refusal(answer) == (400, "field_not_allowed", "chat_template_kwargs"), name
    assert relayed(upstream) == []


@each(
    ("name", "value"),
    [("previous_response_id", "resp_1"), ("conversation", "conv_1"), ("background", True)],
)
async def test_what_one_engine_would_have_to_remember_is_refused(
    gateway: Gateway, upstream: ScriptedUpstream, name: str, value: Any
) -> None:
    """Responses are kept by no engine here: the client is told to send the conversation."""
    before = len(relayed(upstream))
    answer = await gateway.ask(body_for(RESPONSES, **{name: value}), RESPONSES)
    assert refusal(answer) == (400, "unsupported_operation", name)
    assert len(relayed(upstream)) == before
    upstream.always(play(load("vllm", "responses")), path=RESPONSES)
    assert (await gateway.ask(body_for(RESPONSES, **{name: None}), RESPONSES)).status == 200


async def test_everything_else_passes_as_it_came(gateway: Gateway, upstream: ScriptedUpstream) -> None:
    """Known or not, to the byte: the engine is the one to judge."""
    upstream.always(play(load("vllm", "chat_basic")), path=CHAT)
    passed = (
        b'"messages":[{"role":"user","content":"\\u00e9 \xc3\xa9","x" : 1.0}],"temperature":0.70,"top_p":1E0'
        b',"seed":18446744073709551615,"stop":["a", "b"],"service_tier":"flex","user":"u","metadata":null'
        b',"bogus":{"deep":[1e2,{}]}'
    )
    assert (await gateway.ask(b'{"model":"public/model",' + passed + b"}")).status == 200
    assert relayed(upstream)[0].body == b'{"model":"smollm2",' + passed + b"}"


@pytest.mark.parametrize(
    ("path", "salted"),
    [(CHAT, True), (COMPLETIONS, True), (RESPONSES, True), (MESSAGES, True), ("/tokenize", False)],
)
async def test_trust_domains_do_not_share_a_prefix_cache(
    start_gateway: StartGateway, upstream: ScriptedUpstream, path: str, salted: bool
) -> None:
    """Keys of one domain have one salt, of two domains two; a key without a domain shares the common cache."""
    domains = {"a1": "a", "a2": "a", "b": "b", "none": None}
    keys = tuple(
        KeySettings(name=name, key=SecretStr(f"fb-{name}"), trust_domain=domain) for name, domain in domains.items()
    )
    gateway = await start_gateway(upstream, keys=keys)
    upstream.always(play(load("vllm", ANSWERS.get(path, "tokenize"))), path=path)
    salts = {}
    for name in domains:
        answer = await gateway.ask(body_for(path), path, [("authorization", f"Bearer fb-{name}")])
        assert answer.status == 200
        salts[name] = relayed(upstream)[-1].json().get("cache_salt")
    if not salted:
        assert set(salts.values()) == {None}
        return
    assert salts["a1"] == salts["a2"] != salts["b"]
    assert salts["a1"] and salts["b"] and salts["none"] is None


@each("path", [path for path, route in RELAYED.items() if not route.streams])
async def test_a_path_that_does_not_stream_says_so(gateway: Gateway, upstream: ScriptedUpstream, path: str) -> None:
    answer = await gateway.ask(body_for(path, stream=True), path)
    assert refusal(answer) == (400, None, "stream")
    assert relayed(upstream) == []
