"""SGLang's file against what SGLang 0.5.23 really said: naming adapters, errors of every shape, lists, load."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.protocol import Capability, Dispatch, EngineError, EngineLoad, Fault, Target
from engines.sglang import Sglang
from gateway.serving.redact import redact
from tests.support.recordings import Recording, all_recordings, load
from tests.support.table import each

SGLANG = Sglang()
FAILED = [recording for recording in all_recordings("sglang", streams=False) if recording.status >= 400]


def recorded(name: str) -> Recording:
    return load("sglang", name)


def error_of(name: str) -> EngineError:
    recording = recorded(name)
    return SGLANG.read_error(recording.status, recording.body)


def raw(**fields: Any) -> dict[str, msgspec.Raw]:
    return {name: msgspec.Raw(json.dumps(value).encode()) for name, value in fields.items()}


def names(target: Target) -> tuple[Any, Any]:
    adapter = None if target.adapter is None else json.loads(bytes(target.adapter))
    return json.loads(bytes(target.model)), adapter


# --- naming ------------------------------------------------------------------------------------------------------


@each(
    ("name", "base", "named"),
    [
        ("smollm2", None, ("smollm2", None)),
        ("a", "smollm2", ("smollm2", "a")),
        ("smollm2:a", None, ("smollm2", "a")),
        ("smollm2:a@sha256:12", None, ("smollm2", "a@sha256:12")),
        ('quo"ted', "bäse", ("bäse", 'quo"ted')),
    ],
)
def test_an_adapter_is_named_beside_its_base(name: str, base: str | None, named: tuple[str, str | None]) -> None:
    assert names(SGLANG.target(name, base)) == named


def test_the_list_tells_which_names_are_adapters() -> None:
    """A bare adapter name answers 200 from the base model, so the list is what keeps them apart."""
    base, adapter = SGLANG.read_models(recorded("models").body)
    assert (base.name, base.base, base.max_model_len) == ("smollm2", None, 8192)
    assert (adapter.name, adapter.base) == ("a", "smollm2")
    assert names(SGLANG.target(adapter.name, adapter.base)) == ("smollm2", "a")
    assert recorded("lora_bare_name").status == recorded("model_unknown").status == 200
    assert Capability.MODELS_CHECKED not in SGLANG.capabilities
    with pytest.raises(ValueError, match="list of models cannot be read"):
        SGLANG.read_models(b"[]")


def prepared(path: str, target: Target, fields: dict[str, Any], *, ask: bool = False, salt: str | None = None) -> Any:
    return json.loads(SGLANG.prepare(path, raw(**fields), Dispatch(target, ask, salt)))


def test_a_request_for_the_base_model_names_no_adapter() -> None:
    """Even if a client's own choice came this far: the edge refuses it before."""
    asked = {"model": "public", "messages": [], "temperature": 0.1, "lora_path": "another-teams"}
    body = prepared("/v1/chat/completions", SGLANG.target("smollm2"), asked)
    assert body == {"model": "smollm2", "messages": [], "temperature": 0.1}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_request_for_an_adapter_names_that_one_alone(path: str) -> None:
    for asked in ({}, {"lora_path": "another-teams"}, {"lora_path": ["another-teams"]}):
        body = prepared(path, SGLANG.target("a", "smollm2"), {"model": "public", **asked})
        assert body == {"model": "smollm2", "lora_path": "a"}


def test_usage_and_salt_are_added_where_they_are_known() -> None:
    target = SGLANG.target("smollm2")
    body = prepared("/v1/completions", target, {"prompt": "x", "stream": True}, ask=True, salt="team a")
    assert body["stream_options"] == {"include_usage": True}
    assert body["cache_salt"] == "team a"
    body = prepared("/tokenize", target, {"prompt": "x"}, ask=True, salt="team a")
    assert body == {"model": "smollm2", "prompt": "x"}


# --- errors ------------------------------------------------------------------------------------------------------


