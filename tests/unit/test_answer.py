"""Whole answers: renamed exactly, otherwise left alone, and never believed for their status alone."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.protocol import EngineError, Fault
from engines.vllm import Vllm
from gateway.serving.answer import Answer, AnswerError, _renamed_in_place, read_answer
from gateway.serving.meter import Usage
from tests.support.recordings import Recording, all_recordings, load
from tests.support.table import each

PUBLIC = "public/model"
ENGINE = Vllm()
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/embeddings", "/tokenize")
ANSWERS = [
    recording
    for recording in all_recordings(streams=False)
    if recording.status == 200 and recording.path in PATHS and recording.body.startswith(b"{")
]


def answered(body: bytes, public: str = PUBLIC) -> Answer:
    answer = read_answer(body, ENGINE, public)
    assert isinstance(answer, Answer)
    return answer


@each("recording", ANSWERS)
def test_a_recorded_answer_changes_in_its_model_alone(recording: Recording) -> None:
    """And is the same bytes where it names no model or the client's own."""
    before = recording.json()
    after = json.loads(answered(recording.body).body)
    if "model" in before:
        assert after == {**before, "model": PUBLIC}
        assert answered(recording.body, before["model"]).body is recording.body
    else:
        assert answered(recording.body).body is recording.body


@each(
    ("engine", "name", "usage"),
    [
        ("vllm", "chat_basic", Usage(37, 8, None)),
        ("vllm", "comp_basic", Usage(5, 12, None)),
        ("vllm", "responses", Usage(37, 8, 0, 0)),
        ("vllm", "messages", Usage(37, 8, None)),
        ("vllm", "tokenize", None),
        ("sglang", "chat_nonstream", Usage(37, 8, 0)),
        ("sglang", "messages", Usage(31, 4, 30)),
        ("lmdeploy", "chat", Usage(37, 7, 0)),
    ],
)
def test_usage_is_read_in_every_dialect(engine: str, name: str, usage: Usage | None) -> None:
    recording = load(engine, name)
    assert answered(recording.body).usage == usage


# --- drawn answers -----------------------------------------------------------------------------------------------

SCALARS = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=12)
VALUES = st.recursive(
    SCALARS | st.sampled_from(["m", '"model":"m"', "model"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6) | st.just("model"), inner),
    max_leaves=12,
)
OBJECTS = st.dictionaries(
    st.text(max_size=6).filter(lambda name: name not in ("object", "type", "error", "model")), VALUES, max_size=6
)


@given(rest=OBJECTS, model=st.text(max_size=20), indent=st.sampled_from([None, 1]), ascii_only=st.booleans())
def test_decoded_an_answer_differs_in_its_model_only(
    rest: dict[str, Any], model: str, indent: int | None, ascii_only: bool
) -> None:
    """However it is spelt, and whatever else is called model inside it."""
    value = {**rest, "model": model}
    body = json.dumps(value, indent=indent, ensure_ascii=ascii_only).encode()
    answer = answered(body)
    assert json.loads(answer.body) == {**value, "model": PUBLIC}
    for part in rest.values():
        # Each field's own bytes are kept: numbers, escapes and spacing.
        spelt = json.dumps(part, ensure_ascii=ascii_only).encode()
        assert spelt in answer.body or indent is not None


@given(rest=OBJECTS, model=st.sampled_from([None, PUBLIC, "absent"]))
def test_an_answer_that_needs_no_renaming_keeps_its_very_bytes(rest: dict[str, Any], model: str | None) -> None:
    value = rest if model == "absent" else {**rest, "model": model}
    body = b" " + json.dumps(value, indent=2).encode() + b"\n"
    if isinstance(rest.get("usage", {}), dict):
        assert answered(body).body is body


@given(body=st.binary(max_size=120) | st.text(alphabet='{}[]":,model0eE.\\u ', max_size=60).map(str.encode))
def test_no_bytes_of_an_engine_make_it_fail(body: bytes) -> None:
    assert isinstance(read_answer(body, ENGINE, PUBLIC), Answer | AnswerError | EngineError)


def test_numbers_keep_their_spelling() -> None:
    """Nothing is read as a float and written again."""
    body = b'{"model":"m","a":1.10,"b":1E5,"c":12345678901234567890123,"d":1e999,"e":"\\u00e9\\/"}'
    assert answered(body).body == body.replace(b'"m"', b'"public/model"')


