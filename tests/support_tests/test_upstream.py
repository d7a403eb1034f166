"""The scripted engine plays what it is told, at the byte it is told, and writes down what it saw."""

from __future__ import annotations

import asyncio
import socket

import pytest

from tests.conftest import Connect
from tests.support.client import ConnectionEndedError, RawClient, request_bytes
from tests.support.journal import Journal
from tests.support.recordings import all_recordings, load
from tests.support.script import (
    DONE,
    Answer,
    Do,
    Gate,
    Script,
    endless_event,
    event_stream,
    garbage,
    json_answer,
    nothing,
    play,
)
from tests.support.sockets import black_hole, unread_by_peer
from tests.support.splits import byte_by_byte
from tests.support.table import named
from tests.support.tls import client_context
from tests.support.upstream import ScriptedUpstream, answer_as_recorded

CHAT = "/v1/chat/completions"
STREAM = load("vllm", "chat_stream")


async def open_client(connect: Connect, upstream: ScriptedUpstream) -> RawClient:
    """Connect to an upstream on any kind of address."""
    return await connect(upstream.url, tls=client_context() if upstream.url.startswith("https") else None)


async def test_every_recording_is_played_exactly(upstream: ScriptedUpstream, connect: Connect) -> None:
    """Status, body and content type arrive as recorded, whatever its framing."""
    for number, recording in enumerate(all_recordings()):
        upstream.always(play(recording))
        with named(recording=recording):
            async with await connect(upstream.url) as client:
                body = recording.request_body or None
                client.request(recording.method, recording.path, recording.request_headers, body)
                response = await client.response()
            assert (response.status, response.body, response.complete) == (recording.status, recording.body, True)
            assert response.header("content-type") == recording.header("content-type")
            if recording.header("transfer-encoding"):
                assert response.chunks == recording.pieces()
            assert upstream.requests[number].body == recording.request_body
            assert upstream.requests[number].target == recording.path


async def test_all_kinds_of_address_serve_and_keep_the_connection(
    any_upstream: ScriptedUpstream, connect: Connect
) -> None:
    any_upstream.always(play(STREAM))
    client = await open_client(connect, any_upstream)
    for _ in range(3):
        client.post(CHAT, STREAM.request_body)
        assert await client.head()
        assert await client.events() == STREAM.events()
    assert any_upstream.accepted == 1
    assert [request.index for request in any_upstream.requests] == [0, 1, 2]


@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
async def test_each_framing(upstream: ScriptedUpstream, connect: Connect, framing: str) -> None:
    upstream.always(play(STREAM, framing=framing))  # type: ignore[arg-type]
    client = await connect(upstream.url)
    client.post(CHAT, {})
    response = await client.response()
    assert response.body == STREAM.body
    assert response.complete
    if framing == "close":
        assert await client.ended() == "close"


async def test_trailers_follow_the_last_chunk(upstream: ScriptedUpstream, connect: Connect) -> None:
    upstream.always(event_stream([DONE], trailers=[("x-checksum", "1")]))
    client = await connect(upstream.url)
    client.post(CHAT, {})
    response = await client.response()
    assert (response.body, response.trailers) == (DONE, [("x-checksum", "1")])


async def test_each_piece_of_a_cut_answer_is_one_read_of_the_peer(
    any_upstream: ScriptedUpstream, connect: Connect
) -> None:
    """Byte by byte means that the peer's transport is given one byte at a time."""
    script = event_stream([b'data: {"a":1}\n\n', DONE])
    any_upstream.always(script.cut(byte_by_byte(script.data)))
    client = await open_client(connect, any_upstream)
    client.post(CHAT, {})
    assert (await client.response()).body == b'data: {"a":1}\n\n' + DONE
    assert client.reads == [1] * len(script.data)


async def test_a_gate_holds_the_answer_until_the_test_opens_it(upstream: ScriptedUpstream, connect: Connect) -> None:
    script = play(STREAM)
    gate = Gate("second event")
    upstream.always(script.do(gate, script.after_frame(0)))
    client = await connect(upstream.url)
    client.post(CHAT, {})
    await client.head()
    assert await client.event() == STREAM.events()[0]
    await gate.reached()
    assert not client.buffer
    upstream.journal.note("test", "opened")
    gate.open()
    assert await client.events() == STREAM.events()[1:]
    assert upstream.journal.order("gate", "opened", "answered") == ["gate", "opened", "answered"]


async def test_a_peer_that_leaves_is_seen_at_once_whatever_the_script_does(
    any_upstream: ScriptedUpstream, connect: Connect
) -> None:
    """In a silent prefill and in mid-stream alike, the order is: client ended, upstream saw it closed."""
    script = play(STREAM)
    for request, place in enumerate([0, script.after_frame(0)]):
        any_upstream.queue(script.do(Do.HANG, place))
        client = await open_client(connect, any_upstream)
        client.post(CHAT, {})
        await any_upstream.saw("hanging", request=request)
        await client.close()
        closed = await any_upstream.saw("closed", request=request)
        assert closed.connection == request
    assert any_upstream.journal.order("ended", "closed") == ["ended", "closed"] * 2
    assert any_upstream.open_connections == 0


