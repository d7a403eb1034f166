"""The end: announce, close the listener, drain, tell whoever is left, and no request is lost on the way."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway.settings import Shutdown
from tests.conftest import Connect
from tests.support.client import RawClient
from tests.support.gateway import (
    AUTH,
    CHAT,
    ENGINE_MODEL,
    KEY,
    MODEL,
    Face,
    Gateway,
    StartGateway,
    chat,
    give_database,
    relayed,
    serving,
)
from tests.support.journal import PATIENCE
from tests.support.recordings import load
from tests.support.script import DONE, Do, Gate, json_answer, nothing, play
from tests.support.sockets import free_port
from tests.support.upstream import ScriptedUpstream

STREAM = play(load("vllm", "chat_stream"))
FOR_EVER = 1000.0


def stopping(gateway: Gateway) -> asyncio.Task[None]:
    """Tell the gateway to stop, as SIGTERM does, and return what ends when it has."""
    gateway.replica.stop()
    return asyncio.create_task(gateway.replica.until_stopped())


async def over(stopped: asyncio.Task[None]) -> None:
    async with asyncio.timeout(PATIENCE):
        await stopped


async def until_refused(url: str) -> None:
    """Wait until nobody listens there any more."""
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                client = await RawClient.connect(url)
            except ConnectionRefusedError:
                return
            await client.close()


async def begun_stream(gateway: Gateway, connect: Connect) -> RawClient:
    """Return a client in the middle of a stream."""
    client = await connect(gateway.url)
    client.post(CHAT, chat(stream=True), AUTH)
    await client.head()
    assert await client.event()
    return client


async def test_announced_first_it_still_serves(
    start_gateway: StartGateway, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """A load balancer sees that it is not ready, and until it has reacted requests are answered, each with a close."""
    gateway = await start_gateway(upstream, shutdown=Shutdown(announce=FOR_EVER, drain=FOR_EVER))
    kept = await connect(gateway.url, name="kept")
    upstream.always(json_answer(b"{}"), path=CHAT)
    kept.post(CHAT, chat(), AUTH)
    assert (await kept.response()).header("connection") is None
    stopped = stopping(gateway)
    await gateway.line("stopping")
    assert [(await gateway.get(f"/health/{what}")).status for what in ("ready", "live")] == [503, 200]
    assert (await gateway.get("/health/ready", admin=True)).status == 503
    kept.post(CHAT, chat(), AUTH)
    answer = await kept.response()
    assert (answer.status, answer.header("connection")) == (200, "close")
    assert await kept.ended() == "close"
    upstream.always(STREAM, path=CHAT)
    new = await connect(gateway.url, name="new")
    new.post(CHAT, chat(stream=True), AUTH)
    streamed = await new.response()
    assert (streamed.header("connection"), streamed.events()[-1]) == ("close", DONE)
    assert await new.ended() == "close"
    gateway.replica.stop()
    await over(stopped)


async def test_then_the_listener_closes_and_what_runs_may_finish(
    start_gateway: StartGateway, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """Idle connections go, new ones are refused, a stream and a whole answer in flight come to their end."""
    gateway = await start_gateway(upstream, shutdown=Shutdown(announce=0, drain=FOR_EVER))
    gate = Gate()
    upstream.queue(
        json_answer(b"{}"), STREAM.do(gate, STREAM.after_frame(1)), json_answer(b"{}").do(gate, 0), path=CHAT
    )
    idle = await connect(gateway.url, name="idle")
    idle.post(CHAT, chat(), AUTH)
    await idle.response()
    streaming = await begun_stream(gateway, connect)
    waiting = await connect(gateway.url)
    waiting.post(CHAT, chat(), AUTH)
    await upstream.saw("gate", times=2)
    url = gateway.url
    stopped = stopping(gateway)
    assert await idle.ended() == "close"
    await until_refused(url)
    assert not stopped.done()
    gate.open()
    assert (await streaming.events())[-1] == DONE
    assert await streaming.ended() == "close"
    answer = await waiting.response()
    assert (answer.status, answer.header("connection")) == (200, "close")
    assert await waiting.ended() == "close"
    await over(stopped)
    assert gateway.lines("stopped")[0]["cut_off"] == 0
    assert [line["outcome"] for line in gateway.lines("request")] == ["ok"] * 3


async def test_what_is_left_after_the_drain_is_told(
    start_gateway: StartGateway, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """A stream by an event, whoever has no answer yet by a status; the engine's connections are closed."""
    gateway = await start_gateway(upstream, shutdown=Shutdown(announce=0, drain=0))
    upstream.queue(STREAM.do(Do.HANG, STREAM.after_frame(1)), path=CHAT)
    upstream.always(nothing().do(Do.HANG), path=CHAT)
    streaming = await begun_stream(gateway, connect)
    assert await streaming.event()
    silent, whole = await connect(gateway.url), await connect(gateway.url)
    silent.post(CHAT, chat(stream=True), AUTH)
    whole.post(CHAT, chat(), AUTH)
    await upstream.saw("hanging", times=3)
    stopped = stopping(gateway)
    (event,) = await streaming.events()
    assert json.loads(event.removeprefix(b"data: "))["error"]["code"] == "server_shutting_down"
    assert await streaming.ended() == "close"
    for client in (silent, whole):
        answer = await client.response()
        assert (answer.status, answer.json()["error"]["code"]) == (503, "server_shutting_down")
        assert (answer.header("retry-after"), answer.header("connection")) == ("1", "close")
        assert await client.ended() == "close"
    await over(stopped)
    await upstream.saw("closed", times=3)
    assert gateway.lines("stopped")[0]["cut_off"] == 3
    assert [line["outcome"] for line in gateway.lines("request")] == ["shutdown"] * 3


