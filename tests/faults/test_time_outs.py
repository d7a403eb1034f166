"""Who stays silent is given up after the time configured for that silence; the tests move the clock."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest

from gateway.settings import Stream, Timeouts, Upstream
from tests.conftest import Connect
from tests.support.client import RawClient, Response
from tests.support.gateway import (
    AUTH,
    CHAT,
    ENGINE_MODEL,
    MODEL,
    Gateway,
    StartGateway,
    chat,
    relayed,
    serving,
    until,
)
from tests.support.journal import Journal
from tests.support.recordings import load
from tests.support.script import DONE, Do, Gate, event_stream, json_answer, nothing, play
from tests.support.sockets import black_hole
from tests.support.upstream import ScriptedUpstream

STREAM = play(load("vllm", "chat_stream"))
TIMES = Timeouts(connect=5, first_byte=60, idle=20, total=300, write=30)
ALMOST = 0.001


@pytest.fixture
async def timed(start_gateway: StartGateway, upstream: ScriptedUpstream) -> Gateway:
    """A gateway without heartbeats, so that only time-outs happen."""
    return await start_gateway(upstream, timeouts=TIMES, stream=Stream(heartbeat_after=0))


async def nothing_comes(client: RawClient) -> None:
    """Let the event loop run, and check that the client was told nothing."""
    for _ in range(20):
        await asyncio.sleep(0)
    assert not client.buffer
    assert client.end is None


async def assert_gave_up(gateway: Gateway, upstream: ScriptedUpstream, told: str, index: int = 0) -> None:
    """The engine's connection is closed, nothing is held, and the log says whose fault it was."""
    await upstream.saw("closed", connection=relayed(upstream)[-1].connection)
    await gateway.idle()
    assert gateway.replica.pool.endpoints[0].connections.open == 0
    line = await gateway.line(index=index)
    assert (line["outcome"], line["error"]) == ("engine_slow", told)


def assert_is_slow(answer: Response, told: str) -> None:
    assert (answer.status, answer.json()["error"]["code"]) == (504, "engine_timeout")
    assert answer.json()["error"]["message"] == told
    assert answer.json()["error"]["type"] == "server_error"


async def test_an_answer_that_does_not_begin(timed: Gateway, upstream: ScriptedUpstream, connect: Connect) -> None:
    """A silent prefill is long, so its time is its own; headers alone are no beginning of a stream."""
    stages = [(True, place) for place in (0, STREAM.after_head - 5, STREAM.after_head, STREAM.inside_frame(0))]
    told = "The engine did not begin its answer for 60 s."
    for index, (stream, place) in enumerate([*stages, (False, 0)]):
        upstream.queue(STREAM.do(Do.UNTIL_READ, place).do(Do.HANG, place), path=CHAT)
        client = await connect(timed.url)
        client.post(CHAT, chat(stream=stream), AUTH)
        await upstream.saw("hanging", times=index + 1)
        timed.advance(60 - ALMOST)
        await nothing_comes(client)
        timed.advance(2 * ALMOST)
        assert_is_slow(await client.response(), told)
        await assert_gave_up(timed, upstream, told, index)


@pytest.mark.parametrize("place", [STREAM.after_frame(1), STREAM.inside_frame(2), STREAM.inside_size_line(2)])
async def test_a_stream_that_falls_silent(
    timed: Gateway, upstream: ScriptedUpstream, connect: Connect, place: int
) -> None:
    upstream.queue(STREAM.do(Do.UNTIL_READ, place).do(Do.HANG, place), path=CHAT)
    client = await connect(timed.url)
    client.post(CHAT, chat(stream=True), AUTH)
    await client.head()
    assert await client.event()
    assert await client.event()
    await upstream.saw("hanging")
    timed.advance(20 - ALMOST)
    await nothing_comes(client)
    timed.advance(2 * ALMOST)
    told = "The engine went silent for 20 s."
    event = await client.event()
    assert event is not None
    assert json.loads(event.removeprefix(b"data: "))["error"]["message"] == told
    assert await client.event() is None
    assert await client.ended() == "close"
    await assert_gave_up(timed, upstream, told)


