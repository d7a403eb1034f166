"""The SSE scanner: bytes of an engine's stream in, whole events for the client out, usage found on the way.

Rule 1: what is returned is always a whole number of events; a partial one waits, bounded.
Rule 2: everything hidden, renamed or dropped is so at event boundaries.
Rule 3: the common case, one plain ``data:`` line, costs a few C calls and no decoding.
"""

from __future__ import annotations

import re

import msgspec

from engines.protocol import Engine, EngineError
from gateway.serving.dialect import Dialect


class Usage(msgspec.Struct, frozen=True, gc=False):
    """Tokens an engine says it used; None where it said nothing."""

    prompt: int | None = None
    completion: int | None = None
    cached: int | None = None
    reasoning: int | None = None
    """Of the completion."""

    def merged(self, later: Usage) -> Usage:
        """Return this usage with what a later report says instead."""
        return Usage(
            self.prompt if later.prompt is None else later.prompt,
            self.completion if later.completion is None else later.completion,
            self.cached if later.cached is None else later.cached,
            self.reasoning if later.reasoning is None else later.reasoning,
        )


class _Details(msgspec.Struct, gc=False):
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None


class UsageView(msgspec.Struct, gc=False):
    """The usage object of every dialect at once."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    prompt_tokens_details: _Details | None = None
    input_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None
    output_tokens_details: _Details | None = None
    cache_read_input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None

    def usage(self) -> Usage:
        """Return the one form the gateway counts with."""
        details = self.prompt_tokens_details or self.input_tokens_details
        cached = details.cached_tokens if details is not None else self.cache_read_input_tokens
        prompt = self.prompt_tokens
        if prompt is None and self.input_tokens is not None:
            # Anthropic's input_tokens leave out what was read from the cache or written to it.
            prompt = self.input_tokens + (self.cache_read_input_tokens or 0) + (self.cache_creation_input_tokens or 0)
        written = self.completion_tokens_details or self.output_tokens_details
        return Usage(
            prompt,
            self.completion_tokens if self.completion_tokens is not None else self.output_tokens,
            cached,
            written.reasoning_tokens if written is not None else None,
        )


class _Inner(msgspec.Struct):
    model: str | None = None
    usage: UsageView | None = None


class _EventView(msgspec.Struct):
    type: str | None = None
    model: str | None = None
    usage: UsageView | None = None
    choices: msgspec.Raw = msgspec.Raw()
    message: _Inner | None = None
    response: _Inner | None = None


_decode_event = msgspec.json.Decoder(_EventView).decode
_decode_inner = msgspec.json.Decoder(_Inner).decode
_decode_text = msgspec.json.Decoder(str).decode
_MODEL = re.compile(rb'"model":( ?)("(?:[^"\\]|\\.)*")')
_UNREADABLE = (ValueError, RecursionError)
"""What msgspec raises on bytes that are no JSON, not of the form asked for, not UTF-8 (in a key), or too deep."""


def read_usage(body: bytes) -> Usage | None:
    """Return the usage of a whole answer, None when it names none or is not understood."""
    try:
        view = _decode_inner(body)
    except _UNREADABLE:
        return None
    return view.usage.usage() if view.usage is not None else None


class Meter:
    """Scans one engine stream.

    ``public`` is the model's name as the client knows it; ``hide_usage`` drops the usage chunk that only the gateway
    asked for; an event longer than ``max_event`` bytes sets ``overflow``.
    """

    __slots__ = (
        "_cr",
        "_dialect",
        "_engine",
        "_held",
        "_hide_usage",
        "_max_event",
        "_needle",
        "_new_prefix",
        "_prefix",
        "_public",
        "_replacement",
        "_tail",
        "ended",
        "events",
        "failure",
        "overflow",
        "usage",
    )

    def __init__(self, dialect: Dialect, engine: Engine, public: str, *, hide_usage: bool, max_event: int) -> None:
        self._dialect = dialect
        self._engine = engine
        self._public = public
        self._hide_usage = hide_usage
        self._max_event = max_event
        self._tail = bytearray()
        self._held: bytes | None = b"" if dialect.opening_types else None
        self._cr = False
        # Learnt from the first event that names the model: engines differ in spacing and may answer with an alias.
        self._needle: bytes | None = None
        self._replacement = b""
        self._prefix: bytes | None = None
        self._new_prefix = b""
        self.events = 0
        self.usage: Usage | None = None
        self.ended = False
        self.failure: EngineError | None = None
        self.overflow = False

    @property
    def partial(self) -> bool:
        """Whether something is held back: part of an event, or the announcement of an answer."""
        return bool(self._tail or self._held)

    def feed(self, data: bytes) -> bytes:
        """Take what was read, return the whole events the client may have (perhaps none)."""
        prefix = self._prefix
        if prefix is not None and data.startswith(prefix) and data.endswith(b"\n\n"):
            # A stream at a real pace: one read is one event of the stream's own kind. It begins like the first one
            # did, up to the model's name; what is left to see is that it is one line and holds no usage.
            length = len(prefix)
            if data.find(b"\n", length) == len(data) - 2 and data.find(b'"usage"', length) < 0 and not self._tail:
                self.events += 1
                return self._new_prefix + data[length:]
        if self._cr or data.find(b"\r") >= 0:
            data = self._unify_line_ends(data)
        if self._tail:
            block = self._complete_tail(data)
        elif data.endswith(b"\n\n"):
            block = data
        else:
            cut = data.rfind(b"\n\n") + 2
            if cut == 1:
                cut = 0
            self._tail += data[cut:]
            self.overflow = len(self._tail) > self._max_event
            block = data[:cut]
        if not block or self.ended or self.failure is not None:
            return b""
        if self._needle is not None and block.startswith(b"data: {") and not self._dialect.typed_events:
            plain = self._plain(block)
            if plain is not None:
                return plain
        return self._scan(block)

    def _complete_tail(self, data: bytes) -> bytes:
        tail = self._tail
        start = len(tail) - 1
        tail += data
        cut = tail.rfind(b"\n\n", start)
        if cut < 0:
            self.overflow = len(tail) > self._max_event
            return b""
        block = bytes(tail[: cut + 2])
        del tail[: cut + 2]
        self.overflow = len(tail) > self._max_event
        return block

    def _unify_line_ends(self, data: bytes) -> bytes:
        # JSON holds no raw carriage return, so only line ends are touched. One at the end of a read ends its line now;
        # should its \n follow, it adds nothing.
        if self._cr and data.startswith(b"\n"):
            data = data[1:]
        self._cr = data.endswith(b"\r")
        return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")

    def _plain(self, block: bytes) -> bytes | None:
        """Pass events that are one ``data: {`` line each and hold neither usage nor error; None: look closer."""
        newlines = block.count(b"\n")
        count = newlines >> 1
        if newlines != 2 and (newlines & 1 or block.count(b"\n\ndata: {") != count - 1):
            return None
        # LMDeploy spells its usage chunk otherwise than the chunks before it: what lacks the needle is looked at.
        if self._needle and block.count(self._needle) != count:
            return None
        if block.find(b'"error"') >= 0:
            return None
        if block.find(b'"usage"') >= 0:
            nulls = block.count(b'"usage":null') + block.count(b'"usage": null')
            if nulls != block.count(b'"usage"'):
                return None
        self.events += count
        return block.replace(self._needle, self._replacement) if self._needle else block

    def _scan(self, block: bytes) -> bytes:
        out: list[bytes] = []
        for event in block.split(b"\n\n"):
            if event:
                out.append(self._event(event))
            if self.ended or self.failure is not None:
                break
        return b"".join(out)

    def _event(self, event: bytes) -> bytes:
        # Comments, ids and retry hints end here: the SDKs stumble over them, and heartbeats are the gateway's own.
        payloads = []
        kind = b""
        for line in event.split(b"\n"):
            if line.startswith(b"data:"):
                payloads.append(line[6:] if line.startswith(b"data: ") else line[5:])
            elif line.startswith(b"event:"):
                kind = line[6:].strip()
        if not payloads:
            return b""
        payload = b"\n".join(payloads)
        if not self._dialect.typed_events:
            if payload.startswith(b"[DONE]"):
                self.ended = True
                self._prefix = None
                return b"data: [DONE]\n\n"
            kind = b""
        payload = self._payload(payload, kind)
        if not payload:
            return b""
        # A payload of several lines stays several lines.
        body = b"data: " + payload.replace(b"\n", b"\ndata: ") + b"\n\n"
        event = b"event: " + kind + b"\n" + body if kind else body
        if self._held is not None:
            if kind in self._dialect.opening_types:
                self._held += event
                return b""
            # The answer has begun: nothing is held any more.
            event, self._held = self._held + event, None
        self.events += event.count(b"\n\n")
        return event

    def _payload(self, payload: bytes, kind: bytes) -> bytes:
        """Read what an event's JSON tells; return it renamed, or nothing when it is hidden or an error."""
        if b'"error"' in payload:
            self.failure = self._engine.read_stream_error(payload)
            if self.failure is not None:
                self._prefix = None
                return b""
        view = self._look(payload, kind)
        if self._dialect.typed_events:
            told = kind.decode("ascii", "replace") if view is None or view.type is None else view.type
            self.ended = told in self._dialect.end_types
        if view is not None:
            self._take_usage(view)
            if self._hide_usage and view.usage is not None and _is_empty(view.choices):
                return b""
        if self._needle:
            return payload.replace(self._needle, self._replacement)
        return payload

    def _look(self, payload: bytes, kind: bytes) -> _EventView | None:
        needle = self._needle
        respelt = needle not in (None, b"") and needle not in payload and b'"model"' in payload
        wanted = needle is None or respelt or b'"usage"' in payload
        if self._dialect.typed_events and not wanted:
            wanted = not kind or kind.decode("ascii", "replace") in self._dialect.end_types
        if not wanted:
            return None
        try:
            view = _decode_event(payload)
        except _UNREADABLE:
            # Not what the dialect promises: the client gets what the engine said.
            return None
        if needle is None or respelt:
            self._learn_model(view, payload)
        return view

    def _learn_model(self, view: _EventView, payload: bytes) -> None:
        inner = view.response or view.message
        model = view.model if view.model is not None else (inner.model if inner is not None else None)
        if model is None:
            return
        for match in _MODEL.finditer(payload):
            if _text(match[2]) == model:
                self._replacement = b'"model":' + match[1] + msgspec.json.encode(self._public)
                self._needle = b"" if model == self._public else match[0]
                if not self._dialect.typed_events and payload.startswith(b"{") and b"\n" not in payload:
                    self._prefix = b"data: " + payload[: match.end()]
                    kept = match[0] if model == self._public else self._replacement
                    self._new_prefix = b"data: " + payload[: match.start()] + kept
                return
        if model == self._public:
            self._needle = b""

    def _take_usage(self, view: _EventView) -> None:
        for found in (view.usage, *(inner.usage for inner in (view.message, view.response) if inner is not None)):
            if found is not None:
                usage = found.usage()
                self.usage = usage if self.usage is None else self.usage.merged(usage)


def _text(raw: bytes) -> str | None:
    try:
        return _decode_text(raw)
    except _UNREADABLE:
        return None


def _is_empty(choices: msgspec.Raw) -> bool:
    return bytes(choices).strip(b" \t") == b"[]"
