"""A stream read piece by piece comes to the same wherever the pieces are cut."""

from __future__ import annotations

import pytest

from loadtests.scenarios.answers import Attempt, Outcome, Row, Stream, as_json, comes_back, from_json, read_whole
from loadtests.scenarios.sse import Event, Reader

SAID = (
    b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n'
    b": a comment\n\n"
    b'data: {"choices":[{"delta":{"content":"Gr\xc3\xbc"}}]}\n\n'
    b'data: {"choices":[{"delta":{"content":"\xc3\x9fe"}}]}\r\n\r\n'
    b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\n'
    b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":2}}\n\n'
    b"data: [DONE]\n\n"
)


def events(*pieces: bytes) -> list[Event]:
    reader = Reader()
    return [event for piece in pieces for event in reader.feed(piece)]


LINES = (
    b"\xef\xbb\xbfevent: one\ndata: a\r\ndata:b\r\n\r\n"
    b":c\rdata\rid: 4\r\rdata:  d\n\n\n"
    b"event: nothing\n\ndata: e\n\ndata: unfinished\n"
)
READ = [Event(b"a\nb", b"one"), Event(b""), Event(b" d"), Event(b"e")]


def test_events_are_the_same_at_every_cut() -> None:
    assert events(LINES) == READ
    assert events(*(LINES[at : at + 1] for at in range(len(LINES)))) == READ
    for at in range(len(LINES)):
        assert events(LINES[:at], LINES[at:]) == READ, at


def stream(*pieces: bytes) -> Stream:
    found = Stream(keep_text=True)
    for number, piece in enumerate(pieces):
        found.feed(piece, number + 1.0)
    return found


def test_a_stream_is_the_same_at_every_cut() -> None:
    for at in range(len(SAID) + 1):
        found = stream(SAID[:at], SAID[at:])
        assert (found.text, found.events, found.usage, found.error) == ("Grüße", 2, (7, 2), "")
        assert found.outcome() is Outcome.COMPLETE


def test_a_stream_that_stops_anywhere_is_broken() -> None:
    for at in range(len(SAID) - 1):
        assert stream(SAID[:at]).outcome() is Outcome.BROKEN, at


def test_the_first_token_is_the_first_that_says_something() -> None:
    role, comment, first, *_ = (piece + b"\n\n" for piece in SAID.split(b"\n\n"))
    found = stream(role, comment, first, first[:-1])
    assert found.first == 3.0
    assert found.gaps == []
    found.feed(b"\n", 7.25)
    assert found.gaps == [4_250_000]
    assert (found.first, found.events) == (3.0, 2)


def test_other_ways_to_say_something() -> None:
    for said in (b'{"text":"x"}', b'{"delta":{"reasoning_content":"x"}}', b'{"delta":{"tool_calls":[{"index":0}]}}'):
        assert stream(b'data: {"choices":[' + said + b'],"error":null}\n\n').events == 1
    assert stream(b'data: {"choices":[{"delta":{"tool_calls":null}}]}\n\n').events == 0


@pytest.mark.parametrize(
    "event",
    [b'data: {"error":{"message":"dead"}}', b'event: error\ndata: {"message":"dead"}', b"data: {dead", b'data: "dead"'],
)
def test_a_stream_may_say_that_it_broke(event: bytes) -> None:
    found = stream(SAID[:-14], event + b"\n\n", SAID[-14:])
    assert found.outcome() is Outcome.ERROR_EVENT
    assert found.error


def test_an_answer_that_is_no_stream() -> None:
    found = read_whole(b'{"choices":[{"message":{"content":"yes"}}],"usage":{"prompt_tokens":3,"completion_tokens":1}}')
    assert found is not None
    assert (found.text, found.tokens) == ("yes", (3, 1))
    assert read_whole(b"<html>") is None


def test_a_client_comes_back_as_the_sdks_do() -> None:
    def after(status: int, headers: dict[str, str], attempt: int = 0) -> float | None:
        return comes_back(status, headers, attempt, 2, 1.0)

    assert after(429, {"retry-after-ms": "1500", "retry-after": "2"}) == 1.5
    assert after(503, {"retry-after": "7"}) == 7
    assert after(429, {"retry-after": "61"}) == 0.375
    assert after(429, {"retry-after": "soon"}) == 0.375
    assert after(500, {}, 1) == 0.75
    assert after(0, {}) == 0.375
    assert after(400, {}) is None
    assert after(400, {"x-should-retry": "true"}) == 0.375
    assert after(429, {"x-should-retry": "false", "retry-after": "1"}) is None
    assert after(429, {"retry-after": "1"}, 2) is None


def test_a_row_comes_back_from_its_line() -> None:
    row = Row("chat", "shop", "1 x", 3, 0, 1.5, Outcome.REFUSED, 429, attempts=[Attempt(429, 0.5)], gaps=[1, 2])
    line = as_json(row)
    assert line.count(b"\n") == 1
    assert from_json(line) == row
