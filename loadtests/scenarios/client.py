"""An HTTP/1.1 client for streams: plain sockets, one request at a time on each connection.

It blocks. Under locust, where sockets wait in greenlets, thousands of it do so beside each other; nothing here knows.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httptools

from loadtests.scenarios.answers import Stream

_READ = 65536
_CONNECT = 10.0
"""Seconds."""
_MOST_BODY = 16 * 2**20


@dataclass(slots=True)
class Answer:
    """What came. ``status`` 0: no answer; ``whole``: it ended as HTTP says it should; ``error``: why it did not."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    whole: bool = False
    timed_out: bool = False
    error: str = ""


class _Reading:
    """Callbacks of the parser."""

    def __init__(self, answer: Answer, stream: Stream | None, clock: Callable[[], float]) -> None:
        self.answer = answer
        self.stream = stream
        self.clock = clock
        self.parser = httptools.HttpResponseParser(self)
        self.keep = False
        self._body: list[bytes] = []
        self._size = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        self.answer.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        status = self.parser.get_status_code()
        if status < 200:
            self.answer.headers.clear()
        self.answer.status = status

    def on_body(self, piece: bytes) -> None:
        if self.stream is not None and self.answer.status == 200:
            self.stream.feed(piece, self.clock())
            return
        self._size += len(piece)
        if self._size <= _MOST_BODY:
            self._body.append(piece)

    def on_message_complete(self) -> None:
        if self.answer.status < 200:
            return
        self.keep = self.parser.should_keep_alive()
        self.answer.body = b"".join(self._body)
        self.answer.whole = True


class Client:
    """Asks one host. ``clock`` is what a stream's times are read from."""

    def __init__(self, url: str, clock: Callable[[], float]) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is not http://host:port or https://host")
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._host = parts.hostname
        self._port = parts.port or (443 if self._tls else 80)
        self._prefix = parts.path.rstrip("/")
        self._name = parts.netloc.rpartition("@")[2]
        self._clock = clock
        self._idle: list[socket.socket] = []

    def ask(self, path: str, headers: Mapping[str, str], body: bytes, stream: Stream | None, timeout: float) -> Answer:
        """POST JSON and read the answer, a stream's events as they come. ``timeout``: seconds to wait for more."""
        lines = {"host": self._name, "content-type": "application/json", "content-length": str(len(body)), **headers}
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        request = f"POST {self._prefix}{path} HTTP/1.1\r\n{head}\r\n".encode() + body
        while self._idle:
            answer = self._on(self._idle.pop(), request, stream, timeout)
            # Whoever kept a connection too long is not told that it was closed until he writes to it.
            if answer.status or answer.timed_out:
                return answer
        try:
            connection = self._connect()
        except OSError as error:
            return Answer(error=f"no connection: {error}", timed_out=isinstance(error, TimeoutError))
        return self._on(connection, request, stream, timeout)

    def close(self) -> None:
        """Close the connections that are kept."""
        while self._idle:
            self._idle.pop().close()

    def _connect(self) -> socket.socket:
        connection = socket.create_connection((self._host, self._port), _CONNECT)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._tls is None:
            return connection
        try:
            return self._tls.wrap_socket(connection, server_hostname=self._host)
        except BaseException:
            connection.close()
            raise

    def _on(self, connection: socket.socket, request: bytes, stream: Stream | None, timeout: float) -> Answer:
        answer = Answer()
        reading = _Reading(answer, stream, self._clock)
        try:
            connection.settimeout(timeout)
            connection.sendall(request)
            while not answer.whole:
                piece = connection.recv(_READ)
                if not piece:
                    _end_of_input(reading)
                    break
                reading.parser.feed_data(piece)
        except TimeoutError:
            answer.timed_out = True
            answer.error = f"nothing came for {timeout:g} s"
        except (OSError, httptools.HttpParserError) as error:
            answer.error = f"{type(error).__name__}: {error}"
        finally:
            if answer.whole and reading.keep:
                self._idle.append(connection)
            else:
                connection.close()
        return answer


def _end_of_input(reading: _Reading) -> None:
    """A body without a length ends with the connection; any other was cut."""
    answer = reading.answer
    headers = answer.headers
    if answer.status >= 200 and "content-length" not in headers and "transfer-encoding" not in headers:
        with contextlib.suppress(httptools.HttpParserError):
            reading.on_message_complete()
        reading.keep = False
        return
    answer.error = "the connection was closed in the middle of the answer" if answer.status else "no answer came"
