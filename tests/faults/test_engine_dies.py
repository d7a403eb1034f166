"""The engine dies: a JSON error before the first event, an error event after it, or another engine is asked."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest

from tests.conftest import Connect
from tests.support.client import error_of
from tests.support.gateway import AUTH, CHAT, MODEL, Gateway, StartGateway, chat, relayed, serving
from tests.support.journal import Journal
from tests.support.recordings import load
from tests.support.script import (
    DONE,
    Answer,
    Do,
    Script,
    endless_event,
    event_stream,
    garbage,
    json_answer,
    nothing,
    play,
)
from tests.support.upstream import ScriptedUpstream

RECORDED = load("vllm", "chat_stream")
STREAM = play(RECORDED)
EVENTS = [event.replace(b'"model":"smollm2"', b'"model":"public/model"') for event in RECORDED.events()]

BEFORE_THE_FIRST_EVENT = {
    "before any byte": 0,
    "inside the status line": 5,
    "inside the head": STREAM.after_head - 3,
    "after the head": STREAM.after_head,
    "inside the first size line": STREAM.inside_size_line(0),
    "inside the first event": STREAM.inside_frame(0),
    "inside the first event's blank line": STREAM.after_frame(0) - 3,
}
AFTER_IT = {
    "after the first event": (STREAM.after_frame(0), 1),
    "inside a size line": (STREAM.inside_size_line(2), 2),
    "inside an event": (STREAM.inside_frame(2), 2),
    "between events": (STREAM.after_frame(4), 5),
    "before the reason for its end": (STREAM.after_frame(-3), len(EVENTS) - 2),
}
AT_THE_END = {
    "before the end mark": STREAM.after_frame(-2),
    "inside the end mark": STREAM.inside_frame(-1),
}
ENDINGS = [Do.CLOSE, Do.RESET]


def dies(script: Script, place: int, ending: Do) -> Script:
    """Return a script that ends once the gateway has read everything up to a place."""
    return script.do(Do.UNTIL_READ, place).do(ending, place)


async def assert_nothing_held(gateway: Gateway) -> None:
    await gateway.idle()
    assert gateway.replica.pool.endpoints[0].connections.open == 0


@pytest.mark.parametrize("ending", ENDINGS)
async def test_before_the_first_event_the_client_gets_json(
    gateway: Gateway, upstream: ScriptedUpstream, ending: Do
) -> None:
    """The status is not spent on a stream that never began."""
    for index, (stage, place) in enumerate(BEFORE_THE_FIRST_EVENT.items()):
        upstream.queue(dies(STREAM, place, ending), path=CHAT)
        answer = await gateway.ask(chat(stream=True))
        assert (answer.status, answer.header("content-type")) == (502, "application/json"), stage
        assert (error_of(answer)["type"], error_of(answer)["code"]) == ("server_error", "engine_failed"), stage
        assert (await gateway.line(index=index))["outcome"] == "engine_failed", stage
        await assert_nothing_held(gateway)


@pytest.mark.parametrize("ending", ENDINGS)
async def test_after_it_the_stream_ends_with_an_error_event(
    gateway: Gateway, upstream: ScriptedUpstream, connect: Connect, ending: Do
) -> None:
    """Every whole event before it came through, no partial one did, and the connection ends: no client can miss it."""
    for index, (stage, (place, events)) in enumerate(AFTER_IT.items()):
        upstream.queue(dies(STREAM, place, ending), path=CHAT)
        client = await connect(gateway.url)
        client.post(CHAT, chat(stream=True), AUTH)
        assert (await client.head()).status == 200
        *before, last = await client.events()
        assert before == EVENTS[:events], stage
        assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "engine_failed", stage
        assert await client.ended() == "close", stage
        line = await gateway.line(index=index)
        assert (line["outcome"], line["status"], line["events"]) == ("engine_failed", 200, events), stage
        await assert_nothing_held(gateway)


@pytest.mark.parametrize("ending", ENDINGS)
async def test_what_was_said_in_full_gets_its_end_mark(
    gateway: Gateway, upstream: ScriptedUpstream, ending: Do
) -> None:
    """The reason for its end was told: nothing is missing but the mark, and its usage, which nobody knows any more."""
    for index, (stage, place) in enumerate(AT_THE_END.items()):
        upstream.queue(dies(STREAM, place, ending), path=CHAT)
        answer = await gateway.ask(chat(stream=True))
        assert (answer.status, answer.complete, answer.events()) == (200, True, EVENTS), stage
        line = await gateway.line(index=index)
        assert (line["outcome"], line["settlement"], line["attempts"]) == ("ok", "counted", 1), stage
        await assert_nothing_held(gateway)


@pytest.mark.parametrize("ending", ENDINGS)
async def test_after_the_end_mark_nobody_notices(gateway: Gateway, upstream: ScriptedUpstream, ending: Do) -> None:
    upstream.queue(dies(STREAM, STREAM.before_last_chunk, ending), path=CHAT)
    answer = await gateway.ask(chat(stream=True))
    assert (answer.status, answer.complete, answer.events()) == (200, True, EVENTS)
    assert (await gateway.line())["outcome"] == "ok"
    await upstream.saw("ended", request=relayed(upstream)[0].index)
    await gateway.idle()


@pytest.mark.parametrize("ending", ENDINGS)
async def test_a_whole_answer_that_breaks_off_is_a_502(
    gateway: Gateway, upstream: ScriptedUpstream, ending: Do
) -> None:
    """Also where what came is JSON by itself: the length tells."""
    script = json_answer(b"{}" + b" " * 100)
    for place in (script.after_head, script.after_head + 2):
        upstream.queue(dies(script, place, ending), path=CHAT)
        answer = await gateway.ask(chat())
        assert (answer.status, error_of(answer)["code"]) == (502, "engine_failed")
    await assert_nothing_held(gateway)


UNREADABLE = {
    "no HTTP": garbage(),
    "endless headers": Script(b"HTTP/1.1 200 OK\r\n" + b"x-more: x\r\n" * 10_000),
    "no JSON": json_answer(b"<html>oops</html>"),
    "no object": json_answer(b"[1]"),
    "nothing": json_answer(b""),
    "cut JSON": json_answer(b'{"model":"smollm2","choices":['),
    "deeply nested": json_answer(b"[" * 100_000),
}


async def test_what_cannot_be_read_is_a_502(gateway: Gateway, upstream: ScriptedUpstream) -> None:
    for what, script in UNREADABLE.items():
        upstream.queue(script, path=CHAT)
        answer = await gateway.ask(chat())
        assert (answer.status, error_of(answer)["code"]) == (502, "engine_failed"), what
        await gateway.idle()


async def test_an_endless_first_event_is_a_502(gateway: Gateway, upstream: ScriptedUpstream) -> None:
    """What is held back is bounded."""
    upstream.queue(event_stream(endless_event(3_000_000)), path=CHAT)
    answer = await gateway.ask(chat(stream=True))
    assert (answer.status, error_of(answer)["code"]) == (502, "engine_failed")
    assert "1048576 bytes" in error_of(answer)["message"]
    await assert_nothing_held(gateway)


async def test_an_endless_later_event_ends_the_stream(gateway: Gateway, upstream: ScriptedUpstream) -> None:
    upstream.queue(event_stream([RECORDED.events()[0], *endless_event(3_000_000)]), path=CHAT)
    answer = await gateway.ask(chat(stream=True))
    first, last = answer.events()
    assert first == EVENTS[0]
    assert "1048576 bytes" in json.loads(last.removeprefix(b"data: "))["error"]["message"]
    await assert_nothing_held(gateway)


async def test_an_event_as_large_as_allowed_passes(gateway: Gateway, upstream: ScriptedUpstream) -> None:
    large = b'data: {"model":"smollm2","pad":"%b"}\n\n' % (b"x" * 1_000_000)
    upstream.queue(event_stream([large, DONE]), path=CHAT)
    answer = await gateway.ask(chat(stream=True))
    assert answer.events() == [large.replace(b"smollm2", MODEL.encode()), DONE]


@pytest.mark.parametrize("ending", ENDINGS)
async def test_a_kept_connection_that_was_closed_costs_nothing(
    gateway: Gateway, upstream: ScriptedUpstream, ending: Do
) -> None:
    """The engine closed it just as the request went out: it is sent again, once, on a new connection."""
    upstream.queue(json_answer(b"{}"), nothing().do(ending), STREAM, path=CHAT)
    await gateway.ask(chat())
    answer = await gateway.ask(chat(stream=True))
    assert answer.events() == EVENTS
    seen = relayed(upstream)
    assert seen[1].body == seen[2].body
    assert seen[0].connection == seen[1].connection != seen[2].connection
    assert gateway.replica.pool.endpoints[0].connections.accepted == 2


@pytest.mark.parametrize("ending", ENDINGS)
async def test_a_new_connection_that_closes_is_no_stale_one(
    gateway: Gateway, upstream: ScriptedUpstream, ending: Do
) -> None:
    """The engine may have worked on it: one engine, one attempt."""
    upstream.queue(json_answer(b"{}"), nothing().do(ending), nothing().do(ending), STREAM, path=CHAT)
    await gateway.ask(chat())
    answer = await gateway.ask(chat(stream=True))
    assert (answer.status, error_of(answer)["code"]) == (502, "engine_failed")
    assert len(relayed(upstream)) == 3


Pair = tuple[Gateway, ScriptedUpstream, ScriptedUpstream]


@pytest.fixture
async def pair(start_gateway: StartGateway, journal: Journal, upstream: ScriptedUpstream) -> AsyncIterator[Pair]:
    """A gateway in front of two engines; the second always answers well."""
    async with ScriptedUpstream(journal=journal, name="second") as second:
        second.always(STREAM, path=CHAT)
        upstream.always(STREAM, path=CHAT)
        yield await start_gateway(serving(upstream), serving(second)), upstream, second


async def test_another_engine_is_asked_before_the_first_event(pair: Pair) -> None:
    """The client sees one whole stream, whichever engine was tried first."""
    gateway, first, second = pair
    for stage, place in BEFORE_THE_FIRST_EVENT.items():
        for engine in (first, second):
            engine.queue(dies(STREAM, place, Do.RESET), path=CHAT)
        answers = [await gateway.ask(chat(stream=True)) for _ in range(2)]
        # Each engine fails once: both when the first request tries them, then never again.
        assert [answer.status for answer in answers] == [502, 200], stage
        assert answers[1].events() == EVENTS, stage
    attempts = [line["attempts"] for line in gateway.lines("request")]
    assert attempts[1::2] == [1] * len(BEFORE_THE_FIRST_EVENT)
    await gateway.idle()


async def test_one_dead_engine_of_two_is_never_seen(
    pair: Pair,
) -> None:
    gateway, first, _ = pair
    first.always(nothing().do(Do.RESET), path=CHAT)
    answers = [await gateway.ask(chat(stream=True)) for _ in range(4)]
    assert [(answer.status, answer.events()) for answer in answers] == [(200, EVENTS)] * 4
    assert sum(line["attempts"] for line in gateway.lines("request")) > 4
    await gateway.idle()


async def test_an_unreachable_engine_is_left_alone_afterwards(
    pair: Pair,
) -> None:
    """Only the first request pays for finding out."""
    gateway, first, second = pair
    first.refuse()
    for connection in first.connections:
        connection.finish(Do.CLOSE)
    answers = [await gateway.ask(chat(stream=True)) for _ in range(6)]
    assert [answer.status for answer in answers] == [200] * 6
    assert sum(line["attempts"] for line in gateway.lines("request")) == 7
    assert len(relayed(second)) == 6
    healthy = {endpoint.name: endpoint.healthy for endpoint in gateway.replica.pool.endpoints}
    assert healthy == {first.url: False, second.url: True}


async def test_a_full_engine_hands_over(pair: Pair) -> None:
    """503 before the work, and SGLang's way of saying it as the first event of a stream."""
    gateway, first, second = pair
    full = [
        play(load("vllm", "s2_over_4")),
        play(load("sglang", "q_full_stream")),
        Answer(429, pieces=[b"{}"]).script(),
    ]
    for script in full:
        first.always(script, path=CHAT)
        answers = [await gateway.ask(chat(stream=True)) for _ in range(2)]
        assert [answer.events() for answer in answers] == [EVENTS] * 2
    assert len(relayed(second)) == 6


