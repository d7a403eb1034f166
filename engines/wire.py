"""Error shapes that engines built on the same web stack share."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from engines.protocol import EngineError, EngineLoad, Fault, Fields, ServedModel

_decode, _encode = msgspec.json.decode, msgspec.json.encode

BUSY_WORDS = ("queue is full", "currently busy", "overloaded", "cannot accept new requests")
SHUTDOWN_WORDS = ("after shutdown", "shutting down")
_STATUS = re.compile("[0-9]{3}")


def parse(body: bytes) -> dict[str, Any]:
    """Return the JSON object in ``body``, or an empty one when it holds none."""
    try:
        value = _decode(body)
    except (ValueError, RecursionError):
        # Not JSON, not UTF-8, or nested without end.
        return {}
    return value if isinstance(value, dict) else {}


def error_fields(value: dict[str, Any]) -> dict[str, Any]:
    """Return the part of an answer that tells the error: nested, flat, or a bare string (``{"error": "…"}``)."""
    inner = value.get("error")
    if isinstance(inner, dict):
        return inner
    if isinstance(inner, str):
        return {"message": inner}
    if "detail" in value:
        detail = value["detail"]
        return {"message": detail if isinstance(detail, str) else msgspec.json.encode(detail).decode()}
    return value


def fault_of(status: int, message: str, *, bare_detail: bool) -> Fault:
    """Return whose fault a status means. ``bare_detail`` tells a web framework's own answer from the engine's."""
    lowered = message.lower()
    if status in (429, 503) or any(word in lowered for word in BUSY_WORDS + SHUTDOWN_WORDS):
        return Fault.OVERLOADED
    if status in (401, 403):
        return Fault.CREDENTIALS
    if status in (404, 405) and bare_detail:
        return Fault.UNSUPPORTED
    if status == 404:
        return Fault.UNKNOWN_MODEL
    if 400 <= status < 500:
        return Fault.REQUEST
    return Fault.FAILED


def read_error(status: int, body: bytes) -> EngineError:
    """Read an error answer of any of the known shapes."""
    value = parse(body)
    fields = error_fields(value)
    message = fields.get("message")
    if not isinstance(message, str) or not message:
        text = body[:200].decode("utf-8", "replace").strip()
        message = text if text and not value else f"the engine answered {status} without a message"
    param = fields.get("param")
    fault = fault_of(status, message, bare_detail="detail" in value)
    code = "context_length_exceeded" if fault is Fault.REQUEST and is_too_long(message) else None
    return EngineError(fault, message, param if isinstance(param, str) else None, code)


def is_too_long(message: str) -> bool:
    """Tell whether a message says that the prompt does not fit the model."""
    lowered = message.lower()
    return "context length" in lowered or "maximum model length" in lowered or "max_model_len" in lowered


def status_in(fields: dict[str, Any]) -> int:
    """Return the status an in-stream error carries in ``code``; 500 when it names none."""
    code = fields.get("code")
    if isinstance(code, int):
        return code
    if isinstance(code, str) and _STATUS.fullmatch(code):
        return int(code)
    return 500


def read_stream_error(payload: bytes) -> EngineError | None:
    """Read one event's JSON: an error by its ``error``, ``object`` or ``type``; None for anything else.

    A chunk of an answer may carry an empty or even a filled field of that name.
    """
    value = parse(payload)
    is_error = value.get("error") is not None or value.get("object") == "error" or value.get("type") == "error"
    if not is_error or "choices" in value:
        return None
    return read_error(status_in(error_fields(value)), payload)


_USAGE_ONLY = msgspec.Raw(b'{"include_usage":true}')


def with_usage(options: msgspec.Raw | None) -> msgspec.Raw:
    """Return ``stream_options`` that ask for usage, whatever else they ask for."""
    if options is None or bytes(options) == b"null":
        return _USAGE_ONLY
    try:
        wanted = msgspec.json.decode(options, type=dict[str, msgspec.Raw])
    except (ValueError, RecursionError):
        # No object, a key that is not UTF-8, or too deep: the engine says what is wrong with it, in its own words.
        return options
    wanted["include_usage"] = msgspec.Raw(b"true")
    return msgspec.Raw(msgspec.json.encode(wanted))


def continue_answer(path: str, fields: Fields, begun: str) -> None:
    """Have an answer go on from what it has ``begun`` with, which is not empty: as vLLM and SGLang want it.

    The edge has seen that a chat's messages are a list that is not empty, and a prompt is one text.
    """
    if path == "/v1/completions":
        # Text after text: the end of the one string, less its quote, and the beginning of the other.
        fields["prompt"] = msgspec.Raw(bytes(fields["prompt"]).rstrip()[:-1] + _encode(begun)[1:])
        return
    message = _encode({"role": "assistant", "content": begun})
    fields["messages"] = msgspec.Raw(b"%b,%b]" % (bytes(fields["messages"]).rstrip()[:-1], message))
    fields["continue_final_message"] = msgspec.Raw(b"true")
    fields["add_generation_prompt"] = msgspec.Raw(b"false")


def read_models(body: bytes) -> tuple[ServedModel, ...]:
    """Read OpenAI's list of models, with the base model where an engine tells it as ``parent``. ValueError."""
    data = parse(body).get("data")
    if not isinstance(data, list):
        raise ValueError("its list of models cannot be read")  # noqa: TRY004 - the caller knows one kind
    return tuple(_listed(item) for item in data if isinstance(item, dict) and isinstance(item.get("id"), str))


def _listed(item: dict[str, Any]) -> ServedModel:
    created, length, parent = item.get("created"), item.get("max_model_len"), item.get("parent")
    return ServedModel(
        item["id"],
        created if isinstance(created, int) else 0,
        length if isinstance(length, int) else None,
        parent if isinstance(parent, str) else None,
    )


def read_gauges(body: bytes, names: Mapping[str, str]) -> dict[str, float]:
    """Read gauges out of Prometheus' text format: the sum over all label sets.

    ``names`` maps a metric's name to the key it gets in the answer; what is missing there is missing here.
    """
    found: dict[str, float] = {}
    for line in body.decode("utf-8", "replace").splitlines():
        name = line.partition("{")[0].partition(" ")[0]
        key = names.get(name)
        if key is not None:
            with contextlib.suppress(ValueError):
                found[key] = found.get(key, 0.0) + float(line.rpartition(" ")[2])
    return found


def load_from(gauges: Mapping[str, float]) -> EngineLoad | None:
    """Return the load that gauges named ``running``, ``waiting`` and perhaps ``cache_used`` tell."""
    if "running" not in gauges or "waiting" not in gauges:
        return None
    return EngineLoad(int(gauges["running"]), int(gauges["waiting"]), gauges.get("cache_used"))
