"""The relay is driven without sockets: first scene by scene, then by a machine that does anything in any order."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engines.protocol import EngineError, Fault
from gateway.errors import Kind
from gateway.policy.retry import Cause
from gateway.serving.relay import HEARTBEAT, RelayLimits, translate
from gateway.serving.ticket import Outcome
from gateway.serving.upstream import Loss
from tests.support.examples import examples
from tests.support.table import each
from tests.unit.ports import CHAT, JSON, OWN, SSE, FakeConnection, Stage

CHUNK = b'data: {"model":"own-name","choices":[{"delta":{"content":"x"}}]}\n\n'
SHOWN = b'data: {"model":"public/model","choices":[{"delta":{"content":"x"}}]}'
DONE = b"data: [DONE]\n\n"
USAGE = b'data: {"model":"own-name","choices":[],"usage":{"prompt_tokens":5,"completion_tokens":2}}\n\n'
ANSWER = b'{"model":"own-name","choices":[],"usage":{"prompt_tokens":5,"completion_tokens":2}}'
BUSY = b'{"error":{"message":"The engine is currently busy","code":503}}'


def started(stage: Stage) -> FakeConnection:
    """An attempt whose engine has begun to stream."""
    attempt = stage.start()
    attempt.connect()
    attempt.head()
    return attempt


# --- one engine, all well ----------------------------------------------------------------------------------------


def test_a_stream_passes_and_everything_is_given_back() -> None:
    stage = Stage()
    attempt = started(stage)
    assert attempt.payload.startswith(b"POST /v1/chat/completions HTTP/1.1\r\n")
    assert b"\r\nx-request-id: req_1\r\n" in attempt.payload
    assert attempt.body == {"model": OWN, "n": 1, "stream_options": {"include_usage": True}}
    assert stage.in_flight == 1
    attempt.data(CHUNK)
    assert stage.client.status == 200
    assert stage.client.headers[b"content-type"] == b"text/event-stream; charset=utf-8"
    attempt.data(CHUNK + USAGE + DONE)
    assert stage.client.events == [SHOWN, SHOWN, b"data: [DONE]"]
    assert not stage.client.closed
    assert attempt.ended == "released"
    stage.check_over(Outcome.OK, 200)
    assert (stage.ticket.events, stage.ticket.attempts) == (2, 1)
    assert stage.ticket.usage is not None
    assert stage.ticket.usage.completion == 2


def test_a_whole_answer_passes() -> None:
    stage = Stage(stream=False)
    stage.start().answer(200, ANSWER)
    assert stage.client.out == ANSWER.replace(b"own-name", b"public/model")
    assert stage.client.headers[b"content-type"] == b"application/json"
    stage.check_over(Outcome.OK, 200)


def test_no_status_before_the_first_event() -> None:
    """Head, comments, half an event: none of it commits the answer."""
    stage = Stage(endpoints=2)
    attempt = started(stage)
    for data in (b": keep-alive\n\n", b"\n", CHUNK[:-1]):
        attempt.data(data)
        assert not stage.client.started
    attempt.data(b"\n")
    assert stage.client.started


def test_the_body_is_dropped_with_the_first_event() -> None:
    """No other engine is asked from there on."""
    stage = Stage(endpoints=2)
    attempt = started(stage)
    assert stage.fields
    attempt.data(CHUNK)
    assert not stage.fields


# --- other engines -----------------------------------------------------------------------------------------------


def fail_overloaded(attempt: FakeConnection) -> None:
    attempt.answer(503, BUSY)


def fail_event(attempt: FakeConnection) -> None:
    attempt.connect()
    attempt.head()
    attempt.data(b'data: {"error":{"message":"The request queue is full.","code":503}}\n\n' + DONE)


def fail_closed(attempt: FakeConnection) -> None:
    attempt.connect()
    attempt.lose(Loss.CLOSED)


def fail_garbage(attempt: FakeConnection) -> None:
    attempt.connect()
    attempt.lose(Loss.GARBAGE)


def fail_connect(attempt: FakeConnection) -> None:
    attempt.lose(Loss.CONNECT)


def fail_no_end(attempt: FakeConnection) -> None:
    attempt.connect()
    attempt.head()
    attempt.data(b": hello\n\n")
    attempt.complete()


def fail_nonsense(attempt: FakeConnection) -> None:
    attempt.answer(200, b"<html>")


def fail_status(attempt: FakeConnection) -> None:
    attempt.answer(500, b"")


def fail_model(attempt: FakeConnection) -> None:
    attempt.answer(404, b'{"error":{"message":"The model `own-name` does not exist."}}')


def fail_key(attempt: FakeConnection) -> None:
    attempt.answer(401, b'{"error":"Unauthorized"}')


FAILURES: list[tuple[Any, Outcome, int, str]] = [
    (fail_overloaded, Outcome.BUSY, 503, "overloaded"),
    (fail_event, Outcome.BUSY, 503, "overloaded"),
    (fail_closed, Outcome.ENGINE_FAILED, 502, "broken"),
    (fail_garbage, Outcome.ENGINE_FAILED, 502, "broken"),
    (fail_connect, Outcome.NO_ENGINE, 503, "connect"),
    (fail_no_end, Outcome.ENGINE_FAILED, 502, "broken"),
    (fail_nonsense, Outcome.ENGINE_FAILED, 502, "broken"),
    (fail_status, Outcome.ENGINE_FAILED, 502, "broken"),
    (fail_model, Outcome.NO_ENGINE, 503, "unknown_model"),
    (fail_key, Outcome.ENGINE_FAILED, 502, "credentials"),
]
IDS = [fail.__name__ for fail, *_ in FAILURES]


@each(("fail", "outcome", "status", "reason"), FAILURES)
def test_a_failure_without_another_engine_is_told(fail: Any, outcome: Outcome, status: int, reason: str) -> None:
    stage = Stage()
    fail(stage.start())
    assert stage.client.status == status
    assert stage.client.json["error"]["message"]
    stage.check_over(outcome, status)
    assert stage.metrics._upstream_errors == {("e0", reason): 1}


@each(("fail", "outcome", "status", "reason"), FAILURES)
def test_another_engine_is_asked_while_nothing_has_reached_the_client(
    fail: Any, outcome: Outcome, status: int, reason: str
) -> None:
    stage = Stage(endpoints=2)
    fail(stage.start())
    assert [attempt.endpoint for attempt in stage.attempts] in (["e0", "e1"], ["e1", "e0"])
    assert stage.in_flight == 1
    stage.attempt.connect()
    stage.attempt.head()
    stage.attempt.data(CHUNK + DONE)
    assert stage.client.events == [SHOWN, b"data: [DONE]"]
    stage.check_over(Outcome.OK, 200)
    assert stage.ticket.attempts == 2


@each(("fail", "outcome", "status", "reason"), FAILURES)
def test_after_a_heartbeat_a_failure_is_an_event(fail: Any, outcome: Outcome, status: int, reason: str) -> None:
    """Another engine is asked all the same; the status is 200 for good."""
    stage = Stage(endpoints=2)
    first = stage.start()
    first.connect()
    stage.advance(15)
    assert stage.client.out == HEARTBEAT
    first.lose(Loss.CLOSED)
    assert len(stage.attempts) == 2
    fail(stage.attempt)
    assert stage.client.status == 200
    assert stage.client.closed
    assert stage.client.out.startswith(HEARTBEAT + b'data: {"error":{')
    stage.check_over(outcome, 200)


def break_error(attempt: FakeConnection) -> None:
    attempt.data(b'data: {"error":{"message":"The request queue is full.","code":503}}\n\n')


def break_closed(attempt: FakeConnection) -> None:
    attempt.lose(Loss.CLOSED)


def break_garbage(attempt: FakeConnection) -> None:
    attempt.lose(Loss.GARBAGE)


def break_no_end(attempt: FakeConnection) -> None:
    attempt.complete()


def break_endless(attempt: FakeConnection) -> None:
    attempt.data(b"data: " + b"x" * 2000)


def break_same_read(attempt: FakeConnection) -> None:
    attempt.data(CHUNK + b'data: {"error":{"message":"broke"}}\n\n')


BREAKS = [break_error, break_closed, break_garbage, break_no_end, break_endless, break_same_read]


@each("broken", BREAKS)
@each("path", [CHAT, "/v1/responses", "/v1/messages"])
def test_after_the_first_event_no_other_engine_is_asked(broken: Any, path: str) -> None:
    """The client is told in its own dialect, and the connection is not used again."""
    stage = Stage(endpoints=3, path=path, limits=RelayLimits(event=1000))
    attempt = started(stage)
    attempt.data(CHUNK)
    broken(attempt)
    assert len(stage.attempts) == 1
    assert stage.client.events[0] == SHOWN
    kind, _, data = stage.client.events[-1].rpartition(b"data: ")
    told = json.loads(data)
    assert kind == (b"" if path == CHAT else b"event: error\n")
    assert (told if path == "/v1/responses" else told["error"])["message"]
    assert stage.client.closed
    assert attempt.ended in ("aborted", "lost", "whole")
    stage.check_over(Outcome.BUSY if broken is break_error else Outcome.ENGINE_FAILED, 200)


def test_the_number_of_other_engines_is_bounded() -> None:
    stage = Stage(endpoints=5, limits=RelayLimits(retries=2))
    stage.start()
    for _ in range(3):
        fail_overloaded(stage.attempt)
    assert len(stage.attempts) == len({attempt.endpoint for attempt in stage.attempts}) == 3
    stage.check_over(Outcome.BUSY, 503)


def test_the_clients_own_fault_is_told_at_once() -> None:
    stage = Stage(endpoints=2)
    stage.start().answer(400, b'{"error":{"message":"temperature must be 0 or more","param":"temperature"}}')
    assert stage.client.json["error"] == {
        "message": "temperature must be 0 or more",
        "type": "invalid_request_error",
        "param": "temperature",
        "code": None,
    }
    stage.check_over(Outcome.REFUSED, 400)
    assert stage.metrics._upstream_errors == {}


def test_a_stale_connection_is_replayed_once_on_a_new_one() -> None:
    """It costs no other engine; a second time it is a failure like any other."""
    stage = Stage(endpoints=2, kept=True)
    first = stage.start()
    assert first.reused
    first.lose(Loss.STALE)
    assert stage.attempt.fresh
    assert stage.attempt.endpoint == first.endpoint
    assert stage.attempt.payload == first.payload
    assert stage.metrics._upstream_errors == {}
    stage.attempt.connect()
    stage.attempt.lose(Loss.CLOSED)
    assert stage.attempt.endpoint != first.endpoint
    # The next engine's kept connection may be stale just as well.
    stage.attempt.lose(Loss.STALE)
    assert stage.attempt.fresh
    stage.attempt.answer(200, ANSWER)
    stage.check_over(Outcome.OK, 200)
    assert stage.ticket.attempts == 4


def test_without_any_engine() -> None:
    stage = Stage()
    stage.endpoint.down("gone")
    stage.relay.start(stage.clock())
    assert stage.attempts == []
    assert stage.client.headers[b"retry-after"] == b"1"
    stage.check_over(Outcome.NO_ENGINE, 503)


def test_a_path_no_engine_offers_is_said_to_be_so(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(stream=False)
    monkeypatch.setattr(type(stage.endpoint.engine), "paths", {})
    stage.relay.start(stage.clock())
    assert stage.client.json["error"]["code"] == "unsupported_operation"
    stage.check_over(Outcome.REFUSED, 400)


def test_an_engine_that_cannot_be_reached_is_left_alone() -> None:
    stage = Stage()
    fail_connect(stage.start())
    assert not stage.endpoint.healthy
    assert stage.endpoint.trouble == "as the test says"


TRANSLATED = [
    (Fault.REQUEST, Cause.REQUEST, Kind.INVALID),
    (Fault.UNSUPPORTED, Cause.REQUEST, Kind.UNSUPPORTED),
    (Fault.OVERLOADED, Cause.OVERLOADED, Kind.BUSY),
    (Fault.UNKNOWN_MODEL, Cause.UNKNOWN_MODEL, Kind.NO_ENGINE),
    (Fault.CREDENTIALS, Cause.CREDENTIALS, Kind.ENGINE_FAILED),
    (Fault.FAILED, Cause.BROKEN, Kind.ENGINE_FAILED),
]


@each(("fault", "cause", "kind"), TRANSLATED)
def test_whose_fault_an_engines_error_is(fault: Fault, cause: Cause, kind: Kind) -> None:
    """The engine's words stay where they are the client's business, without its paths; its names and keys do not."""
    found, refusal = translate(EngineError(fault, "see /opt/app/own-name.py"), "public", CHAT)
    assert (found, refusal.kind) == (cause, kind)
    assert "/opt" not in refusal.message
    if fault in (Fault.UNKNOWN_MODEL, Fault.UNSUPPORTED, Fault.CREDENTIALS):
        assert "own-name" not in refusal.message


def test_every_fault_is_translated() -> None:
    assert {fault for fault, _, _ in TRANSLATED} == set(Fault)


# --- time --------------------------------------------------------------------------------------------------------


def test_an_answer_that_began_may_pause_only_for_the_idle_time() -> None:
    """The shorter time holds from the first event on, heartbeats or not."""
    for stream, first in ((True, CHUNK), (False, ANSWER[:9])):
        stage = Stage(stream=stream, limits=RelayLimits(first_byte=600, idle=30, heartbeat_after=0))
        attempt = stage.start()
        attempt.connect()
        attempt.head(200, SSE if stream else JSON)
        stage.advance(500)
        attempt.data(first)
        stage.advance(29)
        assert not stage.relay.done
        stage.advance(1)
        assert attempt.ended == "aborted"
        stage.check_over(Outcome.ENGINE_SLOW, 200 if stream else 504)
        assert "went silent for 30 s" in stage.ticket.error


def test_each_event_begins_the_idle_time_anew() -> None:
    stage = Stage(limits=RelayLimits(idle=30, heartbeat_after=0))
    attempt = started(stage)
    for _ in range(5):
        attempt.data(CHUNK)
        stage.advance(29)
    attempt.data(CHUNK[:9])
    stage.advance(29)
    assert not stage.relay.done
    attempt.data(CHUNK[9:] + DONE)
    stage.check_over(Outcome.OK, 200)


def test_an_engines_comments_do_not() -> None:
    """Its keep-alives come from its web server while the model hangs."""
    stage = Stage(limits=RelayLimits(idle=30, heartbeat_after=0))
    attempt = started(stage)
    attempt.data(CHUNK)
    for _ in range(3):
        stage.advance(10)
        attempt.data(b": keep-alive\n\n")
    stage.advance(0)
    stage.check_over(Outcome.ENGINE_SLOW, 200)


def test_the_first_byte_and_the_connection_have_their_own_time() -> None:
    stage = Stage(endpoints=2, limits=RelayLimits(connect=5, first_byte=100, heartbeat_after=0))
    first = stage.start()
    stage.advance(4.9)
    assert first.ended == ""
    stage.advance(0.1)
    assert first.ended == "aborted"
    assert not stage.pool.endpoints[["e0", "e1"].index(first.endpoint)].healthy
    stage.attempt.connect()
    stage.advance(99.9)
    assert not stage.relay.done
    stage.advance(0.1)
    # Its time is used up: nobody else is asked.
    stage.check_over(Outcome.ENGINE_SLOW, 504)


def test_the_whole_request_has_its_time() -> None:
    stage = Stage(limits=RelayLimits(total=100))
    attempt = started(stage)
    for _ in range(10):
        attempt.data(CHUNK)
        stage.advance(10)
    assert b"took longer than 100 s" in stage.client.events[-1]
    stage.check_over(Outcome.ENGINE_SLOW, 200)


def test_heartbeats_come_while_the_engine_is_silent() -> None:
    stage = Stage(limits=RelayLimits(heartbeat_after=15))
    attempt = started(stage)
    stage.advance(14.9)
    assert not stage.client.started
    for count in range(1, 4):
        stage.advance(15)
        assert stage.client.out == HEARTBEAT * count
    attempt.data(CHUNK)
    stage.advance(14.9)
    assert stage.client.out.count(HEARTBEAT) == 3
    stage.advance(0.1)
    assert stage.client.out.count(HEARTBEAT) == 4


def test_whole_answers_get_no_heartbeat() -> None:
    stage = Stage(stream=False)
    attempt = stage.start()
    attempt.connect()
    stage.advance(500)
    assert not stage.client.started
    attempt.answer(200, ANSWER)
    stage.check_over(Outcome.OK, 200)


@pytest.mark.parametrize(("status", "body"), [(200, ANSWER), (400, b'{"error":{"message":"no"}}')])
def test_after_a_heartbeat_a_whole_answer_is_an_error_event(status: int, body: bytes) -> None:
    """The stream's head is out: a second one in the middle of it would be nonsense on the wire."""
    stage = Stage()
    attempt = stage.start()
    attempt.connect()
    stage.advance(15)
    attempt.answer(status, body)
    assert stage.client.closed
    assert json.loads(stage.client.events[-1].removeprefix(b"data: "))["error"]["message"]
    stage.check_over(Outcome.ENGINE_FAILED if status == 200 else Outcome.REFUSED, 200)


