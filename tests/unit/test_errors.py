"""The table of errors against the wire contract, line by line."""

from __future__ import annotations

import json
import math

from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import Kind, Refusal, anthropic_body, openai_body
from gateway.headers import to_pairs
from gateway.serving.dialect import ANTHROPIC, OPENAI, RESPONSES, Dialect
from tests.support.table import each

INVALID = "invalid_request_error"
CONTRACT: list[tuple[Kind, int, str, str | None]] = [
    (Kind.INVALID, 400, INVALID, None),
    (Kind.TOO_LONG, 400, INVALID, "context_length_exceeded"),
    (Kind.UNSUPPORTED, 400, INVALID, "unsupported_operation"),
    (Kind.FORBIDDEN_FIELD, 400, INVALID, "field_not_allowed"),
    (Kind.MEDIA, 400, INVALID, "media_not_allowed"),
    (Kind.NO_KEY, 401, INVALID, "invalid_api_key"),
    (Kind.NO_RIGHT, 403, "permission_error", "model_not_allowed"),
    (Kind.NO_ADMIN, 403, "permission_error", "admin_only"),
    (Kind.NO_ENDPOINT, 404, INVALID, "endpoint_not_found"),
    (Kind.NOT_POSSIBLE, 400, INVALID, "not_possible"),
    (Kind.NO_REQUEST, 404, INVALID, "request_not_found"),
    (Kind.DECLARED, 400, INVALID, "declared_in_file"),
    (Kind.NOT_FOUND, 404, INVALID, "not_found"),
    (Kind.STALE, 412, INVALID, "changed_meanwhile"),
    (Kind.NO_MODEL, 404, INVALID, "model_not_found"),
    (Kind.NO_PATH, 404, INVALID, "unknown_url"),
    (Kind.NO_METHOD, 405, INVALID, "method_not_allowed"),
    (Kind.SLOW_CLIENT, 408, INVALID, "request_timeout"),
    (Kind.TOO_LARGE, 413, INVALID, "request_too_large"),
    (Kind.CONTENT_TYPE, 415, INVALID, "unsupported_media_type"),
    (Kind.HEADERS_TOO_LARGE, 431, INVALID, "headers_too_large"),
    (Kind.TOO_LARGE_FOR_LIMIT, 400, INVALID, "request_exceeds_limit"),
    (Kind.TOO_MANY_REQUESTS, 429, "requests", "rate_limit_exceeded"),
    (Kind.TOO_MANY_TOKENS, 429, "tokens", "rate_limit_exceeded"),
    (Kind.OVER_BUDGET, 429, "insufficient_quota", "insufficient_quota"),
    (Kind.SLOW_DOWN, 429, "rate_limit_error", "slow_down"),
    (Kind.LIMITS_AWAY, 503, "service_unavailable_error", "limits_unavailable"),
    (Kind.BUSY, 503, "service_unavailable_error", "server_is_overloaded"),
    (Kind.STATE_AWAY, 503, "service_unavailable_error", "state_unavailable"),
    (Kind.NO_ENGINE, 503, "service_unavailable_error", "server_is_overloaded"),
    (Kind.SHUTDOWN, 503, "service_unavailable_error", "server_shutting_down"),
    (Kind.ENGINE_FAILED, 502, "server_error", "engine_failed"),
    (Kind.ENGINE_SLOW, 504, "server_error", "engine_timeout"),
    (Kind.INTERNAL, 500, "server_error", "internal_error"),
]
ANTHROPIC_TYPES = {
    400: INVALID,
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    502: "api_error",
    504: "api_error",
    503: "overloaded_error",
}


@each(("kind", "status", "type_", "code"), CONTRACT)
@each("dialect", [OPENAI, RESPONSES])
def test_openais_envelope(dialect: Dialect, kind: Kind, status: int, type_: str, code: str | None) -> None:
    refusal = Refusal(kind, "It did not work. Do this.", param="n")
    assert dialect.status(refusal) == status
    assert json.loads(dialect.error_body(refusal, "req_1")) == {
        "error": {"message": "It did not work. Do this.", "type": type_, "param": "n", "code": code}
    }


@each(("kind", "status", "type_", "code"), CONTRACT)
def test_anthropics_envelope(kind: Kind, status: int, type_: str, code: str | None) -> None:
    """Its own type for each situation, and 529 where OpenAI has 503."""
    refusal = Refusal(kind, "It did not work. Do this.")
    assert ANTHROPIC.status(refusal) == (529 if status == 503 else status)
    assert json.loads(ANTHROPIC.error_body(refusal, "req_1")) == {
        "type": "error",
        "error": {"type": ANTHROPIC_TYPES.get(status, INVALID), "message": "It did not work. Do this."},
        "request_id": "req_1",
    }