async def test_each_event_starts_the_time_anew(timed: Gateway, upstream: ScriptedUpstream, connect: Connect) -> None:
    """A slow stream that goes on is no silent one."""
    script = STREAM
    gates = [Gate() for _ in STREAM.frames]
    for index, gate in enumerate(gates):
        script = script.do(gate, STREAM.frames[index][0])
    upstream.queue(script, path=CHAT)
    client = await connect(timed.url)
    client.post(CHAT, chat(stream=True), AUTH)
    for index, gate in enumerate(gates):
        await gate.reached()
        timed.advance(19)
        gate.open()
        if index == 0:
            await client.head()
        assert await client.event()
    assert (await timed.line())["outcome"] == "ok"


async def test_a_whole_answer_that_stops_in_the_middle(
    timed: Gateway, upstream: ScriptedUpstream, connect: Connect
) -> None:
    script = json_answer(load("vllm", "chat_basic").body)
    place = script.after_head + 10
    upstream.queue(script.do(Do.UNTIL_READ, place).do(Do.HANG, place), path=CHAT)
    client = await connect(timed.url)
    client.post(CHAT, chat(), AUTH)
    await upstream.saw("hanging")
    timed.advance(20 + ALMOST)
    told = "The engine went silent for 20 s."
    assert_is_slow(await client.response(), told)
    await assert_gave_up(timed, upstream, told)


