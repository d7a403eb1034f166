"""What the scanner of streams promises byte by byte, and what it does with engines that keep no promise.

``tests/serving/test_meter.py`` compares the recorded streams as JSON at every split; here they are compared as bytes,
and streams are drawn.
"""

from __future__ import annotations

import json
import re
from typing import Any, SupportsIndex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.protocol import Fault
from engines.vllm import Vllm
from gateway.api.routes import RELAYED
from gateway.serving.dialect import ANTHROPIC, OPENAI, RESPONSES, Dialect
from gateway.serving.meter import Meter, Usage, read_usage
from tests.support.recordings import Recording, all_recordings, load
from tests.support.splits import byte_by_byte, every_cut, pieces, plans
from tests.support.table import each

PUBLIC = "public/model"
DONE = b"data: [DONE]\n\n"
STREAMS = [recording for recording in all_recordings(streams=True) if not recording.name.startswith("q_full_")]


def meter_for(dialect: Dialect = OPENAI, *, hide: bool = False, public: str = PUBLIC, limit: int = 1 << 20) -> Meter:
    return Meter(dialect, Vllm(), public, hide_usage=hide, max_event=limit)


def feed_all(meter: Meter, parts: list[bytes]) -> bytes:
    """Feed piece after piece; each answer must be whole events."""
    out = []
    for part in parts:
        passed = meter.feed(part)
        assert passed == b"" or (passed.startswith((b"data: ", b"event: ")) and passed.endswith(b"\n\n"))
        out.append(passed)
    return b"".join(out)


# --- recorded streams, byte for byte -----------------------------------------------------------------------------


def expected_bytes(recording: Recording, *, hide: bool) -> bytes:
    """What the client should get, made with a regular expression and json instead of the scanner's needles."""
    names = {json.dumps(name).encode() for name in re.findall(r'"model": ?"([^"]+)"', recording.body.decode())}
    out = []
    for event in recording.events():
        if event.startswith(b":"):
            continue
        chunk = event.partition(b"data: ")[2]
        told = json.loads(chunk) if chunk.startswith(b"{") else {}
        if hide and told.get("usage") is not None and told.get("choices") == []:
            continue
        for name in names:
            event = re.sub(rb'("model": ?)' + re.escape(name), rb'\1"' + PUBLIC.encode() + b'"', event)
        out.append(event)
    return b"".join(out)


@each("recording", STREAMS)
@each("hide", [False, True])
def test_a_recorded_stream_is_passed_on_byte_for_byte(recording: Recording, hide: bool) -> None:
    """Whole, and as the engine's own reads brought it, and with several events in a read."""
    dialect = RELAYED[recording.path].dialect
    expected = expected_bytes(recording, hide=hide)
    pairs = [b"".join(recording.events()[start : start + 2]) for start in range(0, len(recording.events()), 2)]
    for parts in ([recording.body], recording.pieces(), recording.events(), pairs):
        meter = meter_for(dialect, hide=hide)
        assert feed_all(meter, parts) == expected
        assert meter.ended
        assert not meter.partial


@each("recording", STREAMS)
def test_the_engines_name_for_the_model_reaches_no_client(recording: Recording) -> None:
    """Also where a read ends inside the name."""
    (name,) = set(re.findall(rb'"model": ?"([^"]+)"', recording.body))
    dialect = RELAYED[recording.path].dialect
    places = {place for match in re.finditer(re.escape(name), recording.body) for place in range(*match.span())}
    for place in sorted(places - {0}):
        out = feed_all(meter_for(dialect), pieces(recording.body, (place,)))
        assert re.findall(rb'"model": ?"([^"]+)"', out) == re.findall(
            rb'"model": ?"([^"]+)"', recording.body.replace(name, PUBLIC.encode())
        )


# --- drawn streams -----------------------------------------------------------------------------------------------

ENGINE_NAMES = ("smollm2", "org/name@0123", "näme", 'quo"ted', "back\\slash", PUBLIC)
WORDS = st.lists(
    st.sampled_from(
        [
            '"usage":{"prompt_tokens":1}',
            '"usage": null',
            '"error":{"message":"no"}',
            '"model":"smollm2"',
            '"model": "org/name@0123"',
            "data: [DONE]",
            "\n\n",
            "\r\n",
            "é€😀",
            "\\",
            '"',
            " plain ",
        ]
    ),
    max_size=6,
).map("".join)
COMPACT, SPACED = (",", ":"), (", ", ": ")
USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}


