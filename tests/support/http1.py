"""The little of HTTP/1.1 that both ends of a test need, written apart from any parser the gateway uses.

Strict on purpose: what this reads without complaint is well-formed. Malformed input raises ``ProtocolError`` with the
offending bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Headers = Sequence[tuple[str, str]]

HEX = frozenset(b"0123456789abcdefABCDEF")


class ProtocolError(Exception):
    """The peer sent something that is not HTTP/1.1."""


def header(headers: Headers, name: str) -> str | None:
    """Return the first value of a header, whatever the case of its name, or None."""
    return next((value for key, value in headers if key.lower() == name.lower()), None)


def header_values(headers: Headers, name: str) -> list[str]:
    """Return every value of a header in the order received."""
    return [value for key, value in headers if key.lower() == name.lower()]


def encode_head(start_line: str, headers: Headers) -> bytes:
    """Return a start line and headers as bytes, with the empty line after them."""
    lines = [start_line, *(f"{key}: {value}" for key, value in headers), "", ""]
    return "\r\n".join(lines).encode("latin-1")


def parse_head(raw: bytes) -> tuple[str, list[tuple[str, str]]]:
    """Split a complete head (it ends with the empty line) into its start line and headers. Raises ``ProtocolError``."""
    start_line, *lines = raw.removesuffix(b"\r\n\r\n").decode("latin-1").split("\r\n")
    headers = []
    for line in lines:
        key, colon, value = line.partition(":")
        if not colon or not key or key != key.strip() or "\n" in line:
            raise ProtocolError(f"not a header line: {line!r}")
        headers.append((key, value.strip()))
    return start_line, headers


def encode_chunk(data: bytes) -> bytes:
    """Frame one piece of a chunked body. An empty piece would end the body, so it is refused with ``ValueError``."""
    if not data:
        raise ValueError("an empty chunk ends a body; use last_chunk()")
    return b"%x\r\n%b\r\n" % (len(data), data)


def last_chunk(trailers: Headers = ()) -> bytes:
    """Return the chunk that ends a chunked body, with trailers when given."""
    return b"0\r\n" + "".join(f"{key}: {value}\r\n" for key, value in trailers).encode("latin-1") + b"\r\n"


class BodyReader:
    """Takes one body out of a buffer as bytes arrive.

    ``chunks`` holds each chunk as it was framed (for other framings: each piece as it was fed), ``done`` says the
    body is complete.
    """

    def __init__(self, framing: Literal["length", "chunked", "close"], length: int = 0) -> None:
        self.framing = framing
        self.chunks: list[bytes] = []
        self.trailers: list[tuple[str, str]] = []
        self.done = framing == "length" and length == 0
        self._left = length
        self._in_trailers = False

    @property
    def body(self) -> bytes:
        """Everything read so far, without framing."""
        return b"".join(self.chunks)

    def feed(self, buffer: bytearray) -> None:
        """Take this body's bytes from the front of ``buffer``. Raises ``ProtocolError`` on a malformed chunk."""
        if self.done:
            return
        if self.framing == "chunked":
            while not self.done and self._take_chunk(buffer):
                continue
            return
        size = len(buffer) if self.framing == "close" else min(self._left, len(buffer))
        if size:
            self.chunks.append(bytes(buffer[:size]))
            del buffer[:size]
            self._left -= size
        self.done = self.framing == "length" and self._left == 0

    def end(self) -> bool:
        """Say that the connection ended; return whether that completes the body."""
        if self.framing == "close":
            self.done = True
        return self.done

    def _take_chunk(self, buffer: bytearray) -> bool:
        """Take one whole chunk, or the trailers, if they are there. Returns whether anything was taken."""
        if self._in_trailers:
            return self._take_trailers(buffer)
        line_end = buffer.find(b"\r\n")
        if line_end < 0:
            if len(buffer) > 32:
                raise ProtocolError(f"no chunk size in {bytes(buffer[:32])!r}")
            return False
        digits = bytes(buffer[:line_end]).partition(b";")[0]
        if not digits or not HEX.issuperset(digits):
            raise ProtocolError(f"not a chunk size: {digits!r}")
        size = int(digits, 16)
        if size == 0:
            self._in_trailers = True
            del buffer[: line_end + 2]
            return self._take_trailers(buffer)
        start = line_end + 2
        if len(buffer) < start + size + 2:
            return False
        if buffer[start + size : start + size + 2] != b"\r\n":
            raise ProtocolError(f"a chunk of {size} bytes is not followed by a line end")
        self.chunks.append(bytes(buffer[start : start + size]))
        del buffer[: start + size + 2]
        return True

    def _take_trailers(self, buffer: bytearray) -> bool:
        if buffer.startswith(b"\r\n"):
            del buffer[:2]
        else:
            end = buffer.find(b"\r\n\r\n")
            if end < 0:
                return False
            self.trailers = parse_head(b"\r\n" + bytes(buffer[: end + 4]))[1]
            del buffer[: end + 4]
        self.done = True
        return True
