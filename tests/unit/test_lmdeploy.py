"""What LMDeploy is sent, and what it answered, as recorded."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from engines.lmdeploy import LmDeploy
from engines.protocol import Capability, Dispatch, EngineLoad, Fault, ServedModel, plain_target
from gateway.api.peek import FORBIDDEN
from gateway.api.routes import RELAYED
from tests.support.recordings import Recording, all_recordings, load
from tests.support.table import each

LMDEPLOY = LmDeploy()
FAILED = [recording for recording in all_recordings("lmdeploy", streams=False) if recording.status >= 400]


def recorded(name: str) -> Recording:
    return load("lmdeploy", name)


# --- what it is sent ---------------------------------------------------------------------------------------------


def prepared(path: str, *, ask: bool = False, **fields: Any) -> Any:
    raw = {name: msgspec.Raw(json.dumps(value).encode()) for name, value in fields.items()}
    dispatch = Dispatch(LMDEPLOY.target("adapter", "base"), ask, "a team's salt")
    return json.loads(LMDEPLOY.prepare(path, raw, dispatch))


def test_a_model_and_an_adapter_are_named_alike() -> None:
    assert LMDEPLOY.target("m") == plain_target("m")
    assert LMDEPLOY.target("adapter", "base") == plain_target("adapter")
    body = prepared("/v1/chat/completions", model="public", messages=[], temperature=0.1)
    assert body == {"model": "adapter", "messages": [], "temperature": 0.1}


@pytest.mark.parametrize("path", sorted(LMDEPLOY.paths))
def test_usage_is_asked_for_where_it_does_not_come_by_itself(path: str) -> None:
    asked = prepared(path, ask=True, model="m", stream=True).get("stream_options")
    assert asked == ({"include_usage": True} if RELAYED[path].asks_usage else None)
    assert "stream_options" not in prepared(path, model="m", stream=True)


def test_what_would_reach_past_the_gateway_is_refused_from_clients() -> None:
    """Another one's session, another engine's cache, an adapter, and prompts that nobody has looked at."""
    assert LMDEPLOY.control_fields <= FORBIDDEN
    steering = {"session_id", "adapter_name", "migration_request", "with_cache", "preserve_cache", "image_data"}
    assert steering <= LMDEPLOY.control_fields


# --- what it answers ---------------------------------------------------------------------------------------------


@each(
    ("name", "fault", "param", "code"),
    [
        ("err_404", Fault.UNSUPPORTED, None, None),
        ("err_405", Fault.UNSUPPORTED, None, None),
        ("err_model", Fault.UNKNOWN_MODEL, None, None),
        ("err_ctype", Fault.REQUEST, None, None),
        ("err_json", Fault.REQUEST, None, None),
        ("err_maxtok0", Fault.REQUEST, "max_tokens", None),
        ("err_missing", Fault.REQUEST, "messages", None),
        ("err_n", Fault.REQUEST, "n", None),
        ("err_temp", Fault.REQUEST, "temperature", None),
        ("err_type", Fault.REQUEST, "max_tokens", None),
        ("err_toolong", Fault.REQUEST, None, "context_length_exceeded"),
        ("err_toolong_stream", Fault.REQUEST, None, "context_length_exceeded"),
        ("messages_anthropic", Fault.REQUEST, None, None),
    ],
)
def test_a_recorded_error(name: str, fault: Fault, param: str | None, code: str | None) -> None:
    """Whatever is wrong with a request is a 400, and only the message says with what of it."""
    error = LMDEPLOY.read_error(recorded(name).status, recorded(name).body)
    assert (error.fault, error.param, error.code) == (fault, param, code)


@each("recording", FAILED)
def test_a_recorded_error_keeps_its_words(recording: Recording) -> None:
    body = recording.json()
    said = body.get("detail") or body.get("message") or body["error"]["message"]
    assert LMDEPLOY.read_error(recording.status, recording.body).message == said


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ("The top_k -1 cannot be a negative integer.", "top_k"),
        ("messages.0.content: Field required", "messages"),
        ("The session_id 7 is occupied.", None),
        ("something went wrong: really", None),
    ],
)
def test_the_field_at_fault_is_read_out_of_the_message(message: str, param: str | None) -> None:
    body = msgspec.json.encode({"message": message, "code": 400, "param": None, "object": "error"})
    error = LMDEPLOY.read_error(400, body)
    assert (error.message, error.param) == (message, param)


def test_without_its_key_it_says_no_more_than_that() -> None:
    flat = b'{"message":"Unauthorized.","type":"authentication_error","code":401,"param":null,"object":"error"}'
    assert LMDEPLOY.read_error(401, flat).fault is Fault.CREDENTIALS


def test_a_busy_session_is_plain_text() -> None:
    error = LMDEPLOY.read_error(500, b"Internal Server Error")
    assert (error.fault, error.message) == (Fault.FAILED, "Internal Server Error")


@pytest.mark.parametrize("name", ["err_toolong_stream", "err_temp", "err_model"])
def test_a_failure_in_a_stream_is_read_like_one_before_it(name: str) -> None:
    whole = recorded(name)
    event = msgspec.json.encode({"error": whole.json()})
    assert LMDEPLOY.read_stream_error(event) == LMDEPLOY.read_error(whole.status, whole.body)


@pytest.mark.parametrize("recording", all_recordings("lmdeploy", streams=True), ids=str)
def test_a_chunk_is_no_error(recording: Recording) -> None:
    for event in recording.events():
        assert LMDEPLOY.read_stream_error(event.removeprefix(b"data: ")) is None


def test_the_list_of_models_does_not_tell_an_adapter_from_its_base() -> None:
    created = 1795488246
    assert LMDEPLOY.read_models(recorded("models").body) == (
        ServedModel("smol", created),
        ServedModel("ad1", created),
        ServedModel("ad2", created),
    )
    with pytest.raises(ValueError, match="cannot be read"):
        LMDEPLOY.read_models(b'{"error":"Unauthorized"}')


def test_its_load_is_what_its_scheduler_says() -> None:
    """The server's own count of those that wait never forgets one whose client left."""
    metrics = recorded("metrics").body
    assert LMDEPLOY.read_load(metrics) == EngineLoad(running=0, waiting=0, cache_used=0.0)
    labels = b'{engine="0",model_name="smol"} '
    for gauge, value in (
        (b"num_requests_running", b"3.0"),
        (b"num_requests_waiting", b"1.0"),
        (b"num_api_requests_waiting", b"2.0"),
        (b"gpu_cache_usage_perc", b"0.25"),
    ):
        line = b"lmdeploy:" + gauge + labels
        assert line + b"0.0\n" in metrics
        metrics = metrics.replace(line + b"0.0\n", line + value + b"\n")
    assert LMDEPLOY.read_load(metrics) == EngineLoad(running=3, waiting=1, cache_used=0.25)
    assert LMDEPLOY.read_load(b"") is None


