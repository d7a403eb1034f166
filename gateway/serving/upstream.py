"""The HTTP/1.1 client that speaks to engines: one request at a time on a connection, idle ones kept last-in first-out.

It carries bytes and reports events; what they mean and how long to wait is the exchange's business.
"""

from __future__ import annotations

import asyncio
import enum
import ssl
from collections import deque
from dataclasses import dataclass, field
from typing import Protocol, cast
from urllib.parse import urlsplit

import httptools

MAX_HEAD = 64 * 1024
"""Bytes of status line and headers an engine may send."""

IDLE_AFTER = 20.0
"""Seconds after which an idle connection is not used again; uvicorn closes them after 5 by default, vLLM after 5."""

END_BYTES = 64 * 1024
END_WAIT = 2.0
"""What an engine may still send, and how long it may take, once a stream has said its end; then it is cut off."""

_HEAD, _BODY, _COMPLETE = range(3)

_SIZES = {b"%x" % size: size for size in range(1, 4096)}
"""What a chunk's first line may say, but for the last, empty chunk; larger ones are the parser's."""


class Loss(enum.Enum):
    """How an attempt ended without an answer."""

    CONNECT = "connect"
    """No connection: the engine has seen nothing."""
    STALE = "stale"
    """A kept connection was closed before any byte of an answer: safe to send again."""
    CLOSED = "closed"
    """The connection ended before the answer was whole."""
    GARBAGE = "garbage"
    """What came was not HTTP, or too large a head."""


class Receiver(Protocol):
    """Who is told what comes from the engine."""

    def on_connected(self) -> None:
        """Tell that a new connection stands and the request is on its way."""
        ...

    def on_head(self, status: int, content_type: bytes) -> None:
        """Take the answer's status and content type (lower case)."""
        ...

    def on_data(self, data: bytes) -> None:
        """Take what one read brought of the body."""
        ...

    def on_complete(self) -> None:
        """Take the end of the answer."""
        ...

    def on_lost(self, loss: Loss, detail: str) -> None:
        """Take that nothing more will come."""
        ...


@dataclass(frozen=True, slots=True)
class Address:
    """Where an engine listens: TCP, TLS or a Unix socket."""

    host: str
    port: int
    unix: str | None = None
    # Two contexts are never equal: after a reload every endpoint with one would be another endpoint.
    tls: ssl.SSLContext | None = field(default=None, compare=False)
    ca_file: str | None = None

    @property
    def authority(self) -> bytes:
        """Return what the ``host`` header says."""
        if self.unix is not None:
            return b"localhost"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}".encode("ascii")


def parse_address(url: str, ca_file: str | None = None) -> Address:
    """Return where ``http://host:port``, ``https://…`` or ``unix:/path`` leads. Raises ValueError otherwise."""
    if url.startswith("unix:"):
        return Address("", 0, unix=url.removeprefix("unix://").removeprefix("unix:"))
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r} is not an engine's address: write http://host:port, https://host:port or unix:/path")
    tls = ssl.create_default_context(cafile=ca_file) if parts.scheme == "https" else None
    return Address(parts.hostname, parts.port or (443 if tls else 80), tls=tls, ca_file=ca_file)


class Connections:
    """The connections to one engine. ``limit`` bounds those in use and idle together."""

    def __init__(self, address: Address, limit: int) -> None:
        self.address = address
        self.limit = limit
        self.open = 0
        self.accepted = 0
        """Connections made so far."""
        self._retired = False
        self._idle: deque[Connection] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._all: set[Connection] = set()

    @property
    def full(self) -> bool:
        """Whether no request can be sent now."""
        return not self._idle and self.open >= self.limit

    def send(self, payload: bytes, receiver: Receiver, *, fresh: bool = False) -> Connection:
        """Send a request on an idle connection, or on a new one; the caller has asked ``full``."""
        loop = self._loop
        if loop is None:
            loop = self._loop = asyncio.get_running_loop()
        now = loop.time()
        while self._idle and not fresh:
            connection = self._idle.pop()
            if connection.usable(now):
                connection.send(payload, receiver)
                return connection
            connection.idle = False
            connection.close()
        connection = Connection(self, loop)
        self.open += 1
        self._all.add(connection)
        connection.connect(payload, receiver)
        return connection

    def keep(self, connection: Connection) -> None:
        """Take back a connection that can serve again."""
        self._idle.append(connection)
        if self._retired:
            connection.close()

    def drop(self, connection: Connection) -> None:
        """Forget a connection that is gone."""
        if connection in self._all:
            self._all.discard(connection)
            self.open -= 1
            if connection.idle:
                self._idle.remove(connection)

    def retire(self) -> None:
        """Close every connection that is idle, now or once its answer is through: the engine is not ours any more."""
        self._retired = True
        for connection in list(self._idle):
            connection.close()

    def cut(self, why: str) -> None:
        """Close every connection at once; who waits for an answer is told ``why`` there will be none."""
        for connection in list(self._all):
            connection.cut(why)

    def close(self) -> None:
        """Close every connection, in use or not."""
        for connection in list(self._all):
            connection.abort()


