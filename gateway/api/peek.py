"""Typed views of request bodies: what the gateway must know, read without touching the rest.

A body is taken apart into its top-level fields, each still the bytes the client sent, and put together again for the
engine: what was authorised is what is sent, and a key that stands twice stands once afterwards.
"""

from __future__ import annotations

import re

import msgspec

from engines.protocol import Fields
from engines.registry import ENGINES
from gateway.api.media import MediaRules, check_media, has_escapes, may_hold_media, weigh_media
from gateway.errors import Kind, Refusal
from gateway.serving.dialect import Route
from gateway.serving.tokens import count_prompts
from gateway.settings import Caps

FORBIDDEN = frozenset().union(*(engine.control_fields for engine in ENGINES.values()))
"""Fields no client may send: one engine's control field is refused whatever engine will serve."""

MAX_MODEL_NAME = 256

_FLOATS = (
    "temperature",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "length_penalty",
)


class _View(msgspec.Struct, gc=False):
    """Everything of a body that is read, in any dialect."""

    model: str | None = None
    stream: bool | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    length_penalty: float | None = None


_VIEWED = frozenset(_View.__struct_fields__)
_decode_view = msgspec.json.Decoder(_View, strict=True).decode
_encode = msgspec.json.Encoder().encode
_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_any = msgspec.json.Decoder().decode
_decode_string = msgspec.json.Decoder(str).decode
_decode_int = msgspec.json.Decoder(int, strict=True).decode
_SURROGATE = re.compile(rb"\\u([dD][89a-fA-F][0-9a-fA-F]{2})")
_NULL, _TRUE, _FALSE = b"null", b"true", b"false"
_TEMPLATE_KEYS = frozenset({"chat_template", "tokenize", "conversation", "tools", "documents"})


class Asked(msgspec.Struct, gc=False):
    """What a body asks for. ``wants_usage`` tells whether the client asked for the usage chunk itself, ``media``
    how many images and the like are in it, and their bytes."""

    model: str
    fields: Fields
    stream: bool
    wants_usage: bool
    max_tokens: int | None
    media: tuple[int, int] = (0, 0)


def read_body(body: bytes, route: Route, caps: Caps, media: MediaRules) -> Asked | Refusal:
    """Check a body against everything that can be said without knowing which engine will serve it."""
    # First, since the reader of JSON calls half a surrogate pair a body cut short.
    fields = check_surrogates(body) or _take_apart(body)
    if isinstance(fields, Refusal):
        return fields
    if not FORBIDDEN.isdisjoint(fields):
        name = min(FORBIDDEN.intersection(fields))
        return Refusal(Kind.FORBIDDEN_FIELD, f"The field {name!r} is not for clients to set. Leave it out.", name)
    asked = _at_a_glance(fields, route, caps) or _field_by_field(fields, route, caps)
    if isinstance(asked, Refusal):
        return asked
    if asked.stream and not route.streams:
        return Refusal(Kind.INVALID, f"{route.path} does not stream. Leave 'stream' out.", "stream")
    refusal = _refused(fields, route)
    if refusal is None and may_hold_media(body, route):
        refusal = check_media(fields, route, media, caps.media)
        if refusal is None and route.media_fields:
            asked.media = weigh_media(body)
    return asked if refusal is None else refusal


def _at_a_glance(fields: dict[str, msgspec.Raw], route: Route, caps: Caps) -> Asked | None:
    """Read in one go what ``_field_by_field`` reads step by step; None where something is wrong or a cap must hold.

    It says nothing that the other would not say, and what is wrong is left to the other, which finds the words.
    """
    if caps.n is not None or caps.max_tokens is not None:
        return None
    try:
        # Of these few bytes: the messages, most of a body, are read past once and not twice.
        view = _decode_view(_encode({name: raw for name, raw in fields.items() if name in _VIEWED}))
    except (msgspec.DecodeError, RecursionError):
        return None
    model = view.model
    if model is None or not 0 < len(model) <= MAX_MODEL_NAME:
        return None
    stated: int | None = None
    for name in route.token_fields:
        value: int | None = getattr(view, name)
        if value is not None:
            if not 0 < value < 2**31:
                return None
            stated = value if stated is None else stated
    options = fields.get("stream_options")
    return Asked(model, fields, bool(view.stream), options is not None and _wants_usage(options), stated)


