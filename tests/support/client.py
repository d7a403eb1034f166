"""A raw HTTP/1.1 client: it sends exact bytes, may misbehave, and keeps exactly what came back.

The official clients are used elsewhere; this one is for assertions on single bytes, chunks and connection ends.
"""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, cast
from urllib.parse import urlsplit

from tests.support.http1 import (
    BodyReader,
    Headers,
    encode_chunk,
    encode_head,
    header,
    header_values,
    last_chunk,
    parse_head,
)
from tests.support.journal import PATIENCE, Journal
from tests.support.sockets import reset_on_close, tcp_socket, unread_by_peer


class ConnectionEndedError(Exception):
    """The peer ended the connection too early for the test. ``how`` is ``"close"`` or ``"reset"``."""

    def __init__(self, how: Literal["close", "reset"], left: bytes) -> None:
        super().__init__(f"the peer ended the connection ({how}); unread: {left[:300]!r}")
        self.how = how
        self.left = left


@dataclass(slots=True)
class Head:
    """The start of an answer. ``raw`` is exact."""

    status: int
    reason: str
    headers: list[tuple[str, str]]
    raw: bytes

    def header(self, name: str) -> str | None:
        """Return the first value of a header, whatever the case of its name, or None."""
        return header(self.headers, name)

    def header_values(self, name: str) -> list[str]:
        """Return every value of a header in the order received."""
        return header_values(self.headers, name)


@dataclass(slots=True)
class Response(Head):
    """A whole answer. ``chunks``: the body's pieces as framed; ``complete``: its framing ended properly."""

    body: bytes = b""
    chunks: list[bytes] = field(default_factory=list)
    trailers: list[tuple[str, str]] = field(default_factory=list)
    complete: bool = True

    def json(self) -> Any:
        """Return the body as JSON. Raises ``json.JSONDecodeError``."""
        return json.loads(self.body)

    def events(self) -> list[bytes]:
        """Return the body's server-sent events, exact, each with its blank line; an unfinished last one without."""
        parts = self.body.split(b"\n\n")
        return [part + b"\n\n" for part in parts[:-1]] + ([parts[-1]] if parts[-1] else [])


def error_of(answer: Response) -> dict[str, Any]:
    """Return what an answer in OpenAI's error envelope tells."""
    error: dict[str, Any] = answer.json()["error"]
    return error


def text_of(answer: Response) -> str:
    """Return what a chat that was answered says."""
    assert answer.status == 200, answer.body
    text: str = answer.json()["choices"][0]["message"]["content"]
    return text


def request_bytes(
    method: str,
    target: str,
    headers: Headers = (),
    body: bytes | Sequence[bytes] | None = None,
    *,
    host: str = "test",
) -> bytes:
    """Return a well-formed request: a ``bytes`` body gets its length, a sequence of pieces is sent chunked."""
    framing: list[tuple[str, str]] = []
    data = b""
    if isinstance(body, bytes):
        framing, data = [("content-length", str(len(body)))], body
    elif body is not None:
        framing, data = [("transfer-encoding", "chunked")], b"".join(map(encode_chunk, body)) + last_chunk()
    return encode_head(f"{method} {target} HTTP/1.1", [("host", host), *headers, *framing]) + data


