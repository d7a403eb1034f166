"""A scripted engine on a raw socket: it plays scripts and writes down what it saw.

It knows HTTP/1.1 framing and nothing of an engine. What a request gets is chosen by the test: the next script queued
for its path, else the next one queued for any path, else the standing one for its path, else the standing one for
all.
"""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

from tests.support.http1 import BodyReader, ProtocolError, header, parse_head
from tests.support.journal import EAGER_TURNS, Entry, Journal
from tests.support.recordings import Recording
from tests.support.script import Do, Gate, Script, json_answer, nothing, play
from tests.support.sockets import bind_free, reset_on_close, tcp_socket, unread_by_peer


@dataclass(slots=True)
class SeenRequest:
    """A request as it arrived. ``head`` is exact bytes; header names keep their case; ``body`` has no framing."""

    index: int
    connection: int
    method: str
    target: str
    headers: list[tuple[str, str]]
    head: bytes
    body: bytes = b""
    complete: bool = False

    def header(self, name: str) -> str | None:
        """Return the first value of a header, whatever the case of its name, or None."""
        return header(self.headers, name)

    def json(self) -> Any:
        """Return the body as JSON. Raises ``json.JSONDecodeError``."""
        return json.loads(self.body)


Responder = Script | Callable[[SeenRequest], Script]


@dataclass(slots=True)
class _Plan:
    """What requests get: queued scripts go first, each once; standing ones stay."""

    queued: dict[str | None, deque[Responder]] = field(default_factory=dict)
    standing: dict[str | None, Responder] = field(default_factory=dict)

    def choose(self, request: SeenRequest) -> Responder:
        """Return what this request gets, taking it out of its queue."""
        path = request.target.partition("?")[0]
        for key in (path, None):
            if self.queued.get(key):
                return self.queued[key].popleft()
        for key in (path, None):
            if key in self.standing:
                return self.standing[key]
        return error_answer(f"the test has no script for {request.method} {request.target}")


def error_answer(message: str) -> Script:
    """Return the 500 that tells a test what it forgot to script."""
    return json_answer(json.dumps({"error": {"message": message}}).encode(), status=500)


