"""What is kept of a stream so that it can go on at another engine, and how the rest is made one stream with it.

Rule 1: only what has reached the client is kept, whole events in which its text is the only thing that counts.
Rule 2: keeping costs next to nothing: a chunk that differs from the last one in its text alone is cut out of what
stands around it, and only others are taken apart.
Rule 3: the client sees one answer: the first one's id and time, no role said twice, the tokens of both parts.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from engines.protocol import Capability, Fields
from gateway.policy.resume import Delivered, Finish, Reason, Resume, ResumeRules, decide, hindrance
from gateway.policy.retry import Cause
from gateway.serving.dialect import Route
from gateway.serving.meter import Usage, UsageView
from gateway.serving.pool import Endpoint

BATCH = 128
"""Texts of chunks that are put aside before they are made one, and counted."""
ASIDE = 8192
"""Bytes that they are taken for, which every stream may have."""

DONE = b"data: [DONE]\n\n"

_NULL = (b"", b"null")
_EMPTY = (*_NULL, b'""', b"[]", b"{}")
_WHY = {
    "tool_calls": Reason.TOOLS,
    "function_call": Reason.TOOLS,
    "reasoning": Reason.REASONING,
    "reasoning_content": Reason.REASONING,
}


class _Choice(msgspec.Struct):
    index: int = 0
    delta: dict[str, msgspec.Raw] | None = None
    text: msgspec.Raw = msgspec.Raw()
    logprobs: msgspec.Raw = msgspec.Raw()
    finish_reason: str | None = None


class _Chunk(msgspec.Struct):
    id: msgspec.Raw = msgspec.Raw()
    object: msgspec.Raw = msgspec.Raw()
    created: msgspec.Raw = msgspec.Raw()
    model: msgspec.Raw = msgspec.Raw()
    choices: list[_Choice] = []


class _Named(msgspec.Struct, frozen=True):
    """What all chunks of the client's stream say of it, as JSON."""

    id: msgspec.Raw
    object: msgspec.Raw
    created: msgspec.Raw
    model: msgspec.Raw


_encode = msgspec.json.encode
_decode_chunk = msgspec.json.Decoder(_Chunk).decode
_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_choices = msgspec.json.Decoder(list[dict[str, msgspec.Raw]]).decode
_decode_usage = msgspec.json.Decoder(UsageView).decode
_decode_text = msgspec.json.Decoder(str).decode
_UNREADABLE = (ValueError, RecursionError)


class Memory:
    """Bytes kept of all streams of a process."""

    __slots__ = ("used",)

    def __init__(self) -> None:
        self.used = 0