# --- pace and leaving --------------------------------------------------------------------------------------------


def test_a_slow_client_makes_the_engine_wait() -> None:
    """Its own slowness is not the engine's silence, and it gets no heartbeats on top."""
    stage = Stage(limits=RelayLimits(write=60, idle=30, heartbeat_after=5))
    attempt = started(stage)
    attempt.data(CHUNK)
    stage.relay.pause()
    stage.advance(59)
    assert stage.client.out.count(HEARTBEAT) == 0
    stage.relay.resume()
    stage.advance(29)
    attempt.data(DONE)
    stage.check_over(Outcome.OK, 200)


def test_a_pause_does_not_outlive_its_attempt() -> None:
    """The next engine is read from, and waited for as long as any."""
    stage = Stage(endpoints=2, limits=RelayLimits(connect=5))
    stage.start().connect()
    stage.relay.pause()
    stage.attempt.lose(Loss.CLOSED)
    stage.advance(5)
    stage.check_over(Outcome.NO_ENGINE, 503)


def test_a_client_that_takes_nothing_is_cut_off_at_last() -> None:
    stage = Stage(limits=RelayLimits(write=60, idle=30))
    attempt = started(stage)
    attempt.data(CHUNK)
    stage.relay.pause()
    assert attempt.paused
    stage.advance(60)
    assert stage.client.aborted
    assert attempt.ended == "aborted"
    stage.check_over(Outcome.CLIENT_GONE, 499)


