"""HTTP/1.1 for the simulated engine: requests in, answers and streams of events out, and connections broken on demand.

It looks like uvicorn under vLLM: the same headers, a short keep-alive, a client that closes its side counts as gone.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterable
from email.utils import formatdate
from http import HTTPStatus
from typing import cast
from urllib.parse import unquote

import httptools

MAX_BODY = 64 << 20
MAX_HEADERS = 256
KEEP_ALIVE = 5.0
"""Seconds an idle connection is kept; vLLM's default."""

_PHRASES = {status.value: status.phrase for status in HTTPStatus}
_EVENT_STREAM = "text/event-stream; charset=utf-8"


class Exchange:
    """One request and its answer. ``on_gone`` is called when the client leaves before the answer is through,
    ``on_writable`` when a client that was slow to read has caught up."""

    def __init__(
        self, connection: Connection, method: str, target: bytes, headers: dict[str, str], body: bytes
    ) -> None:
        url = httptools.parse_url(target)
        self.method = method
        self.path = unquote((url.path or b"/").decode("latin-1"))
        self.headers = headers
        self.body = body
        self.more_headers: list[tuple[str, str]] = []
        self.on_gone: Callable[[], None] | None = None
        self.on_writable: Callable[[], None] | None = None
        self.over = False
        self.begun = False
        self.too_large = False
        self._connection = connection

    @property
    def writable(self) -> bool:
        """Whether the client keeps up."""
        return not self.over and self._connection.writable

    def answer(
        self, status: int, body: bytes = b"", content_type: str | None = "application/json", *more: tuple[str, str]
    ) -> None:
        """Send a whole answer."""
        if self.over:
            return
        headers = [("content-length", str(len(body)))]
        if content_type is not None:
            headers.append(("content-type", content_type))
        self._connection.send(self._head(status, [*headers, *more]) + (b"" if self.method == "HEAD" else body))
        self._end()

    def stream(self) -> None:
        """Begin a stream of events."""
        if not self.over:
            self.begun = True
            chunked = [("content-type", _EVENT_STREAM), ("transfer-encoding", "chunked")]
            self._connection.send(self._head(200, chunked))

    def write(self, events: bytes) -> None:
        """Send events."""
        if events and not self.over:
            self._connection.send(b"%x\r\n%b\r\n" % (len(events), events))

    def end(self) -> None:
        """End the stream."""
        if not self.over:
            self._connection.send(b"0\r\n\r\n")
            self._end()

    def close(self) -> None:
        """Close the connection in the middle of the answer."""
        self.over = True
        self._connection.close()

    def reset(self) -> None:
        """Reset the connection."""
        self.over = True
        self._connection.reset()

    def gone(self) -> None:
        """Note that the client left."""
        if not self.over:
            self.over = True
            if self.on_gone is not None:
                self.on_gone()

    def _head(self, status: int, headers: Iterable[tuple[str, str]]) -> bytes:
        lines = [f"HTTP/1.1 {status} {_PHRASES.get(status, '')}", f"date: {formatdate(usegmt=True)}", "server: uvicorn"]
        lines += [f"{name}: {value}" for name, value in (*headers, *self.more_headers)]
        if not self._connection.keeps_alive:
            lines.append("connection: close")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace")

    def _end(self) -> None:
        self.over = True
        self._connection.next()


class Connection(asyncio.Protocol):
    """One connection. Requests that come before their turn wait, unread beyond one read."""

    def __init__(self, handle: Callable[[Exchange], None], open_connections: set[Connection]) -> None:
        self._handle = handle
        self._open = open_connections
        self._parser = httptools.HttpRequestParser(self)
        self._turn: deque[tuple[Exchange, bool]] = deque()
        self._now: Exchange | None = None
        self._idle: asyncio.TimerHandle | None = None
        self.writable = True
        self.keeps_alive = True
        self.closing = False

    # --- the transport's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = cast(asyncio.Transport, transport)
        self._loop = asyncio.get_running_loop()
        self._open.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the exchanges that the client is gone."""
        self._open.discard(self)
        self._stop_waiting()
        exchanges = [self._now] if self._now is not None else []
        exchanges += [exchange for exchange, _ in self._turn]
        self._now = None
        self._turn.clear()
        for exchange in exchanges:
            exchange.gone()

    def data_received(self, data: bytes) -> None:
        """Read requests."""
        self._stop_waiting()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self.close()
        except httptools.HttpParserError:
            text = b"Invalid HTTP request received."
            head = b"HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain; charset=utf-8\r\ncontent-length: %d\r\n"
            self.send(head % len(text) + b"connection: close\r\n\r\n" + text)
            self.close()
        self._begin_next()
        if self._turn:
            self._transport.pause_reading()

    def pause_writing(self) -> None:
        """The client is slow to read."""
        self.writable = False

    def resume_writing(self) -> None:
        """It caught up."""
        self.writable = True
        if self._now is not None and self._now.on_writable is not None:
            self._now.on_writable()

    # --- the parser's side

    def on_message_begin(self) -> None:
        """A request begins."""
        self._target = b""
        self._headers: dict[str, str] = {}
        self._body: list[bytes] = []
        self._size = 0

    def on_url(self, url: bytes) -> None:
        """Its target, or a part of it."""
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header."""
        if len(self._headers) >= MAX_HEADERS:
            raise ValueError("too many headers")
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        """Its headers are complete."""
        self._keep = self._parser.should_keep_alive()
        if self._headers.get("expect", "").lower() == "100-continue":
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        """A part of its body; what is too much is not kept."""
        self._size += len(body)
        if self._size <= MAX_BODY:
            self._body.append(body)

    def on_message_complete(self) -> None:
        """It is complete."""
        method = self._parser.get_method().decode("latin-1")
        exchange = Exchange(self, method, self._target, self._headers, b"".join(self._body))
        self._body = []
        exchange.too_large = self._size > MAX_BODY
        self._turn.append((exchange, self._keep))

    # --- the exchange's side

    def send(self, data: bytes) -> None:
        """Send bytes."""
        if not self._transport.is_closing():
            self._transport.write(data)

    def next(self) -> None:
        """The answer is through: go on with the next request, or wait for one."""
        self._now = None
        if not self.keeps_alive or self.closing:
            self.close()
        elif self._turn:
            self._loop.call_soon(self._begin_next)
        else:
            self._transport.resume_reading()
            self._idle = self._loop.call_later(KEEP_ALIVE, self.close)

    def close(self) -> None:
        """Close it when all is sent."""
        self._stop_waiting()
        self._transport.close()

    def close_when_idle(self) -> None:
        """Close it as soon as it serves nothing."""
        self.closing = True
        if self._now is None and not self._turn:
            self.close()

    def reset(self) -> None:
        """Close it so that the client sees a reset."""
        sock = self._transport.get_extra_info("socket")
        if sock is not None and sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()

    def _begin_next(self) -> None:
        if self._turn and self._now is None and not self._transport.is_closing():
            self._now, self.keeps_alive = self._turn.popleft()
            if self._now.too_large:
                self.keeps_alive = False
                self._now.answer(413, b'{"detail":"the body is too large"}')
            else:
                self._handle(self._now)

    def _stop_waiting(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