_KEYS = st.sampled_from(('"model"', '"mod\\u0065l"', '"id"', '"inner"'))
_VALUES = st.sampled_from(
    ('"m"', '"model"', '{"model":"m"}', '["model","m"]', '"\\"model\\":\\"m\\""', '"\\\\"', '"ü"', "null", '"mm"')
)


_FIELDS = st.lists(st.tuples(_KEYS, st.sampled_from((":", ": ", " :")), _VALUES), max_size=4)


@given(_FIELDS, _KEYS, st.sampled_from((":", ": ")), _FIELDS)
def test_an_answer_renamed_in_place_is_as_if_taken_apart(
    before: list[tuple[str, str, str]], key: str, colon: str, after: list[tuple[str, str, str]]
) -> None:
    """Whatever stands in it, and wherever a model is named beside its own."""
    body = ("{" + ",".join("".join(field) for field in (*before, (key, colon, '"m"'), *after)) + "}").encode()
    whole = json.loads(body)
    if isinstance(whole.get("model"), str):
        renamed = _renamed_in_place(body, whole["model"], PUBLIC)
        assert renamed is None or json.loads(renamed) == {**whole, "model": PUBLIC}


def test_only_what_names_one_model_is_renamed_in_place() -> None:
    assert _renamed_in_place(b'{"id":1,"model":"m","b":"m"}', "m", "n") == b'{"id":1,"model":"n","b":"m"}'
    for body in (
        b'{"mod\\u0065l":"m"}',
        b'{"model": "m"}',
        b'{"model":"m","of":{"model":"m"}}',
        b'{"model":"m","b":"model"}',
    ):
        assert _renamed_in_place(body, "m", "n") is None


def test_a_large_answer_is_renamed() -> None:
    pad = b"x" * (5 << 20)
    assert answered(b'{"model":"m","pad":"%b"}' % pad).body == b'{"model":"public/model","pad":"%b"}' % pad


# --- what is no answer -------------------------------------------------------------------------------------------

ERRORS = [
    ('{"error":{"message":"full","type":"x","param":null,"code":503}}', Fault.OVERLOADED, "full"),
    ('{"object":"error","message":"full of","type":"x","param":null,"code":500}', Fault.FAILED, "full of"),
    ('{"type":"error","error":{"type":"overloaded_error","message":"overloaded"}}', Fault.OVERLOADED, "overloaded"),
    ('{"error":"Unauthorized"}', Fault.FAILED, "Unauthorized"),
]


@pytest.mark.parametrize(("body", "fault", "message"), ERRORS, ids=range(len(ERRORS)))
def test_an_error_with_status_200_is_found(body: str, fault: Fault, message: str) -> None:
    error = read_answer(body.encode(), ENGINE, PUBLIC)
    assert isinstance(error, EngineError)
    assert (error.fault, error.message) == (fault, message)


@pytest.mark.parametrize(
    "body",
    [
        '{"model":"m","error":null,"object":"response"}',
        '{"model":"m","error":{"message":"x"},"object":"response","status":"failed"}',
        '{"model":"m","choices":[{"message":{"content":"{\\"error\\":{}}"}}]}',
    ],
)
def test_what_only_speaks_of_an_error_is_an_answer(body: str) -> None:
    """A failed response is a whole answer of its dialect."""
    assert answered(body.encode()).body == body.replace('"m"', '"public/model"').encode()


NO_ANSWERS = [b"", b"  ", b"Success", b"[1]", b'"text"', b"null", b"7", b'{"model":"m"', b'{"model":"m"}}',
              b'{"model":"\xff"}', b"[" * 100_000, b'{"a":' * 100_000, b"<html></html>", b'{"a":NaN}']  # fmt: skip


@each("body", NO_ANSWERS)
def test_what_is_no_json_object_is_no_answer(body: bytes) -> None:
    answer = read_answer(body, ENGINE, PUBLIC)
    assert isinstance(answer, AnswerError)
    assert answer.message.startswith("The engine answered 200 with something that is not")


@pytest.mark.parametrize("body", [b'{"model":"m","usage":7}', b'{"model":"m","usage":{"prompt_tokens":"7"}}'])
def test_an_answer_of_an_unknown_form_is_passed_on_without_usage(body: bytes) -> None:
    assert answered(body) == Answer(body.replace(b'"m"', b'"public/model"'), None)


def test_a_model_that_is_no_name_is_replaced() -> None:
    assert answered(b'{"model":{"x":1},"id":"y"}').body == b'{"model":"public/model","id":"y"}'