class RawClient(asyncio.Protocol):
    """One connection. A wait fails with what was received when the peer sends nothing for ``PATIENCE`` seconds.

    ``received`` is everything that came, ``reads`` how many bytes each read of the socket brought. Entries it writes
    to the journal as its name: ``connected``, ``sent``, ``ended`` (this end closed) and ``closed`` (the peer did).
    """

    def __init__(self, journal: Journal, name: str) -> None:
        self.journal = journal
        self.name = name
        self.received = bytearray()
        self.reads: list[int] = []
        self.buffer = bytearray()
        self.end: Literal["close", "reset"] | None = None
        self._news = asyncio.Event()
        self._gone = asyncio.Event()
        self._head: Head | None = None
        self._body: BodyReader | None = None
        self._taken = 0
        self._methods: list[str] = []
        self._event_tail = bytearray()
        self._ended_by_us = False
        self.transport: asyncio.Transport

    @classmethod
    async def connect(
        cls,
        address: str,
        *,
        tls: ssl.SSLContext | None = None,
        journal: Journal | None = None,
        name: str = "client",
        receive_buffer: int | None = None,
    ) -> RawClient:
        """Connect to a base URL (``http://host:port``, ``https://…`` with ``tls``, ``unix:/path``).

        ``receive_buffer`` makes the kernel's buffer small (bytes), for tests of slow readers.
        """
        loop = asyncio.get_running_loop()
        parts = urlsplit(address)
        unix = parts.scheme == "unix"
        sock = socket.socket(socket.AF_UNIX) if unix else tcp_socket()
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.setblocking(False)
        try:
            await loop.sock_connect(sock, str(Path(parts.path)) if unix else (parts.hostname, parts.port))
            _, client = await loop.create_connection(
                lambda: cls(journal or Journal(), name),
                sock=sock,
                ssl=tls,
                server_hostname=parts.hostname if tls else None,
            )
        except BaseException:
            sock.close()
            raise
        return client

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # Sending

    def send(self, data: bytes) -> None:
        """Write bytes as they are, well-formed or not."""
        self.transport.write(data)
        self.journal.note(self.name, "sent", detail=f"{len(data)} bytes")

    async def send_pieces(self, pieces: Iterable[bytes]) -> None:
        """Write pieces one after the other, each taken out of its kernel by the peer before the next is written."""
        sock = self.transport.get_extra_info("socket")
        for piece in pieces:
            self.send(piece)
            while not self._gone.is_set() and (self.transport.get_write_buffer_size() or unread_by_peer(sock)):
                await asyncio.sleep(0)

    def request(
        self, method: str, target: str, headers: Headers = (), body: bytes | Sequence[bytes] | None = None
    ) -> None:
        """Write a well-formed request; see ``request_bytes``."""
        self.expect(method)
        self.send(request_bytes(method, target, headers, body))

    def expect(self, method: str) -> None:
        """Say that a request with this method was sent by ``send`` (an answer to HEAD has no body)."""
        self._methods.append(method)

    def post(self, target: str, body: Any, headers: Headers = ()) -> None:
        """Write a POST with a JSON body (bytes are taken as they are)."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.request("POST", target, [("content-type", "application/json"), *headers], data)

    # Ending

    def half_close(self) -> None:
        """Say that nothing more will be sent, and keep reading."""
        self.transport.write_eof()
        self.journal.note(self.name, "ended", detail="half")

    async def reset(self) -> None:
        """End the connection with RST."""
        sock = self.transport.get_extra_info("socket")
        if sock.family != socket.AF_UNIX:
            reset_on_close(sock)
        self._note_ended("reset")
        self.transport.abort()
        await self._gone.wait()

    async def close(self) -> None:
        """Close the connection; nothing happens when it is closed already."""
        if not self._gone.is_set():
            self._note_ended("close")
            self.transport.close()
        await self._gone.wait()

    def stop_reading(self) -> None:
        """Leave what comes in the kernel, as a slow reader does."""
        self.transport.pause_reading()

    def read_on(self) -> None:
        """Read again."""
        self.transport.resume_reading()

    def _note_ended(self, how: str) -> None:
        if self.end is None:
            self._ended_by_us = True
            self.journal.note(self.name, "ended", detail=how)

    # Receiving

    async def head(self) -> Head:
        """Return the head of the next answer, interim answers (1xx) included."""
        assert self._head is None, "the previous answer's body is not read yet"
        while (end := self.buffer.find(b"\r\n\r\n")) < 0:
            await self._more()
        raw = bytes(self.buffer[: end + 4])
        del self.buffer[: end + 4]
        start_line, headers = parse_head(raw)
        version, status, *reason = start_line.split(" ", 2)
        assert version == "HTTP/1.1", f"answered with {start_line!r}"
        head = Head(int(status), reason[0] if reason else "", headers, raw)
        if head.status >= 200:
            self._start_body(head)
        return head

    def _start_body(self, head: Head) -> None:
        method = self._methods.pop(0) if self._methods else "GET"
        length = head.header("content-length")
        if method == "HEAD" or head.status in (204, 304):
            self._body = BodyReader("length", 0)
        elif head.header("transfer-encoding") is not None:
            assert length is None, "an answer has both transfer-encoding and content-length"
            self._body = BodyReader("chunked")
        else:
            self._body = BodyReader("close") if length is None else BodyReader("length", int(length))
        self._head = head
        self._taken = 0
        self._event_tail.clear()

    async def chunk(self) -> bytes | None:
        """Return the next piece of the body as it was framed, or None at its end. Raises ``ConnectionEndedError``."""
        assert self._body is not None, "read the head first"
        while True:
            self._body.feed(self.buffer)
            if self._taken < len(self._body.chunks):
                self._taken += 1
                return self._body.chunks[self._taken - 1]
            if self._body.done:
                self._head = None
                return None
            await self._more()

    async def event(self) -> bytes | None:
        """Return the next server-sent event, exact, with its blank line, or None at the body's end.

        Raises ``AssertionError`` when the body ends inside an event, ``ConnectionEndedError`` when the connection does.
        """
        while (end := self._event_tail.find(b"\n\n")) < 0:
            piece = await self.chunk()
            if piece is None:
                assert not self._event_tail, f"the body ends inside an event: {bytes(self._event_tail)!r}"
                return None
            self._event_tail += piece
        event = bytes(self._event_tail[: end + 2])
        del self._event_tail[: end + 2]
        return event

    async def events(self) -> list[bytes]:
        """Return every remaining event of the body."""
        found = []
        while (event := await self.event()) is not None:
            found.append(event)
        return found

    async def response(self) -> Response:
        """Read one whole answer; when the connection ends inside its body, ``complete`` is False."""
        head = self._head or await self.head()
        while head.status < 200:
            head = await self.head()
        complete = True
        try:
            while await self.chunk() is not None:
                continue
        except ConnectionEndedError:
            complete = False
        body = self._body
        assert body is not None
        return Response(
            head.status, head.reason, head.headers, head.raw, body.body, list(body.chunks), body.trailers, complete
        )

    async def ended(self) -> Literal["close", "reset"]:
        """Wait until the peer ends the connection; return how. Raises ``AssertionError`` when bytes come instead."""
        try:
            while True:
                assert not self.buffer, f"expected the end, got {bytes(self.buffer[:300])!r}"
                await self._more()
        except ConnectionEndedError as end:
            return end.how

    async def _more(self) -> None:
        """Wait for more bytes or the end of the connection."""
        if self.end is None:
            self._news.clear()
            try:
                async with asyncio.timeout(PATIENCE):
                    await self._news.wait()
            except TimeoutError:
                raise AssertionError(f"nothing more came; received so far: {bytes(self.received[-2000:])!r}") from None
            return
        if self._body is not None and self._head is not None and self._body.end():
            return
        raise ConnectionEndedError(self.end, bytes(self.buffer))

    # Callbacks of the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Not checked with isinstance: uvloop's transports do not derive from asyncio's.
        self.transport = cast(asyncio.Transport, transport)
        self.journal.note(self.name, "connected")

    def data_received(self, data: bytes) -> None:
        self.reads.append(len(data))
        self.received += data
        self.buffer += data
        self._news.set()

    def eof_received(self) -> bool:
        self._peer_ended("close")
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._peer_ended("reset" if exc is not None else "close")
        self._gone.set()

    def _peer_ended(self, how: Literal["close", "reset"]) -> None:
        if self.end is None:
            self.end = how
            if not self._ended_by_us:
                self.journal.note(self.name, "closed", detail=how)
        self._news.set()