class Kept:
    """What is kept of one stream. ``why`` tells that it cannot go on any more, and that nothing is kept of it."""

    __slots__ = (
        "_body",
        "_carried",
        "_chunks",
        "_fields",
        "_finish",
        "_from",
        "_head",
        "_held",
        "_limit",
        "_memory",
        "_named",
        "_new",
        "_old",
        "_pending",
        "_prompt",
        "_route",
        "_rules",
        "_size",
        "_sound",
        "_summed_up",
        "_tail",
        "_texts",
        "_to",
        "_told",
        "begun",
        "cause",
        "left",
        "moves",
        "why",
    )

    def __init__(
        self, route: Route, fields: Fields, limit: int | None, size: int, rules: ResumeRules, memory: Memory
    ) -> None:
        self._route = route
        self._fields = fields
        self._limit = limit
        self._rules = rules
        self._memory = memory
        self._held = size + ASIDE
        """Bytes that are counted in ``memory``."""
        memory.used += self._held
        self._texts: list[bytes] = []
        self._body: list[bytes] = []
        """The text, in pieces of the inside of a JSON string."""
        self._size = 0
        self._head = self._tail = b""
        """What stood before and after the text of the last chunk that was taken apart."""
        self._from = self._to = 0
        self._named: _Named | None = None
        self._finish: str | None = None
        self._summed_up = False
        """Whether the client has its usage."""
        self._chunks = 0
        """Of the part that is delivered now, up to the last one with text."""
        self._pending = 0
        """Those after it, which bring nothing yet: of a part of a character, say."""
        self._carried = 0
        """Tokens of the parts before."""
        self._told = self._sound = True
        """Of the parts before: whether engines told how many tokens they are, whether their chunks were tokens."""
        self._prompt: int | None = None
        """Tokens of the client's prompt, where an engine told them."""
        self._old = self._new = b""
        """How the chunks of the part that goes on begin, and how they have to."""
        self.begun = ""
        """The text that the next engine goes on from."""
        self.left: int | None = None
        """Tokens that it may still say."""
        self.moves = 0
        self.cause: Cause | None = None
        """Why the stream is on its way to another engine; None: it is not."""
        self.why: Reason | None = None

    # --- while it is delivered ------------------------------------------------------------------------------------

    def take(self, out: bytes) -> bytes:
        """Take whole events for the client, return what the client gets for them."""
        if self.moves:
            out = self._rewrite(out)
        if self.why is None:
            head = self._head
            if head and out.startswith(head) and out.endswith(self._tail):
                # At a real pace: one chunk, like the last one. Without a quote nothing but text is in it.
                text = out[self._from : self._to]
                if text and b'"' not in text:
                    self._texts.append(text)
                    if len(self._texts) >= BATCH:
                        self._fold()
                    return out
            self._look(out)
        return out

    def _look(self, out: bytes) -> None:
        """Take several events, or one that is not like the last."""
        for event in out.split(b"\n\n"):
            if event and self.why is None:
                text = self._alike(event)
                if text:
                    self._texts.append(text)
                else:
                    self._fold()
                    self._read(event)
        if self.why is None:
            self._fold()

    def _alike(self, event: bytes) -> bytes:
        """Return the text of a chunk that differs from the last one in nothing else, nothing where it does."""
        head, tail = self._head, self._tail[:-2]
        if not head or not event.startswith(head) or not event.endswith(tail):
            return b""
        text = event[len(head) : len(event) - len(tail)]
        try:
            # A quote that ends the string early would be that of another chunk than those known.
            return text if _decode_text(b'"%b"' % text) else b""
        except _UNREADABLE:
            return b""

    def _fold(self) -> None:
        """Make one text of those that were put aside."""
        if self._texts:
            self._chunks += self._pending + len(self._texts)
            self._pending = 0
            self._add(b"".join(self._texts))
            self._texts.clear()

    def _add(self, text: bytes) -> None:
        self._body.append(text)
        self._size += len(text)
        self._held += len(text)
        self._memory.used += len(text)
        if self._size > self._rules.max_bytes:
            self.give_up(Reason.BYTES)
        elif self._memory.used > self._rules.total_bytes:
            self.give_up(Reason.MEMORY)

    def _read(self, event: bytes) -> None:
        """Take what one event says."""
        payload = _payload(event)
        if payload == b"[DONE]":
            return
        try:
            chunk = _decode_chunk(payload)
        except _UNREADABLE:
            self.give_up(Reason.UNREADABLE)
            return
        if self._named is None:
            self._named = _Named(chunk.id, chunk.object, chunk.created, chunk.model)
        if not chunk.choices:
            self._summed_up = True
            return
        choice = chunk.choices[0]
        delta = choice.delta or {}
        why = _hindered(chunk.choices, choice, delta)
        if why is not None:
            self.give_up(why)
            return
        self._finish = choice.finish_reason or self._finish
        name = self._route.resumed
        raw = bytes(delta.get(name, b"") if name == "content" else choice.text)
        if raw in _NULL or (raw == b'""' and "role" in delta):
            return
        if len(raw) < 2 or raw[:1] != b'"':
            self.give_up(Reason.UNREADABLE)
        elif raw == b'""':
            self._pending += 1
        else:
            self._texts.append(raw[1:-1])
            self._fold()
            if choice.finish_reason is None:
                self._learn(event, raw, name)

    def _learn(self, event: bytes, raw: bytes, name: str) -> None:
        """Note what stands around the text of a chunk, so that the next ones need not be read."""
        for spelling in (b'"%b":', b'"%b": '):
            needle = spelling % name.encode() + raw
            if event.count(needle) == 1:
                at = event.find(needle) + len(needle) - len(raw)
                self._head, self._tail = event[: at + 1], event[at + len(raw) - 1 :] + b"\n\n"
                self._from, self._to = len(self._head), -len(self._tail)
                return

    def give_up(self, why: Reason) -> None:
        """Keep nothing any more: it cannot go on elsewhere."""
        if self.why is None:
            self.why = why
            self.drop()

    def drop(self) -> None:
        """Let go of everything that was kept."""
        self._memory.used -= self._held
        self._held = self._size = 0
        self._texts.clear()
        self._body.clear()
        self._fields.clear()
        self.begun = ""

    # --- when it breaks off ---------------------------------------------------------------------------------------

    def broke(
        self, cause: Cause, usage: Usage | None, engine: Capability, count: Callable[[int], int]
    ) -> Resume | Finish | Reason:
        """Return what becomes of the stream. ``usage``: what the engine told so far, ``engine``: what it can do,
        ``count``: makes tokens of chunks, where they are not the same."""
        self._fold()
        if self.why is not None:
            return self.why
        self._close_part(usage, Capability.TOKEN_CHUNKS in engine, count)
        try:
            text = _decode_text(b'"%b"' % b"".join(self._body))
        except _UNREADABLE:
            self.give_up(Reason.UNREADABLE)
            return Reason.UNREADABLE
        delivered = Delivered(text, self._carried, self._told, self._sound, self._finish)
        chat = self._route.resumed == "content"
        then = decide(cause, delivered, self._limit, self.moves, self._rules, chat=chat)
        if isinstance(then, Resume):
            self.left = then.left
            self.begun = text
            self.moves += 1
            self._old = self._new = b""
        return then

    def _close_part(self, usage: Usage | None, sound: bool, count: Callable[[int], int]) -> None:
        """Add the tokens of the part that broke off to those before it."""
        chunks, empty = self._chunks, self._pending
        self._chunks = self._pending = 0
        if usage is not None and usage.completion is not None:
            self._prompt = self.total(usage).prompt
            # What its last chunks did not bring yet is said anew.
            self._carried += max(0, usage.completion - empty)
        elif chunks:
            self._told = False
            self._sound = self._sound and sound
            self._carried += chunks if sound else max(chunks, count(chunks))

    def closed_to(self, endpoints: tuple[Endpoint, ...]) -> list[Endpoint]:
        """Return those of the endpoints that cannot go on with what has begun."""
        if not self.begun or self._route.resumed != "content":
            return []
        return [endpoint for endpoint in endpoints if Capability.CONTINUE not in endpoint.engine.capabilities]

    def fields(self) -> Fields:
        """Return the request for the rest: with what is left of its limit."""
        fields = dict(self._fields)
        if self.left is not None:
            names = [name for name in self._route.token_fields if bytes(fields.get(name, b"null")) != b"null"]
            for name in names or self._route.token_fields[-1:]:
                fields[name] = msgspec.Raw(b"%d" % self.left)
        return fields

    def ending(self, then: Finish, *, usage: bool) -> bytes:
        """Return the end of a stream that was said in full; with its ``usage`` where that was told."""
        named = self._named
        out = b""
        if named is not None and then.reason is not None:
            rest: dict[str, object] = {"delta": {}} if self._route.resumed == "content" else {"text": ""}
            choice = {"index": 0, **rest, "logprobs": None, "finish_reason": then.reason}
            out = self._chunk(named, [choice])
        if named is not None and usage and not self._summed_up and self._told and self._prompt is not None:
            told = {"prompt_tokens": self._prompt, "completion_tokens": self._carried}
            out += self._chunk(named, [], usage={**told, "total_tokens": self._prompt + self._carried})
        return out + DONE

    @staticmethod
    def _chunk(named: _Named, choices: list[object], **more: object) -> bytes:
        known = {name: raw for name, raw in msgspec.structs.asdict(named).items() if bytes(raw)}
        return b"data: " + _encode({**known, "choices": choices, **more}) + b"\n\n"

    # --- what is one answer ---------------------------------------------------------------------------------------

    @property
    def counted(self) -> bool:
        """Whether tokens of its earlier parts were counted rather than told."""
        return bool(self._carried) and not self._told

    def total(self, usage: Usage) -> Usage:
        """Return the usage of the client's answer, given that of its latest part.

        That part's prompt held the text before it. So the sum of all is what the engine says, and where the prompt of
        the first part was not told, only how it falls into prompt and answer rests on what was counted.
        """
        prompt = self._prompt
        if prompt is None and usage.prompt is not None:
            prompt = max(0, usage.prompt - self._carried)
        completion = None if usage.completion is None else usage.completion + self._carried
        cached = usage.cached
        if cached is not None and prompt is not None:
            cached = min(cached, prompt)
        return Usage(prompt, completion, cached, usage.reasoning)

    def so_far(self) -> Usage | None:
        """Return the usage of the parts that broke off, where engines told it and nothing came since."""
        known = self._told and self._prompt is not None and not self._chunks and not self._texts
        return Usage(self._prompt, self._carried) if known else None

    def _rewrite(self, out: bytes) -> bytes:
        return b"".join([self._one(event) for event in out.split(b"\n\n") if event])

    def _one(self, event: bytes) -> bytes:
        """Return an event of a later part as one of the client's stream; nothing where it only says its role."""
        old = self._old
        if old and event.startswith(old):
            rest = event[len(old) :]
            if b'"usage"' not in rest and b'"role"' not in rest:
                return self._new + rest + b"\n\n"
        payload = _payload(event)
        named = self._named
        if named is None or payload == b"[DONE]":
            return event + b"\n\n"
        try:
            fields = _decode_fields(payload)
            self._rename(fields, named)
            if not self._strip(fields):
                return b""
        except _UNREADABLE:
            return event + b"\n\n"
        self._learn_beginning(event, named)
        return b"data: " + _encode(fields) + b"\n\n"

    @staticmethod
    def _rename(fields: Fields, named: _Named) -> None:
        for name in ("id", "created"):
            raw = getattr(named, name)
            if name in fields and bytes(raw):
                fields[name] = raw

    def _strip(self, fields: Fields) -> bool:
        """Take out the role, and make the usage the whole answer's; tell whether anything is left to be said."""
        said = False
        usage = fields.get("usage", msgspec.Raw())
        if bytes(usage) not in _NULL:
            fields["usage"] = self._summed(usage)
            said = True
        choices = _decode_choices(fields.get("choices", msgspec.Raw(b"[]")))
        for choice in choices:
            raw = choice.get("delta")
            if raw is None or b'"role"' not in bytes(raw):
                said = True
                continue
            delta = _decode_fields(raw)
            delta.pop("role", None)
            choice["delta"] = msgspec.Raw(_encode(delta))
            ends = bytes(choice.get("finish_reason", b"null")) != b"null"
            said = said or ends or any(bytes(value) not in _EMPTY for value in delta.values())
        fields["choices"] = msgspec.Raw(_encode(choices))
        return said or not choices

    def _summed(self, raw: msgspec.Raw) -> msgspec.Raw:
        usage = _decode_fields(raw)
        total = self.total(_decode_usage(raw).usage())
        prompt, completion = total.prompt or 0, total.completion or 0
        told = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        usage |= {name: msgspec.Raw(b"%d" % number) for name, number in told.items()}
        details = usage.get("prompt_tokens_details", msgspec.Raw())
        if total.cached is not None and bytes(details) not in _NULL:
            cached = {"cached_tokens": msgspec.Raw(b"%d" % total.cached)}
            usage["prompt_tokens_details"] = msgspec.Raw(_encode(_decode_fields(details) | cached))
        return msgspec.Raw(_encode(usage))

    def _learn_beginning(self, event: bytes, named: _Named) -> None:
        """Note what stands before the choices of this part's chunks, and what the client gets for it."""
        old, mark, _ = event.partition(b'"choices"')
        try:
            fields = _decode_fields(old.removeprefix(b"data: ").rstrip(b", ") + b"}")
        except _UNREADABLE:
            return
        if mark and "usage" not in fields:
            self._rename(fields, named)
            self._old, self._new = old, b"data: " + _encode(fields)[:-1] + b","