@each("stage_reached", ["connecting", "connected", "head", "half an event", "event", "heartbeat"])
def test_a_client_that_leaves_takes_the_engines_work_with_it(stage_reached: str) -> None:
    stage = Stage(endpoints=2)
    attempt = stage.start()
    if stage_reached != "connecting":
        attempt.connect()
    if stage_reached in ("head", "half an event", "event"):
        attempt.head()
    if stage_reached == "half an event":
        attempt.data(CHUNK[:20])
    if stage_reached == "event":
        attempt.data(CHUNK)
    if stage_reached == "heartbeat":
        stage.advance(15)
    before = stage.client.out
    stage.relay.client_gone()
    assert attempt.ended == "aborted"
    assert stage.client.out == before
    stage.check_over(Outcome.CLIENT_GONE, 499)
    stage.relay.client_gone()
    stage.relay.shut_down()
    stage.relay.pause()
    stage.relay.resume()
    stage.check_over(Outcome.CLIENT_GONE, 499)


def test_shutting_down_tells_the_client() -> None:
    for event in (b"", CHUNK):
        stage = Stage()
        attempt = started(stage)
        attempt.data(event)
        stage.relay.shut_down()
        assert b"server_shutting_down" in stage.client.out
        assert attempt.ended == "aborted"
        stage.check_over(Outcome.SHUTDOWN, 200 if event else 503)


