"""The client that speaks to engines: every answer at every split, one request at a time, connections kept or let go."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest

from gateway.serving.upstream import MAX_HEAD, Address, Connection, Connections, Loss, parse_address
from tests.support.gateway import until
from tests.support.journal import PATIENCE
from tests.support.recordings import all_recordings, load
from tests.support.script import Answer, Do, Gate, Script, event_stream, garbage, json_answer, nothing, play
from tests.support.sockets import black_hole
from tests.support.splits import Plan, byte_by_byte, every_cut, pieces, random_plans
from tests.support.table import named
from tests.support.tls import AUTHORITY, server_context
from tests.support.upstream import ScriptedUpstream

REQUEST = b"POST /v1/chat/completions HTTP/1.1\r\nhost: engine\r\ncontent-length: 2\r\n\r\n{}"


@dataclass
class Heard:
    """A receiver that keeps what it is told. ``over`` is set by the last thing it is told."""

    heads: list[tuple[int, bytes]] = field(default_factory=list)
    reads: list[bytes] = field(default_factory=list)
    connected: int = 0
    completed: int = 0
    lost: list[Loss] = field(default_factory=list)
    over: asyncio.Event = field(default_factory=asyncio.Event)

    def on_connected(self) -> None:
        self.connected += 1

    def on_head(self, status: int, content_type: bytes) -> None:
        self.heads.append((status, content_type))

    def on_data(self, data: bytes) -> None:
        self.reads.append(data)

    def on_complete(self) -> None:
        self.completed += 1
        self.over.set()

    def on_lost(self, loss: Loss, detail: str) -> None:
        assert detail
        self.lost.append(loss)
        self.over.set()

    @property
    def body(self) -> bytes:
        return b"".join(self.reads)


class NoTransport(asyncio.Transport):
    """Takes what is written; nothing goes anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.closing = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert not self.closing

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True

    def abort(self) -> None:
        self.closing = True


def take(wire: bytes, plan: Plan) -> tuple[Heard, Connections]:
    """Let one connection read an answer in pieces, without any socket."""
    owner = Connections(Address("engine", 1), limit=1)
    connection = Connection(owner, asyncio.get_running_loop())
    heard = Heard()
    connection._receiver = heard
    connection.connection_made(NoTransport())
    for piece in pieces(wire, plan):
        connection.data_received(piece)
    return heard, owner


async def test_every_recording_is_read_the_same_at_random_splits() -> None:
    for recording in all_recordings():
        wire = play(recording).data
        for plan in [(), byte_by_byte(wire), *random_plans(wire, seed=3, count=5)]:
            heard, owner = take(wire, plan)
            with named(recording=recording, plan=plan):
                assert heard.heads == [(recording.status, (recording.header("content-type") or "").encode())]
                assert heard.body == recording.body
                assert (heard.completed, heard.lost) == (1, [])
                assert not owner.full, "the connection was not kept"


