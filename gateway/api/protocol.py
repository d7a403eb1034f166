"""The fast face: uvicorn's own HTTP/1.1 protocol, in which the relayed paths are served without ASGI in between.

Every other request goes on to uvicorn as usual. A relayed request stands in uvicorn's queue of request cycles as one
of its own, so that pipelined requests of both kinds wait for each other, and uvicorn's shutdown sees them. The limits
on what a client may do with a connection (slow or endless headers, slow bodies, pipelining) hold for every path here.

Written against uvicorn 0.54.0, which is pinned: ``SUPPORTED`` is checked at start.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from gateway.api.edge import Edge, Refused
from gateway.api.request import Request
from gateway.errors import Kind, Refusal
from gateway.headers import Header
from gateway.serving.deadlines import NEVER
from gateway.serving.dialect import OPENAI, Route

SUPPORTED = "0.54.0"
MAX_PIPELINED = 16
"""Requests that may wait on one connection behind the one being served."""
LINGER = 2.0
LINGER_BYTES = 4 * 1024 * 1024
"""How long and how much a refused request's body is still read, unseen, so that the client gets to read the answer."""

SIZE_LINES = tuple(b"%x\r\n" % size for size in range(2048))
"""The first line of a chunk, by its size: formatting it would cost more than sending it."""

CLOSE_EXTENSION = "forebay.close"
"""ASGI extension: a callable that has the connection closed after the answer being sent."""
REFUSAL_EXTENSION = "forebay.refusal"
"""ASGI extension, there once a body turned out to be unreadable: the refusal to answer with. ``receive`` wakes up."""


@dataclass(frozen=True, slots=True)
class ConnectionRules:
    """What a connection may do: seconds, bytes, a count."""

    headers: float = 10.0
    body: float = 60.0
    keep_alive: float = 75.0
    header_bytes: int = 64 * 1024
    header_count: int = 100
    connections: int = 100_000


