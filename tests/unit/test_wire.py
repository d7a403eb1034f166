"""Errors of the three engines, as recorded, and bodies as vLLM gets them."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines import wire
from engines.protocol import Dispatch, EngineLoad, Fault, ServedModel, plain_target
from engines.registry import ENGINES
from engines.vllm import Vllm
from gateway.api.routes import RELAYED
from tests.support.recordings import Recording, all_recordings, load
from tests.support.table import each

VLLM = Vllm()
FAILED = [recording for recording in all_recordings(streams=False) if recording.status >= 400]

FAULTS = [
    ("vllm/err_badjson", Fault.REQUEST),
    ("vllm/err_404", Fault.UNSUPPORTED),
    ("vllm/err_405", Fault.UNSUPPORTED),
    ("vllm/err_embeddings", Fault.UNSUPPORTED),
    ("vllm/lora_unknown_model", Fault.UNKNOWN_MODEL),
    ("vllm/lora_unknown_model_stream", Fault.UNKNOWN_MODEL),
    ("vllm/auth_missing", Fault.CREDENTIALS),
    ("vllm/auth_wrong", Fault.CREDENTIALS),
    ("vllm/s2_over_4", Fault.OVERLOADED),
    ("vllm/sigterm_drain25_new_request", Fault.OVERLOADED),
    ("vllm/messages_err", Fault.UNKNOWN_MODEL),
    ("sglang/err_badjson", Fault.REQUEST),
    ("sglang/err_404", Fault.UNSUPPORTED),
    ("sglang/err_405", Fault.UNSUPPORTED),
    ("sglang/q_full_nonstream", Fault.OVERLOADED),
    ("sglang/err_toolong", Fault.REQUEST),
    ("lmdeploy/err_404", Fault.UNSUPPORTED),
    ("lmdeploy/err_model", Fault.UNKNOWN_MODEL),
    ("lmdeploy/err_temp", Fault.REQUEST),
]


@each(("name", "fault"), FAULTS)
def test_whose_fault_a_recorded_error_is(name: str, fault: Fault) -> None:
    recording = load(*name.split("/"))
    assert wire.read_error(recording.status, recording.body).fault is fault


@each("recording", FAILED)
def test_a_recorded_errors_own_message_is_kept(recording: Recording) -> None:
    """Whatever its shape: nested, flat, a bare string, a framework's detail, plain text, or nothing."""
    error = wire.read_error(recording.status, recording.body)
    assert error.message
    assert error.message[:100] in {
        *(text[:100] for text in texts_of(recording.body)),
        f"the engine answered {recording.status} without a message",
    }
    if recording.body.startswith(b"{") and b'"message"' in recording.body:
        assert not error.message.startswith("the engine answered")


def texts_of(body: bytes) -> list[str]:
    """Every string inside a JSON body, every object as compact JSON too, or the body itself."""
    try:
        todo: list[Any] = [json.loads(body)]
    except ValueError:
        return [body.decode()]
    found = []
    while todo:
        value = todo.pop()
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, dict | list):
            found.append(json.dumps(value, separators=(",", ":"), ensure_ascii=False))
            todo.extend(value.values() if isinstance(value, dict) else value)
    return found


@pytest.mark.parametrize(
    "name",
    ["vllm/err_prompt_too_long", "vllm/err_comp_prompt_too_long", "sglang/err_toolong", "lmdeploy/err_toolong"],
)
def test_too_long_a_prompt_has_its_code(name: str) -> None:
    """The SDKs' users look for it."""
    recording = load(*name.split("/"))
    assert recording.status == 400
    assert wire.read_error(recording.status, recording.body).code == "context_length_exceeded"


def test_the_param_is_kept() -> None:
    recording = load("vllm", "err_max_tokens_zero")
    assert wire.read_error(recording.status, recording.body).param == "max_tokens"


@each(
    ("status", "fault"),
    [
        (400, Fault.REQUEST),
        (401, Fault.CREDENTIALS),
        (403, Fault.CREDENTIALS),
        (404, Fault.UNKNOWN_MODEL),
        (413, Fault.REQUEST),
        (422, Fault.REQUEST),
        (429, Fault.OVERLOADED),
        (500, Fault.FAILED),
        (502, Fault.FAILED),
        (503, Fault.OVERLOADED),
        (302, Fault.FAILED),
    ],
)
def test_the_status_tells_whose_fault_it_is(status: int, fault: Fault) -> None:
    assert wire.read_error(status, b'{"error":{"message":"text"}}').fault is fault