def _payload(event: bytes) -> bytes:
    """Return the JSON of an event, whose every line is data."""
    return b"\n".join([line[6:] for line in event.split(b"\n")]) if b"\n" in event else event[6:]


def _hindered(choices: list[_Choice], choice: _Choice, delta: dict[str, msgspec.Raw]) -> Reason | None:
    if len(choices) > 1 or choice.index:
        return Reason.SEVERAL
    if bytes(choice.logprobs) not in _NULL:
        return Reason.LOGPROBS
    for name, value in delta.items():
        if name not in ("role", "content") and bytes(value) not in _EMPTY:
            return _WHY.get(name, Reason.FIELD)
    return None


def keep(route: Route, fields: Fields, size: int, rules: ResumeRules, memory: Memory) -> Kept | Reason:
    """Begin to keep a stream that can go on elsewhere, or tell why it cannot; ``size``: bytes of its request."""
    if not rules.enabled:
        return Reason.OFF
    if not route.resumed:
        return Reason.DIALECT
    why = hindrance(fields, chat=route.resumed == "content")
    if why is None and memory.used + size + ASIDE > rules.total_bytes:
        why = Reason.MEMORY
    if why is not None:
        return why
    limit = route.implied_tokens
    for name in route.token_fields:
        raw = bytes(fields.get(name, b"null"))
        if raw != b"null":
            # The edge has seen that it is a whole number.
            limit = int(raw)
            break
    return Kept(route, fields, limit, size, rules, memory)