async def test_an_engine_that_keeps_failing_is_left_out_for_a_while(pair: Pair) -> None:
    """Five failures in a row, then it gets nothing for two seconds, then one request decides."""
    gateway, first, _ = pair
    first.always(nothing().do(Do.RESET), path=CHAT)
    answers = [await gateway.ask(chat(stream=True)) for _ in range(30)]
    assert {answer.status for answer in answers} == {200}
    assert len(relayed(first)) == 5
    gateway.clock.advance(2.0)
    for _ in range(6):
        await gateway.ask(chat(stream=True))
    assert len(relayed(first)) == 6
    # Its trial was lost: out again, twice as long; then it is well and gets its part of the work.
    first.always(STREAM, path=CHAT)
    gateway.clock.advance(3.9)
    await gateway.ask(chat(stream=True))
    assert len(relayed(first)) == 6
    gateway.clock.advance(0.1)
    for _ in range(8):
        await gateway.ask(chat(stream=True))
    assert len(relayed(first)) == 6 + 4
    text = (await gateway.get("/metrics", admin=True)).body.decode()
    assert f'forebay_endpoint_ejections_total{{endpoint="{first.url}"}} 2.0' in text
    await gateway.idle()


async def test_the_last_engine_is_asked_however_often_it_failed(pair: Pair) -> None:
    """Refusing everybody for a while because of a burst of errors is what other gateways do."""
    gateway, first, second = pair
    for engine in (first, second):
        engine.always(nothing().do(Do.RESET), path=CHAT)
    failed = [await gateway.ask(chat(stream=True)) for _ in range(10)]
    assert {answer.status for answer in failed} == {502}
    for engine in (first, second):
        engine.always(STREAM, path=CHAT)
    answer = await gateway.ask(chat(stream=True))
    assert (answer.status, answer.events()) == (200, EVENTS)
    await gateway.idle()


async def test_bad_requests_and_full_engines_speak_against_nobody(pair: Pair) -> None:
    gateway, first, second = pair
    for engine in (first, second):
        engine.always(play(load("vllm", "err_temperature_neg")), path=CHAT)
    assert {(await gateway.ask(chat(temperature=-1))).status for _ in range(12)} == {400}
    for engine in (first, second):
        engine.always(play(load("vllm", "s2_over_1")), path=CHAT)
    for _ in range(12):
        await gateway.ask(chat())
    assert all(endpoint.trusted(gateway.clock()) for endpoint in gateway.replica.pool.endpoints)