class ScriptedUpstream:
    """The engine's end of every connection in a test.

    Entries it writes to the journal as ``upstream``: ``accepted``, ``head`` (a request's headers are complete),
    ``request`` (its body too), ``gate`` (a script stands at a gate), ``blocked`` and ``unblocked`` (the peer reads
    slower than the script writes), ``answered`` (the script is through and the connection kept), ``closed`` (the peer
    went away), ``ended`` (we closed or reset it), ``malformed`` and ``pipelined`` (the peer broke HTTP/1.1).
    """

    def __init__(
        self,
        *,
        unix_path: Path | None = None,
        tls: ssl.SSLContext | None = None,
        journal: Journal | None = None,
        name: str = "upstream",
    ) -> None:
        self.journal = journal or Journal()
        self.name = name
        self.requests: list[SeenRequest] = []
        self.connections: list[_Connection] = []
        self.greetings: deque[Script] = deque()
        self.plan = _Plan()
        self._unix_path = unix_path
        self._tls = tls
        self._port = 0
        self._listener: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        await self.accept()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    # Where it listens

    @property
    def port(self) -> int:
        """The TCP port; 0 on a Unix socket."""
        return self._port

    @property
    def url(self) -> str:
        """The address as a base URL: ``http://127.0.0.1:port``, ``https://localhost:port`` or ``unix:/path``."""
        if self._unix_path is not None:
            return f"unix:{self._unix_path}"
        return f"https://localhost:{self._port}" if self._tls else f"http://127.0.0.1:{self._port}"

    async def accept(self) -> None:
        """Start to listen, or listen again at the same address after ``refuse``."""
        loop = asyncio.get_running_loop()
        if self._unix_path is not None:
            self._unix_path.unlink(missing_ok=True)
            self._listener = await loop.create_unix_server(self._connection, str(self._unix_path), ssl=self._tls)
            return
        if self._port == 0:
            bound = bind_free()
            self._port = bound.getsockname()[1]
        else:
            bound = tcp_socket()
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(("127.0.0.1", self._port))
        self._listener = await loop.create_server(self._connection, sock=bound, ssl=self._tls)

    def refuse(self) -> None:
        """Stop listening: new connections are refused, those that are open stay."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    async def stop(self) -> None:
        """Stop listening, close what is open and wait until every socket is closed."""
        self.refuse()
        for connection in self.connections:
            connection.finish(Do.CLOSE)
        await asyncio.gather(*(connection.gone.wait() for connection in self.connections))
        for outcome in await asyncio.gather(*self._tasks(), return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome
        if self._unix_path is not None:
            self._unix_path.unlink(missing_ok=True)

    # What it answers

    def queue(self, *responders: Responder, path: str | None = None) -> None:
        """The next requests (for ``path`` when given) get these, one each, before any standing answer."""
        self.plan.queued.setdefault(path, deque()).extend(responders)

    def always(self, responder: Responder, *, path: str | None = None) -> None:
        """Every request (for ``path`` when given) gets this unless something is queued for it."""
        self.plan.standing[path] = responder

    def greet(self, *scripts: Script) -> None:
        """The next connections get these as soon as they are accepted, before any request: one each."""
        self.greetings.extend(scripts)

    def speak_when_idle(self, script: Script) -> int:
        """Play a script, e.g. ``nothing().do(Do.CLOSE)``, on every connection without a request; return how many."""
        idle = [connection for connection in self.connections if connection.idle]
        for connection in idle:
            connection.start(script, None)
        return len(idle)

    # What it saw

    async def saw(
        self,
        kind: str,
        *,
        request: int | None = None,
        connection: int | None = None,
        after: Entry | None = None,
        times: int = 1,
    ) -> Entry:
        """Wait for an entry of this upstream; see ``Journal.saw``."""
        return await self.journal.saw(
            kind, who=self.name, request=request, connection=connection, after=after, times=times
        )

    async def request(self, index: int = 0) -> SeenRequest:
        """Wait until that many requests have come whole and return the one asked for."""
        await self.saw("request", request=index)
        return self.requests[index]

    @property
    def accepted(self) -> int:
        """How many connections were accepted so far."""
        return len(self.connections)

    @property
    def open_connections(self) -> int:
        """How many connections neither end has closed."""
        return sum(not connection.is_over for connection in self.connections)

    def _tasks(self) -> list[asyncio.Task[None]]:
        return [task for connection in self.connections for task in connection.played]

    def _connection(self) -> _Connection:
        return _Connection(self)


class _Connection(asyncio.Protocol):
    """One accepted connection: reads requests, plays one script at a time."""

    def __init__(self, upstream: ScriptedUpstream) -> None:
        self.upstream = upstream
        self.index = -1
        self.gone = asyncio.Event()
        self.buffer = bytearray()
        self.current: SeenRequest | None = None
        self.body: BodyReader | None = None
        self.body_complete = asyncio.Event()
        self.responder: Responder = nothing()
        self.playing: asyncio.Task[None] | None = None
        self.played: list[asyncio.Task[None]] = []
        self.writable = asyncio.Event()
        self.ended_by_us = False
        self.peer_left = False
        self.transport: asyncio.Transport

    def note(self, kind: str, detail: str = "") -> None:
        request = None if self.current is None else self.current.index
        self.upstream.journal.note(self.upstream.name, kind, connection=self.index, request=request, detail=detail)

    @property
    def idle(self) -> bool:
        return self.current is None and self.playing is None and not self.is_over

    @property
    def is_over(self) -> bool:
        return self.peer_left or self.ended_by_us or self.gone.is_set()

    # Callbacks of the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Not checked with isinstance: uvloop's transports do not derive from asyncio's.
        self.transport = cast(asyncio.Transport, transport)
        # Counted from here on: a TLS handshake that fails makes no connection.
        self.index = len(self.upstream.connections)
        self.upstream.connections.append(self)
        self.writable.set()
        self.note("accepted")
        if self.upstream.greetings:
            self.start(self.upstream.greetings.popleft(), None)

    def data_received(self, data: bytes) -> None:
        if self.current is not None and self.current.complete:
            self.note("pipelined", f"{len(data)} bytes before the answer was through")
        self.buffer += data
        self._read()

    def eof_received(self) -> bool:
        self._peer_left("closed its end")
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._peer_left("reset the connection" if exc is not None else "closed")
        if self.playing is not None:
            self.playing.cancel()
        self.gone.set()

    def pause_writing(self) -> None:
        self.note("blocked")
        self.writable.clear()

    def resume_writing(self) -> None:
        self.note("unblocked")
        self.writable.set()

    def _peer_left(self, how: str) -> None:
        if not self.peer_left and not self.ended_by_us:
            self.peer_left = True
            self.note("closed", how)

    # Requests

    def _read(self) -> None:
        try:
            if self.current is None:
                self._read_head()
            if self.current is not None and not self.current.complete:
                self._read_body(self.current)
        except ProtocolError as error:
            self.note("malformed", str(error))
            self.finish(Do.RESET)

    def _read_head(self) -> None:
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        raw = bytes(self.buffer[: end + 4])
        del self.buffer[: end + 4]
        start_line, headers = parse_head(raw)
        parts = start_line.split(" ")
        if len(parts) != 3 or parts[2] != "HTTP/1.1":
            raise ProtocolError(f"not a request line: {start_line!r}")
        self.current = SeenRequest(len(self.upstream.requests), self.index, parts[0], parts[1], headers, raw)
        self.upstream.requests.append(self.current)
        self.body = _body_reader(self.current)
        self.body_complete.clear()
        self.note("head", start_line)
        self._head_is_there(self.current)

    def _read_body(self, request: SeenRequest) -> None:
        assert self.body is not None
        self.body.feed(self.buffer)
        request.body = self.body.body if self.body.done else request.body
        if self.body.done:
            request.complete = True
            self.body_complete.set()
            self.note("request", f"{request.method} {request.target}")
            self._body_is_there(request)

    def _head_is_there(self, request: SeenRequest) -> None:
        """Choose the answer, and start it when it does not wait for the body."""
        self.responder = self.upstream.plan.choose(request)
        if isinstance(self.responder, Script) and self.responder.at == "head":
            self.start(self.responder, request)

    def _body_is_there(self, request: SeenRequest) -> None:
        """Start the answer unless it began with the head."""
        if not isinstance(self.responder, Script):
            self.start(self.responder(request), request)
        elif self.responder.at == "request":
            self.start(self.responder, request)

    # Scripts

    def start(self, script: Script, request: SeenRequest | None) -> None:
        self.playing = asyncio.get_running_loop().create_task(self._play(script, request))
        self.played.append(self.playing)

    async def _play(self, script: Script, request: SeenRequest | None) -> None:
        for step in script.steps():
            if isinstance(step, bytes):
                self.transport.write(step)
                await self.writable.wait()
            elif isinstance(step, Gate):
                self.note("gate", step.name)
                await step.wait()
            else:
                await self._do(step)
        if request is not None:
            await self.body_complete.wait()
        self.note("answered")
        self.playing = None
        if request is None:
            return
        if (request.header("connection") or "").lower() == "close":
            self.finish(Do.CLOSE)
            return
        self.current = None
        self._read()

    async def _do(self, step: Do) -> None:
        if step is Do.UNTIL_READ:
            await self._until_read()
        elif step is Do.HANG:
            self.note("hanging")
            await self.gone.wait()
        elif step is Do.HALF_CLOSE:
            self.transport.write_eof()
        elif step is Do.STOP_READING:
            self.transport.pause_reading()
        elif step is Do.READ_ON:
            self.transport.resume_reading()
        else:
            self.finish(step)
            await self.gone.wait()

    async def _until_read(self) -> None:
        """Give way to the event loop until the peer has taken every byte out of its kernel."""
        sock = self.transport.get_extra_info("socket")
        turns = 0
        while self.transport.get_write_buffer_size() or unread_by_peer(sock):
            turns += 1
            await asyncio.sleep(0 if turns < EAGER_TURNS else 0.001)

    def finish(self, how: Do) -> None:
        """Close or reset the connection from this end."""
        if self.gone.is_set() or self.ended_by_us:
            return
        if not self.peer_left:
            self.ended_by_us = True
            self.note("ended", how.name.lower())
        if how is Do.RESET:
            sock = self.transport.get_extra_info("socket")
            if sock.family != socket.AF_UNIX:
                reset_on_close(sock)
            self.transport.abort()
        else:
            self.transport.close()


def _body_reader(request: SeenRequest) -> BodyReader:
    if request.header("transfer-encoding") is not None:
        return BodyReader("chunked")
    return BodyReader("length", int(request.header("content-length") or 0))


def answer_as_recorded(
    recordings: Iterable[Recording], *, ignoring: Collection[str] = ()
) -> Callable[[SeenRequest], Script]:
    """Return a responder that plays the recording of the same request: method, path and JSON body.

    ``ignoring`` names fields of the body that may differ. Where several recordings fit, the first one given wins. A
    request nobody recorded gets a 500 that says so: nothing is made up.
    """

    def essence(method: str, path: str, body: bytes) -> tuple[str, str, Any]:
        try:
            value = json.loads(body) if body else None
        except json.JSONDecodeError:
            value = body
        if isinstance(value, dict):
            value = {key: inner for key, inner in value.items() if key not in ignoring}
        return method, path, value

    known = [(essence(one.method, one.path, one.request_body), one) for one in recordings]

    def respond(request: SeenRequest) -> Script:
        wanted = essence(request.method, request.target, request.body)
        for key, recording in known:
            if key == wanted:
                return play(recording)
        return error_answer(f"no recording has this request: {request.method} {request.target} {request.body[:200]!r}")

    return respond