def test_the_table_is_whole_and_its_kinds_are_apart() -> None:
    """Two kinds may look the same on the wire; they are counted apart all the same."""
    assert [kind for kind, *_ in CONTRACT] == sorted(Kind, key=[kind for kind, *_ in CONTRACT].index)
    assert len({kind.name for kind in Kind}) == len(Kind.__members__) == len(CONTRACT)


def test_no_kind_is_retried_by_mistake() -> None:
    """The SDKs retry 408, 409, 429 and 500 and above by themselves, unless `x-should-retry` says otherwise: what the
    client must change is none of these."""
    retried = {
        kind
        for kind in Kind
        if kind.value.retry is not False and (kind.value.status in (408, 409, 429) or kind.value.status >= 500)
    }
    assert retried == {
        Kind.TOO_MANY_REQUESTS,
        Kind.TOO_MANY_TOKENS,
        Kind.SLOW_DOWN,
        Kind.LIMITS_AWAY,
        Kind.STATE_AWAY,
        Kind.SLOW_CLIENT,
        Kind.BUSY,
        Kind.NO_ENGINE,
        Kind.SHUTDOWN,
        Kind.ENGINE_FAILED,
        Kind.ENGINE_SLOW,
        Kind.INTERNAL,
    }


def test_a_code_of_its_own_goes_before_the_kinds() -> None:
    refusal = Refusal(Kind.INVALID, "too long", code="context_length_exceeded")
    assert json.loads(openai_body(refusal, "r"))["error"]["code"] == "context_length_exceeded"


@each(
    ("seconds", "whole", "milliseconds"),
    [(1.0, b"1", b"1000"), (2.64, b"3", b"2640"), (0.0001, b"1", b"1"), (59.0001, b"60", b"59001"), (0.0, b"0", b"0")],
)
def test_when_to_try_again(seconds: float, whole: bytes, milliseconds: bytes) -> None:
    headers = dict(to_pairs(Refusal(Kind.BUSY, "x", retry_after=seconds).header_lines()))
    assert headers == {b"retry-after": whole, b"retry-after-ms": milliseconds}


@given(seconds=st.floats(0, 60))
def test_times_are_rounded_up(seconds: float) -> None:
    """A client that comes back when told is never too early, and less than a unit late."""
    headers = dict(to_pairs(Refusal(Kind.BUSY, "x", retry_after=seconds).header_lines()))
    assert int(headers[b"retry-after"]) == math.ceil(seconds)
    assert int(headers[b"retry-after-ms"]) == math.ceil(seconds * 1000)


def test_nothing_is_said_of_trying_again_where_nothing_is_known() -> None:
    assert Refusal(Kind.INVALID, "x").header_lines() == b""
    assert Refusal(Kind.INVALID, "x", headers=b"a: b\r\n").header_lines() == b"a: b\r\n"


@given(message=st.text(), param=st.none() | st.text(max_size=10), number=st.integers(0, 10**6))
def test_any_words_make_one_whole_event(message: str, param: str | None, number: int) -> None:
    """No line break of a message ends the event early."""
    if message.encode("utf-8", "ignore").decode() != message:
        return
    refusal = Refusal(Kind.ENGINE_FAILED, message, param)
    for dialect in (OPENAI, RESPONSES, ANTHROPIC):
        event = dialect.error_event(refusal, "req_1", number)
        assert event.endswith(b"\n\n")
        assert event.count(b"\n") == (2 if dialect is OPENAI else 3)
        kind, _, data = event.rpartition(b"data: ")
        assert kind == (b"" if dialect is OPENAI else b"event: error\n")
        told = json.loads(data)
        assert (told if dialect is RESPONSES else told["error"])["message"] == message
        if dialect is RESPONSES:
            assert told["sequence_number"] == number
            assert told["type"] == "error"


def test_the_bodies_of_the_table_are_the_dialects_own() -> None:
    refusal = Refusal(Kind.NO_MODEL, "x")
    assert OPENAI.error_body(refusal, "r") == RESPONSES.error_body(refusal, "r") == openai_body(refusal, "r")
    assert ANTHROPIC.error_body(refusal, "r") == anthropic_body(refusal, "r")
