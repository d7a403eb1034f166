"""The SSE scanner gives the same whole events wherever the reads happen to end.

The oracle is independent of the scanner: each recorded event is taken apart as JSON here and compared as JSON.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.protocol import Fault
from engines.vllm import Vllm
from gateway.api.routes import RELAYED
from gateway.serving.dialect import OPENAI, Dialect
from gateway.serving.meter import Meter, Usage
from tests.support.recordings import Recording, all_recordings, load
from tests.support.splits import Plan, byte_by_byte, every_cut, pieces, plans
from tests.support.table import each

PUBLIC = "public/model"
STREAMS = [recording for recording in all_recordings(streams=True) if not recording.name.startswith("q_full_")]
ONE_MB = 1024 * 1024


def dialect_of(recording: Recording) -> Dialect:
    return RELAYED[recording.path].dialect


def meter_for(dialect: Dialect = OPENAI, *, hide_usage: bool = False, max_event: int = ONE_MB) -> Meter:
    return Meter(dialect, Vllm(), PUBLIC, hide_usage=hide_usage, max_event=max_event)


@dataclass(frozen=True)
class Scan:
    """What a scanner made of a stream."""

    out: bytes
    events: int
    usage: Usage | None
    ended: bool


def scan(meter: Meter, body: bytes, plan: Plan = ()) -> Scan:
    """Feed a body in pieces; every piece of output must be whole events."""
    out = []
    for piece in pieces(body, plan):
        given_on = meter.feed(piece)
        assert not given_on or given_on.endswith(b"\n\n")
        out.append(given_on)
    assert meter.failure is None
    assert not meter.overflow
    return Scan(b"".join(out), meter.events, meter.usage, meter.ended)


def payloads(body: bytes) -> list[Any]:
    """Return the JSON of each event's data (or the text ``[DONE]``), comments left out."""
    found = []
    for event in body.replace(b"\r\n", b"\n").split(b"\n\n"):
        data = [line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:")]
        if data:
            text = b"\n".join(data)
            found.append("[DONE]" if text == b"[DONE]" else json.loads(text))
    return found


def renamed(payload: Any) -> Any:
    """Name the model as the client does, wherever the dialects put it."""
    if isinstance(payload, dict):
        for holder in (payload, payload.get("message"), payload.get("response")):
            if isinstance(holder, dict) and "model" in holder:
                holder["model"] = PUBLIC
    return payload


def is_usage_chunk(payload: Any) -> bool:
    return isinstance(payload, dict) and payload.get("choices") == [] and payload.get("usage") is not None


@each("recording", STREAMS)
@each("hide_usage", [False, True])
def test_the_client_gets_every_event_under_its_own_model_name(recording: Recording, hide_usage: bool) -> None:
    """Nothing else changes, nothing is lost, and only the usage chunk nobody asked for is hidden."""
    seen = scan(meter_for(dialect_of(recording), hide_usage=hide_usage), recording.body)
    expected = [renamed(payload) for payload in payloads(recording.body)]
    if hide_usage:
        expected = [payload for payload in expected if not is_usage_chunk(payload)]
    assert payloads(seen.out) == expected
    assert seen.ended
    kinds = [line for line in recording.body.split(b"\n") if line.startswith(b"event:")]
    assert [line for line in seen.out.split(b"\n") if line.startswith(b"event:")] == kinds


@each("recording", STREAMS)
@each("hide_usage", [False, True])
def test_every_split_gives_the_same(recording: Recording, hide_usage: bool) -> None:
    whole = scan(meter_for(dialect_of(recording), hide_usage=hide_usage), recording.body)
    for plan in plans(recording.body, seed=1):
        assert scan(meter_for(dialect_of(recording), hide_usage=hide_usage), recording.body, plan) == whole, plan


@each("recording", STREAMS)
@each("ending", [b"\r\n", b"\r"])
def test_other_line_ends_give_the_same(recording: Recording, ending: bytes) -> None:
    """The standard allows CR LF and CR, also with the pair torn apart by a read."""
    whole = scan(meter_for(dialect_of(recording)), recording.body)
    # A carriage return at the very end may be half of a pair: the next byte, a comment here, tells.
    other = (recording.body + b": end\n\n").replace(b"\n", ending)
    for plan in [(), byte_by_byte(other), *plans(other, seed=2, short=0)]:
        assert scan(meter_for(dialect_of(recording)), other, plan) == whole, plan


@each(
    ("engine", "name", "usage"),
    [
        ("vllm", "chat_stream_usage", Usage(37, 8, None)),
        ("vllm", "chat_stream_continuous_usage", Usage(37, 8, None)),
        ("vllm", "chat_stream", None),
        ("vllm", "comp_stream_usage", Usage(5, 4, None)),
        ("vllm", "messages_stream", Usage(37, 4, None)),
        ("vllm", "responses_stream", Usage(37, 4, 0, 0)),
        ("sglang", "chat_stream_usage", Usage(37, 8, 36)),
        ("sglang", "chat_stream_nousage", None),
        ("lmdeploy", "chat_stream", None),
        ("lmdeploy", "chat_stream_usage", Usage(37, 7, 32)),
    ],
)
def test_usage_is_found_in_every_dialect(engine: str, name: str, usage: Usage | None) -> None:
    """Null on every other chunk (LMDeploy), on every chunk (continuous), only in the last one, or never."""
    recording = load(engine, name)
    for plan in [(), byte_by_byte(recording.body)]:
        assert scan(meter_for(dialect_of(recording)), recording.body, plan).usage == usage


def test_comments_ids_and_retry_hints_never_pass() -> None:
    """The SDKs stumble over them; heartbeats are the gateway's own. Also beside data, in the fast path's likeness."""
    first = b'data: {"model":"smollm2","n":1}\n\n'
    for extra in (b"id: 7\n", b"retry: 3\n", b"event: chunk\n", b": hello\n"):
        for event in (extra + b'data: {"n":2}\n\n', b'data: {"n":2}\n' + extra + b"\n", extra + b"\n"):
            out = scan(meter_for(), first + event + b"data: [DONE]\n\n", (len(first), len(first) + len(event))).out
            assert extra not in out, event
            assert (b'data: {"n":2}\n\n' in out) == (b"data" in event)


def test_text_that_looks_like_a_needle_stays() -> None:
    """Quotes inside a JSON string are escaped, so the model's own words are never rewritten or read as usage."""
    text = 'He said "model":"smollm2", "usage":{"prompt_tokens":1}, "error" and data: [DONE]'
    chunk = b"data: %b\n\n" % json.dumps({"model": "smollm2", "choices": [{"delta": {"content": text}}]}).encode()
    stream = chunk * 3 + b"data: [DONE]\n\n"
    for plan in [(), byte_by_byte(stream), *every_cut(stream)]:
        seen = scan(meter_for(), stream, plan)
        assert [payload["choices"][0]["delta"]["content"] for payload in payloads(seen.out)[:3]] == [text] * 3
        assert seen.usage is None


@pytest.mark.parametrize("end", [b"data: [DONE]\n\n", b"data:[DONE]\n\n", b"data: [DONE] \n\n"])
def test_what_follows_the_end_mark_is_dropped(end: bytes) -> None:
    """Node's client ends on exactly ``[DONE]``."""
    stream = b'data: {"model":"m"}\n\n' + end + b'data: {"late":1}\n\n'
    for plan in [(), byte_by_byte(stream)]:
        assert scan(meter_for(), stream, plan).out == b'data: {"model":"public/model"}\n\ndata: [DONE]\n\n'


def test_an_error_as_first_event_is_held_back_for_the_status() -> None:
    """SGLang reports a full queue as 200 with an error event: nothing of it reaches the client as a stream."""
    body = load("sglang", "q_full_stream").body
    for plan in plans(body):
        meter = meter_for()
        assert b"".join(meter.feed(piece) for piece in pieces(body, plan)) == b""
        assert meter.failure is not None
        assert meter.failure.fault is Fault.OVERLOADED
        assert meter.failure.message == "The request queue is full."


def test_events_before_an_error_in_mid_stream_are_given_out() -> None:
    stream = b'data: {"model":"m","choices":[]}\n\ndata: {"error":{"message":"lost","code":500}}\n\ndata: [DONE]\n\n'
    for plan in [(), byte_by_byte(stream), *every_cut(stream)]:
        meter = meter_for()
        out = b"".join(meter.feed(piece) for piece in pieces(stream, plan))
        assert out == b'data: {"model":"public/model","choices":[]}\n\n'
        assert meter.failure is not None
        assert (meter.failure.fault, meter.failure.message) == (Fault.FAILED, "lost")
        assert not meter.ended


@pytest.mark.parametrize("step", [1, 7, 100])
def test_an_event_without_end_overflows_exactly_at_its_bound(step: int) -> None:
    meter = meter_for(max_event=100)
    data = b"data: " + b"x" * 200
    held = 0
    for start in range(0, len(data), step):
        meter.feed(data[start : start + step])
        held += len(data[start : start + step])
        assert meter.overflow == (held > 100)
        if meter.overflow:
            break
    assert meter.overflow


def test_an_event_as_long_as_allowed_passes() -> None:
    event = b'data: {"pad":"%b"}\n\n' % (b"x" * ONE_MB)
    meter = meter_for(max_event=len(event))
    assert b"".join(meter.feed(piece) for piece in pieces(event, range(65536, len(event), 65536))) == event
    assert not meter.overflow


LINES = st.one_of(
    st.sampled_from(
        [b": comment", b"id: 1", b"retry: 5", b"event: thing", b"data:", b"data: [DO", b"unknown: x", b"data"]
    ),
    st.integers(0, 99).map(lambda n: b'data: {"model":"m","n":%d}' % n),
    st.integers(0, 9).map(lambda n: b'data: {"choices":[],"usage":{"prompt_tokens":%d}}' % n),
    st.just(b'data: {"choices":[1],"usage":null}'),
)
EVENTS = st.lists(st.lists(LINES, min_size=1, max_size=3).map(lambda lines: b"\n".join(lines) + b"\n\n"), max_size=6)


@given(events=EVENTS, data=st.data(), hide=st.booleans())
def test_any_stream_at_any_split(events: list[bytes], data: st.DataObject, hide: bool) -> None:
    """Whatever the lines, cutting the stream changes nothing, and no line passes that the SDKs cannot take."""
    stream = b"".join(events)
    whole = scan(meter_for(hide_usage=hide), stream)
    cuts = data.draw(st.sets(st.integers(1, max(1, len(stream) - 1)), max_size=12)) if len(stream) > 1 else set()
    assert scan(meter_for(hide_usage=hide), stream, tuple(sorted(cuts))) == whole
    for line in whole.out.split(b"\n"):
        assert line == b"" or line.startswith(b"data: "), line
