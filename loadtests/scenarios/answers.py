"""What became of a request: an answer read event by event, and one row for it. Pure; the clock is the caller's.

Times are seconds; those of a row count from the moment the request should have begun, so that a client that was late,
or a request that was told to come back, does not look quick.
"""

from __future__ import annotations

import enum
from typing import Any

import msgspec

from loadtests.scenarios.sse import Event, Reader


class Outcome(enum.StrEnum):
    """What became of a request."""

    COMPLETE = "complete"
    """Its end mark came (or the whole body, where it is no stream)."""
    REFUSED = "refused"
    """429 or 503."""
    ERROR_EVENT = "error event"
    """The stream said that it broke."""
    BROKEN = "broken"
    """The stream ended without end mark and without an error event."""
    FAILED = "failed"
    """Another status, or no answer at all."""
    TIMED_OUT = "timed out"
    """Nothing more came in the client's time."""
    CUT = "cut"
    """Still under way when the run was over."""
    NOT_STARTED = "not started"
    """The client had no place for it before the run was over."""


class Attempt(msgspec.Struct, frozen=True):
    """One try that was refused or failed, and after how many seconds it was to come back (None: nothing was said)."""

    status: int
    retry_after: float | None = None


class Row(msgspec.Struct):
    """One request. ``at``: seconds from the beginning of the run to its intended start; ``late``: seconds from there to
    its real start; ``ttft``, ``total``: from the intended start; ``gaps``: microseconds between tokens."""

    klass: str
    tenant: str
    phase: str
    session: int
    turn: int
    at: float
    outcome: Outcome = Outcome.CUT
    status: int = 0
    late: float = 0.0
    ttft: float | None = None
    total: float | None = None
    gaps: list[int] = []
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    events: int = 0
    retry_after: float | None = None
    attempts: list[Attempt] = []
    error: str = ""
    id: str = ""


_NONE = msgspec.Raw(b"null")


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: msgspec.Raw = _NONE


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    text: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: msgspec.Raw = _NONE


_read_chunk = msgspec.json.Decoder(_Chunk).decode
_DONE = b"[DONE]"


class Stream:
    """A chat's or a completion's stream as it comes in."""

    def __init__(self, keep_text: bool = False) -> None:
        self.first: float | None = None
        """When the first token came, by the caller's clock."""
        self.gaps: list[int] = []
        self.events = 0
        """With a token."""
        self.usage: tuple[int, int] | None = None
        self.ended = False
        self.error = ""
        self._last = 0.0
        self._reader = Reader()
        self._text: list[str] | None = [] if keep_text else None

    @property
    def text(self) -> str:
        """All that was said, where it is kept."""
        return "".join(self._text or ())

    def feed(self, piece: bytes, now: float) -> None:
        """Take what came at ``now``."""
        for event in self._reader.feed(piece):
            self._event(event, now)

    def outcome(self) -> Outcome:
        """What has become of it when nothing more comes."""
        if self.error:
            return Outcome.ERROR_EVENT
        return Outcome.COMPLETE if self.ended else Outcome.BROKEN

    def _event(self, event: Event, now: float) -> None:
        if event.data == _DONE:
            self.ended = True
            return
        try:
            chunk = _read_chunk(event.data)
        except msgspec.MsgspecError as error:
            self.error = f"an event that is no chunk: {error}"
            return
        if chunk.error != _NONE or event.kind == b"error":
            self.error = event.data.decode(errors="replace")[:300]
            return
        if chunk.usage is not None:
            self.usage = (chunk.usage.prompt_tokens, chunk.usage.completion_tokens)
        for choice in chunk.choices:
            self._choice(choice, now)

    def _choice(self, choice: _Choice, now: float) -> None:
        delta = choice.delta
        said = choice.text if delta is None else delta.content or delta.reasoning_content or delta.reasoning
        if not said and (delta is None or delta.tool_calls == _NONE):
            return
        if self.first is None:
            self.first = now
        else:
            self.gaps.append(round((now - self._last) * 1e6))
        self._last = now
        self.events += 1
        if said and self._text is not None:
            self._text.append(said)


class _Message(msgspec.Struct):
    content: str | None = None


class _WholeChoice(msgspec.Struct):
    message: _Message | None = None
    text: str | None = None


class Whole(msgspec.Struct):
    """An answer that is no stream."""

    choices: list[_WholeChoice] = []
    usage: _Usage | None = None

    @property
    def text(self) -> str:
        """What was said."""
        said = (one.message.content if one.message is not None else one.text for one in self.choices)
        return "".join(one or "" for one in said)

    @property
    def tokens(self) -> tuple[int, int] | None:
        """Tokens of prompt and answer, where it says them."""
        return None if self.usage is None else (self.usage.prompt_tokens, self.usage.completion_tokens)


def read_whole(body: bytes) -> Whole | None:
    """The answer; None where it is none."""
    try:
        return msgspec.json.decode(body, type=Whole)
    except msgspec.MsgspecError:
        return None


def told_to_wait(headers: dict[str, str]) -> float | None:
    """Seconds after which to come back, as ``retry-after-ms`` or ``retry-after`` say; None when neither does."""
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            return max(0.0, float(headers[name]) / unit)
        except (KeyError, ValueError):
            continue
    return None


LONGEST_WAIT = 60.0
"""Seconds. The SDKs come back at their own pace where they are told to wait longer."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 8.0


def comes_back(status: int, headers: dict[str, str], attempt: int, most: int, chance: float) -> float | None:
    """Seconds until OpenAI's SDKs try again after ``attempt`` (from 0) tries were answered so; None: never.

    ``status`` 0 is no answer; ``chance`` is drawn from 0 to 1.
    """
    if attempt >= most:
        return None
    said = headers.get("x-should-retry")
    if said == "false" or (said != "true" and status and status not in (408, 409, 429) and status < 500):
        return None
    told = told_to_wait(headers)
    if told is not None and 0 < told <= LONGEST_WAIT:
        return told
    return float(min(_FIRST_PAUSE * 2.0**attempt, _LONGEST_PAUSE) * (1 - 0.25 * chance))


def as_json(row: Row) -> bytes:
    """A row as a line of the raw results."""
    return msgspec.json.encode(row) + b"\n"


def from_json(line: bytes) -> Row:
    """Read one back. msgspec.MsgspecError."""
    return msgspec.json.decode(line, type=Row)


Fields = dict[str, Any]