@pytest.mark.parametrize(
    "script",
    [
        play(load("vllm", "chat_stream"), trailers=[("x-checksum", "0"), ("x-end", "")]),
        play(load("vllm", "chat_basic")),
        Answer(pieces=[b"{}"], interim=b"HTTP/1.1 100 Continue\r\n\r\n").script(),
        Answer(pieces=[b"{}"], interim=b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n").script(),
    ],
    ids=["chunked with trailers", "length", "after 100 Continue", "after 103 Early Hints"],
)
async def test_an_answer_cut_anywhere_is_the_same_answer(script: Script) -> None:
    """Inside the head, a chunk's size line, a trailer: every single position of the wire."""
    whole, _ = take(script.data, ())
    assert whole.completed == 1
    for plan in every_cut(script.data):
        heard, owner = take(script.data, plan)
        assert (heard.heads, heard.body, heard.completed) == (whole.heads, whole.body, 1), plan
        assert not owner.full, plan


@pytest.fixture
async def connections(any_upstream: ScriptedUpstream) -> AsyncIterator[Connections]:
    """Connections to a scripted engine, on each kind of address in turn."""
    opened = connections_to(any_upstream)
    yield opened
    opened.close()


def connections_to(upstream: ScriptedUpstream) -> Connections:
    ca_file = str(AUTHORITY) if upstream.url.startswith("https") else None
    return Connections(parse_address(upstream.url, ca_file), limit=4)


async def ask(connections: Connections) -> Heard:
    """Send one request and wait for the end of its answer."""
    heard = Heard()
    connections.send(REQUEST, heard)
    async with asyncio.timeout(PATIENCE):
        await heard.over.wait()
    return heard


async def test_one_connection_serves_one_request_after_another(
    any_upstream: ScriptedUpstream, connections: Connections
) -> None:
    """Whole answers and streams alike: the engine accepts once."""
    any_upstream.queue(*[play(load("vllm", name)) for name in ("chat_basic", "chat_stream", "err_badjson")] * 3)
    for _ in range(9):
        assert (await ask(connections)).completed == 1
    assert any_upstream.accepted == connections.accepted == connections.open == 1
    assert [request.head + request.body for request in any_upstream.requests] == [REQUEST] * 9


async def test_the_connection_used_last_is_used_next(upstream: ScriptedUpstream) -> None:
    """Those used least grow old and are closed: the pool shrinks to what is needed."""
    connections = connections_to(upstream)
    gate = Gate()
    upstream.queue(json_answer(b"{}").do(gate, 0), json_answer(b"{}"))
    upstream.always(json_answer(b"{}"))
    first = Heard()
    connections.send(REQUEST, first)
    await gate.reached()
    await ask(connections)
    gate.open()
    await first.over.wait()
    await ask(connections)
    assert [request.connection for request in upstream.requests] == [0, 1, 0]
    connections.close()


async def test_an_idle_connection_the_engine_closes_is_forgotten(
    any_upstream: ScriptedUpstream, connections: Connections
) -> None:
    any_upstream.always(json_answer(b"{}"))
    await ask(connections)
    await any_upstream.saw("answered")
    any_upstream.speak_when_idle(nothing().do(Do.CLOSE))
    await until(lambda: connections.open == 0, "the closed connection still counts")
    assert (await ask(connections)).completed == 1
    assert connections.accepted == 2


async def test_bytes_nobody_asked_for_end_an_idle_connection(
    any_upstream: ScriptedUpstream, connections: Connections
) -> None:
    """An engine that sends 408 and closes must not have that read as the next request's answer."""
    any_upstream.always(json_answer(b"{}"))
    await ask(connections)
    await any_upstream.saw("answered")
    any_upstream.speak_when_idle(Answer(408, pieces=[b"late"]).script())
    await any_upstream.saw("closed", connection=0)
    heard = await ask(connections)
    assert (heard.heads[0][0], heard.body) == (200, b"{}")


async def test_a_second_answer_in_one_read_ends_the_connection(upstream: ScriptedUpstream) -> None:
    """What follows an answer belongs to nobody: it is not kept for the next request."""
    connections = connections_to(upstream)
    upstream.queue(Script(json_answer(b'"one"').data + json_answer(b'"two"').data), json_answer(b'"three"'))
    assert (await ask(connections)).body == b'"one"'
    assert (await ask(connections)).body == b'"three"'
    assert connections.accepted == 2
    connections.close()


@pytest.mark.parametrize("ending", [Do.CLOSE, Do.RESET])
async def test_a_kept_connection_that_closes_under_a_request_is_stale(upstream: ScriptedUpstream, ending: Do) -> None:
    """Told apart from a new connection that closes: that request may have been worked on."""
    connections = connections_to(upstream)
    upstream.queue(json_answer(b"{}"), nothing().do(ending), nothing().do(ending))
    await ask(connections)
    assert (await ask(connections)).lost == [Loss.STALE]
    assert (await ask(connections)).lost == [Loss.CLOSED]
    assert connections.open == 0


async def test_a_reused_connection_that_breaks_after_a_byte_is_not_stale(upstream: ScriptedUpstream) -> None:
    connections = connections_to(upstream)
    upstream.queue(json_answer(b"{}"), json_answer(b"{}").do(Do.CLOSE, 1))
    await ask(connections)
    assert (await ask(connections)).lost == [Loss.CLOSED]


STREAM = play(load("vllm", "chat_stream"))
PLACES = {
    "before any byte": 0,
    "inside the head": STREAM.after_head - 10,
    "after the head": STREAM.after_head,
    "inside a size line": STREAM.inside_size_line(2),
    "inside an event": STREAM.inside_frame(2),
    "between events": STREAM.after_frame(2),
    "before the last chunk": STREAM.before_last_chunk,
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())
@pytest.mark.parametrize("ending", [Do.CLOSE, Do.RESET])
async def test_an_answer_that_breaks_off_is_never_complete(upstream: ScriptedUpstream, place: int, ending: Do) -> None:
    connections = connections_to(upstream)
    upstream.queue(STREAM.do(Do.UNTIL_READ, place).do(ending, place))
    heard = await ask(connections)
    assert (heard.completed, heard.lost) == (0, [Loss.CLOSED])
    assert load("vllm", "chat_stream").body.startswith(heard.body)
    assert connections.open == 0


async def test_a_body_without_length_ends_with_the_connection(upstream: ScriptedUpstream) -> None:
    """A close is its end; a reset is not."""
    connections = connections_to(upstream)
    script = Answer(pieces=[b"{}"], framing="close").script()
    upstream.queue(script, script.do(Do.UNTIL_READ, script.after_head).do(Do.RESET, script.after_head))
    heard = await ask(connections)
    assert (heard.completed, heard.body) == (1, b"{}")
    assert (await ask(connections)).lost == [Loss.CLOSED]
    assert connections.open == 0


@pytest.mark.parametrize(
    "answer",
    [
        garbage(),
        Script(b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n"),
        Script(b"HTTP/1.1 200 OK\r\nx-huge: " + b"x" * MAX_HEAD),
        Script(b"HTTP/1.1 200 OK\r\n" + b"x-more: x\r\n" * (MAX_HEAD // 10)),
        Script(STREAM.data[: STREAM.inside_size_line(0)] + b"zz\r\n"),
    ],
    ids=["no HTTP", "no header", "a header without end", "headers without end", "no chunk size"],
)
async def test_what_is_not_http_is_garbage(upstream: ScriptedUpstream, answer: Script) -> None:
    connections = connections_to(upstream)
    upstream.queue(answer)
    heard = await ask(connections)
    assert (heard.completed, heard.lost) == (0, [Loss.GARBAGE])
    assert connections.open == 0


async def test_a_refused_connection_is_told_as_such(any_upstream: ScriptedUpstream, connections: Connections) -> None:
    any_upstream.refuse()
    heard = await ask(connections)
    assert (heard.lost, heard.connected) == ([Loss.CONNECT], 0)
    assert connections.open == 0


async def test_a_certificate_nobody_vouches_for_is_refused() -> None:
    async with ScriptedUpstream(tls=server_context()) as upstream:
        connections = Connections(parse_address(upstream.url), limit=1)
        assert (await ask(connections)).lost == [Loss.CONNECT]
        assert upstream.requests == []


async def test_an_attempt_to_connect_can_be_given_up() -> None:
    """Behind a firewall that drops packets nothing is heard until somebody loses patience."""
    with black_hole() as (host, port):
        connections = Connections(Address(host, port), limit=1)
        heard = Heard()
        connection = connections.send(REQUEST, heard)
        assert connections.full
        for _ in range(20):
            await asyncio.sleep(0)
        assert not heard.over.is_set()
        connection.abort()
        assert connections.open == 0
        assert heard.lost == []


async def test_abort_closes_the_engines_connection_at_once(
    any_upstream: ScriptedUpstream, connections: Connections
) -> None:
    """Whether the answer has begun or not; nothing more is heard of it."""
    for request, place in enumerate([0, STREAM.after_frame(0)]):
        any_upstream.queue(STREAM.do(Do.HANG, place))
        heard = Heard()
        connection = connections.send(REQUEST, heard)
        await any_upstream.saw("hanging", request=request)
        connection.abort()
        await any_upstream.saw("closed", request=request)
        assert not heard.over.is_set()
        assert connections.open == 0


async def test_a_finished_stream_is_let_go_of_before_its_last_chunk(upstream: ScriptedUpstream) -> None:
    """After ``[DONE]`` nobody waits; the connection is kept once its terminating chunk is there."""
    connections = connections_to(upstream)
    gate = Gate()
    upstream.queue(STREAM.do(gate, STREAM.before_last_chunk), json_answer(b"{}"))
    heard = Heard()
    connection = connections.send(REQUEST, heard)
    await gate.reached()
    await until(lambda: heard.body.endswith(b"data: [DONE]\n\n"), "the stream did not come")
    connection.release()
    gate.open()
    await upstream.saw("answered")
    await until(lambda: connection.idle, "the connection was not kept")
    assert not heard.over.is_set()
    await ask(connections)
    assert connections.accepted == 1
    connections.close()


async def test_an_engine_that_talks_on_after_the_end_is_cut_off(upstream: ScriptedUpstream) -> None:
    connections = connections_to(upstream)
    gate = Gate()
    chatter = event_stream([b"data: [DONE]\n\n", *[b": " + b"x" * 1000 + b"\n\n"] * 200])
    upstream.queue(chatter.do(gate, chatter.after_frame(0)))
    heard = Heard()
    connection = connections.send(REQUEST, heard)
    await gate.reached()
    await until(lambda: bool(heard.reads), "the stream did not come")
    connection.release()
    gate.open()
    await upstream.saw("closed", connection=0)
    assert connections.open == 0


async def test_an_engine_that_never_ends_a_finished_stream_is_cut_off(
    upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.serving.upstream.END_WAIT", 0)
    connections = connections_to(upstream)
    upstream.queue(STREAM.do(Do.HANG, STREAM.before_last_chunk))
    heard = Heard()
    connection = connections.send(REQUEST, heard)
    await upstream.saw("hanging", request=0)
    await until(lambda: heard.body.endswith(b"data: [DONE]\n\n"), "the stream did not come")
    connection.release()
    await upstream.saw("closed", request=0)
    assert connections.open == 0


async def test_a_paused_connection_blocks_the_engine(upstream: ScriptedUpstream) -> None:
    """What is not read stays in the kernel; after that the engine waits."""
    connections = connections_to(upstream)
    size = 8_000_000
    upstream.queue(Answer(pieces=[b"x" * size]).script())
    heard = Heard()
    connection = connections.send(REQUEST, heard)
    await until(lambda: bool(heard.heads), "no answer began")
    connection.pause()
    taken = len(heard.body)
    await upstream.saw("blocked", request=0)
    for _ in range(20):
        await asyncio.sleep(0)
    assert len(heard.body) == taken < size
    connection.resume()
    await heard.over.wait()
    assert len(heard.body) == size
    connections.close()


async def test_the_number_of_connections_is_bounded(upstream: ScriptedUpstream) -> None:
    connections = connections_to(upstream)
    gate = Gate()
    upstream.always(json_answer(b"{}").do(gate, 0))
    receivers = [Heard() for _ in range(connections.limit)]
    full = [connections.full]
    for receiver in receivers:
        connections.send(REQUEST, receiver)
        full.append(connections.full)
    assert full == [False, False, False, False, True]
    gate.open()
    for receiver in receivers:
        await receiver.over.wait()
    assert (connections.full, connections.open) == (False, 4)
    connections.close()


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://engine:8000", Address("engine", 8000)),
        ("http://engine", Address("engine", 80)),
        ("http://[::1]:8000", Address("::1", 8000)),
        ("unix:/run/engine.sock", Address("", 0, unix="/run/engine.sock")),
    ],
)
def test_addresses(url: str, address: Address) -> None:
    assert parse_address(url) == address


def test_what_the_host_header_says() -> None:
    assert Address("engine", 8000).authority == b"engine:8000"
    assert Address("::1", 8000).authority == b"[::1]:8000"
    assert Address("", 0, unix="/run/engine.sock").authority == b"localhost"


@pytest.mark.parametrize("url", ["engine:8000", "ftp://engine", "http://", "https:///v1"])
def test_other_addresses_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="is not an engine's address: write http://host:port"):
        parse_address(url)