FAULTS = {
    "before any byte": 0,
    "inside the head": play(STREAM).after_head // 2,
    "after the head": play(STREAM).after_head,
    "inside a chunk's size line": play(STREAM).inside_size_line(1),
    "inside an event": play(STREAM).inside_frame(1),
    "between events": play(STREAM).after_frame(1),
    "between [DONE] and the last chunk": play(STREAM).before_last_chunk,
}


@pytest.mark.parametrize("place", FAULTS.values(), ids=FAULTS.keys())
@pytest.mark.parametrize("ending", [Do.CLOSE, Do.RESET])
async def test_a_fault_happens_at_its_byte(
    upstream: ScriptedUpstream, connect: Connect, place: int, ending: Do
) -> None:
    """What was written before the fault arrives, nothing after it, and the end is the one asked for."""
    script = play(STREAM)
    upstream.always(script.do(Do.UNTIL_READ, place).do(ending, place))
    client = await connect(upstream.url)
    client.post(CHAT, {})
    await upstream.saw("ended", request=0)
    with pytest.raises(ConnectionEndedError) as end:
        await client.head()
        while await client.chunk() is not None:
            continue
    assert end.value.how == ending.name.lower()
    assert bytes(client.received) == script.data[:place]


async def test_refused_then_accepted_again_at_the_same_address(upstream: ScriptedUpstream) -> None:
    upstream.always(json_answer(b"{}"))
    upstream.refuse()
    with pytest.raises(ConnectionRefusedError):
        await RawClient.connect(upstream.url)
    await upstream.accept()
    async with await RawClient.connect(upstream.url) as client:
        client.post(CHAT, {})
        assert (await client.response()).json() == {}


async def test_a_black_hole_neither_accepts_nor_refuses() -> None:
    with black_hole() as (host, port), socket.socket() as sock:
        sock.setblocking(False)
        attempt = asyncio.create_task(asyncio.get_running_loop().sock_connect(sock, (host, port)))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not attempt.done()
        attempt.cancel()


async def test_greetings_come_before_any_request(upstream: ScriptedUpstream, connect: Connect) -> None:
    """Accept and close, accept and reset, garbage instead of HTTP."""
    upstream.greet(nothing().do(Do.CLOSE), nothing().do(Do.RESET), garbage())
    assert await (await connect(upstream.url)).ended() == "close"
    assert await (await connect(upstream.url)).ended() == "reset"
    talker = await connect(upstream.url)
    await upstream.saw("ended", connection=2)
    with pytest.raises(AssertionError, match="this is not HTTP"):
        await talker.head()


async def test_idle_connections_can_be_closed_and_busy_ones_stay(upstream: ScriptedUpstream, connect: Connect) -> None:
    gate = Gate()
    upstream.queue(json_answer(b"{}"), json_answer(b"{}").do(gate, 0))
    idle, busy = await connect(upstream.url), await connect(upstream.url, name="busy")
    idle.post(CHAT, {})
    await idle.response()
    await upstream.saw("answered", request=0)
    busy.post(CHAT, {})
    await gate.reached()
    assert upstream.speak_when_idle(nothing().do(Do.CLOSE)) == 1
    assert await idle.ended() == "close"
    gate.open()
    assert (await busy.response()).json() == {}


async def test_an_answer_may_come_before_the_request_body(upstream: ScriptedUpstream, connect: Connect) -> None:
    """The engine answers on the head alone and reads no further; the body stays in the kernel."""
    upstream.always(json_answer(b'{"early":true}', status=413).do(Do.STOP_READING, 0).before_request_body())
    client = await connect(upstream.url)
    whole = request_bytes("POST", CHAT, (), b"x" * 1000)
    client.send(whole[:-1000])
    assert (await client.response()).status == 413
    client.send(whole[-1000:])
    assert unread_by_peer(client.transport.get_extra_info("socket")) == 1000
    assert not upstream.requests[0].complete


async def test_a_slow_reader_blocks_the_script(upstream: ScriptedUpstream, connect: Connect) -> None:
    upstream.always(event_stream(endless_event(4_000_000)))
    client = await connect(upstream.url, receive_buffer=4096)
    client.stop_reading()
    client.post(CHAT, {})
    await upstream.saw("blocked", request=0)
    for _ in range(20):
        await asyncio.sleep(0)
    assert upstream.journal.order("answered") == []
    client.read_on()
    assert len((await client.response()).body) > 4_000_000
    await upstream.saw("answered", request=0)


async def test_an_endless_event_has_no_end() -> None:
    event = b"".join(endless_event(1_000_000))
    assert len(event) >= 1_000_000
    assert b"\n" not in event
    assert event.startswith(b"data: ")


async def test_answers_are_chosen_by_queue_then_path_then_default(upstream: ScriptedUpstream, connect: Connect) -> None:
    upstream.always(json_answer(b'"default"'))
    upstream.always(json_answer(b'"models"'), path="/v1/models")
    upstream.queue(json_answer(b'"next"'))
    upstream.queue(json_answer(b'"next of models"'), path="/v1/models")
    client = await connect(upstream.url)
    answers = []
    for path in ("/v1/models", "/v1/models?x=1", "/v1/models", "/other"):
        client.request("GET", path)
        answers.append((await client.response()).json())
    assert answers == ["next of models", "next", "models", "default"]


