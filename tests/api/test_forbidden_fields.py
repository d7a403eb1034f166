"""What steers an engine reaches none: every control field of every kind, on every path it serves, however it is spelt.

The engines are scripts that write down what arrives. ``test_caps_and_fields`` has the values such a field may have,
``unit/test_peek`` the reading of bodies.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from engines.registry import ENGINES
from gateway.settings import Upstream
from tests.api.test_caps_and_fields import MESSAGES, body_for
from tests.conftest import Connect
from tests.support.client import RawClient, Response
from tests.support.gateway import AUTH, CHAT, ENGINE_MODEL, KEY, MODEL, Gateway, StartGateway, relayed
from tests.support.script import Script, json_answer
from tests.support.table import each
from tests.support.upstream import ScriptedUpstream

WELL = Script(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
FORBIDDEN = sorted({(kind, name) for kind, engine in ENGINES.items() for name in engine.control_fields})
LISTED = json.dumps({"object": "list", "data": [{"id": ENGINE_MODEL, "object": "model", "created": 1}]}).encode()


def behind(upstream: ScriptedUpstream, kind: str) -> Upstream:
    """Return the configuration of a scripted engine of this kind that is well, and serves ``MODEL``."""
    engine = ENGINES[kind]
    upstream.always(WELL, path=engine.ready_path)
    upstream.always(json_answer(LISTED), path=engine.models_path)
    upstream.always(json_answer(b'{"model":"%b"}' % ENGINE_MODEL.encode()))
    return Upstream(url=upstream.url, engine=kind, models={MODEL: ENGINE_MODEL})


def escaped(name: str, at: int) -> str:
    """Return a name with one character of it spelt as an escape, as JSON allows."""
    return f"{name[:at]}\\u{ord(name[at]):04X}{name[at + 1 :]}"


def spellings(path: str, name: str) -> dict[str, bytes]:
    """Return bodies that all send a field; a good request goes before it, after it and around it."""
    good = json.dumps(body_for(path))[1:-1]
    middle = len(name) // 2
    whole = "".join(f"\\u{ord(letter):04x}" for letter in name)
    texts = {
        "last": f'{{{good},"{name}":"x"}}',
        "first": f'{{"{name}":"x",{good}}}',
        "null": f'{{{good},"{name}":null}}',
        "escaped": f'{{{good},"{escaped(name, middle)}":1}}',
        "all escaped": f'{{{good},"{whole}":1}}',
        "twice": f'{{"{name}":null,{good},"{name}":{{}}}}',
        "twice, the second escaped": f'{{"{name}":null,{good},"{escaped(name, 0)}":["x"]}}',
        "between two models": f'{{"model":"x",{good},"{name}":1,"model":"{MODEL}"}}',
        "in a stream": f'{{"stream":true,{good},"{name}":0}}',
        "spread out": f'{{\n{good} ,\r\n\t"{name}" \n : "x" }}',
    }
    return {told: text.encode() for told, text in texts.items()}


async def ask(client: RawClient, path: str, body: bytes) -> Response:
    client.post(path, body, AUTH)
    return await client.response()


def expect_refusal(answer: Response, path: str, name: str, told: str) -> None:
    error: dict[str, Any] = answer.json()["error"]
    where = (path, name, told)
    assert answer.status == 400, where
    assert error["type"] == "invalid_request_error", where
    assert f"'{name}' is not for clients to set" in error["message"], where
    # Anthropic's envelope has neither code nor param.
    if path != MESSAGES:
        assert (error["code"], error["param"]) == ("field_not_allowed", name), where


async def expect_it_would_have_arrived(gateway: Gateway, upstreams: list[ScriptedUpstream], path: str) -> None:
    """A request without such a field reaches an engine, so that nothing above was refused for another reason."""
    before = sum(len(relayed(upstream)) for upstream in upstreams)
    assert (await gateway.ask(body_for(path), path)).status == 200, path
    assert sum(len(relayed(upstream)) for upstream in upstreams) == before + 1, path


@pytest.mark.parametrize("kind", ENGINES)
async def test_a_field_of_its_own_list_reaches_no_engine(
    start_gateway: StartGateway, upstream: ScriptedUpstream, connect: Connect, kind: str
) -> None:
    gateway = await start_gateway(behind(upstream, kind))
    client = await connect(gateway.url)
    for path in ENGINES[kind].paths:
        for turn, name in enumerate(sorted(ENGINES[kind].control_fields)):
            bodies = list(spellings(path, name).items())
            # Each field is spelt in every way on one of the paths at least, and in three ways on each.
            chosen = bodies if path == CHAT else [bodies[(turn + step) % len(bodies)] for step in (0, 3, 6)]
            for told, body in chosen:
                expect_refusal(await ask(client, path, body), path, name, told)
    assert relayed(upstream) == []
    for path in ENGINES[kind].paths:
        await expect_it_would_have_arrived(gateway, [upstream], path)


async def test_a_field_of_any_engine_is_refused_where_several_kinds_serve_one_model(
    start_gateway: StartGateway, connect: Connect
) -> None:
    """Whichever would have been chosen: the client cannot try until it gets the one that takes the field."""
    async with ScriptedUpstream() as one, ScriptedUpstream() as two, ScriptedUpstream() as three:
        upstreams = [one, two, three]
        gateway = await start_gateway(*map(behind, upstreams, ("vllm", "sglang", "lmdeploy")))
        client = await connect(gateway.url)
        for name in sorted({name for _, name in FORBIDDEN}):
            for path in (CHAT, MESSAGES):
                for told, body in spellings(path, name).items():
                    if told in ("last", "escaped", "in a stream"):
                        expect_refusal(await ask(client, path, body), path, name, told)
        assert [relayed(upstream) for upstream in upstreams] == [[], [], []]
        await expect_it_would_have_arrived(gateway, upstreams, CHAT)


@each("name", ["lora_path", "adapter_name", "vllm_xargs"])
async def test_an_sdk_is_told_which_field_it_was(gateway: Gateway, upstream: ScriptedUpstream, name: str) -> None:
    """What is called ``extra_body`` there are fields of the body like all others."""
    import openai

    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=KEY, max_retries=0) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": "Hi"}], extra_body={name: "x"}
            )
    assert (caught.value.code, caught.value.param) == ("field_not_allowed", name)
    assert relayed(upstream) == []


@each("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
async def test_another_encoding_hides_no_field(
    gateway: Gateway, upstream: ScriptedUpstream, connect: Connect, encoding: str
) -> None:
    """The engines' own reader of JSON would guess it from the first bytes."""
    client = await connect(gateway.url)
    body = json.dumps({**body_for(CHAT), "priority": 1}).encode(encoding)
    answer = await ask(client, CHAT, body)
    assert (answer.status, answer.json()["error"]["type"]) == (400, "invalid_request_error")
    assert relayed(upstream) == []


@pytest.mark.parametrize("kind", ENGINES)
async def test_what_stands_deeper_stays_there(
    start_gateway: StartGateway, upstream: ScriptedUpstream, kind: str
) -> None:
    """No engine takes its control fields out of other fields, and the gateway lifts none out of them: not out of
    ``extra_body``, which is what SDKs call further fields of the body, and not out of a query."""
    gateway = await start_gateway(behind(upstream, kind))
    inside = dict.fromkeys((name for _, name in FORBIDDEN), "x")
    sent: dict[str, Any] = {**body_for(CHAT), "extra_body": inside, "metadata": inside, "user": json.dumps(inside)}
    assert (await gateway.ask(sent, f"{CHAT}?{'&'.join(f'{name}=x' for name in inside)}")).status == 200
    [arrived] = relayed(upstream)
    assert arrived.target == CHAT
    assert arrived.json() == {**sent, "model": ENGINE_MODEL}
    assert not set(arrived.json()) & set(inside)