class ForebayProtocol(HttpToolsProtocol):
    """One client connection. ``bound`` makes the class that uvicorn is given."""

    edge: Edge
    rules: ConnectionRules
    routes: Mapping[bytes, Route]
    """The relayed paths; empty where the ASGI face serves them."""
    unread: Route
    """What answers in the dialect of a request that could not be read."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.deadline = NEVER
        self._in_head = False
        self._in_body = False
        # Since the last request's end, and of that what is body.
        self._head_bytes = 0
        self._body_bytes = 0
        self._deaf = False
        self._dropped = 0
        self._reading: RelayedCycle | None = None
        self._serving: RelayedCycle | None = None
        self._running: Any = None
        """uvicorn's cycle being served; its newest may be one that waits."""
        self.waiting_bytes = 0
        """Of bodies whose requests wait for their turn."""

    # --- the connection ---------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, unless there are too many."""
        super().connection_made(transport)
        self.deadline = self.edge.deadlines.clock() + self.rules.headers
        self.edge.deadlines.watch(self)
        if len(self.connections) > self.rules.connections:
            told = "This gateway holds as many connections as it may. Try again shortly."
            self._answer_unread(Refusal(Kind.BUSY, told, retry_after=1.0))

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell whatever is being served that the client is gone."""
        self.edge.deadlines.forget(self)
        serving, self._serving = self._serving, None
        self._reading = None
        if serving is not None:
            serving.client_gone()
        running, self._running = self._running, None
        if running is not None and not running.response_complete:
            running.disconnected = True
            running.message_event.set()
        self.pipeline.clear()
        if self._ours():
            # Nothing of uvicorn's own is being served: spare it from finding a cycle of ours.
            self._set_cycle(None)
        super().connection_lost(exc)

    def _ours(self) -> bool:
        """Tell whether the newest request cycle is one of ours."""
        cycle: Any = self.cycle
        return isinstance(cycle, RelayedCycle)

    def _set_cycle(self, cycle: Any) -> None:
        self.cycle = cycle

    def data_received(self, data: bytes) -> None:
        """Parse what came, within the bounds on heads."""
        if self._deaf:
            self._drop(len(data))
            return
        self._head_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._refuse_upgrade()
            return
        except httptools.HttpParserError:
            self._bad_request("The request is not valid HTTP/1.1.")
            return
        if self._in_head:
            self._bound_head()
        elif self._head_bytes:
            self._bound_framing()

    def _bound_head(self) -> None:
        if self._head_bytes > self.rules.header_bytes or len(self.headers) > self.rules.header_count:
            self._answer_unread(self._headers_too_large())
        elif self.deadline == NEVER:
            self.deadline = self.edge.deadlines.clock() + self.rules.headers

    def _bound_framing(self) -> None:
        """Bound what comes with a body: sizes of chunks, their extensions, trailers."""
        framing = self._head_bytes - self._body_bytes
        if framing > 2 * self.rules.header_bytes + 8 * self._body_bytes:
            self._bad_request("What frames the body (chunk sizes, extensions, trailers) is too large. Send it plainly.")

    def _headers_too_large(self) -> Refusal:
        rules = self.rules
        told = f"The headers are more than {rules.header_bytes} bytes or {rules.header_count} lines. Send fewer."
        return Refusal(Kind.HEADERS_TOO_LARGE, told)

    def _drop(self, size: int) -> None:
        self._dropped += size
        if self._dropped > LINGER_BYTES:
            self.transport.abort()

    def on_deadline(self, now: float) -> None:
        """Close a connection that is idle, or whose request does not come."""
        self.deadline = NEVER
        if self._deaf:
            self.transport.abort()
        elif self._in_head and self._head_bytes:
            seconds = self.rules.headers
            self._answer_unread(Refusal(Kind.SLOW_CLIENT, f"The headers took longer than {seconds:g} s to arrive."))
        elif self._in_body:
            seconds = self.rules.body
            self._answer_unread(Refusal(Kind.SLOW_CLIENT, f"The body took longer than {seconds:g} s to arrive."))
        else:
            self.transport.close()

    def pause_writing(self) -> None:
        """The client is slow: have the engine's stream wait."""
        self.flow.pause_writing()
        if self._serving is not None:
            self._serving.pause()

    def resume_writing(self) -> None:
        """The client has caught up."""
        self.flow.resume_writing()
        if self._serving is not None:
            self._serving.resume()

    # --- what the parser finds --------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """Start a request's head."""
        if self._deaf:
            return
        self.url = b""
        self.headers = []
        self.expect_100_continue = False
        self._in_head = True
        self._reading = None
        self.deadline = NEVER

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header."""
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """Serve a relayed request here, hand any other to uvicorn."""
        if self._deaf:
            return
        self._in_head = False
        if self._head_bytes > self.rules.header_bytes or len(self.headers) > self.rules.header_count:
            size = sum(len(name) + len(value) + 4 for name, value in self.headers)
            if size > self.rules.header_bytes or len(self.headers) > self.rules.header_count:
                self._answer_unread(self._headers_too_large())
                return
        if len(self.pipeline) >= MAX_PIPELINED:
            self._bad_request(f"More than {MAX_PIPELINED} requests wait on this connection.")
            return
        route = self.routes.get(self.url) or self.routes.get(self.url.partition(b"?")[0])
        if route is None or self.parser.get_method() != b"POST":
            self._hand_over()
            return
        # HTTP/1.0 is neither sent chunks nor kept: that would have to be said in words of its own.
        is_current = self.parser.get_http_version() == "1.1"
        keep_alive = is_current and self.parser.should_keep_alive()
        cycle = RelayedCycle(self, route, self.headers, keep_alive, is_current)
        # Trailers are no headers: what comes after the body is read past.
        self.headers = []
        existing = self.cycle
        self._set_cycle(cycle)
        self._reading = cycle
        self._in_body = True
        self._body_bytes = 0
        if existing is None or existing.response_complete:
            self._start(cycle)
        else:
            self.pipeline.appendleft((cycle, self.app))  # type: ignore[arg-type]
        if not cycle.read:
            self.deadline = self.edge.deadlines.clock() + self.rules.body

    def _hand_over(self) -> None:
        url, headers = self.url, self.headers
        super().on_message_begin()
        self.url, self.expect_100_continue = url, _expects_continue(headers)
        self.headers.extend(headers)
        extensions: Any = {}
        self.scope["extensions"] = extensions
        self.deadline = self.edge.deadlines.clock() + self.rules.body
        try:
            super().on_headers_complete()
        except (UnicodeDecodeError, httptools.HttpParserInvalidURLError):
            self._bad_request("The request's URL is not valid.")
            return
        cycle: Any = self.cycle
        cycle.transport = _CycleTransport(self, cycle)
        self._in_body = True
        self._body_bytes = 0
        extensions[CLOSE_EXTENSION] = cycle.transport.close_after
        self.headers = []
        # uvicorn stops reading while a request waits behind another; then nobody would see the client leave.
        self.flow.resume_reading()

    def close_gently(self, cycle: Any) -> None:
        """Close after the answer of one of uvicorn's cycles, whose body may still be on its way."""
        if cycle.more_body:
            self.linger()
        else:
            self.transport.close()

    def on_body(self, body: bytes) -> None:
        """Take part of a body."""
        if self._deaf:
            return
        self._body_bytes += len(body)
        if self._reading is not None:
            self._reading.on_body(body)
        elif self.cycle is not None and not self._ours():
            super().on_body(body)

    def on_message_complete(self) -> None:
        """Take the end of a body."""
        if self._deaf:
            return
        self._head_bytes = 0
        self._in_body = False
        self.deadline = NEVER
        reading, self._reading = self._reading, None
        if reading is not None:
            reading.on_read()
        elif self.cycle is not None and not self._ours():
            super().on_message_complete()
            if self.cycle.response_complete:
                # It was answered before its body came: the connection is idle from here on.
                self.deadline = self.edge.deadlines.clock() + self.rules.keep_alive

    # --- uvicorn's queue --------------------------------------------------------------------------------------------

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        if isinstance(cycle, RelayedCycle):
            self._start(cycle)
        else:
            self._running = cycle
            super()._start_asgi_task(cycle, app)

    def _start(self, cycle: RelayedCycle) -> None:
        self._serving = cycle
        cycle.start()

    def on_response_complete(self) -> None:
        """Begin the next waiting request, or wait for one to come."""
        self._serving = self._running = None
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        if self._deaf:
            self.linger()
            return
        self.flow.resume_reading()
        if self.pipeline:
            cycle, app = self.pipeline.pop()
            self._start_asgi_task(cycle, app)
        elif self.edge.closing:
            self.transport.close()
        elif not self._in_head and not self._in_body:
            self.deadline = self.edge.deadlines.clock() + self.rules.keep_alive

    def _unset_keepalive_if_required(self) -> None:
        """The keep-alive deadline is one of ours, not a timer."""

    # --- requests that cannot be read -------------------------------------------------------------------------------

    def send_400_response(self, msg: str) -> None:
        """Answer what uvicorn finds wrong in our envelope."""
        self._bad_request(msg)

    def _bad_request(self, message: str) -> None:
        self._answer_unread(Refusal(Kind.INVALID, message))

    def _refuse_upgrade(self) -> None:
        self._bad_request("Protocol upgrades are not offered here. Send the request without an 'upgrade' header.")

    def _answer_unread(self, refusal: Refusal) -> None:
        """Refuse what cannot be read; an answer under way to an earlier request is finished first, and then the end."""
        in_body, newest = self._in_body, self.cycle
        self._deaf = True
        self._in_head = self._in_body = False
        self._reading = None
        self.pipeline.clear()
        current: Any = self._serving or self._running
        if current is not None and not current.response_complete:
            if in_body and current is newest:
                self._refuse_current(current, refusal)
            else:
                current.keep_alive = False
            return
        if in_body and newest is not None and newest.response_complete:
            # Answered before its body was read: there is nothing to say any more.
            self.linger()
            return
        ticket = self.edge.new_ticket("")
        ticket.client = self.peer
        status, headers, body = self.edge.refusal(self.unread, ticket, refusal)
        self.write_answer(status, headers, body, close=True)
        self.linger()

    def _refuse_current(self, cycle: Any, refusal: Refusal) -> None:
        """Refuse the request being served because of its body."""
        if isinstance(cycle, RelayedCycle):
            cycle.refuse(refusal)
            return
        cycle.scope["extensions"][REFUSAL_EXTENSION] = refusal
        cycle.message_event.set()
        # An application that does not listen loses the connection.
        self.deadline = self.edge.deadlines.clock() + LINGER

    @property
    def peer(self) -> str:
        """The address the connection comes from."""
        return self.client[0] if self.client else ""

    # --- bytes ------------------------------------------------------------------------------------------------------

    def write_answer(self, status: int, headers: bytes, body: bytes, *, close: bool) -> None:
        """Write a whole answer at once."""
        head = self.head(status, headers, close=close)
        self.transport.write(b"".join((head, b"content-length: %d\r\n\r\n" % len(body), body)))

    def head(self, status: int, headers: bytes, *, close: bool) -> bytes:
        """Return status line and headers without the empty line."""
        end = b"connection: close\r\n" if close else b""
        return b"".join((STATUS_LINE[status], _DEFAULTS.of(self.server_state.default_headers), headers, end))

    def linger(self) -> None:
        """Say that nothing more will come, and read on unseen for a moment: a reset would take the answer with it."""
        self._deaf = True
        self._reading = None
        if self.transport.is_closing():
            return
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.deadline = self.edge.deadlines.clock() + LINGER


