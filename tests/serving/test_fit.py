"""Engines of one model that are not alike: a request goes to one that can serve it, over sockets and on both faces."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest

from engines.protocol import Capability
from gateway.models import PublicModel
from gateway.serving.jobs import needs_of
from tests.support.gateway import CHAT, Gateway, StartGateway, chat, relayed, serving
from tests.support.journal import Journal
from tests.support.script import json_answer
from tests.support.table import each
from tests.support.upstream import ScriptedUpstream

ANSWER = b'{"model":"own","choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}'
TOOLS = [{"type": "function", "function": {"name": "f"}}]


@pytest.fixture
async def second(journal: Journal) -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream(journal=journal) as scripted:
        yield scripted


async def served(gateway: Gateway, times: int = 4, **body: Any) -> set[str]:
    """Ask a few times and return which engines served."""
    before = len(gateway.replica.edge.recent)
    for _ in range(times):
        assert (await gateway.ask(chat(**body))).status == 200
    return {ticket.endpoint for ticket in list(gateway.replica.edge.recent)[before:]}


async def two(
    start: StartGateway,
    upstream: ScriptedUpstream,
    second: ScriptedUpstream,
    first: Mapping[str, Any],
    other: Mapping[str, Any],
    **more: Any,
) -> Gateway:
    for one in (upstream, second):
        one.always(json_answer(ANSWER), path=CHAT)
    return await start(serving(upstream, name="one", **first), serving(second, name="two", **other), **more)


async def test_a_long_request_goes_where_the_context_is_long_enough(
    start_gateway: StartGateway, upstream: ScriptedUpstream, second: ScriptedUpstream
) -> None:
    """By what it says of itself, and by what its prompt probably is; where no such engine is there, one that is only
    probably too short serves, and one that is certainly too short says so itself."""
    gateway = await two(start_gateway, upstream, second, {"max_model_len": 1000}, {"max_model_len": 8000})
    assert await served(gateway, max_tokens=10) == {"one", "two"}
    assert await served(gateway, max_tokens=1500) == {"two"}
    long_one = [{"role": "user", "content": "word " * 2000}]
    assert await served(gateway, messages=long_one, max_tokens=10) == {"two"}
    assert await served(gateway, max_tokens=9000) == {"one", "two"}
    long = gateway.replica.pool.endpoints[1]
    long.down("as the test says")
    assert await served(gateway, messages=long_one, max_tokens=10) == {"one"}
    assert (await gateway.ask(chat(max_tokens=1500))).status == 503
    assert len(relayed(upstream)) + len(relayed(second)) == 20


async def test_what_an_engine_says_of_its_context_counts(
    start_gateway: StartGateway, upstream: ScriptedUpstream, second: ScriptedUpstream
) -> None:
    for one, length in ((upstream, 2048), (second, 512)):
        listed = {"object": "list", "data": [{"id": "m", "object": "model", "max_model_len": length}]}
        one.always(json_answer(json.dumps(listed).encode()), path="/v1/models")
        one.always(json_answer(ANSWER), path=CHAT)
    asked = [
        serving(one).model_copy(update={"models": None, "name": name})
        for one, name in ((upstream, "one"), (second, "two"))
    ]
    gateway = await start_gateway(*asked)
    assert await served(gateway, model="m", max_tokens=600) == {"one"}
    assert await served(gateway, model="m", max_tokens=6) == {"one", "two"}


async def test_what_a_request_needs_is_asked_of_an_engine_that_can(
    start_gateway: StartGateway, upstream: ScriptedUpstream, second: ScriptedUpstream
) -> None:
    """LMDeploy takes no named tool; a plain chat is anybody's."""
    listed = b'{"object":"list","data":[{"id":"smollm2","object":"model"}]}'
    upstream.always(json_answer(listed), path="/v1/models")
    gateway = await two(start_gateway, upstream, second, {"engine": "lmdeploy"}, {})
    assert await served(gateway) == {"one", "two"}
    assert await served(gateway, tools=TOOLS) == {"one", "two"}
    assert await served(gateway, tools=TOOLS, tool_choice="required") == {"two"}
    told = await gateway.get("/health/ready")
    assert told.status == 200


async def test_a_route_may_name_a_device(
    start_gateway: StartGateway, upstream: ScriptedUpstream, second: ScriptedUpstream
) -> None:
    route = {"model": "public/model", "device": "cuda"}
    fast = PublicModel.model_validate({"routes": [route], "fallback": ["public/model"]})
    gateway = await two(start_gateway, upstream, second, {"device": "cpu"}, {"device": "cuda"}, models={"fast": fast})
    assert await served(gateway) == {"one", "two"}
    assert await served(gateway, model="fast") == {"two"}
    gateway.replica.pool.endpoints[1].down("as the test says")
    assert await served(gateway, model="fast") == {"one"}


@each(
    ("body", "needs"),
    [
        ({"tools": [], "tool_choice": "auto", "n": 1, "logprobs": False, "stop": None}, Capability(0)),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, Capability.TOOLS | Capability.FORCED_TOOLS),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, Capability.JSON_SCHEMA),
        ({"response_format": {"type": "text"}}, Capability(0)),
        ({"logprobs": True, "n": 2}, Capability.LOGPROBS | Capability.SEVERAL_ANSWERS),
        ({"stop": ["x"], "top_logprobs": 3}, Capability.STOP_WORDS | Capability.LOGPROBS),
    ],
)
def test_what_a_body_needs(body: dict[str, Any], needs: Capability) -> None:
    fields: Any = {name: json.dumps(value, separators=(",", ":")).encode() for name, value in body.items()}
    assert needs_of(fields) == needs
