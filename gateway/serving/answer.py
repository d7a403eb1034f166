"""Whole answers: read for what they say of usage and errors, and given the client's own model name."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import msgspec

from engines.protocol import Engine, EngineError
from gateway.serving.meter import Usage, UsageView


class Answer(msgspec.Struct, frozen=True, gc=False):
    """An answer fit for the client."""

    body: bytes
    usage: Usage | None


@dataclass(frozen=True, slots=True)
class AnswerError:
    """An answer with status 200 that is none."""

    message: str


class _View(msgspec.Struct, gc=False):
    model: str | None = None
    usage: UsageView | None = None
    object: str | None = None
    type: str | None = None
    error: msgspec.Raw = msgspec.Raw()


_decode = msgspec.json.Decoder(_View).decode
_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def read_answer(body: bytes, engine: Engine, public: str) -> Answer | AnswerError | EngineError:
    """Read a 200: the answer as the client may have it, an error an engine hid in it, or that it is no JSON object.

    The model is renamed where only it can be meant, or else by taking the object apart and putting it together again:
    exact, whatever the text holds.
    """
    try:
        view = _decode(body)
    except msgspec.ValidationError:
        # JSON, but not of the dialect's form: passed on as it came, without usage.
        return _renamed(body, public, None)
    except (ValueError, RecursionError):
        # A key that is not UTF-8 is a UnicodeDecodeError.
        return AnswerError("The engine answered 200 with something that is not JSON.")
    if view.object == "error" or view.type == "error" or (view.object is None and _is_error(view.error)):
        error = engine.read_stream_error(body)
        if error is not None:
            return error
    usage = view.usage.usage() if view.usage is not None else None
    if view.model is None or view.model == public:
        return Answer(body, usage)
    renamed = _renamed_in_place(body, view.model, public)
    return Answer(renamed, usage) if renamed is not None else _renamed(body, public, usage)


@lru_cache(1024)
def _named(model: str) -> bytes:
    return b'"model":' + msgspec.json.encode(model)


def _renamed_in_place(body: bytes, model: str, public: str) -> bytes | None:
    """Rename an answer that names its ``model``; None where it does so in another way than engines do.

    Quotes within a string are escaped, and only ``\\u`` spells a letter otherwise: without any, the one ``"model"`` of
    a body is the key of the object that names it.
    """
    if body.find(b"\\u") >= 0 or body.count(b'"model"') != 1:
        return None
    own = _named(model)
    at = body.find(own)
    if at < 0:
        return None
    return b"".join((body[:at], _named(public), body[at + len(own) :]))


def _renamed(body: bytes, public: str, usage: Usage | None) -> Answer | AnswerError:
    try:
        fields = _decode_fields(body)
    except (ValueError, RecursionError):
        return AnswerError("The engine answered 200 with something that is not a JSON object.")
    if "model" in fields:
        fields["model"] = msgspec.Raw(msgspec.json.encode(public))
        body = msgspec.json.encode(fields)
    return Answer(body, usage)


def _is_error(error: msgspec.Raw) -> bool:
    return bytes(error) not in (b"", b"null")