def test_adapters_come_and_go_with_the_engine_only() -> None:
    assert Capability.ADAPTERS in LMDEPLOY.capabilities
    assert Capability.ADAPTER_LOADING not in LMDEPLOY.capabilities
    assert LMDEPLOY.load_adapter("a", "/adapters/a") is None
    assert LMDEPLOY.unload_adapter("a") is None
    assert LMDEPLOY.read_adapter_answer(200, b"") is None
    error = LMDEPLOY.read_adapter_answer(404, b'{"detail":"Not Found"}')
    assert error is not None
    assert error.fault is Fault.UNSUPPORTED


@pytest.mark.parametrize(
    ("name", "capability"),
    [
        ("chat_tools_named", Capability.FORCED_TOOLS),
        ("long_maxtok", Capability.LENGTH_CHECKED),
    ],
)
def test_what_is_not_declared_was_seen_not_to_hold(name: str, capability: Capability) -> None:
    """A named tool that is not called; an answer cut off long before the tokens it was promised."""
    assert capability not in LMDEPLOY.capabilities
    recording = recorded(name)
    assert recording.status == 200
    [choice] = recording.json()["choices"]
    if capability is Capability.FORCED_TOOLS:
        assert recording.request_json()["tool_choice"]["function"]["name"] == "get_weather"
        assert choice["message"]["tool_calls"] is None
    else:
        assert recording.json()["usage"]["completion_tokens"] < recording.request_json()["max_tokens"]
        assert choice["finish_reason"] == "length"