@st.composite
def chunks(draw: st.DrawFn) -> tuple[str, list[tuple[str, bool]]]:
    """A model name and events as the three engines spell them: each JSON text and whether it is the usage chunk."""
    name = draw(st.sampled_from(ENGINE_NAMES))
    separators = draw(st.sampled_from([COMPACT, SPACED]))
    nulls = draw(st.booleans())
    events: list[tuple[str, bool]] = []
    for text in draw(st.lists(WORDS, min_size=1, max_size=5)):
        chunk: dict[str, Any] = {"id": "x", "model": name, "choices": [{"index": 0, "delta": {"content": text}}]}
        if nulls:
            chunk["usage"] = None
        events.append((json.dumps(chunk, separators=separators, ensure_ascii=draw(st.booleans())), False))
    if draw(st.booleans()):
        last = {"id": "x", "model": name, "choices": [], "usage": USAGE}
        # LMDeploy changes its spacing between the chunks and the usage chunk.
        events.append((json.dumps(last, separators=draw(st.sampled_from([COMPACT, SPACED]))), True))
    return name, events


NOISE = st.sampled_from(["", ": keep-alive\n\n", "id: 4\n\n", "retry: 10\n\n", "event: chunk\n\n", "\n"])
ENDINGS = st.sampled_from(["\n", "\r\n", "\r"])


@given(drawn=chunks(), hide=st.booleans(), ending=ENDINGS, data=st.data())
def test_a_drawn_stream_comes_out_as_it_should(
    drawn: tuple[str, list[tuple[str, bool]]], hide: bool, ending: str, data: st.DataObject
) -> None:
    """Every event under the client's model name and otherwise untouched, wherever the reads end.

    Text that looks like usage, an error, a model or the end mark stays text; noise between the events is dropped.
    """
    name, events = drawn
    sent, wanted = "", []
    for text, is_usage in events:
        sent += data.draw(NOISE) + f"data: {text}\n\n"
        if not (hide and is_usage):
            wanted.append({**json.loads(text), "model": PUBLIC})
    sent += data.draw(NOISE) + "data: [DONE]\n\n"
    stream = sent.replace("\n", ending).encode()
    cuts = data.draw(st.sets(st.integers(1, len(stream) - 1), max_size=20))
    meter = meter_for(hide=hide)
    out = feed_all(meter, pieces(stream, sorted(cuts)))
    assert out.endswith(DONE)
    got = [event.removeprefix(b"data: ") for event in out.removesuffix(DONE).split(b"\n\n") if event]
    assert [json.loads(event) for event in got] == wanted
    assert meter.ended
    assert meter.events == len(wanted)
    assert meter.usage == (Usage(7, 3, None) if events[-1][1] else None)
    if name == PUBLIC:
        assert got == [text.encode() for text, is_usage in events if not (hide and is_usage)]


@given(data=st.binary(max_size=200), typed=st.booleans(), hide=st.booleans())
def test_no_bytes_of_an_engine_make_it_fail(data: bytes, typed: bool, hide: bool) -> None:
    """Whatever comes, the scanner says something: events, an error, or that it still waits."""
    meter = meter_for(ANTHROPIC if typed else OPENAI, hide=hide)
    stream = b'data: {"model":"m"}\n\ndata: {' + data + b"\n\ndata: " + data + b"\n\n"
    out = feed_all(meter, [stream, data, b"\n\n"])
    assert out == b"" or out.endswith(b"\n\n")


BROKEN = [
    b'data: {"model":"\xff","usage":{}}\n\n',
    b'data: {"model":"m","a":{"model":"\xff"}}\n\n',
    b'data: {"\xff":1}\n\n',
    b'data: {"error":"\xff"}\n\n',
    b'data: {"model":' + b"[" * 5000 + b"]" * 5000 + b"}\n\n",
    b'data: {"model":"m","usage":"much"}\n\n',
    b'data: {"model":"m","usage":{"prompt_tokens":"7"}}\n\n',
    b"data: nonsense\n\n",
    b"data: [1,2]\n\n",
    b"data: null\n\n",
]


@each("event", BROKEN)
def test_what_is_not_understood_is_passed_on(event: bytes) -> None:
    """The client gets what the engine said, and the stream goes on."""
    meter = meter_for()
    assert meter.feed(event + DONE).replace(b'"public/model"', b'"m"') == event + DONE
    assert meter.ended
    assert meter.usage is None


