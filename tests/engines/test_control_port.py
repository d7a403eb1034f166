"""The agent as a program of its own, as in an engine's image: its control port, its signals, its exit code."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, suppress
from pathlib import Path

import httpx
import pytest

from engines import minder
from engines.minder import DRAINING, FAILED, READY, SERVING, STOPPED, WAITING, arguments_digest, this_program
from engines.minding import MinderClient, MinderError
from tests.engines.standalone import AS_A_FILE, QUICK, TOKEN, Standalone, Start
from tests.engines.test_minder import GONE_WITHIN, assert_gone
from tests.support.table import each


async def test_it_tells_how_its_engine_is(start: Start) -> None:
    agent = start()
    state = await agent.until(SERVING)
    assert (state.name, state.address, state.starts, state.restarts) == ("fake", agent.engine_address, 1, 0)
    assert state.arguments == arguments_digest(agent.command, "")
    assert state.minder_pid == agent.family()[1]
    assert state.pid is not None
    assert os.getpgid(state.pid) == state.pid
    assert (state.kept, state.owned, state.gated) == (False, False, False)


async def test_sigterm_ends_it_in_order_with_code_0(start: Start) -> None:
    """As a container is ended. Nobody follows, so nobody could tell that it has drained: a short time is waited."""
    agent = start("--drain", "0.05", program=AS_A_FILE)
    state = await agent.until(SERVING)
    agent.process.send_signal(signal.SIGTERM)
    assert agent.wait() == 0
    assert agent.log.read_text().endswith("bye\n")
    assert agent.process.stdout is not None
    assert agent.process.stdout.read() == agent.log.read_bytes()
    assert state.pid is not None
    assert_gone(state.pid)
    assert not Path(agent.control.removeprefix("unix:")).exists()
    assert not Path(agent.engine_address.removeprefix("unix:")).exists()


async def test_a_second_sigterm_waits_no_longer(start: Start) -> None:
    agent = start("--drain", "3600", "--grace", "3600", engine=("--stubborn", "--child"))
    state = await agent.until(SERVING)
    agent.process.send_signal(signal.SIGTERM)
    await agent.until(DRAINING)
    agent.process.send_signal(signal.SIGTERM)
    assert agent.wait() == 0
    assert state.pid is not None
    assert_gone(state.pid)


async def test_an_engine_that_is_given_up_gives_the_container_its_exit_code(start: Start) -> None:
    agent = start(*QUICK, "--restart", "never_ready=2", engine=("--crash", "ValueError: no such model"))
    assert agent.wait() == 3
    assert agent.log.read_text() == "ValueError: no such model\n" * 2


async def test_told_to_stay_it_can_be_asked_why_and_started_again(start: Start) -> None:
    agent = start(*QUICK, "--restart", "never_ready=2", "--stay", engine=("--crash", "ValueError: no such model"))
    state = await agent.until(FAILED)
    assert re.fullmatch(
        r"fake ended by itself after \d+ s \(exit code 3\): ValueError: no such model \(the whole log: .*engine\.log\);"
        r" given up: it ended 2 times and was never ready",
        state.message,
    )
    # With arguments it can work with, it does.
    good = agent.command[1 : agent.command.index("--crash")]
    await agent.client.call("PUT", "/arguments", arguments=good)
    assert (await agent.client.call("GET", "/state")).arguments == arguments_digest([agent.command[0], *good], "")
    await agent.client.call("POST", "/start")
    assert (await agent.until(SERVING)).starts == 3


async def test_a_stop_while_it_waits_is_obeyed_at_once(start: Start) -> None:
    agent = start("--restart", "first=3600", "--restart", "cap=3600")
    state = await agent.until(SERVING)
    assert state.pid is not None
    os.kill(state.pid, signal.SIGKILL)
    waiting = await agent.until(WAITING)
    assert re.search(r"killed by SIGKILL, .*; starting it again in \d+ s", waiting.message)
    await agent.client.call("POST", "/stop", grace=0)
    await agent.until(STOPPED)
    await agent.client.call("POST", "/restart")
    assert (await agent.until(SERVING, starts=2)).restarts == 0


async def test_no_traffic_before_the_owner_says_so(start: Start) -> None:
    agent = start("--gated")
    state = await agent.until(READY)
    with pytest.raises(MinderError, match="fake is ready in its start number 1"):
        await agent.client.call("POST", "/release", starts=2)
    assert (await agent.client.call("POST", "/release", starts=state.starts)).phase == SERVING
    await agent.client.call("POST", "/restart", grace=10)
    await agent.until(READY, starts=2)


async def test_a_restart_waits_for_all_who_follow(start: Start) -> None:
    """Each gateway tells when nothing of its own is under way; only then does the engine hear SIGTERM."""
    agent = start()
    await agent.until(SERVING)
    async with aclosing(agent.client.events(follower="a")) as a, aclosing(agent.client.events(follower="b")) as b:
        assert [(await anext(one)).phase for one in (a, b)] == [SERVING, SERVING]  # type: ignore[union-attr]
        assert (await agent.client.call("POST", "/restart", drain=3600, grace=10)).phase == DRAINING
        assert (await anext(a)).phase == DRAINING  # type: ignore[union-attr]
        assert not (await agent.client.call("POST", "/drained", follower="a")).drained
        assert (await agent.client.call("POST", "/drained", follower="nobody")).phase == DRAINING
        assert (await agent.client.call("POST", "/drained", follower="b")).drained
        assert (await agent.until(SERVING, starts=2)).restarts == 0


async def test_gateways_that_have_left_are_not_waited_for(start: Start) -> None:
    """A kept engine is stopped when its gateway is gone: with it, its requests are."""
    agent = start()
    await agent.until(SERVING)
    async with aclosing(agent.client.events(follower="a")) as events:
        assert (await anext(events)).phase == SERVING  # type: ignore[union-attr]
    await agent.client.call("POST", "/stop", drain=3600, grace=10, leave=True)
    assert agent.wait() == 0


async def test_a_drain_is_undone_by_start(start: Start) -> None:
    agent = start()
    first = await agent.until(SERVING)
    assert (await agent.client.call("POST", "/drain")).phase == DRAINING
    again = await agent.client.call("POST", "/start")
    assert (again.phase, again.pid) == (SERVING, first.pid)


async def test_a_stop_that_was_taken_back_is_forgotten(start: Start) -> None:
    """Told to stop and leave, and while it drains to go on: its engine is then minded as before."""
    agent = start(*QUICK)
    first = await agent.until(SERVING)
    assert first.pid is not None
    assert (await agent.client.call("POST", "/stop", drain=3600, leave=True)).phase == DRAINING
    assert (await agent.client.call("POST", "/start")).phase == SERVING
    os.kill(first.pid, signal.SIGKILL)
    assert (await agent.until(SERVING, starts=2)).restarts == 1


async def test_nobody_takes_back_a_signal(start: Start) -> None:
    """Nor an owner's death: an engine that goes on then is nobody's."""
    agent = start("--drain", "3600")
    await agent.until(SERVING)
    agent.process.send_signal(signal.SIGTERM)
    await agent.until(DRAINING)
    for call in ("/start", "/restart"):
        with pytest.raises(MinderError, match="refused: this agent is about to leave"):
            await agent.client.call("POST", call)
    await agent.client.call("POST", "/stop", grace=10)
    assert agent.wait() == 0


async def test_a_drain_that_is_undone_opens_no_gate(start: Start) -> None:
    """What has to be done before traffic was not done yet."""
    agent = start("--gated")
    await agent.until(READY)
    await agent.client.call("POST", "/drain")
    assert (await agent.client.call("POST", "/start")).phase == READY
    await agent.client.call("POST", "/release", starts=1)
    await agent.client.call("POST", "/drain")
    assert (await agent.client.call("POST", "/start")).phase == SERVING


async def test_its_log_is_shown_and_followed(start: Start) -> None:
    agent = start(engine=("--say", "one", "--say", "two"))
    await agent.until(SERVING)
    asked = [line async for line in agent.client.logs(1)]
    assert asked[-1].startswith("asked /health")
    async with aclosing(agent.client.logs(100, follow=True)) as lines:
        assert [await anext(lines), await anext(lines)] == ["one", "two"]
        await agent.client.call("POST", "/stop", grace=10, leave=True)
        assert [line async for line in lines][-1] == "bye"


async def test_on_tcp_only_who_has_the_token_is_let_in(start: Start) -> None:
    """And the engine does not inherit it."""
    agent = start(tcp=True)
    state = await agent.until(SERVING)
    assert state.pid is not None
    assert TOKEN.encode() not in Path(f"/proc/{state.pid}/environ").read_bytes()
    for token in (None, "x", "another-token-of-length", TOKEN + "x"):
        async with MinderClient(agent.control, token) as stranger:
            with pytest.raises(MinderError, match="refused: send the token as 'Authorization: Bearer TOKEN'"):
                await stranger.call("POST", "/stop")
            with pytest.raises(MinderError, match="refused: send the token"):
                await anext(stranger.events())
    assert (await agent.client.call("GET", "/state")).pid == state.pid


@pytest.fixture(scope="module")
def one_agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Standalone]:
    agent = Standalone(tmp_path_factory.mktemp("agent"))
    yield agent
    agent.end()


@pytest.fixture
async def unmoved(one_agent: Standalone) -> AsyncIterator[Standalone]:
    """An agent whose engine serves, and serves on after the test as if nothing had been."""
    async with MinderClient(one_agent.control) as client:
        one_agent.client = client
        before = await one_agent.until(SERVING)
        yield one_agent
        assert await client.call("GET", "/state") == before


@each(
    ("method", "path", "body", "status", "told"),
    [
        ("GET", "/", b"", 404, "there is nothing at /; the paths are /arguments, /drain, "),
        ("GET", "/stop", b"", 405, "/stop is for POST"),
        ("POST", "/stop", b"[1]", 400, "the body should be a JSON object"),
        ("POST", "/stop", b"[" * 100_000, 400, "the body should be a JSON object"),
        ("POST", "/stop", b'{"grace": -1}', 400, "grace should be seconds from 0 to 3600"),
        ("POST", "/stop", b'{"grace": true}', 400, "grace should be seconds"),
        ("POST", "/stop", b'{"grace": NaN}', 400, "grace should be seconds"),
        ("POST", "/stop", b'{"leave": 1}', 400, "leave should be true or false"),
        ("POST", "/stop", b'{"patience": 1}', 400, "unknown field 'patience'; known here: drain, grace, leave"),
        ("PUT", "/arguments", b'{"arguments": "rm"}', 400, "arguments should be a list of texts"),
        ("PUT", "/arguments", b'{"arguments": ["a\\u0000"]}', 400, "arguments should be a list of texts"),
        ("PUT", "/arguments", b'{"arguments": ["\\ud800"]}', 400, "arguments should be a list of texts"),
        ("POST", "/release", b"{}", 409, "fake is serving in its start number 1"),
        ("GET", "/logs?lines=many", b"", 400, "lines should be a number"),
        ("GET", "/logs?lines=%C2%B2", b"", 400, "lines should be a number"),
        ("PUT", "/arguments", b"x" * 1_100_000, 413, "the body has more than 1048576 bytes"),
    ],
)
async def test_what_it_cannot_do_is_refused_with_the_reason(
    unmoved: Standalone, method: str, path: str, body: bytes, status: int, told: str
) -> None:
    transport = httpx.AsyncHTTPTransport(uds=unmoved.control.removeprefix("unix:"), verify=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://minder") as client:
        try:
            answer = await client.request(method, path, content=body)
        except httpx.WriteError:
            assert status == 413  # it does not read what it will not take
            return
    assert answer.status_code == status
    assert answer.json()["error"]["message"].startswith(told)


@each(
    ("sent", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET /state HTTP/1.1\r\n" + b"x: y\r\n" * 10_000 + b"\r\n", 413),
        (b"POST /stop HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n", 400),
        (b"GET http://[ HTTP/1.1\r\n\r\n", 400),
        (b"POST /stop HTTP/1.1\r\ncontent-length: \xb2\r\n\r\n", 400),
        (b"POST /stop HTTP/1.1\r\ncontent-length: -1\r\n\r\n", 400),
        (b"POST /stop HTTP/1.1\r\ncontent-length: " + b"9" * 50 + b"\r\n\r\n", 413),
    ],
)
async def test_what_is_no_request_is_answered_and_let_go(unmoved: Standalone, sent: bytes, status: int) -> None:
    reader, writer = await asyncio.open_unix_connection(unmoved.control.removeprefix("unix:"))
    writer.write(sent)
    with suppress(OSError):
        answer = await asyncio.wait_for(reader.read(), GONE_WITHIN)
        assert answer.startswith(b"HTTP/1.1 %d " % status)
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


@each(
    ("arguments", "told"),
    [
        (("--control", "http://127.0.0.1:1"), "a control port on TCP lets in who has a token; give --token-file or"),
        (("--control", "nowhere"), "'nowhere' is no address; write unix:/path or http://host:port"),
        (
            ("--control", "unix:/tmp/x", "--restart", "storms=1"),
            "--restart storms=1: unknown; when to start again: first=1",
        ),
        (("--control", "unix:/tmp/x", "--restart", "storm=many"), "--restart storm=many: should be a number"),
        (("--control", "unix:/tmp/x", "--token-file", "/nowhere"), "--token-file /nowhere cannot be read"),
        (("--control", "unix:/tmp/x", "--phase", "loading=("), "--phase: "),
    ],
)
def test_what_cannot_begin_says_why(tmp_path: Path, arguments: tuple[str, ...], told: str) -> None:
    """Its command says so as the next test shows; without that it takes no process."""
    said = ["run", "--name", "fake", "--log", str(tmp_path / "log"), *arguments, "--", "true"]
    options = minder._parser().parse_args(said)
    with pytest.raises((minder.UsageError, minder.AddressError)) as caught:
        asyncio.run(options.run(options))
    assert str(caught.value).startswith(told)


def test_a_control_port_that_is_taken_is_said(tmp_path: Path, listener: socket.socket) -> None:
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    said = ["--name", "fake", "--log", str(tmp_path / "log"), "--control", address]
    done = subprocess.run(
        [*this_program(), "run", *said, "--", "true"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "FOREBAY_MINDER_TOKEN": TOKEN},
        timeout=GONE_WITHIN,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("minder: the control port of fake cannot listen on 127.0.0.1 port")