@pytest.mark.parametrize(
    ("path", "name", "event"),
    [
        ("/v1/messages", "messages_stream", b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error"'),
        ("/v1/responses", "responses_stream", b'event: error\ndata: {"type":"error","code":"server_shutting_down"'),
    ],
)
async def test_each_dialect_is_told_in_its_own_words(
    start_gateway: StartGateway, upstream: ScriptedUpstream, connect: Connect, path: str, name: str, event: bytes
) -> None:
    gateway = await start_gateway(upstream, shutdown=Shutdown(announce=0, drain=0))
    script = play(load("vllm", name), pieces=load("vllm", name).events())
    # The first events are only announcements.
    upstream.queue(script.do(Do.HANG, script.after_frame(2)), path=path)
    client = await connect(gateway.url)
    client.post(path, chat(stream=True, input="x"), AUTH)
    await client.head()
    for _ in range(3):
        assert await client.event()
    stopped = stopping(gateway)
    (last,) = await client.events()
    assert last.startswith(event)
    await over(stopped)


async def test_asked_twice_it_ends_now(
    start_gateway: StartGateway, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """Whoever presses Ctrl-C again does not want to wait; clients are told all the same."""
    gateway = await start_gateway(upstream, shutdown=Shutdown(announce=FOR_EVER, drain=FOR_EVER))
    upstream.queue(STREAM.do(Do.HANG, STREAM.after_frame(0)), path=CHAT)
    client = await begun_stream(gateway, connect)
    stopped = stopping(gateway)
    await gateway.line("stopping")
    gateway.replica.stop()
    (event,) = await client.events()
    assert b'"server_shutting_down"' in event
    await over(stopped)


async def test_a_client_that_takes_nothing_does_not_hold_it_up(
    start_gateway: StartGateway, upstream: ScriptedUpstream, connect: Connect
) -> None:
    gateway = await start_gateway(upstream, shutdown=Shutdown(announce=0, drain=0))
    pad = b'data: {"pad":"%b"}\n\n' % (b"x" * 60_000)
    upstream.queue(play(load("vllm", "chat_stream"), pieces=[pad] * 200), path=CHAT)
    client = await connect(gateway.url, receive_buffer=4096)
    client.post(CHAT, chat(stream=True), AUTH)
    await client.head()
    client.stop_reading()
    await gateway.paused()
    await over(stopping(gateway))
    assert not gateway.replica.listeners[0].state.connections
    client.read_on()
    answer = await client.response()
    assert answer.complete == (b'"server_shutting_down"' in answer.events()[-1])


@asynccontextmanager
async def process(face: Face, folder: Path, upstream: ScriptedUpstream, **shutdown: Any) -> AsyncIterator[Any]:
    """Run a replica as the process it is in production; yields it with its address as ``url``.

    Starting one takes longer than a hundred tests, so each test has one face here; what both do is shown above.
    """
    engine = serving(upstream)
    port = free_port()
    config = {
        "listen": {"port": port, "face": face},
        "admin": {"enabled": False},
        "data_dir": str(folder),
        "keys": [{"name": "alice", "key": KEY}],
        "upstreams": [{"url": engine.url, "models": {MODEL: ENGINE_MODEL}}],
        "shutdown": shutdown,
    }
    give_database(folder / "forebay.db")
    file = folder / "forebay.yaml"
    file.write_text(yaml.safe_dump(config))
    started = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gateway.app", "--config", str(file), stderr=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(PATIENCE * 3):
            assert started.stderr is not None
            while b'"started"' not in (line := await started.stderr.readline()):
                assert line, f"the gateway ended with code {await started.wait()} before it served"
        yield started, f"http://127.0.0.1:{port}"
    finally:
        if started.returncode is None:
            started.kill()
        # Also reads its log to the end, which the pipe needs to be closed.
        await started.communicate()


@pytest.mark.parametrize("face", ["protocol"])
async def test_sighup_reloads_the_process_and_sigterm_ends_it_with_code_0(
    face: Face, tmp_path: Path, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """With a stream in flight that comes to its end first, and its port free afterwards. SIGHUP before that has it read
    its file again, also when it is the same: a secret beside it, or the log's own file, may have changed."""
    gate = Gate()
    upstream.queue(STREAM.do(gate, STREAM.after_frame(1)), path=CHAT)
    async with process(face, tmp_path, upstream, announce=0, drain=FOR_EVER) as (gateway, url):
        gateway.send_signal(signal.SIGHUP)
        async with asyncio.timeout(PATIENCE):
            while b'"reloaded"' not in await gateway.stderr.readline():
                continue
        client = await connect(url)
        client.post(CHAT, chat(stream=True), AUTH)
        await gate.reached()
        gateway.send_signal(signal.SIGTERM)
        async with asyncio.timeout(PATIENCE):
            while b'"stopping"' not in await gateway.stderr.readline():
                continue
        gate.open()
        assert (await client.response()).events()[-1] == DONE
        async with asyncio.timeout(PATIENCE):
            assert await gateway.wait() == 0
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", int(url.rpartition(":")[2])))


@pytest.mark.parametrize("face", ["asgi"])
async def test_a_second_sigterm_ends_it_now(
    face: Face, tmp_path: Path, upstream: ScriptedUpstream, connect: Connect
) -> None:
    upstream.queue(STREAM.do(Do.HANG, STREAM.after_frame(0)), path=CHAT)
    async with process(face, tmp_path, upstream, announce=FOR_EVER, drain=FOR_EVER) as (gateway, url):
        client = await connect(url)
        client.post(CHAT, chat(stream=True), AUTH)
        await client.head()
        assert await client.event()
        gateway.send_signal(signal.SIGTERM)
        async with asyncio.timeout(PATIENCE):
            while b'"stopping"' not in await gateway.stderr.readline():
                continue
        gateway.send_signal(signal.SIGTERM)
        (event,) = await client.events()
        assert b'"server_shutting_down"' in event
        async with asyncio.timeout(PATIENCE):
            assert await gateway.wait() == 0
    await upstream.saw("closed", connection=relayed(upstream)[0].connection)


async def test_a_request_whose_body_is_still_coming_is_told(
    start_gateway: StartGateway, upstream: ScriptedUpstream, connect: Connect
) -> None:
    gateway = await start_gateway(upstream, shutdown=Shutdown(announce=0, drain=0))
    client = await connect(gateway.url)
    headers = [("content-type", "application/json"), ("content-length", "1000"), *AUTH]
    head = "".join(f"{name}: {value}\r\n" for name, value in [("host", "test"), *headers])
    await client.send_pieces([f"POST {CHAT} HTTP/1.1\r\n{head}\r\n{{".encode()])
    stopped = stopping(gateway)
    answer = await client.response()
    assert (answer.status, answer.json()["error"]["code"]) == (503, "server_shutting_down")
    assert answer.header("connection") == "close"
    await over(stopped)
    assert [line["outcome"] for line in gateway.lines("request")] == ["shutdown"]
