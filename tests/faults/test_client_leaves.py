"""The client goes away: the engine's connection is closed at once, at whatever stage, and the request is settled once.

What is asserted is the order of events, never a time.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from concurrent.futures import Executor, Future
from typing import Any

import pytest

from gateway.settings import Bounds, Upstream
from tests.conftest import Connect
from tests.support.client import RawClient
from tests.support.gateway import (
    AUTH,
    CHAT,
    ENGINE_MODEL,
    MODEL,
    Gateway,
    StartGateway,
    chat,
    post_bytes,
    relayed,
    until,
)
from tests.support.recordings import load
from tests.support.script import DONE, Do, Gate, Script, event_stream, json_answer, play
from tests.support.sockets import black_hole
from tests.support.upstream import ScriptedUpstream

STREAM = play(load("vllm", "chat_stream"))
EVENTS = load("vllm", "chat_stream").events()

Leave = Callable[[RawClient], Awaitable[None]]


async def half_close(client: RawClient) -> None:
    """Say that nothing more comes; to a server this is a client that left."""
    client.half_close()


WAYS: dict[str, Leave] = {"close": RawClient.close, "reset": RawClient.reset, "half-close": half_close}


@pytest.fixture(params=list(WAYS.values()), ids=list(WAYS))
def leave(request: pytest.FixtureRequest) -> Leave:
    """Each way to go in turn."""
    way: Leave = request.param
    return way


async def assert_stopped(gateway: Gateway, upstream: ScriptedUpstream, index: int = 0) -> None:
    """The engine saw its connection closed after the client went, and the request gave back what it held."""
    closed = await upstream.saw("closed", connection=relayed(upstream)[-1].connection)
    assert upstream.journal.find("ended", who="client")[-1].index < closed.index
    await gateway.idle()
    assert gateway.replica.pool.endpoints[0].connections.open == 0
    line = await gateway.line(index=index)
    assert (line["outcome"], line["status"]) == ("client_gone", 499)
    assert len(gateway.lines("request")) == index + 1


STAGES = {
    "in a silent prefill": (0, 0),
    "after the engine's headers": (STREAM.after_head, 0),
    "inside the first event": (STREAM.inside_frame(0), 0),
    "between events": (STREAM.after_frame(1), 2),
    "inside an event": (STREAM.inside_frame(2), 2),
    "inside a chunk's size line": (STREAM.inside_size_line(2), 2),
}


async def test_the_engine_is_told_at_every_stage(
    gateway: Gateway, upstream: ScriptedUpstream, connect: Connect, leave: Leave
) -> None:
    for index, (stage, (place, events)) in enumerate(STAGES.items()):
        upstream.journal.note("test", stage)
        upstream.queue(STREAM.do(Do.UNTIL_READ, place).do(Do.HANG, place), path=CHAT)
        client = await connect(gateway.url)
        client.post(CHAT, chat(stream=True), AUTH)
        await upstream.saw("hanging", times=index + 1)
        if events:
            await client.head()
        for _ in range(events):
            assert await client.event(), stage
        await leave(client)
        await assert_stopped(gateway, upstream, index)
        assert gateway.lines("request")[index].get("events", 0) == events, stage


async def test_a_whole_answer_is_stopped_too(
    gateway: Gateway, upstream: ScriptedUpstream, connect: Connect, leave: Leave
) -> None:
    script = json_answer(load("vllm", "chat_basic").body)
    upstream.queue(script.do(Do.UNTIL_READ, script.after_head + 100).do(Do.HANG, script.after_head + 100), path=CHAT)
    client = await connect(gateway.url)
    client.post(CHAT, chat(), AUTH)
    await upstream.saw("hanging")
    await leave(client)
    await assert_stopped(gateway, upstream)


async def test_between_heartbeats(gateway: Gateway, upstream: ScriptedUpstream, connect: Connect, leave: Leave) -> None:
    """The status is sent, no event has come yet."""
    upstream.queue(STREAM.do(Do.HANG, 0), path=CHAT)
    client = await connect(gateway.url)
    client.post(CHAT, chat(stream=True), AUTH)
    await upstream.saw("hanging")
    gateway.advance(15)
    await client.head()
    assert await client.event() == b": keep-alive\n\n"
    await leave(client)
    await assert_stopped(gateway, upstream)


async def test_while_its_own_bytes_wait_to_be_read(
    gateway: Gateway, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """A slow reader that gives up: the engine's stream was paused, and is closed now."""
    upstream.queue(event_stream([EVENTS[0], *[b'data: {"pad":"%b"}\n\n' % (b"x" * 60_000)] * 400, DONE]), path=CHAT)
    client = await connect(gateway.url, receive_buffer=4096)
    client.post(CHAT, chat(stream=True), AUTH)
    await client.head()
    client.stop_reading()
    await gateway.paused()
    await client.reset()
    await assert_stopped(gateway, upstream)