def _field_by_field(fields: dict[str, msgspec.Raw], route: Route, caps: Caps) -> Asked | Refusal:
    model = _model(fields)
    if isinstance(model, Refusal):
        return model
    stream = _flag(fields, "stream")
    if isinstance(stream, Refusal):
        return stream
    refusal = _check_numbers(fields)
    if refusal is not None:
        return refusal
    max_tokens = _hold_caps(fields, route, caps)
    if isinstance(max_tokens, Refusal):
        return max_tokens
    wants_usage = "stream_options" in fields and _wants_usage(fields["stream_options"])
    return Asked(model, fields, stream, wants_usage, max_tokens)


def _take_apart(body: bytes) -> dict[str, msgspec.Raw] | Refusal:
    if not body:
        return Refusal(Kind.INVALID, "The body is empty. Send a JSON object.")
    if not body.isascii() and not _is_utf8(body):
        # Fields are passed on as bytes and mostly not decoded here: the engine would fail on them.
        return Refusal(Kind.INVALID, "The body is not valid UTF-8. Send JSON encoded as UTF-8.")
    try:
        return _decode_fields(body)
    except msgspec.ValidationError:
        return Refusal(Kind.INVALID, "The body is JSON but no object. Send a JSON object.")
    except msgspec.DecodeError as error:
        return Refusal(Kind.INVALID, f"The body is not valid JSON: {error}.")
    except RecursionError:
        return Refusal(Kind.INVALID, "The body is nested too deeply to be read.")


def _is_utf8(body: bytes) -> bool:
    try:
        body.decode()
    except UnicodeDecodeError:
        return False
    return True


def _model(fields: dict[str, msgspec.Raw]) -> str | Refusal:
    raw = fields.get("model")
    if raw is None or bytes(raw) == _NULL:
        return Refusal(Kind.INVALID, "The field 'model' is missing. GET /v1/models lists what there is.", "model")
    try:
        model = _decode_string(raw)
    except msgspec.DecodeError:
        return Refusal(Kind.INVALID, "The field 'model' must be a string.", "model")
    if not model or len(model) > MAX_MODEL_NAME:
        told = f"The field 'model' must have 1 to {MAX_MODEL_NAME} characters. GET /v1/models lists what there is."
        return Refusal(Kind.INVALID, told, "model")
    return model


def _flag(fields: dict[str, msgspec.Raw], name: str) -> bool | Refusal:
    raw = fields.get(name)
    if raw is None:
        return False
    value = bytes(raw)
    if value == _TRUE:
        return True
    if value in (_FALSE, _NULL):
        return False
    return Refusal(Kind.INVALID, f"The field {name!r} must be true or false.", name)


def _refused(fields: dict[str, msgspec.Raw], route: Route) -> Refusal | None:
    for name, reason in route.refused_fields:
        if name in fields and bytes(fields[name]) not in (_NULL, _FALSE):
            return Refusal(Kind.UNSUPPORTED, f"The field {name!r} cannot be served: {reason}.", name)
    if "chat_template_kwargs" in fields and bytes(fields["chat_template_kwargs"]) != _NULL:
        try:
            given = _decode_fields(fields["chat_template_kwargs"])
        except (msgspec.DecodeError, RecursionError):
            return Refusal(Kind.INVALID, "'chat_template_kwargs' must be an object.", "chat_template_kwargs")
        taken = sorted(_TEMPLATE_KEYS.intersection(given))
        if taken:
            told = f"'chat_template_kwargs' may not hold {taken[0]!r}: the template is the model's own."
            return Refusal(Kind.FORBIDDEN_FIELD, told, "chat_template_kwargs")
    return None


