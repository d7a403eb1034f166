"""The loader reads both forms and gives back the engines' bytes untouched."""

from __future__ import annotations

import json

import pytest

from tests.support.recordings import ENGINES, RECORDINGS, Recording, all_recordings, load
from tests.support.table import each


def test_three_file_form_is_read_exactly() -> None:
    """A stream of vLLM: request as JSON bytes, status, headers, reads and the untouched body."""
    recording = load("vllm", "chat_stream")
    assert (recording.method, recording.path) == ("POST", "/v1/chat/completions")
    assert json.loads(recording.request_body)["stream"] is True
    assert recording.status == 200
    assert recording.header("Content-Type") == "text/event-stream; charset=utf-8"
    assert recording.body == (RECORDINGS / "vllm" / "chat_stream.sse").read_bytes()
    assert recording.is_stream
    assert recording.reads[0] == (1.5298, 260)


def test_malformed_request_body_is_kept_as_it_was_sent() -> None:
    assert load("vllm", "err_badjson").request_body == b'{"model": "smollm2", '
    assert load("sglang", "err_badjson").request_body == b'{"model":'
    assert load("lmdeploy", "err_json").request_body == b"{bad json"


def test_single_file_form_of_sglang() -> None:
    """The body starts right after the empty line; the seconds in brackets are no reason phrase."""
    recording = load("sglang", "q_full_stream")
    assert (recording.method, recording.path, recording.status) == ("POST", "/v1/chat/completions", 200)
    assert recording.reason == ""
    assert recording.body.startswith(b'data: {"error": {"object": "error", "message": "The request queue is full."')
    assert recording.body.endswith(b"data: [DONE]\n\n")
    assert recording.header("transfer-encoding") == "chunked"


def test_single_file_form_of_lmdeploy() -> None:
    recording = load("lmdeploy", "chat_stream_usage")
    assert recording.request_json()["stream_options"] == {"include_usage": True}
    assert (recording.status, recording.reason) == (200, "OK")
    assert recording.events()[0].startswith(b'data: {"id": "chatcmpl-')


def test_get_requests_have_no_body() -> None:
    assert load("sglang", "models").request_body == b""
    assert load("lmdeploy", "models").request_body == b""
    assert load("vllm", "get_models").request_body == b""


@each("recording", all_recordings())
def test_pieces_and_events_lose_no_byte(recording: Recording) -> None:
    assert b"".join(recording.pieces()) == recording.body
    assert b"".join(recording.events()) == recording.body
    assert 200 <= recording.status < 600


def test_streams_can_be_chosen() -> None:
    """Streams and whole answers together are everything, and every engine has both."""
    for engine in ENGINES:
        streams, whole = all_recordings(engine, streams=True), all_recordings(engine, streams=False)
        assert streams
        assert whole
        assert len(streams) + len(whole) == len(all_recordings(engine))
        assert all(recording.body.endswith(b"\n\n") for recording in streams)


def test_unknown_name_says_what_there_is() -> None:
    with pytest.raises(FileNotFoundError, match=r"no recording 'nope' of vllm; there are: .*chat_basic"):
        load("vllm", "nope")