def test_a_model_is_renamed_wherever_its_spelling_changes() -> None:
    """Alone in a read, or in the middle of one whose other events are spelt as before."""
    spaced, compact = b'data: {"model": "m", "n": %d}\n\n', b'data: {"model":"m","n":%d}\n\n'
    stream = [spaced % 1, compact % 2, spaced % 3 + compact % 4 + spaced % 5, compact % 6 + compact % 7]
    meter = meter_for()
    assert feed_all(meter, stream) == b"".join(stream).replace(b'"m"', b'"public/model"')
    assert meter.events == 7


def test_another_model_inside_an_event_is_not_the_engines_name() -> None:
    event = b'data: {"choices":[{"model":"other"}],"model":"m"}\n\n'
    meter = meter_for()
    for _ in range(2):
        assert meter.feed(event) == event.replace(b'"m"', b'"public/model"')


def test_a_line_before_the_next_event_is_not_left_lying() -> None:
    meter = meter_for()
    event = b'data: {"model":"m"}\n\n'
    assert feed_all(meter, [event, b"id: 1\n", event]) == event.replace(b'"m"', b'"public/model"') * 2
    assert not meter.partial


# --- the end -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"], ids=["lf", "crlf", "cr"])
def test_the_end_mark_is_seen_with_the_last_byte_of_its_event(ending: str) -> None:
    """Nothing need follow it: a carriage return is not held back for a line feed that never comes."""
    stream = 'data: {"model":"m"}\n\ndata: [DONE]\n\n'.replace("\n", ending).encode()
    # Of CR LF the last byte adds nothing: the blank line is there with its CR.
    needed = len(stream) - (ending == "\r\n")
    for plan in [(), byte_by_byte(stream)]:
        meter = meter_for()
        out = feed_all(meter, pieces(stream[: needed - 1], tuple(cut for cut in plan if cut < needed - 1)))
        assert not meter.ended
        assert out + meter.feed(stream[needed - 1 :]) == b'data: {"model":"public/model"}\n\n' + DONE
        assert meter.ended


TYPED_ENDS = [(RESPONSES, "response.completed"), (RESPONSES, "response.failed"), (RESPONSES, "response.incomplete"),
              (ANTHROPIC, "message_stop")]  # fmt: skip


@each(("dialect", "kind"), TYPED_ENDS)
@each("public", [PUBLIC, "m"])
@each("form", ["both", "only the event line", "only the type"])
def test_typed_streams_end_with_their_own_event(dialect: Dialect, kind: str, public: str, form: str) -> None:
    """An engine may name the type in its line, in its JSON, or in both."""
    line = b"" if form == "only the type" else b"event: " + kind.encode() + b"\n"
    body = {"response": {"model": "m"}} if form == "only the event line" else {"type": kind, "response": {"model": "m"}}
    first = b'data: {"type":"response.created","response":{"model":"m"}}\n\n'
    end = line + b"data: " + json.dumps(body, separators=COMPACT).encode() + b"\n\n"
    for plan in [(), (len(first),), byte_by_byte(first + end)]:
        meter = meter_for(dialect, public=public)
        out = feed_all(meter, pieces(first + end + b'data: {"type":"late"}\n\n', plan))
        assert out == (first + end).replace(b'"model":"m"', b'"model":"%b"' % public.encode())
        assert meter.ended


def test_a_typed_stream_ends_also_when_its_last_event_cannot_be_read() -> None:
    """Its usage is of a form nobody knows: that costs the figure, not the stream."""
    event = b'event: response.completed\ndata: {"type":"response.completed","response":{"usage":{"input_tokens":1.5}}}'
    meter = meter_for(RESPONSES)
    assert meter.feed(event + b"\n\n") == event + b"\n\n"
    assert meter.ended
    assert meter.usage is None


@pytest.mark.parametrize("public", [PUBLIC, "m"], ids=["renamed", "same name"])
def test_nothing_passes_after_the_end(public: str) -> None:
    """Not even an event of the stream's own kind, in the same read or in the next."""
    event = b'data: {"model":"m"}\n\n'
    meter = meter_for(public=public)
    assert meter.feed(event + DONE + event) == event.replace(b'"m"', b'"%b"' % public.encode()) + DONE
    assert meter.feed(event) == b""
    assert meter.events == 1


