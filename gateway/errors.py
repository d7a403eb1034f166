"""What can go wrong, whose fault it is, and the one table that turns it into HTTP.

The status, type and code of every kind are the wire contract of the OpenAI SDKs; the last column is the type that
Anthropic's SDK expects for the same situation.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, unique

import msgspec


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One row of the table: how a kind of refusal looks on the wire.

    Two rows are never equal: kinds that look the same on the wire are counted apart, and ``Enum`` merges equal values.
    """

    status: int
    type: str
    code: str | None
    anthropic: str
    anthropic_status: int
    retry: bool | None = None
    """``x-should-retry``; None leaves it to the SDK's own rule for the status."""


_INVALID = "invalid_request_error"


@unique
class Kind(Enum):
    """Every refusal and failure a client can meet."""

    # The client's fault.
    INVALID = Row(400, _INVALID, None, _INVALID, 400)
    TOO_LONG = Row(400, _INVALID, "context_length_exceeded", _INVALID, 400)
    UNSUPPORTED = Row(400, _INVALID, "unsupported_operation", _INVALID, 400)
    FORBIDDEN_FIELD = Row(400, _INVALID, "field_not_allowed", _INVALID, 400)
    MEDIA = Row(400, _INVALID, "media_not_allowed", _INVALID, 400)
    NO_KEY = Row(401, _INVALID, "invalid_api_key", "authentication_error", 401)
    NO_RIGHT = Row(403, "permission_error", "model_not_allowed", "permission_error", 403)
    NO_ADMIN = Row(403, "permission_error", "admin_only", "permission_error", 403)
    NO_ENDPOINT = Row(404, _INVALID, "endpoint_not_found", "not_found_error", 404)
    NOT_POSSIBLE = Row(400, _INVALID, "not_possible", _INVALID, 400)
    NO_REQUEST = Row(404, _INVALID, "request_not_found", "not_found_error", 404)
    DECLARED = Row(400, _INVALID, "declared_in_file", _INVALID, 400)
    NOT_FOUND = Row(404, _INVALID, "not_found", "not_found_error", 404)
    STALE = Row(412, _INVALID, "changed_meanwhile", _INVALID, 412)
    NO_MODEL = Row(404, _INVALID, "model_not_found", "not_found_error", 404)
    NO_PATH = Row(404, _INVALID, "unknown_url", "not_found_error", 404)
    NO_METHOD = Row(405, _INVALID, "method_not_allowed", _INVALID, 405)
    SLOW_CLIENT = Row(408, _INVALID, "request_timeout", _INVALID, 408)
    TOO_LARGE = Row(413, _INVALID, "request_too_large", "request_too_large", 413)
    CONTENT_TYPE = Row(415, _INVALID, "unsupported_media_type", _INVALID, 415)
    HEADERS_TOO_LARGE = Row(431, _INVALID, "headers_too_large", _INVALID, 431)
    # Over a limit of the client's own.
    TOO_LARGE_FOR_LIMIT = Row(400, _INVALID, "request_exceeds_limit", _INVALID, 400)
    TOO_MANY_REQUESTS = Row(429, "requests", "rate_limit_exceeded", "rate_limit_error", 429, True)
    TOO_MANY_TOKENS = Row(429, "tokens", "rate_limit_exceeded", "rate_limit_error", 429, True)
    OVER_BUDGET = Row(429, "insufficient_quota", "insufficient_quota", "rate_limit_error", 429, False)
    # Nobody's fault: there is no room.
    SLOW_DOWN = Row(429, "rate_limit_error", "slow_down", "rate_limit_error", 429, True)
    BUSY = Row(503, "service_unavailable_error", "server_is_overloaded", "overloaded_error", 529)
    LIMITS_AWAY = Row(503, "service_unavailable_error", "limits_unavailable", "overloaded_error", 529)
    # The engine's fault, or ours.
    STATE_AWAY = Row(503, "service_unavailable_error", "state_unavailable", "overloaded_error", 529)
    NO_ENGINE = Row(503, "service_unavailable_error", "server_is_overloaded", "overloaded_error", 529)
    ENGINE_FAILED = Row(502, "server_error", "engine_failed", "api_error", 502)
    ENGINE_SLOW = Row(504, "server_error", "engine_timeout", "api_error", 504)
    SHUTDOWN = Row(503, "service_unavailable_error", "server_shutting_down", "overloaded_error", 529)
    INTERNAL = Row(500, "server_error", "internal_error", "api_error", 500)


@dataclass(frozen=True, slots=True)
class Refusal:
    """A request that is not served, as a value.

    ``message`` says what happened and what to do; ``code`` overrides the kind's own; ``retry_after`` is in seconds.
    """

    kind: Kind
    message: str
    param: str | None = None
    code: str | None = None
    retry_after: float | None = None
    headers: bytes = b""
    """Whole lines that its answer has beside those of every answer."""
    logged: str | None = None
    """What the log says instead of ``message``, where that may quote the client's request."""
    should_retry: bool | None = None
    """``x-should-retry`` where the kind's own does not hold."""
    limit: str = ""
    """Which limit refuses it, where one does."""

    def openai_error(self) -> dict[str, str | None]:
        """Return the object inside OpenAI's envelope."""
        row = self.kind.value
        return {"message": self.message, "type": row.type, "param": self.param, "code": self.code or row.code}

    def header_lines(self) -> bytes:
        """Return its own lines and what the SDKs read about retrying: ``retry-after`` in whole seconds rounded up, and
        in ms."""
        lines = self.headers
        if self.retry_after is not None:
            seconds, milliseconds = -(-self.retry_after // 1), -(-self.retry_after * 1000 // 1)
            lines += b"retry-after: %d\r\nretry-after-ms: %d\r\n" % (seconds, milliseconds)
        retry = self.kind.value.retry if self.should_retry is None else self.should_retry
        if retry is not None:
            lines += b"x-should-retry: true\r\n" if retry else b"x-should-retry: false\r\n"
        return lines


SHUTTING_DOWN = Refusal(Kind.SHUTDOWN, "The gateway is shutting down. Send the request again.", retry_after=1.0)
"""What a request gets that is left when the time to drain is over, wherever it is."""


def internal(request_id: str) -> Refusal:
    """Return what is told of a request on which the gateway itself failed."""
    return Refusal(Kind.INTERNAL, f"The gateway failed on this request. Report it with its id: {request_id}.")


def no_model(model: str) -> Refusal:
    """Return what is told of a model that there is not."""
    told = f"The model {model!r} does not exist. GET /v1/models lists what there is."
    return Refusal(Kind.NO_MODEL, told, "model")


def openai_body(refusal: Refusal, request_id: str) -> bytes:
    """Return OpenAI's error envelope."""
    return msgspec.json.encode({"error": refusal.openai_error()})


def anthropic_body(refusal: Refusal, request_id: str) -> bytes:
    """Return Anthropic's error envelope."""
    error = {"type": refusal.kind.value.anthropic, "message": refusal.message}
    return msgspec.json.encode({"type": "error", "error": error, "request_id": request_id})