class DefaultLines:
    """The lines of uvicorn's own headers, which it makes anew each second."""

    def __init__(self) -> None:
        self._made_of: list[Header] = []
        self._lines = b""

    def of(self, headers: list[Header]) -> bytes:
        """Return them."""
        if headers is not self._made_of:
            self._made_of = headers
            self._lines = b"".join([b"%b: %b\r\n" % header for header in headers])
        return self._lines


_DEFAULTS = DefaultLines()


class _CycleTransport:
    """What a cycle of uvicorn's writes to: where it would cut off a body that still comes, the rest is read unseen."""

    __slots__ = ("_cycle", "_protocol")

    def __init__(self, protocol: ForebayProtocol, cycle: Any) -> None:
        self._protocol = protocol
        self._cycle = cycle

    def write(self, data: bytes) -> None:
        self._protocol.transport.write(data)

    def is_closing(self) -> bool:
        return self._protocol.transport.is_closing()

    def close(self) -> None:
        self._protocol.close_gently(self._cycle)

    def close_after(self) -> None:
        """Have the connection closed after this cycle's answer."""
        self._cycle.keep_alive = False


class RelayedCycle:
    """A relayed request and its answer: the client as the relay sees it, and a request cycle as uvicorn does."""

    __slots__ = (
        "_chunked",
        "_parts",
        "_protocol",
        "_refused",
        "_request",
        "_size",
        "_started",
        "disconnected",
        "headers",
        "keep_alive",
        "read",
        "response_complete",
        "route",
    )

    def __init__(
        self, protocol: ForebayProtocol, route: Route, headers: list[Header], keep_alive: bool, chunked: bool
    ) -> None:
        self._protocol = protocol
        self.route = route
        self.headers = headers
        self.keep_alive = keep_alive
        self.response_complete = False
        self.disconnected = False
        self.read = False
        """Whether the whole body is here."""
        self._chunked = chunked
        self._parts: list[bytes] = []
        self._size = 0
        self._request: Request | None = None
        self._started = False
        self._refused = False

    # --- the request ------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Its turn has come: let it in, or refuse it before its body is read."""
        self._started = True
        protocol = self._protocol
        protocol.waiting_bytes -= self._size
        opened = protocol.edge.open(self.route, self.headers, protocol.peer)
        if isinstance(opened, Refused):
            self._refused = True
            self.respond(*protocol.edge.refusal(opened.route, opened.ticket, opened.refusal))
            return
        self._request = opened
        opened.interrupt = self.refuse
        if opened.expects and not self.read and self._chunked and not self._size and _expects_continue(self.headers):
            protocol.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if self._size and self._grown():
            return
        if self.read:
            self._run()

    def on_body(self, body: bytes) -> None:
        """Take part of the body."""
        if self._refused:
            return
        self._parts.append(body)
        self._size += len(body)
        if self._request is not None and self._request.length is None:
            self._grown()
        elif self._request is None:
            # It waits behind another request: nobody has looked at it yet.
            self._protocol.waiting_bytes += len(body)
            if self._protocol.waiting_bytes > self._protocol.edge.rules.body:
                self._protocol.transport.abort()

    def _grown(self) -> bool:
        """Refuse a body that has grown too large; tell whether it was refused."""
        request = self._request
        assert request is not None
        refusal = self._protocol.edge.grow(request, self._size)
        if refusal is None:
            return False
        self.refuse(refusal)
        return True

    def on_read(self) -> None:
        """The body is whole."""
        self.read = True
        if self._started and not self._refused:
            self._run()

    def _run(self) -> None:
        request = self._request
        assert request is not None
        body = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts = []
        self._protocol.edge.run(request, body, self)

    def refuse(self, refusal: Refusal) -> None:
        """Refuse it while its body is still coming."""
        self._refused = True
        self._parts = []
        if self._request is not None:
            self._protocol.edge.refuse(self._request, refusal, self)
        else:
            self._protocol.transport.abort()

    def client_gone(self) -> None:
        """The connection is lost."""
        if not self.response_complete:
            self.disconnected = True
            self.response_complete = True
            if self._request is not None:
                self._protocol.edge.client_gone(self._request)

    def pause(self) -> None:
        """The client is slow."""
        if self._request is not None and self._request.relay is not None:
            self._request.relay.pause()

    def resume(self) -> None:
        """The client has caught up."""
        if self._request is not None and self._request.relay is not None:
            self._request.relay.resume()

    # --- the answer -------------------------------------------------------------------------------------------------

    def respond(self, status: int, headers: bytes, body: bytes) -> None:
        """Send a whole answer."""
        close = self._closes()
        if not self.disconnected:
            self._protocol.write_answer(status, headers, body, close=close)
        self._finish(close)

    def start_stream(self, headers: bytes, data: bytes) -> None:
        """Send status, headers and the first bytes of a stream."""
        protocol = self._protocol
        close = self._closes() or not self._chunked
        self.keep_alive = not close
        head = protocol.head(200, headers, close=close)
        if self._chunked:
            protocol.transport.write(
                b"%btransfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n" % (head, len(data), data)
                if data
                else head + b"transfer-encoding: chunked\r\n\r\n"
            )
        else:
            protocol.transport.write(b"%b\r\n%b" % (head, data))

    def send(self, data: bytes) -> None:
        """Send more of a stream."""
        if self._chunked:
            size = len(data)
            line = SIZE_LINES[size] if size < len(SIZE_LINES) else b"%x\r\n" % size
            data = b"".join((line, data, b"\r\n"))
        self._protocol.transport.write(data)

    def end_stream(self, data: bytes, *, close: bool) -> None:
        """Send the last bytes of a stream."""
        if self._chunked:
            self._protocol.transport.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data) if data else b"0\r\n\r\n")
        elif data:
            self._protocol.transport.write(data)
        self._finish(close or not self.keep_alive)

    def abort(self) -> None:
        """Cut the connection."""
        self.response_complete = True
        self._protocol.transport.abort()

    def _closes(self) -> bool:
        return not self.keep_alive or not self.read or self._protocol.edge.closing

    def _finish(self, close: bool) -> None:
        self.response_complete = True
        protocol = self._protocol
        if self.disconnected:
            return
        if not close:
            protocol.on_response_complete()
        elif self.read:
            protocol.transport.close()
        else:
            protocol.linger()


def _expects_continue(headers: list[Header]) -> bool:
    return any(name == b"expect" and value.lower() == b"100-continue" for name, value in headers)


def bound(edge: Edge, rules: ConnectionRules, routes: Mapping[str, Route], *, fast: bool) -> type[ForebayProtocol]:
    """Return the protocol class for one listener. ``fast``: relayed paths are served here and not by ASGI."""
    relayed = {path.encode("ascii"): route for path, route in routes.items()} if fast else {}
    unread = Route("", OPENAI, "")
    return type(
        "BoundProtocol", (ForebayProtocol,), {"edge": edge, "rules": rules, "routes": relayed, "unread": unread}
    )