def test_typed_streams_do_not_end_with_done() -> None:
    """The end mark of the other dialect is nothing special there."""
    meter = meter_for(ANTHROPIC)
    assert meter.feed(DONE) == DONE
    assert not meter.ended


def test_anthropic_usage_comes_in_two_parts() -> None:
    """The input's in the first event, without what the cache gave; the output's in the last but one."""
    meter = meter_for(ANTHROPIC)
    meter.feed(
        b'event: message_start\ndata: {"type":"message_start","message":{"model":"m","usage":'
        b'{"input_tokens":37,"output_tokens":0,"cache_read_input_tokens":5}}}\n\n'
    )
    assert meter.usage == Usage(42, 0, 5)
    meter.feed(b'event: message_delta\ndata: {"type":"message_delta","usage":{"output_tokens":4}}\n\n')
    assert meter.usage == Usage(42, 4, 5)


# --- errors in the stream ----------------------------------------------------------------------------------------

STREAM_ERRORS = [
    ('{"error":{"message":"full","type":"SERVICE_UNAVAILABLE","param":null,"code":503}}', Fault.OVERLOADED),
    ('{"error": {"object": "error", "message": "The request queue is full.", "code": 503}}', Fault.OVERLOADED),
    ('{"error": {"message": "broke", "type": "internal_error", "code": 500}}', Fault.FAILED),
    ('{"message": "broke", "type": "internal_error", "code": 500, "param": null, "object": "error"}', Fault.FAILED),
    ('{"error":"broke"}', Fault.FAILED),
    ('{"error":{"message":"too long","code":"400"}}', Fault.REQUEST),
    ('{"error":{"message":"odd","code":"²"}}', Fault.FAILED),
    ('{"error":{"message":"odd","code":"' + "9" * 5000 + '"}}', Fault.FAILED),
]


@each(("payload", "fault"), STREAM_ERRORS)
@each("before", [b"", b'data: {"model":"m","choices":[]}\n\n'])
@each("public", [PUBLIC, "m"])
def test_an_error_event_is_found_and_not_passed_on(payload: str, fault: Fault, before: bytes, public: str) -> None:
    """Nor is anything behind it, at whatever split."""
    event = b"data: " + payload.encode() + b"\n\n"
    stream = before + event + DONE
    cuts = plans(stream) if len(stream) < 300 else [(), (len(before),), (len(before) + 9,)]
    for plan in cuts:
        meter = meter_for(public=public)
        assert feed_all(meter, pieces(stream, plan)) == before.replace(b'"m"', b'"%b"' % public.encode())
        assert meter.failure is not None
        assert meter.failure.fault is fault
        assert not meter.ended
        assert meter.feed(b'data: {"model":"m","choices":[]}\n\n') == b""


def test_an_anthropic_error_event_is_found() -> None:
    meter = meter_for(ANTHROPIC)
    event = b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error","message":"currently busy"}}\n\n'
    assert meter.feed(event) == b""
    assert meter.failure is not None
    assert (meter.failure.fault, meter.failure.message) == (Fault.OVERLOADED, "currently busy")


def test_an_error_of_null_is_none() -> None:
    """``/v1/responses`` says ``"error":null`` in every whole response, and a failed one is an event of its own."""
    meter = meter_for(RESPONSES)
    event = b'event: response.created\ndata: {"type":"response.created","response":{"model":"m","error":null}}\n\n'
    failed = b'event: response.failed\ndata: {"type":"response.failed","response":{"error":{"message":"x"}}}\n\n'
    assert meter.feed(event) == b""
    assert meter.feed(failed) == event.replace(b'"m"', b'"public/model"') + failed
    assert meter.ended
    assert meter.failure is None


@pytest.mark.parametrize(("dialect", "name"), [(ANTHROPIC, "messages_stream"), (RESPONSES, "responses_stream")])
def test_what_only_announces_an_answer_is_given_with_its_beginning(dialect: Dialect, name: str) -> None:
    """Until then it is part of nothing: an engine may still refuse, and another one be asked."""
    meter = meter_for(dialect)
    events = load("vllm", name).events()
    opening = [event for event in events if event.partition(b"\n")[0].removeprefix(b"event: ") in dialect.opening_types]
    assert events[: len(opening)] == opening
    for event in opening:
        assert (meter.feed(event), meter.events, meter.partial) == (b"", 0, True)
    assert meter.feed(events[len(opening)]).count(b"\n\n") == meter.events == len(opening) + 1
    assert not meter.partial
    assert meter.feed(events[len(opening) + 1]).count(b"\n\n") == 1