async def test_a_request_that_takes_too_long_altogether(
    timed: Gateway, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """However lively the stream is."""
    gate = Gate()
    pad = b'data: {"model":"smollm2"}\n\n'
    script = event_stream([pad] * 40)
    for index in range(20):
        script = script.do(gate if index == 19 else Do.UNTIL_READ, script.after_frame(index))
    upstream.queue(script, path=CHAT)
    client = await connect(timed.url)
    client.post(CHAT, chat(stream=True), AUTH)
    await gate.reached()
    await client.head()
    for _ in range(20):
        assert await client.event()
    timed.clock.advance(300)
    gate.open()
    timed.replica.deadlines.run_due()
    last = (await client.events())[-1]
    assert json.loads(last.removeprefix(b"data: "))["error"]["message"] == "The request took longer than 300 s."
    assert (await timed.line())["outcome"] == "engine_slow"
    await timed.idle()


@pytest.fixture
async def unreachable(start_gateway: StartGateway, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Gateway]:
    """A gateway whose only engine neither accepts nor refuses connections."""
    # The gateway's first look at the engine waits this long in vain.
    monkeypatch.setattr("gateway.serving.watch.LOOK_TIMEOUT", 0.01)
    with black_hole() as (host, port):
        url = Upstream(url=f"http://{host}:{port}", models={MODEL: ENGINE_MODEL})
        gateway = await start_gateway(url, timeouts=TIMES)
        gateway.replica.pool.endpoints[0].up()
        yield gateway


@pytest.mark.parametrize("stream", [True, False])
async def test_a_connection_that_does_not_come(unreachable: Gateway, connect: Connect, stream: bool) -> None:
    """The engine is down until it is seen again; the client may try again."""
    client = await connect(unreachable.url)
    client.post(CHAT, chat(stream=stream), AUTH)
    endpoint = unreachable.replica.pool.endpoints[0]
    await until(lambda: endpoint.connections.open == 1, "no connection was tried")
    unreachable.advance(5 - ALMOST)
    await nothing_comes(client)
    unreachable.advance(2 * ALMOST)
    answer = await client.response()
    assert (answer.status, answer.json()["error"]["code"]) == (503, "server_is_overloaded")
    assert answer.header("retry-after") == "1"
    assert (endpoint.healthy, endpoint.trouble) == (False, "no connection within 5 s")
    assert endpoint.connections.open == 0
    await unreachable.idle()


async def test_another_engine_is_asked_when_a_connection_does_not_come(
    start_gateway: StartGateway, upstream: ScriptedUpstream, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.serving.watch.LOOK_TIMEOUT", 0.01)
    upstream.always(STREAM, path=CHAT)
    with black_hole() as (host, port):
        gone = Upstream(url=f"http://{host}:{port}", models={MODEL: ENGINE_MODEL})
        gateway = await start_gateway(gone, serving(upstream), timeouts=TIMES)
        # Long up, both of them: of two newcomers the one that came earlier would get both requests.
        for endpoint in gateway.replica.pool.endpoints:
            endpoint.up()
            endpoint.ramp_until = 0.0
        # One of the two requests meets the engine that cannot be reached, whichever is asked first.
        clients = [await connect(gateway.url) for _ in range(2)]
        for client in clients:
            client.post(CHAT, chat(stream=True), AUTH)
        await until(lambda: len(relayed(upstream)) == 1, "the engine that can be reached was not asked")
        gateway.advance(5)
        for client in clients:
            assert (await client.response()).events()[-1] == DONE
        assert sorted(line["attempts"] for line in gateway.lines("request")) == [1, 2]


async def test_another_engine_is_not_asked_when_one_is_slow(
    start_gateway: StartGateway, upstream: ScriptedUpstream, connect: Connect, journal: Journal
) -> None:
    """It may still be working on the request, and the client's time is used up."""
    async with ScriptedUpstream(journal=journal, name="second") as second:
        for engine in (upstream, second):
            engine.always(nothing().do(Do.HANG), path=CHAT)
        gateway = await start_gateway(serving(upstream), serving(second), timeouts=TIMES)
        client = await connect(gateway.url)
        client.post(CHAT, chat(), AUTH)
        await journal.saw("hanging")
        gateway.advance(60)
        assert (await client.response()).status == 504
        assert len(relayed(upstream)) + len(relayed(second)) == 1


async def test_a_client_that_takes_nothing_is_cut_off(
    timed: Gateway, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """The engine is not at fault while it waits: its idle time does not count, the client's write time does."""
    pad = b'data: {"pad":"%b"}\n\n' % (b"x" * 60_000)
    upstream.queue(event_stream([*[pad] * 400, DONE]), path=CHAT)
    client = await connect(timed.url, receive_buffer=4096)
    client.post(CHAT, chat(stream=True), AUTH)
    await client.head()
    client.stop_reading()
    await timed.paused()
    timed.advance(30 - ALMOST)
    assert timed.replica.edge.active
    timed.advance(2 * ALMOST)
    await upstream.saw("closed", connection=relayed(upstream)[0].connection)
    await timed.idle()
    assert (await timed.line())["outcome"] == "client_gone"
    client.read_on()
    answer = await client.response()
    assert not answer.complete


async def test_a_client_that_takes_its_time_is_waited_for(
    timed: Gateway, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """Reading on in time, it gets everything, and the engine's own time starts anew."""
    timed.hold_little()
    pad = b'data: {"pad":"%b"}\n\n' % (b"x" * 60_000)
    upstream.queue(event_stream([*[pad] * 50, DONE]), path=CHAT)
    client = await connect(timed.url, receive_buffer=4096)
    client.post(CHAT, chat(stream=True), AUTH)
    await client.head()
    client.stop_reading()
    await timed.paused()
    timed.advance(29)
    client.read_on()
    assert (await client.events())[-1] == DONE
    assert (await timed.line())["outcome"] == "ok"


async def test_an_idle_engine_connection_is_not_used_for_ever(
    gateway: Gateway, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Engines close idle connections after some seconds; ours are given up before they would be stale."""
    upstream.always(json_answer(b"{}"), path=CHAT)
    await gateway.ask(chat())
    await gateway.ask(chat())
    connections = gateway.replica.pool.endpoints[0].connections
    assert connections.accepted == 1
    monkeypatch.setattr("gateway.serving.upstream.IDLE_AFTER", 0)
    await gateway.ask(chat())
    assert (connections.accepted, connections.open) == (2, 1)