@given(status=st.integers(100, 599), body=st.binary(max_size=80))
def test_no_bytes_of_an_engine_make_it_fail(status: int, body: bytes) -> None:
    for shape in (body, b'{"error":{"message":"' + body + b'"}}', b'{"detail":' + body + b"}"):
        error = wire.read_error(status, shape)
        assert error.message
        assert wire.read_error(status, shape) == error
        VLLM.read_stream_error(shape)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(["error", "message", "code", "param", "detail", "object", "type"]), inner, max_size=4
        )
    ),
    max_leaves=8,
)


@given(status=st.integers(100, 599), value=JSON)
def test_no_shape_of_an_error_makes_it_fail(status: int, value: Any) -> None:
    body = json.dumps(value).encode()
    assert wire.read_error(status, body).message
    found = VLLM.read_stream_error(body)
    assert found is None or found.message


@each(
    ("code", "status"),
    [(503, 503), ("404", 404), ("not_found", 500), (None, 500), ("²²²", 500), ("9" * 5000, 500), ("4040", 500)],
)
def test_the_status_of_an_error_in_a_stream(code: object, status: int) -> None:
    assert wire.status_in({"code": code}) == status


def test_a_chunk_is_no_error() -> None:
    """An answer's own chunk may carry an empty or even a filled field of that name."""
    for payload in (
        b'{"error":null,"choices":[]}',
        b'{"error":{"message":"x"},"choices":[]}',
        b'{"type":"response.failed","response":{"error":{"message":"x"}}}',
        b'{"type":"message_start"}',
        b"[]",
        b"nonsense",
    ):
        assert VLLM.read_stream_error(payload) is None


# --- what vLLM is sent -------------------------------------------------------------------------------------------


def raw(**fields: Any) -> dict[str, msgspec.Raw]:
    return {name: msgspec.Raw(json.dumps(value).encode()) for name, value in fields.items()}


def prepared(path: str, fields: dict[str, msgspec.Raw], *, ask: bool = False, salt: str | None = None) -> Any:
    return json.loads(VLLM.prepare(path, fields, Dispatch(plain_target("own name"), ask, salt)))


def test_the_model_goes_by_its_own_name_and_the_rest_as_it_came() -> None:
    body = prepared("/v1/chat/completions", raw(model="public", messages=[], temperature=0.1, stream=True))
    assert body == {"model": "own name", "messages": [], "temperature": 0.1, "stream": True}


@each("path", ["/v1/chat/completions", "/v1/completions"])
@each(
    ("given_options", "sent"),
    [
        ("absent", {"include_usage": True}),
        (None, {"include_usage": True}),
        ({}, {"include_usage": True}),
        ({"include_usage": False}, {"include_usage": True}),
        ({"continuous_usage_stats": True}, {"continuous_usage_stats": True, "include_usage": True}),
        # The engine says what is wrong with these.
        ([], []),
        ("yes", "yes"),
    ],
)
def test_usage_is_asked_for(path: str, given_options: object, sent: object) -> None:
    fields = raw(model="m") if given_options == "absent" else raw(model="m", stream_options=given_options)
    assert prepared(path, fields, ask=True)["stream_options"] == sent


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages", "/v1/embeddings"])
def test_usage_is_not_asked_for_where_it_comes_by_itself(path: str) -> None:
    """A field unknown there would be refused or ignored."""
    assert "stream_options" not in prepared(path, raw(model="m"), ask=True)


@pytest.mark.parametrize(
    ("path", "salted"),
    [("/v1/chat/completions", True), ("/v1/messages", True), ("/v1/embeddings", False), ("/tokenize", False)],
)
def test_a_trust_domain_becomes_the_salt_of_the_prefix_cache(path: str, salted: bool) -> None:
    body = prepared(path, raw(model="m"), salt="team a")
    assert body.get("cache_salt") == ("team a" if salted else None)
    assert "cache_salt" not in prepared(path, raw(model="m"))


