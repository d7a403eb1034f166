"""Copies of requests for another model: nobody waits for them, nobody pays, and they are the first to go."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from pydantic import SecretStr

from gateway.limits import Limits
from gateway.models import PublicModel
from gateway.serving.explain import explanation, row_of
from gateway.settings import Bounds, KeySettings
from tests.conftest import Connect
from tests.support.gateway import AUTH, CHAT, KEY, Gateway, StartGateway, chat, relayed, serving, until
from tests.support.journal import Journal
from tests.support.recordings import load
from tests.support.script import Do, Gate, event_stream, json_answer
from tests.support.upstream import ScriptedUpstream

ANSWER = b'{"model":"own","choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}'
COPIED = {"large": PublicModel.model_validate({"mirror": {"model": "next", "share": 1, "timeout": 20}})}
LIMITS = Limits.model_validate(
    {"tenants": {"alice": {"limits": {"requests": "100/h"}}}, "models": {"next": {"price": {"input": 1, "output": 1}}}}
)


@pytest.fixture
async def second(journal: Journal) -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream(journal=journal) as scripted:
        yield scripted


@pytest.fixture
async def copied(start_gateway: StartGateway, upstream: ScriptedUpstream, second: ScriptedUpstream) -> Gateway:
    """A gateway that copies every request for `large` to `next`, whose engine takes one at a time."""
    return await copying(start_gateway, upstream, second)


async def copying(start: StartGateway, upstream: ScriptedUpstream, second: ScriptedUpstream, **more: Any) -> Gateway:
    for one in (upstream, second):
        one.always(json_answer(ANSWER), path=CHAT)
    return await start(
        serving(upstream, models={"large": "own-large"}, name="one"),
        serving(second, models={"next": "own-next"}, name="two", max_running=1),
        keys=(KeySettings(name="alice", key=SecretStr(KEY)),),
        limits=LIMITS,
        models=COPIED,
        **more,
    )


def held(second: ScriptedUpstream) -> Gate:
    """Have an engine answer when the gate opens."""
    gate = Gate()
    second.always(json_answer(ANSWER).do(gate, 0), path=CHAT)
    return gate


def running(gateway: Gateway) -> int:
    return len(gateway.replica.edge.mirrors)


def shed(gateway: Gateway) -> dict[str, int]:
    return gateway.replica.metrics._mirrors_shed


def families(gateway: Gateway) -> dict[str, dict[tuple[str, ...], float]]:
    """What a scrape says of copies."""
    return {
        one.name: {tuple(sample.labels.values()): sample.value for sample in one.samples}
        for one in gateway.replica.metrics.collect()
        if one.name.startswith(("forebay_mirror", "forebay_requests", "forebay_in_flight"))
    }


async def test_a_copy_is_nobodys_wait_and_nobodys_charge(copied: Gateway, second: ScriptedUpstream) -> None:
    """The client has its answer while the copy runs; the copy has a ticket of its own, told apart everywhere."""
    gate = held(second)
    answer = await copied.ask(chat(model="large", max_tokens=4))
    assert (answer.status, answer.header("x-forebay-model")) == (200, "large")
    await until(lambda: len(relayed(second)) == 1, "no copy came")
    assert relayed(second)[0].json() == chat(model="own-next", max_tokens=4)
    assert families(copied)["forebay_mirror_in_flight"] == {("next",): 1.0}
    gate.open()
    line = await copied.line("mirror")
    assert (line["model"], line["mirrors"], line["via"]) == ("next", answer.header("x-request-id"), "mirror")
    assert (line["outcome"], line["settlement"], line["tokens_out"]) == ("ok", "mirror", 2)
    assert not {"tenant", "key"} & {name for name, value in line.items() if value}
    copy = copied.replica.edge.recent[1]
    row = row_of(copy, copy.ended)
    assert (row.tenant, row.key, row.cost_nanos, row.settlement, row.tokens_in) == ("", "", 0, "mirror", 3)
    assert explanation(row, "memory")["asked"]["mirrors"] == answer.header("x-request-id")
    told = families(copied)
    assert told["forebay_requests"] == {("large", "alice", "ok"): 1.0}
    assert told["forebay_mirror_requests"] == {("next", "ok"): 1.0}
    assert told["forebay_mirror_tokens"] == {("next", "in"): 3.0, ("next", "out"): 2.0, ("next", "cached"): 0.0}
    assert ("next",) not in told["forebay_in_flight"]
    # Of a hundred requests in an hour each took one, its copy none.
    left = [answer.header("x-ratelimit-remaining-requests")]
    left.append((await copied.ask(chat(model="large"))).header("x-ratelimit-remaining-requests"))
    assert left == ["99", "98"]


async def test_a_copy_makes_room_for_whoever_waits(copied: Gateway, second: ScriptedUpstream, connect: Connect) -> None:
    """The engine is told at once; and where it is busy no copy is sent."""
    held(second)
    assert (await copied.ask(chat(model="large"))).status == 200
    await until(lambda: len(relayed(second)) == 1, "no copy came")
    gate = held(second)
    client = await connect(copied.url)
    client.post(CHAT, chat(model="next"), AUTH)
    await until(lambda: len(relayed(second)) == 2, "the copy is in the way")
    line = await copied.line("mirror")
    assert (line["outcome"], line["settlement"]) == ("busy", "mirror")
    assert (await copied.ask(chat(model="large"))).status == 200
    assert (shed(copied), running(copied)) == ({"busy": 1}, 0)
    gate.open()
    assert (await client.response()).status == 200


async def test_a_copy_has_a_time_of_its_own_and_one_attempt(copied: Gateway, second: ScriptedUpstream) -> None:
    held(second)
    assert (await copied.ask(chat(model="large"))).status == 200
    await until(lambda: len(relayed(second)) == 1, "no copy came")
    copied.advance(19.9)
    assert running(copied) == 1
    copied.advance(0.2)
    assert (await copied.line("mirror"))["outcome"] == "engine_slow"
    second.always(json_answer(b'{"error":{"message":"full"}}', status=503), path=CHAT)
    assert (await copied.ask(chat(model="large"))).status == 200
    line = await copied.line("mirror", 1)
    assert (line["outcome"], line["attempts"]) == ("busy", 1)
    assert len(relayed(second)) == 2


async def test_copies_are_bounded_in_number_and_bytes(
    start_gateway: StartGateway, upstream: ScriptedUpstream, second: ScriptedUpstream
) -> None:
    event = 1000
    gateway = await copying(
        start_gateway, upstream, second, bounds=Bounds(mirrors=1, mirror_bytes=2 * event, event=event)
    )
    held(second)
    assert (await gateway.ask(chat(model="large", user="u" * event))).status == 200
    assert (shed(gateway), running(gateway)) == ({"bound": 1}, 0)
    assert [(await gateway.ask(chat(model="large"))).status for _ in range(2)] == [200, 200]
    assert (shed(gateway), running(gateway)) == ({"bound": 2}, 1)


async def test_a_stream_is_copied_as_one_and_goes_on_without_its_client(
    copied: Gateway, upstream: ScriptedUpstream, second: ScriptedUpstream, connect: Connect
) -> None:
    gates = [Gate(), Gate()]
    for one, gate in zip((upstream, second), gates, strict=True):
        one.always(event_stream(load("vllm", "chat_stream").events()).do(gate, 0), path=CHAT)
    client = await connect(copied.url)
    client.post(CHAT, chat(model="large", stream=True), AUTH)
    await until(lambda: len(relayed(second)) == 1, "no copy came")
    await client.close()
    assert (await copied.line())["outcome"] == "client_gone"
    gates[1].open()
    line = await copied.line("mirror")
    assert (line["outcome"], line["stream"], line["events"] > 1) == ("ok", True, True)


async def test_nothing_is_copied_that_is_refused_or_counts_tokens_only(
    copied: Gateway, upstream: ScriptedUpstream, second: ScriptedUpstream
) -> None:
    upstream.always(json_answer(b'{"tokens":[1],"count":1}'), path="/tokenize")
    second.always(json_answer(b'{"tokens":[1],"count":1}'), path="/tokenize")
    assert (await copied.ask({"model": "large", "prompt": "Hi"}, path="/tokenize")).status == 200
    copied.replica.pool.endpoints[0].down("as the test says")
    assert (await copied.ask(chat(model="large"))).status == 503
    assert relayed(second) == []


async def test_a_copys_stream_that_breaks_off_goes_on_nowhere(
    start_gateway: StartGateway, upstream: ScriptedUpstream, second: ScriptedUpstream, journal: Journal
) -> None:
    """Its client's would; nobody reads this one, and no other engine works for it."""
    whole = event_stream(load("vllm", "chat_stream").events())
    upstream.always(whole, path=CHAT)
    async with ScriptedUpstream(journal=journal, name="third") as third:
        for one in (second, third):
            one.always(whole.do(Do.CLOSE, whole.after_frame(2)), path=CHAT)
        gateway = await start_gateway(
            serving(upstream, models={"large": "own-large"}, name="one"),
            serving(second, models={"next": "own-next"}, name="two"),
            serving(third, models={"next": "own-next"}, name="three"),
            models=COPIED,
        )
        assert (await gateway.ask(chat(model="large", stream=True))).status == 200
        line = await gateway.line("mirror")
        assert (line["outcome"], line["attempts"]) == ("engine_failed", 1)
        assert len(relayed(second)) + len(relayed(third)) == 1