class Connection(asyncio.Protocol):
    """One connection to an engine, used for one request at a time."""

    __slots__ = (
        "_between_chunks",
        "_chunk_ended",
        "_chunks",
        "_connecting",
        "_content_type",
        "_excess",
        "_head_bytes",
        "_keep_alive",
        "_loop",
        "_owner",
        "_parser",
        "_payload",
        "_phase",
        "_receiver",
        "_serial",
        "_transport",
        "_until_close",
        "idle",
        "idle_since",
        "reused",
    )

    def __init__(self, owner: Connections, loop: asyncio.AbstractEventLoop) -> None:
        self._owner = owner
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._receiver: Receiver | None = None
        self._payload = b""
        self._chunks: list[bytes] = []
        self.idle = False
        self.idle_since = 0.0
        self.reused = False
        self._serial = 0
        self._parser = httptools.HttpResponseParser(self)
        self._reset()

    def _reset(self) -> None:
        # The parser itself goes on: it begins a new answer by itself where the last one was whole.
        self._content_type = b""
        self._head_bytes = 0
        self._phase = _HEAD
        self._between_chunks = False
        self._chunk_ended = False
        self._serial += 1
        self._keep_alive = False
        self._until_close = False
        self._excess = False

    # What the exchange asks for.

    def connect(self, payload: bytes, receiver: Receiver) -> None:
        """Open the connection, then send ``payload``."""
        self._payload = payload
        self._receiver = receiver
        self._connecting = self._loop.create_task(self._connect())

    async def _connect(self) -> None:
        address = self._owner.address
        try:
            if address.unix is not None:
                await self._loop.create_unix_connection(lambda: self, address.unix)
            else:
                await self._loop.create_connection(
                    lambda: self,
                    address.host,
                    address.port,
                    ssl=address.tls,
                    server_hostname=address.host if address.tls is not None else None,
                )
        except OSError as error:
            self._connecting = None
            self._owner.drop(self)
            receiver, self._receiver = self._receiver, None
            if receiver is not None:
                receiver.on_lost(Loss.CONNECT, str(error))

    def usable(self, now: float) -> bool:
        """Tell whether an idle connection may carry another request."""
        transport = self._transport
        return transport is not None and not transport.is_closing() and now - self.idle_since < IDLE_AFTER

    def send(self, payload: bytes, receiver: Receiver) -> None:
        """Send a request on a connection that was idle."""
        self.idle = False
        self.reused = True
        self._receiver = receiver
        self._reset()
        assert self._transport is not None
        self._transport.write(payload)

    def release(self) -> None:
        """Let go of an answer that is not whole yet but of no more interest: keep the connection if its end is near."""
        self._receiver = None
        if self._phase != _COMPLETE:
            # The end of a finished stream follows at once in all known engines; the bounds are for those that talk on.
            self._head_bytes = 0
            self._loop.call_later(END_WAIT, self._abandon, self._serial)

    def _abandon(self, serial: int) -> None:
        if serial == self._serial and self._phase != _COMPLETE:
            self.abort()

    def abort(self) -> None:
        """Close at once: this is how an engine is told to stop working."""
        self._receiver = None
        if self._connecting is not None:
            self._connecting.cancel()
            self._connecting = None
        self._owner.drop(self)
        self.idle = False
        if self._transport is not None:
            self._transport.abort()

    def cut(self, why: str) -> None:
        """Close at once, and tell who waits for the answer."""
        self._fail(Loss.CLOSED, why)

    def close(self) -> None:
        """Close an idle connection."""
        self._owner.drop(self)
        self.idle = False
        if self._transport is not None:
            self._transport.close()

    def pause(self) -> None:
        """Stop reading: the client is slower than the engine."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def resume(self) -> None:
        """Read again."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    # What the event loop reports.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the request that waited for the connection."""
        self._connecting = None
        self._transport = cast(asyncio.Transport, transport)
        self._owner.accepted += 1
        if self._receiver is None:
            self.abort()
            return
        self._transport.write(self._payload)
        self._payload = b""
        self._receiver.on_connected()

    def data_received(self, data: bytes) -> None:
        """Parse what came, and report a read's worth of body at once."""
        if self._between_chunks:
            cut = data.find(b"\r\n", 1, 5)
            size = _SIZES.get(data[:cut])
            if size is not None and len(data) == cut + size + 4 and data.endswith(b"\r\n"):
                receiver = self._receiver
                if receiver is not None:
                    # A whole chunk in one read leaves the parser where it is, so it need not see it.
                    receiver.on_data(data[cut + 2 : -2])
                    return
        if self.idle or self._phase == _COMPLETE:
            # An answer nobody asked for: the connection cannot be trusted.
            self.abort()
            return
        if self._phase == _HEAD or self._receiver is None:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(Loss.GARBAGE, f"not HTTP: {error}")
            return
        # At the end of a chunk, and not within the line that tells the next one's size.
        self._between_chunks = self._chunk_ended and data.endswith(b"\r\n")
        receiver = self._receiver
        if receiver is None:
            self._let_go()
            return
        chunks = self._chunks
        if chunks:
            body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
            self._chunks = []
            receiver.on_data(body)
        if self._phase == _COMPLETE:
            self._finish()
        elif self._phase == _HEAD and self._head_bytes > MAX_HEAD:
            self._fail(Loss.GARBAGE, f"more than {MAX_HEAD} bytes of headers")

    def _let_go(self) -> None:
        self._chunks = []
        if self._phase == _COMPLETE:
            self._finish()
        elif self._head_bytes > END_BYTES:
            self.abort()

    def _finish(self) -> None:
        receiver, self._receiver = self._receiver, None
        keep = self._keep_alive and not self._excess
        if keep and self._transport is not None and not self._transport.is_closing():
            self.idle = True
            self.idle_since = self._loop.time()
            self._owner.keep(self)
        else:
            self.close()
        if receiver is not None:
            receiver.on_complete()

    def _fail(self, loss: Loss, detail: str) -> None:
        receiver = self._receiver
        self.abort()
        if receiver is not None:
            receiver.on_lost(loss, detail)

    def connection_lost(self, exc: Exception | None) -> None:
        """Report an answer that will not be whole."""
        receiver, self._receiver = self._receiver, None
        self._owner.drop(self)
        self.idle = False
        if receiver is None:
            return
        if self._phase == _BODY and self._until_close and exc is None:
            # HTTP/1.0 style: neither length nor chunks, the close is the end.
            receiver.on_complete()
            return
        detail = str(exc) if exc is not None else "the engine closed the connection"
        loss = Loss.STALE if self.reused and self._head_bytes == 0 else Loss.CLOSED
        receiver.on_lost(loss, detail)

    # What the parser finds.

    def on_header(self, name: bytes, value: bytes) -> None:
        """Note what decides how the body is read."""
        lowered = name.lower()
        if self._excess:
            return
        if lowered == b"content-type":
            self._content_type = value.lower()
        elif lowered in (b"content-length", b"transfer-encoding"):
            self._until_close = False

    def on_message_begin(self) -> None:
        """Start an answer. A second one in the same read is nobody's: what it says is not heard."""
        if self._phase == _COMPLETE:
            self._excess = True
            return
        self._until_close = True
        self._content_type = b""

    def on_headers_complete(self) -> None:
        """Report the head. ``should_keep_alive`` is right only here."""
        status = self._parser.get_status_code()
        if status < 200 or self._excess:
            return
        self._phase = _BODY
        self._keep_alive = self._parser.should_keep_alive() and not self._until_close
        if self._receiver is not None:
            self._receiver.on_head(status, self._content_type)

    def on_body(self, body: bytes) -> None:
        """Collect; reported once a read."""
        if not self._excess:
            self._chunks.append(body)

    def on_chunk_header(self) -> None:
        """Note that a chunk has begun."""
        self._chunk_ended = False

    def on_chunk_complete(self) -> None:
        """Note that a chunk has ended."""
        self._chunk_ended = True

    def on_message_complete(self) -> None:
        """Note that the answer is whole."""
        self._chunk_ended = False
        if self._phase == _BODY:
            self._phase = _COMPLETE