async def test_a_request_without_a_script_says_so(upstream: ScriptedUpstream, connect: Connect) -> None:
    client = await connect(upstream.url)
    client.request("GET", "/unplanned")
    response = await client.response()
    assert (response.status, b"the test has no script for GET /unplanned" in response.body) == (500, True)


async def test_answer_as_recorded_needs_the_same_request(upstream: ScriptedUpstream, connect: Connect) -> None:
    """Fields that are ignored may differ or be missing; where two recordings fit, the first one wins."""
    recording = load("vllm", "chat_basic")
    malformed = load("vllm", "err_badjson")
    upstream.always(answer_as_recorded([recording, malformed, load("vllm", "auth_missing")], ignoring=["max_tokens"]))
    client = await connect(upstream.url)
    client.post(CHAT, {**recording.request_json(), "max_tokens": 99})
    assert (await client.response()).body == recording.body
    client.post(CHAT, recording.request_body)
    assert (await client.response()).body == recording.body
    client.post(CHAT, malformed.request_body)
    assert (await client.response()).body == malformed.body
    client.post(CHAT, {**recording.request_json(), "temperature": 0.5})
    response = await client.response()
    assert (response.status, b"no recording has this request" in response.body) == (500, True)


async def test_pipelined_and_malformed_requests_are_noted(upstream: ScriptedUpstream, connect: Connect) -> None:
    gate = Gate()
    upstream.always(json_answer(b"{}").do(gate, 0))
    client = await connect(upstream.url)
    client.request("GET", "/first")
    await gate.reached()
    client.request("GET", "/second")
    await upstream.saw("pipelined", request=0)
    gate.open()
    await client.response()
    await client.response()
    client.send(b"NOT HTTP\r\n\r\n")
    await upstream.saw("malformed")
    assert await client.ended() == "reset"


async def test_headers_and_chunked_bodies_of_requests_are_kept(upstream: ScriptedUpstream, connect: Connect) -> None:
    upstream.always(json_answer(b"{}"))
    client = await connect(upstream.url)
    client.request("POST", CHAT, [("X-Odd-Case", "a"), ("x-odd-case", "b")], [b"one", b"two"])
    await client.response()
    request = await upstream.request(0)
    assert request.body == b"onetwo"
    assert [pair for pair in request.headers if pair[0].lower() == "x-odd-case"] == [
        ("X-Odd-Case", "a"),
        ("x-odd-case", "b"),
    ]
    assert request.head.startswith(b"POST /v1/chat/completions HTTP/1.1\r\nhost: test\r\nX-Odd-Case: a\r\n")


async def test_an_interim_answer_precedes_the_final_one(upstream: ScriptedUpstream, connect: Connect) -> None:
    upstream.always(Answer(pieces=[b"{}"], interim=b"HTTP/1.1 100 Continue\r\n\r\n").script())
    client = await connect(upstream.url)
    client.post(CHAT, {})
    assert (await client.head()).status == 100
    assert (await client.response()).json() == {}


async def test_waiting_for_what_does_not_happen_shows_what_did(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.support.journal.PATIENCE", 0)
    journal = Journal()
    journal.note("client", "sent", detail="12 bytes")
    with pytest.raises(AssertionError, match=r"'closed' .* did not happen; what did:\n +0 client: sent 12 bytes"):
        await journal.saw("closed", request=3)


def test_places_of_a_chunked_answer() -> None:
    script = event_stream([b"data: a longer event\n\n", DONE])
    assert script.data[: script.after_head].endswith(b"\r\n\r\n")
    assert script.data[script.after_head : script.inside_size_line(0)] == b"1"
    assert script.data[script.inside_size_line(0) :].startswith(b"6\r\ndata: a longer event")
    assert script.data[script.inside_frame(0) :].endswith(b"event\n\n\r\ne\r\n" + DONE + b"\r\n0\r\n\r\n")
    assert script.data[script.after_frame(0) :].startswith(b"e\r\n" + DONE)
    assert script.data[script.before_last_chunk :] == b"0\r\n\r\n"


def test_steps_are_in_order_of_their_place_and_stop_at_the_first_ending() -> None:
    """Actions at the same place keep the order in which they were added."""
    gate = Gate()
    script = Script(b"abcdef").do(Do.CLOSE, 4).do(gate, 2).do(Do.UNTIL_READ, 2).do(Do.READ_ON, 5)
    assert script.steps() == [b"ab", gate, Do.UNTIL_READ, b"cd", Do.CLOSE]
    assert Script(b"abcdef").cut([1, 3]).steps() == [b"a", Do.UNTIL_READ, b"bc", Do.UNTIL_READ, b"def"]


def test_a_position_outside_the_answer_is_refused() -> None:
    with pytest.raises(ValueError, match="outside the 0 bytes"):
        nothing().do(Do.CLOSE, 1)