# --- bounds ------------------------------------------------------------------------------------------------------


class CountingTail(bytearray):
    """A buffer that counts the bytes that operations on it look at or move."""

    touched = 0

    def rfind(  # type: ignore[override]
        self, sub: bytes, start: SupportsIndex = 0, end: SupportsIndex | None = None
    ) -> int:
        self.touched += len(self) - int(start)
        return super().rfind(sub, start, end)

    def find(  # type: ignore[override]
        self, sub: bytes, start: SupportsIndex = 0, end: SupportsIndex | None = None
    ) -> int:
        self.touched += len(self) - int(start)
        return super().find(sub, start, end)

    def __getitem__(self, where):  # type: ignore[no-untyped-def]
        found = super().__getitem__(where)
        self.touched += len(found) if isinstance(found, bytearray) else 1
        return found

    def __iadd__(self, data: bytes) -> CountingTail:  # type: ignore[override,misc]
        self.touched += len(data)
        super().extend(data)
        return self


def test_a_large_event_in_small_pieces_is_not_copied_again_and_again() -> None:
    """1 MB in pieces of 1 KB: each byte is looked at a few times, not a thousand times."""
    event = b'data: {"model":"m","pad":"' + b"x" * (1 << 20) + b'"}\n\n'
    meter = meter_for(limit=2 << 20)
    meter._tail = tail = CountingTail()
    out = feed_all(meter, pieces(event, range(1024, len(event), 1024)))
    assert out == event.replace(b'"m"', b'"public/model"')
    assert meter._tail is tail
    assert len(event) < tail.touched < 6 * len(event)
    assert not tail


def test_nothing_is_held_between_events() -> None:
    meter = meter_for()
    for _ in range(3):
        meter.feed(b'data: {"model":"m"}\n\nda')
        assert meter.partial
        meter.feed(b'ta: {"model":"m"}\n\n')
        assert not meter.partial


@given(size=st.integers(0, 300), step=st.integers(1, 70))
def test_a_partial_event_overflows_beyond_its_bound_and_only_then(size: int, step: int) -> None:
    meter = meter_for(limit=200)
    data = b'data: {"pad":"'.ljust(size, b"x")[:size]
    for start in range(0, size, step):
        meter.feed(data[start : start + step])
        assert meter.overflow == (min(start + step, size) > 200)


# --- usage of whole answers --------------------------------------------------------------------------------------


@each(
    ("body", "usage"),
    [
        (b'{"usage":{"prompt_tokens":5,"completion_tokens":2}}', Usage(5, 2, None)),
        (b'{"usage":{"prompt_tokens":5,"prompt_tokens_details":{"cached_tokens":4}}}', Usage(5, None, 4)),
        (b'{"usage":{"prompt_tokens":5,"prompt_tokens_details":null}}', Usage(5, None, None)),
        (b'{"usage":{"input_tokens":5,"output_tokens":2,"cache_read_input_tokens":3}}', Usage(8, 2, 3)),
        (
            b'{"usage":{"input_tokens":5,"cache_creation_input_tokens":6,"cache_read_input_tokens":0}}',
            Usage(11, None, 0),
        ),
        (b'{"usage":{"input_tokens":0,"output_tokens":0}}', Usage(0, 0, None)),
        (b'{"usage":null}', None),
        (b"{}", None),
        (b'{"usage":7}', None),
        (b'{"usage":{"prompt_tokens":1e999}}', None),
        (b'{"\xff":1}', None),
        (b"[" * 5000, None),
        (b"", None),
    ],
)
def test_usage_of_a_whole_answer(body: bytes, usage: Usage | None) -> None:
    assert read_usage(body[:10_000]) == usage


def test_every_cut_of_a_usage_chunk_finds_it() -> None:
    stream = b'data: {"model":"m","choices":[],"usage":{"prompt_tokens":5,"completion_tokens":2}}\n\n' + DONE
    for plan in every_cut(stream):
        meter = meter_for(hide=True)
        assert feed_all(meter, pieces(stream, plan)) == DONE
        assert meter.usage == Usage(5, 2, None)
        assert meter.events == 0
