"""What a scripted engine answers: the exact bytes, and what to do at which position of them.

A ``Script`` is a value. Every cut, pause or fault is an action at a byte position of the answer, so each combination
of framing, split and fault is built from the same few pieces. Positions worth breaking at are found by
``after_head``, ``after_frame`` and so on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Literal

from tests.support.http1 import Headers, encode_chunk, encode_head, last_chunk
from tests.support.recordings import Recording

Framing = Literal["length", "chunked", "close"]
DONE = b"data: [DONE]\n\n"


class Do(Enum):
    """What the engine does at a position of its answer, besides writing."""

    UNTIL_READ = "wait until the peer has read everything written so far"
    CLOSE = "close the connection (FIN)"
    RESET = "reset the connection (RST; on a Unix socket the peer sees a close)"
    HALF_CLOSE = "close the writing side only, keep reading"
    HANG = "write nothing more and keep the connection until the peer leaves it"
    STOP_READING = "leave what the peer sends in the kernel"
    READ_ON = "read again"


ENDINGS = frozenset({Do.CLOSE, Do.RESET, Do.HANG})


class Gate:
    """Holds a script at one place until the test opens it; ``await gate.reached()`` waits until it stands there."""

    def __init__(self, name: str = "gate") -> None:
        self.name = name
        self._arrived = asyncio.Event()
        self._opened = asyncio.Event()

    def open(self) -> None:
        """Let the script pass; it stays open."""
        self._opened.set()

    async def reached(self) -> None:
        """Wait until the script stands at this gate (bounded by the test's own time limit)."""
        await self._arrived.wait()

    async def wait(self) -> None:
        """Stand at the gate. Called by whoever plays the script."""
        self._arrived.set()
        await self._opened.wait()


Action = Do | Gate


@dataclass(frozen=True, slots=True)
class Script:
    """An answer as bytes with actions between them.

    ``frames`` are the positions (start, end) of each body piece with its framing. ``at`` says when the answer starts:
    as soon as the request's head is there, or once the whole request is. After the last byte the connection is kept
    for the next request, unless an action ended it.
    """

    data: bytes
    head_end: int = 0
    frames: tuple[tuple[int, int], ...] = ()
    actions: tuple[tuple[int, Action], ...] = ()
    at: Literal["head", "request"] = "request"

    def do(self, action: Action, at: int | None = None) -> Script:
        """Return a script that also does this once ``at`` bytes are written (None: after the last one)."""
        place = len(self.data) if at is None else at
        if not 0 <= place <= len(self.data):
            raise ValueError(f"position {place} is outside the {len(self.data)} bytes of this answer")
        return replace(self, actions=(*self.actions, (place, action)))

    def cut(self, positions: Iterable[int]) -> Script:
        """Return a script that writes in pieces, each one read by the peer before the next is written."""
        script = self
        for position in positions:
            script = script.do(Do.UNTIL_READ, position)
        return script

    def cut_body(self, positions: Iterable[int]) -> Script:
        """Like ``cut``, with positions counted from the end of the head."""
        return self.cut(self.head_end + position for position in positions)

    def before_request_body(self) -> Script:
        """Return a script that answers once the request's head is there, before its body is read."""
        return replace(self, at="head")

    def steps(self) -> list[bytes | Action]:
        """Return bytes to write and actions to do, in order, ending with the first action that ends the connection."""
        steps: list[bytes | Action] = []
        written = 0
        for position, action in sorted(self.actions, key=lambda item: item[0]):
            if position > written:
                steps.append(self.data[written:position])
                written = position
            steps.append(action)
            if action in ENDINGS:
                return steps
        if written < len(self.data):
            steps.append(self.data[written:])
        return steps

    @property
    def after_head(self) -> int:
        """The position right after the headers."""
        return self.head_end

    def after_frame(self, index: int) -> int:
        """The position after a body piece and its framing; negative indexes count from the last piece."""
        return self.frames[index][1]

    def inside_frame(self, index: int) -> int:
        """The position in the middle of a body piece: inside an event when pieces are events."""
        start, end = self.frames[index]
        return (start + end) // 2

    def inside_size_line(self, index: int) -> int:
        """The position after the first digit of a chunk's size line."""
        return self.frames[index][0] + 1

    @property
    def before_last_chunk(self) -> int:
        """The position after the last body piece: between ``[DONE]`` and the terminating chunk."""
        return self.frames[-1][1]


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP answer to be framed: ``Answer(...).script()``. Recordings become one by ``of``."""

    status: int = 200
    headers: Headers = ()
    pieces: Sequence[bytes] = ()
    framing: Framing = "length"
    trailers: Headers = ()
    reason: str = "OK"
    version: str = "HTTP/1.1"
    interim: bytes = field(default=b"")

    def script(self) -> Script:
        """Frame the answer: each piece becomes a chunk of its own under ``chunked``."""
        framing_header = {
            "length": ("content-length", str(sum(map(len, self.pieces)))),
            "chunked": ("transfer-encoding", "chunked"),
            "close": ("connection", "close"),
        }[self.framing]
        start_line = f"{self.version} {self.status} {self.reason}".rstrip()
        data = bytearray(self.interim + encode_head(start_line, [*self.headers, framing_header]))
        head_end = len(data)
        frames = []
        for piece in self.pieces:
            if not piece:
                continue
            start = len(data)
            data += encode_chunk(piece) if self.framing == "chunked" else piece
            frames.append((start, len(data)))
        if self.framing == "chunked":
            data += last_chunk(self.trailers)
        script = Script(bytes(data), head_end, tuple(frames))
        return script.do(Do.CLOSE) if self.framing == "close" else script


def play(
    recording: Recording,
    *,
    framing: Framing | None = None,
    pieces: Sequence[bytes] | None = None,
    trailers: Headers = (),
) -> Script:
    """Play a recording: its status, headers and body, cut as the engine cut it unless ``pieces`` says otherwise.

    The framing is the recorded one unless given; the length is computed, because some recorded ones are stale.
    """
    recorded = "chunked" if recording.header("transfer-encoding") else "length"
    headers = [
        pair for pair in recording.response_headers if pair[0].lower() not in ("content-length", "transfer-encoding")
    ]
    return Answer(
        status=recording.status,
        reason=recording.reason,
        headers=headers,
        pieces=recording.pieces() if pieces is None else pieces,
        framing=framing or ("chunked" if recorded == "chunked" else "length"),
        trailers=trailers,
    ).script()


def json_answer(body: bytes, *, status: int = 200, headers: Headers = ()) -> Script:
    """Return a whole JSON answer with its length."""
    return Answer(status, [*headers, ("content-type", "application/json")], [body]).script()


def event_stream(events: Sequence[bytes], *, framing: Framing = "chunked", trailers: Headers = ()) -> Script:
    """Return a stream of events, each one a piece of its own. Every event brings its own blank line."""
    return Answer(
        headers=[("content-type", "text/event-stream; charset=utf-8")],
        pieces=events,
        framing=framing,
        trailers=trailers,
    ).script()


def endless_event(size: int) -> list[bytes]:
    """Return pieces of one event of ``size`` bytes whose blank line never comes."""
    piece = 65536
    return [b"data: {" + b"x" * (piece - 7), *[b"x" * piece] * (size // piece)]


def garbage() -> Script:
    """Return bytes that are no HTTP answer (a TLS alert), then a close."""
    return Script(b"\x15\x03\x03\x00\x02\x02\x46 this is not HTTP\r\n\r\n").do(Do.CLOSE)


def nothing() -> Script:
    """Return an answer without a byte; add ``.do(Do.CLOSE)``, ``.do(Do.RESET)`` or ``.do(Do.HANG)``."""
    return Script(b"")
