"""vLLM: its paths, the fields it must not take from a client, and how its errors look.

Shown on vLLM 0.32.0.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from engines import wire
from engines.protocol import Dispatch, EngineError, Fields

_encode = msgspec.json.encode
_USAGE_ONLY = msgspec.Raw(b'{"include_usage":true}')

_OPENAI_STREAMS = frozenset({"/v1/chat/completions", "/v1/completions"})
_SALTED = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"})


class Vllm:
    """vLLM's OpenAI-compatible server."""

    name = "vllm"
    control_fields = frozenset(
        {
            # Who is served, in which order, with whose cache: the gateway's decisions.
            "cache_salt",
            "priority",
            "request_id",
            "session_id",
            # Between engines, never from a client.
            "ec_transfer_params",
            "kv_transfer_params",
            "vllm_xargs",
            # Code and tensors: a template runs in the engine, tensors are unpickled there.
            "chat_template",
            "logits_processors",
            "mm_payload",
            "prompt_embeds",
            "return_mm_kwargs",
        }
    )
    paths: Mapping[str, str] = {
        path: path
        for path in (
            "/v1/chat/completions",
            "/v1/completions",
            "/v1/responses",
            "/v1/messages",
            "/v1/embeddings",
            "/v1/rerank",
            "/v1/score",
            "/tokenize",
        )
    }
    ready_path = "/health"
    models_path = "/v1/models"

    def prepare(self, path: str, fields: Fields, dispatch: Dispatch) -> bytes:
        """Name the model as the engine knows it, and ask for usage where the client did not."""
        fields["model"] = dispatch.model
        if dispatch.ask_usage and path in _OPENAI_STREAMS:
            fields["stream_options"] = _with_usage(fields.get("stream_options"))
        if dispatch.cache_salt is not None and path in _SALTED:
            fields["cache_salt"] = msgspec.Raw(_encode(dispatch.cache_salt))
        return _encode(fields)

    def read_error(self, status: int, body: bytes) -> EngineError:
        """Read an answer whose status was not 200."""
        return wire.read_error(status, body)

    def read_stream_error(self, payload: bytes) -> EngineError | None:
        """Read an event's JSON; vLLM reports a failure in a stream as an event ``{"error": {...}}``."""
        value = wire.parse(payload)
        is_error = value.get("error") is not None or value.get("object") == "error" or value.get("type") == "error"
        if not is_error or "choices" in value:
            return None
        fields = wire.error_fields(value)
        return wire.read_error(wire.status_in(fields), payload)

    def model_needles(self, model: str) -> tuple[bytes, ...]:
        """Return the spellings of the model's name in answers: vLLM writes JSON without spaces."""
        return (b'"model":' + _encode(model),)


def _with_usage(options: msgspec.Raw | None) -> msgspec.Raw:
    if options is None or bytes(options) == b"null":
        return _USAGE_ONLY
    try:
        wanted = msgspec.json.decode(options, type=dict[str, msgspec.Raw])
    except msgspec.ValidationError:
        # Not an object: the engine says what is wrong with it, in its own words.
        return options
    wanted["include_usage"] = msgspec.Raw(b"true")
    return msgspec.Raw(_encode(wanted))