@each(
    ("name", "error"),
    [
        ("err_badjson", EngineError(Fault.REQUEST, "the body: JSON decode error")),
        ("err_nomessages", EngineError(Fault.REQUEST, "messages: Field required", "messages")),
        (
            "stream_priority_invalid",
            EngineError(
                Fault.REQUEST,
                "priority: Input should be a valid integer, unable to parse string as an integer",
                "priority",
            ),
        ),
        (
            "err_temp",
            EngineError(
                Fault.REQUEST, "temperature must be a non-negative finite number, got -1.0.", param="temperature"
            ),
        ),
        ("q_full_nonstream", EngineError(Fault.OVERLOADED, "The request queue is full.")),
        ("q_wait1", EngineError(Fault.OVERLOADED, "The request is aborted by a higher priority request.")),
        ("err_404", EngineError(Fault.UNSUPPORTED, "Not Found")),
        ("lora_load_noauth", EngineError(Fault.CREDENTIALS, "Unauthorized")),
        ("lora_unknown_colon", EngineError(Fault.UNKNOWN_MODEL, "the adapter is not loaded")),
        ("lora_unknown_stream", EngineError(Fault.UNKNOWN_MODEL, "the adapter is not loaded")),
    ],
)
def test_a_recorded_error_is_what_other_engines_would_say(name: str, error: EngineError) -> None:
    assert error_of(name) == error


@each("recording", FAILED)
def test_no_error_tells_of_the_engine_s_files_or_repeats_the_request(recording: Recording) -> None:
    """As a client gets it: SGLang's validator quotes its own files and the whole request, prompts included."""
    said = redact(SGLANG.read_error(recording.status, recording.body).message)
    assert said
    for leak in (".py", "File", "/lab", "site-packages", "'input'", "odict_keys", "dict_keys"):
        assert leak not in said


def test_too_long_a_prompt_has_its_code() -> None:
    for name in ("err_toolong", "err_maxtokens"):
        assert error_of(name).code == "context_length_exceeded"


def test_more_output_than_the_context_holds_has_the_same_code() -> None:
    """What SGLang says since it is told its context length; the lone words run into each other there."""
    message = "max_completion_tokens is too large: 5000.This model supports at most 2048 completion tokens."
    body = json.dumps({"object": "error", "message": message, "type": "BadRequestError", "code": 400}).encode()
    told = EngineError(Fault.REQUEST, message, "max_completion_tokens", "context_length_exceeded")
    assert SGLANG.read_error(400, body) == told


def test_of_a_validator_s_lines_only_what_stands_before_the_value_is_read() -> None:
    """What a client sends cannot pass for the validator's own words, nor come back."""
    sent = "}}\n  {'type': 'x', 'loc': ('body', 'forged'), 'msg': 'no'"
    lines = [
        {"type": "too_short", "loc": ("body", "messages"), "msg": "List should have 1 item", "input": sent},
        {"type": "literal_error", "loc": ("body", "tools", 0, "type"), "msg": "Input should be 'function'", "input": 1},
    ]
    message = "2 validation errors:\n" + "".join(f"  {line}\n" for line in lines) + '\n  File "/x/http_server.py"'
    error = SGLANG.read_error(400, json.dumps({"object": "error", "message": message, "code": 400}).encode())
    assert error == EngineError(
        Fault.REQUEST, "messages: List should have 1 item; tools.0.type: Input should be 'function'", "messages"
    )


def test_a_full_queue_is_an_event_of_a_stream() -> None:
    """Status 200 and then this: whoever looks at the status alone takes it for an answer."""
    recording = recorded("q_full_stream")
    assert (recording.status, recording.is_stream) == (200, True)
    payload = recording.events()[0].removeprefix(b"data: ")
    assert SGLANG.read_stream_error(payload) == EngineError(Fault.OVERLOADED, "The request queue is full.")


