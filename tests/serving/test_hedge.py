"""A request whose engine is silent is sent to a second one: over sockets and on both faces."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from gateway.limits import Limits
from gateway.settings import Hedge, Stream
from tests.conftest import Connect
from tests.support.gateway import AUTH, CHAT, StartGateway, chat, relayed, until
from tests.support.journal import Journal
from tests.support.recordings import load
from tests.support.script import Do, Script, event_stream, json_answer
from tests.support.upstream import ScriptedUpstream

ANSWER = b'{"model":"own","choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}'
SILENT = Script(b"").do(Do.HANG, 0)


@pytest.fixture
async def second(journal: Journal) -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream(journal=journal) as scripted:
        yield scripted


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_the_second_engine_serves_and_the_first_is_told_to_stop(
    start_gateway: StartGateway, upstream: ScriptedUpstream, second: ScriptedUpstream, connect: Connect, stream: bool
) -> None:
    """The client has the whole answer, once; it is charged once."""
    limits = Limits.model_validate({"defaults": {"tenant": {"requests": "100/h", "tokens": "1M/h"}}})
    gateway = await start_gateway(upstream, second, stream=Stream(hedge=Hedge(after=2.0, share=0.5)), limits=limits)
    good = event_stream(load("vllm", "chat_stream").events()) if stream else json_answer(ANSWER)
    for one in (upstream, second):
        one.always(json_answer(ANSWER), path=CHAT)
    # So that there is a share to take one of.
    for _ in range(2):
        await gateway.ask(chat())
    for one in (upstream, second):
        one.always(SILENT, path=CHAT)
    before = len(relayed(upstream)) + len(relayed(second))
    client = await connect(gateway.url)
    client.post(CHAT, chat(stream=stream), AUTH)
    await until(lambda: len(relayed(upstream)) + len(relayed(second)) == before + 1, "no engine was asked")
    silent, other = (upstream, second) if gateway.replica.pool.endpoints[0].in_flight else (second, upstream)
    other.always(good, path=CHAT)
    gateway.advance(2.0)
    answer = await client.response()
    assert answer.status == 200
    assert answer.body.count(b"[DONE]") == stream
    await silent.saw("closed", connection=relayed(silent)[-1].connection)
    line = await gateway.line("request", 2)
    assert (line["outcome"], line["attempts"]) == ("ok", 2)
    ticket = gateway.replica.edge.recent[2]
    assert [attempt.cause for attempt in ticket.tried] == ["outrun", ""]
    assert ticket.settlement == ("counted" if stream else "exact")
    left = (await gateway.ask(chat())).header("x-ratelimit-remaining-requests")
    assert left == "96"
    assert gateway.replica.metrics._hedges == {"won": 1}