# --- anything in any order ---------------------------------------------------------------------------------------

ENDS = {
    CHAT: DONE,
    "/v1/responses": b'event: response.completed\ndata: {"type":"response.completed"}\n\n',
    "/v1/messages": b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
}
ERROR_EVENTS = {
    CHAT: b'data: {"error":{',
    "/v1/responses": b'event: error\ndata: {"type":"error"',
    "/v1/messages": b'event: error\ndata: {"type":"error"',
}
READS = st.lists(st.sampled_from(["chunk", "chunk", "half", "comment", "usage"]), min_size=1, max_size=3)
SELDOM = st.sampled_from([False, False, False, False, False, True])
"""Draws for what ends a run, so that most runs go far before they end."""


class AnyOrder(RuleBasedStateMachine):
    """Drives one relay in any order that ports can; its own few variables say what should have happened."""

    stage: Stage | None = None

    @initialize(
        endpoints=st.integers(1, 3),
        path=st.sampled_from(sorted(ENDS)),
        stream=st.sampled_from([True, True, False]),
        hide_usage=st.booleans(),
        heartbeat=st.sampled_from([0.0, 15.0]),
        retries=st.integers(0, 2),
        kept=st.booleans(),
    )
    def start(
        self, endpoints: int, path: str, stream: bool, hide_usage: bool, heartbeat: float, retries: int, kept: bool
    ) -> None:
        limits = RelayLimits(
            connect=5,
            first_byte=100,
            idle=30,
            total=400,
            write=60,
            heartbeat_after=heartbeat,
            retries=retries,
            event=500,
        )
        self.stage = Stage(endpoints, path, stream, hide_usage, limits, kept)
        self.held = b""
        self.half = False
        self.left = False
        self.sse = False
        self.began = False
        self.seen = 0
        self.quiet_since = self.paused_since = self.sent_at = self.wrote_at = self.stage.clock()
        self.stage.start()
        self.look()

    # What the test keeps in mind.

    @property
    def here(self) -> Stage:
        assert self.stage is not None
        return self.stage

    def look(self) -> None:
        """Take note of a new attempt, and that none begins once the client has seen an event."""
        if len(self.here.attempts) > self.seen:
            assert self.seen == 0 or not self.shown
            self.seen = len(self.here.attempts)
            self.held = b""
            self.began = self.sse = self.half = False
            self.quiet_since = self.sent_at = self.here.clock()

    @property
    def shown(self) -> bool:
        return self.here.client.started and bool(self.here.client.events)

    @property
    def chunk(self) -> bytes:
        """An event of the path's dialect."""
        typed = self.here.path != CHAT
        return b"event: delta\n" + CHUNK.replace(b"{", b'{"type":"delta",', 1) if typed else CHUNK

    @property
    def over(self) -> bool:
        return bool(self.here.settled)

    @property
    def alive(self) -> bool:
        return self.stage is not None and not self.over

    @property
    def readable(self) -> bool:
        return self.alive and self.here.attempt.headed and not self.here.attempt.paused

    # The engine.

    @precondition(lambda self: self.alive and not self.here.attempt.headed)
    @rule(
        only_connect=st.booleans(),
        status=st.sampled_from([200, 200, 200, 200, 400, 404, 500, 503]),
        content_type=st.sampled_from([SSE, SSE, SSE, b"text/event-stream", JSON]),
    )
    def go_on(self, only_connect: bool, status: int, content_type: bytes) -> None:
        """Connect, and perhaps send the head."""
        if not self.here.attempt.connected:
            self.here.attempt.connect()
            self.quiet_since = self.here.clock()
        if not only_connect:
            self.here.attempt.head(status, content_type)
            self.sse = status == 200 and content_type.startswith(b"text/event-stream")

    def feed(self, data: bytes) -> None:
        attempt, written = self.here.attempt, len(self.here.client.out)
        attempt.data(data)
        self.look()
        if self.over or attempt is not self.here.attempt:
            return
        block = self.held + data
        self.held = block[block.rfind(b"\n\n") + 2 :] if b"\n\n" in block else block
        if len(self.here.client.out) > written:
            self.began = True
            self.wrote_at = self.here.clock()
        if self.held or len(self.here.client.out) > written:
            self.quiet_since = self.here.clock()

    @precondition(lambda self: self.readable and self.sse)
    @rule(parts=READS)
    def stream_data(self, parts: list[str]) -> None:
        chunk, data = self.chunk, b""
        usage = USAGE if self.here.path == CHAT else chunk
        for part in parts:
            if self.half or part == "half":
                # An engine finishes what it began.
                data += chunk[20:] if self.half else chunk[:20]
                self.half = not self.half
            if part != "half":
                data += {"chunk": chunk, "comment": b": keep-alive\n\n", "usage": usage}[part]
        self.feed(data)

    @precondition(lambda self: self.readable and self.sse)
    @rule(before=st.booleans(), kind=st.sampled_from(["end", "end", "error", "endless"]), seldom=SELDOM)
    def stream_ends(self, before: bool, kind: str, seldom: bool) -> None:
        if seldom:
            end = {
                "end": ENDS[self.here.path],
                "error": b'data: {"error":{"message":"currently busy","code":503}}\n\n',
                "endless": b"x" * 600,
            }[kind]
            rest = self.chunk[20:] if self.half else b""
            self.half = False
            self.feed(rest + (self.chunk if before else b"") + end)

    @precondition(lambda self: self.readable and not self.sse)
    @rule(body=st.sampled_from([ANSWER, ANSWER[:10], ANSWER[10:], BUSY, b"junk"]))
    def body_data(self, body: bytes) -> None:
        self.here.attempt.data(body)
        self.began = True
        self.quiet_since = self.here.clock()

    @precondition(lambda self: self.readable)
    @rule(seldom=SELDOM)
    def complete(self, seldom: bool) -> None:
        if seldom or not self.sse:
            self.here.attempt.complete()
            self.look()

    @precondition(lambda self: self.alive)
    @rule(garbage=st.booleans(), seldom=SELDOM)
    def lose(self, garbage: bool, seldom: bool) -> None:
        attempt = self.here.attempt
        if not seldom:
            return
        if not attempt.connected:
            attempt.lose(Loss.CONNECT)
        elif garbage:
            attempt.lose(Loss.GARBAGE)
        else:
            attempt.lose(Loss.STALE if attempt.reused and not attempt.headed else Loss.CLOSED)
        self.look()

    # Time, the client, the operator.

    @rule(seconds=st.sampled_from([0.0, 1.0, 4.0, 5.0, 14.0, 15.0, 29.0, 30.0, 59.0, 100.0]))
    def wait(self, seconds: float) -> None:
        """Let time pass: exactly what is due happens."""
        stage, attempt, was_over = self.here, self.here.attempt, self.over
        written = len(stage.client.out)
        stage.advance(seconds)
        self.left = self.left or stage.client.aborted
        if was_over:
            assert len(stage.client.out) == written
            return
        now = stage.clock()
        if now - stage.ticket.started >= stage.limits.total:
            due = "total"
        elif attempt.paused:
            due = "write" if now - self.paused_since >= stage.limits.write else ""
        elif not attempt.connected:
            due = "connect" if now - self.sent_at >= stage.limits.connect else ""
        else:
            patience = stage.limits.idle if self.began else stage.limits.first_byte
            due = "silence" if now - self.quiet_since >= patience else ""
        assert (attempt.ended != "") == (due != ""), due
        assert self.over or due in ("", "connect")
        self.look()
        after = stage.limits.heartbeat_after
        if due == "" and attempt.connected and not attempt.paused:
            beats = stage.stream and after > 0 and now - self.wrote_at >= after
            assert stage.client.out[written:] == (HEARTBEAT if beats else b"")
        if len(stage.client.out) > written:
            self.wrote_at = now
        # A new attempt may find a heartbeat due: the next sweep sends it.
        assert self.over or due == "connect" or stage.relay.deadline > now

    @rule(seldom=SELDOM)
    def leave(self, seldom: bool) -> None:
        if seldom:
            self.left = self.left or not self.over
            self.here.relay.client_gone()

    @rule()
    def pause(self) -> None:
        if not self.over and not self.here.attempt.paused:
            self.paused_since = self.here.clock()
            self.here.relay.pause()
        elif self.over:
            self.here.relay.pause()

    @rule()
    def resume(self) -> None:
        if not self.over and self.here.attempt.paused:
            self.quiet_since = self.sent_at = self.here.clock()
        self.here.relay.resume()

    @rule(seldom=SELDOM)
    def shut_down(self, seldom: bool) -> None:
        if seldom:
            self.here.relay.shut_down()

    @rule(number=st.integers(0, 2), healthy=st.booleans(), full=SELDOM)
    def change_endpoints(self, number: int, healthy: bool, full: bool) -> None:
        """The watcher's business, and other requests'."""
        number %= self.here.endpoints
        endpoint = self.here.pool.endpoints[number]
        if healthy:
            endpoint.up()
        else:
            endpoint.down("watched")
        # Not so full that it has to wait for it: that is shown where several requests are.
        self.here.connections[number].full = full and self.here.endpoints == 1

    # What must hold throughout.

    @invariant()
    def all_is_held_or_all_is_given_back(self) -> None:
        if self.stage is None:
            return
        stage = self.stage
        if self.over:
            ((outcome, status),) = stage.settled
            stage.check_over(outcome, status)
            self.check_end(outcome, status)
            return
        assert [attempt for attempt in stage.attempts if not attempt.ended] == [stage.attempt]
        assert stage.in_flight == 1
        assert stage.pool.endpoints[int(stage.attempt.endpoint[1:])].in_flight == 1
        assert not stage.client.finished
        assert stage.relay.deadline < float("inf")
        assert len(stage.deadlines) == 1

    def check_end(self, outcome: Outcome, status: int) -> None:
        stage, client = self.here, self.here.client
        assert (outcome is Outcome.CLIENT_GONE) == self.left
        if self.left:
            assert not client.over
            assert status == 499
            return
        assert client.over
        assert client.status == status
        if client.started:
            last = client.events[-1] + b"\n\n"
            failed = last.startswith(ERROR_EVENTS[stage.path])
            assert failed != (last == ENDS[stage.path])
            assert failed == (outcome is not Outcome.OK) == client.closed
        else:
            assert (status == 200) == (outcome is Outcome.OK)
            assert ("error" in client.json) == (outcome is not Outcome.OK)
        assert stage.attempt.ended in (("released", "whole") if outcome is Outcome.OK else ("aborted", "whole", "lost"))
        if outcome is Outcome.OK or client.started:
            assert b'"own-name"' not in client.out

    def teardown(self) -> None:
        """However a run breaks off, shutting down ends it."""
        if self.stage is not None:
            self.stage.relay.shut_down()
            assert self.over
            self.all_is_held_or_all_is_given_back()


AnyOrder.TestCase.settings = settings(max_examples=examples(75), stateful_step_count=30)
TestAnyOrder = AnyOrder.TestCase