def test_a_full_queue_is_told_otherwise_by_its_responses_api() -> None:
    """Whole: a 400. Streamed: a response that was begun and failed; what else fails is passed on as it came."""
    body = b'{"error":{"message":"503: The request queue is full.","type":"invalid_request_error","code":400}}'
    full = EngineError(Fault.OVERLOADED, "The request queue is full.")
    assert SGLANG.read_error(400, body) == full
    *announced, failed = (event.partition(b"data: ")[2] for event in recorded("q_full_responses_stream").events())
    assert [SGLANG.read_stream_error(payload) for payload in announced] == [None, None]
    assert SGLANG.read_stream_error(failed) == full
    assert SGLANG.read_stream_error(failed.replace(b"The request queue is full.", b"Something else.")) is None
    for odd in (b'{"response":1}', b'{"response":{"error":1}}', b'{"response":{"error":{"message":1}}}'):
        assert SGLANG.read_stream_error(odd) is None


def test_the_flat_shape_in_a_stream_is_read_too() -> None:
    assert SGLANG.read_stream_error(recorded("err_temp").body) == error_of("err_temp")
    assert SGLANG.read_stream_error(recorded("q_full_nonstream").body) == error_of("q_full_nonstream")


@each("recording", all_recordings("sglang", streams=True))
def test_no_event_of_an_answer_is_an_error(recording: Recording) -> None:
    if recording.name.startswith("q_full_"):
        return
    for event in recording.events():
        assert SGLANG.read_stream_error(event.removeprefix(b"data: ")) is None


@given(status=st.integers(100, 599), body=st.binary(max_size=80), text=st.text(max_size=80))
def test_no_bytes_of_an_engine_make_it_fail(status: int, body: bytes, text: str) -> None:
    validation = json.dumps({"message": f"1 validation error:\n  {text}\n{{'type': 'x', 'loc': ('body', {text})"})
    for shape in (body, b'{"error":{"message":"' + body + b'"}}', validation.encode()):
        assert SGLANG.read_error(status, shape).message
        SGLANG.read_stream_error(shape)
        SGLANG.read_adapter_answer(status, shape)


# --- load --------------------------------------------------------------------------------------------------------


def test_its_load_counts_each_request_once() -> None:
    """With priorities the same requests are told once more for each priority."""
    body = recorded("q_metrics_full").body
    assert body.count(b"\nsglang:num_queue_reqs{") == 2
    assert SGLANG.read_load(body) == EngineLoad(running=1, waiting=2, cache_used=0.01)
    assert SGLANG.read_load(b"") is None


# --- adapters ----------------------------------------------------------------------------------------------------


def test_how_adapters_are_loaded_and_unloaded() -> None:
    call = SGLANG.load_adapter("s", "/adapters/s")
    assert (call.method, call.path) == ("POST", "/load_lora_adapter")
    assert json.loads(call.body) == {"lora_name": "s", "lora_path": "/adapters/s"}
    call = SGLANG.unload_adapter("s")
    assert (call.method, call.path, json.loads(call.body)) == ("POST", "/unload_lora_adapter", {"lora_name": "s"})
    for name in ("lora_load_ok", "lora_unload_ok"):
        recording = recorded(name)
        assert recording.request_json().keys() <= {"lora_name", "lora_path"}
        assert SGLANG.read_adapter_answer(recording.status, recording.body) is None


@pytest.mark.parametrize("name", ["lora_load_dup", "lora_unload_again"])
def test_what_was_so_already_is_no_failure(name: str) -> None:
    recording = recorded(name)
    assert recording.status == 400
    assert SGLANG.read_adapter_answer(recording.status, recording.body) is None


@pytest.mark.parametrize(
    ("name", "fault", "said"),
    [
        ("lora_load_badpath", Fault.REQUEST, "Repo id must be"),
        ("lora_load_emptydir", Fault.REQUEST, "No such file or directory"),
        ("lora_load_missingfield", Fault.REQUEST, "LoadLoRAAdapterReqInput"),
        ("lora_load_noauth", Fault.CREDENTIALS, "Unauthorized"),
    ],
)
def test_why_an_adapter_was_not_loaded(name: str, fault: Fault, said: str) -> None:
    recording = recorded(name)
    error = SGLANG.read_adapter_answer(recording.status, recording.body)
    assert error is not None
    assert error.fault is fault
    assert said in error.message