async def test_after_the_end_mark_is_no_abort(
    gateway: Gateway, upstream: ScriptedUpstream, connect: Connect, leave: Leave
) -> None:
    """SDKs close right after ``[DONE]``: the request went well, and the engine's connection is kept."""
    gate = Gate()
    upstream.queue(STREAM.do(gate, STREAM.before_last_chunk), STREAM, path=CHAT)
    client = await connect(gateway.url)
    client.post(CHAT, chat(stream=True), AUTH)
    await gate.reached()
    await client.head()
    assert (await client.events())[-1] == DONE
    await leave(client)
    gate.open()
    await upstream.saw("answered", request=relayed(upstream)[0].index)
    assert (await gateway.line())["outcome"] == "ok"
    await gateway.idle()
    connections = gateway.replica.pool.endpoints[0].connections
    await gateway.ask(chat(stream=True))
    assert (connections.accepted, connections.open) == (1, 1)


async def test_while_its_body_is_on_the_way(
    gateway: Gateway, upstream: ScriptedUpstream, connect: Connect, leave: Leave
) -> None:
    """No engine hears of it."""
    request = post_bytes(chat())
    client = await connect(gateway.url)
    await client.send_pieces([request[:-20]])
    await until(lambda: bool(gateway.replica.edge.active), "the request was not let in")
    await leave(client)
    line = await gateway.line()
    assert (line["outcome"], line["status"]) == ("client_gone", 499)
    await gateway.idle()
    assert relayed(upstream) == []


async def test_while_the_engine_is_being_connected_to(
    start_gateway: StartGateway, connect: Connect, leave: Leave, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attempt is given up: no connection comes to stand afterwards."""
    # The gateway's first look at the engine waits this long in vain.
    monkeypatch.setattr("gateway.serving.watch.LOOK_TIMEOUT", 0.01)
    with black_hole() as (host, port):
        gateway = await start_gateway(Upstream(url=f"http://{host}:{port}", models={MODEL: ENGINE_MODEL}))
        # The first look at the engine failed; the request is to meet one that is believed to be there.
        gateway.replica.pool.endpoints[0].up()
        client = await connect(gateway.url)
        client.post(CHAT, chat(stream=True), AUTH)
        connections = gateway.replica.pool.endpoints[0].connections
        await until(lambda: connections.open == 1, "no connection was tried")
        await leave(client)
        assert (await gateway.line())["outcome"] == "client_gone"
        await gateway.idle()
        assert (connections.open, connections.accepted) == (0, 0)


class HeldExecutor(Executor):
    """Takes work and does it only when the test says so."""

    def __init__(self) -> None:
        self.work: list[tuple[Future[Any], Callable[[], Any]]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Keep the work."""
        future: Future[Any] = Future()
        self.work.append((future, lambda: fn(*args, **kwargs)))
        return future

    def run(self) -> None:
        """Do all of it now, as a thread would that cannot know that nobody waits any more."""
        for future, work in self.work:
            if future.set_running_or_notify_cancel():
                future.set_result(work())


async def test_while_a_step_waits(
    start_gateway: StartGateway, upstream: ScriptedUpstream, connect: Connect, leave: Leave
) -> None:
    """A large body is being read in a thread: the step is dropped, and its result, when it comes, starts nothing."""
    gateway = await start_gateway(upstream, bounds=Bounds(offload_above=100))
    held = HeldExecutor()
    gateway.replica.edge._executor = held
    client = await connect(gateway.url)
    client.post(CHAT, chat(stream=True, user="x" * 200), AUTH)
    await until(lambda: bool(held.work), "the body was not given to a thread")
    await leave(client)
    assert (await gateway.line())["outcome"] == "client_gone"
    held.run()
    await gateway.idle()
    assert relayed(upstream) == []
    assert len(gateway.lines("request")) == 1
    assert gateway.lines("internal_error") == []


async def test_many_at_once(gateway: Gateway, upstream: ScriptedUpstream, connect: Connect) -> None:
    """32 of 32 engine streams end, at different stages."""
    hung: list[Script] = [STREAM.do(Do.HANG, place) for place, _ in STAGES.values()]
    upstream.queue(*(hung[number % len(hung)] for number in range(32)), path=CHAT)
    clients = [await connect(gateway.url) for _ in range(32)]
    for client in clients:
        client.post(CHAT, chat(stream=True), AUTH)
    await upstream.saw("hanging", times=32)
    for client in clients:
        await client.close()
    await upstream.saw("closed", times=32)
    await gateway.idle()
    await gateway.line(index=31)
    assert {line["outcome"] for line in gateway.lines("request")} == {"client_gone"}
    assert gateway.replica.pool.endpoints[0].connections.open == 0