def _check_numbers(fields: dict[str, msgspec.Raw]) -> Refusal | None:
    """Refuse numbers such as 1e999: JSON allows them, and an engine computes with infinity then."""
    for name in _FLOATS:
        raw = fields.get(name)
        if raw is not None:
            try:
                _decode_any(raw)
            except (msgspec.DecodeError, RecursionError):
                return Refusal(Kind.INVALID, f"The field {name!r} holds no number that can be computed with.", name)
    return None


def check_surrogates(body: bytes) -> Refusal | None:
    """Refuse half of a surrogate pair: engines fail on text that cannot be encoded."""
    if not has_escapes(body):
        return None
    expected = -1
    for match in _SURROGATE.finditer(body):
        if _is_escaped(body, match.start()):
            continue
        high = int(match[1], 16) < 0xDC00
        if high:
            if expected >= 0:
                break
            expected = match.end()
        elif expected == match.start():
            expected = -1
        else:
            expected = match.start()
            break
    if expected < 0:
        return None
    return Refusal(Kind.INVALID, "The body holds half of a surrogate pair (\\ud800 to \\udfff), which is no character.")


def _is_escaped(body: bytes, at: int) -> bool:
    """Tell whether the backslash at ``at`` is itself escaped: an odd number of them stands before it."""
    before = at
    while before and body[before - 1] == 0x5C:
        before -= 1
    return (at - before) % 2 == 1


def _hold_caps(fields: dict[str, msgspec.Raw], route: Route, caps: Caps) -> int | Refusal | None:
    """Hold a key's caps on answers and output tokens; return the output limit the client stated or the cap set."""
    stated: int | None = None
    for name in route.token_fields:
        value = _count(fields, name)
        if isinstance(value, Refusal):
            return value
        if value is None:
            continue
        if value == 0:
            # SGLang answers with nothing, the others refuse it.
            return Refusal(Kind.INVALID, f"{name!r} must be at least 1.", name)
        if caps.max_tokens is not None and value > caps.max_tokens:
            told = f"This key may ask for at most {caps.max_tokens} output tokens; {name!r} is {value}."
            return Refusal(Kind.INVALID, told, name)
        stated = value if stated is None else stated
    # A cap on context writes the limit itself, once it knows what the prompt leaves.
    if stated is None and route.token_fields and caps.max_tokens is not None and caps.context is None:
        stated = caps.max_tokens if route.implied_tokens is None else min(caps.max_tokens, route.implied_tokens)
        fields[route.token_fields[-1]] = msgspec.Raw(b"%d" % stated)
    if caps.n is not None:
        refusal = _hold_n(fields, route, caps.n)
        if refusal is not None:
            return refusal
    return stated


def _hold_n(fields: dict[str, msgspec.Raw], route: Route, cap: int) -> Refusal | None:
    for name in route.n_fields:
        value = _count(fields, name)
        if isinstance(value, Refusal):
            return value
        answers = (value or 1) * count_prompts(fields.get("prompt"))
        if answers > cap:
            told = f"This key may ask for at most {cap} answers in one request; this one asks for {answers}."
            return Refusal(Kind.INVALID, told, name)
    return None


def _count(fields: dict[str, msgspec.Raw], name: str) -> int | Refusal | None:
    raw = fields.get(name)
    if raw is None or bytes(raw) == _NULL:
        return None
    try:
        value = _decode_int(raw)
    except msgspec.DecodeError:
        return Refusal(Kind.INVALID, f"The field {name!r} must be a whole number.", name)
    if not 0 <= value < 2**31:
        return Refusal(Kind.INVALID, f"The field {name!r} must be between 0 and {2**31 - 1}.", name)
    return value


class _StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


def _wants_usage(raw: msgspec.Raw) -> bool:
    try:
        options = msgspec.json.decode(raw, type=_StreamOptions | None)
    except (msgspec.DecodeError, RecursionError):
        # Malformed options are the engine's to refuse, in its own words.
        return True
    return options is not None and bool(options.include_usage)