def test_options_that_cannot_be_read_do_not_break_it() -> None:
    """The body's check lets only UTF-8 in; an engine file relies on nobody for that."""
    fields = {"model": msgspec.Raw(b'"m"'), "stream_options": msgspec.Raw(b'{"\xff":1}')}
    sent = VLLM.prepare("/v1/chat/completions", fields, Dispatch(plain_target("m"), ask_usage=True))
    assert sent == b'{"model":"m","stream_options":{"\xff":1}}'


def test_every_engine_says_what_the_gateway_needs() -> None:
    """One contract for each file in ``engines``."""
    for name, engine in ENGINES.items():
        assert engine.name == name
        assert engine.control_fields
        assert set(engine.paths) <= set(RELAYED)
        assert all(path.startswith("/") for path in (*engine.paths.values(), engine.ready_path, engine.models_path))
        for field in ("model", "messages", "prompt", "input", "stream", "n", "max_tokens", "tools", "temperature"):
            assert field not in engine.control_fields


# --- the control plane -----------------------------------------------------------------------------------------------


def test_what_can_be_read_of_a_list_of_models_is() -> None:
    """An entry that is none, or says something odd of itself, takes no other model away."""
    listed = VLLM.read_models(
        b'{"object":"list","data":[{"id":"base","created":7,"max_model_len":2048,"parent":null},'
        b'{"id":"support","created":1.5,"max_model_len":null,"parent":"base"},{"id":5},"x",{"created":1}]}'
    )
    assert listed == (ServedModel("base", 7, 2048), ServedModel("support", base="base"))


@each("body", [b"", b"[]", b"{}", b'{"data":{}}', b"<html>", b'{"data":' + b"[" * 100_000])
def test_what_is_no_list_of_models_is_told(body: bytes) -> None:
    with pytest.raises(ValueError, match="list of models"):
        VLLM.read_models(body)


def test_an_engines_load_is_read_out_of_its_gauges() -> None:
    text = (
        b"# HELP vllm:num_requests_running Number of requests\n# TYPE vllm:num_requests_running gauge\n"
        b'vllm:num_requests_running{engine="0",model_name="m"} 3.0\nvllm:num_requests_running{engine="1"} 2.0\n'
        b'vllm:num_requests_waiting{engine="0"} 4.0\nvllm:num_requests_waiting_by_reason{reason="x"} 9.0\n'
        b'vllm:kv_cache_usage_perc{engine="0"} 0.25\n'
    )
    assert VLLM.read_load(text) == EngineLoad(5, 4, 0.25)
    assert VLLM.read_load(b"vllm:num_requests_running 1.0\nvllm:num_requests_waiting 0.0\n") == EngineLoad(1, 0)
    assert VLLM.read_load(b"vllm:num_requests_running 1.0\nvllm:num_requests_waiting much\n") is None
    assert VLLM.read_load(b"") is None


def test_adapters_are_loaded_from_where_they_stay() -> None:
    """Never in place: a name that means other weights than before answers for somebody else."""
    load = VLLM.load_adapter("a@1", "/adapters/a1")
    assert (load.method, load.path) == ("POST", "/v1/load_lora_adapter")
    assert json.loads(load.body) == {"lora_name": "a@1", "lora_path": "/adapters/a1"}
    unload = VLLM.unload_adapter("a@1")
    assert (unload.path, json.loads(unload.body)) == ("/v1/unload_lora_adapter", {"lora_name": "a@1"})


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (400, "The lora adapter 'a' has already been loaded. If you want to load the adapter in place, set it."),
        (404, "The lora adapter 'a' cannot be found."),
    ],
)
def test_an_adapter_that_is_as_wanted_already_is_no_failure(status: int, message: str) -> None:
    body = json.dumps({"error": {"message": message, "type": "X", "param": None, "code": status}}).encode()
    assert VLLM.read_adapter_answer(status, body) is None
    assert VLLM.read_adapter_answer(200, b"Success: LoRA adapter 'a' added successfully.") is None


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (404, "Loading lora a failed: No adapter found for <path>"),
        (500, "Call to add_lora method failed: LoRA rank 32 is greater than max_lora_rank 16."),
    ],
)
def test_an_adapter_that_cannot_be_loaded_is_told(status: int, message: str) -> None:
    body = json.dumps({"error": {"message": message, "type": "X", "param": None, "code": status}}).encode()
    error = VLLM.read_adapter_answer(status, body)
    assert error is not None and error.message == message
