"""The raw client sends what it is told, byte for byte, and reads no more leniently than HTTP allows."""

from __future__ import annotations

import pytest

from tests.conftest import Connect
from tests.support.client import RawClient, request_bytes
from tests.support.http1 import BodyReader, ProtocolError, encode_chunk, header, last_chunk, parse_head
from tests.support.recordings import load
from tests.support.script import DONE, Do, Gate, Script, event_stream, json_answer, play
from tests.support.splits import byte_by_byte, pieces
from tests.support.table import each
from tests.support.tls import client_context
from tests.support.upstream import ScriptedUpstream

CHAT = "/v1/chat/completions"


async def test_a_request_in_single_bytes_arrives_whole(any_upstream: ScriptedUpstream, connect: Connect) -> None:
    """Each byte is read by the server before the next one is written, and the request is the same."""
    any_upstream.always(json_answer(b"{}"))
    tls = client_context() if any_upstream.url.startswith("https") else None
    client = await connect(any_upstream.url, tls=tls)
    request = request_bytes("POST", CHAT, [("content-type", "application/json")], b'{"a":1}')
    await client.send_pieces(pieces(request, byte_by_byte(request)))
    assert (await client.response()).json() == {}
    assert any_upstream.requests[0].body == b'{"a":1}'
    assert any_upstream.journal.order("sent").count("sent") == len(request)


async def test_events_span_chunks_and_chunks_hold_many_events(upstream: ScriptedUpstream, connect: Connect) -> None:
    upstream.always(event_stream([b"data: 1\n\ndata: 2", b"\n", b"\n: comment\n\n", DONE]))
    client = await connect(upstream.url)
    client.post(CHAT, {})
    await client.head()
    assert await client.events() == [b"data: 1\n\n", b"data: 2\n\n", b": comment\n\n", DONE]


async def test_a_body_that_ends_inside_an_event_is_an_error(upstream: ScriptedUpstream, connect: Connect) -> None:
    upstream.always(event_stream([b"data: 1\n\n", b"data: lost\n"]))
    client = await connect(upstream.url)
    client.post(CHAT, {})
    await client.head()
    assert await client.event() == b"data: 1\n\n"
    with pytest.raises(AssertionError, match="the body ends inside an event: b'data: lost"):
        await client.event()


async def test_a_truncated_body_is_not_complete(upstream: ScriptedUpstream, connect: Connect) -> None:
    script = play(load("vllm", "chat_stream"))
    upstream.queue(script.do(Do.CLOSE, script.before_last_chunk), Script(script.data[: script.head_end]).do(Do.RESET))
    client = await connect(upstream.url)
    client.post(CHAT, {})
    response = await client.response()
    assert (response.complete, response.body) == (False, load("vllm", "chat_stream").body)


async def test_two_answers_on_one_connection_are_kept_apart(upstream: ScriptedUpstream, connect: Connect) -> None:
    """Pipelined requests: the second answer's bytes never show up in the first one."""
    upstream.queue(json_answer(b'"first"'), json_answer(b'"second"'))
    client = await connect(upstream.url)
    client.request("GET", "/1")
    client.request("GET", "/2")
    assert [(await client.response()).json(), (await client.response()).json()] == ["first", "second"]


async def test_an_answer_to_head_has_no_body(upstream: ScriptedUpstream, connect: Connect) -> None:
    script = json_answer(b'{"a":1}')
    upstream.queue(Script(script.data[: script.head_end]), json_answer(b'"next"'))
    client = await connect(upstream.url)
    client.request("HEAD", "/1")
    assert (await client.response()).body == b""
    client.request("GET", "/2")
    assert (await client.response()).json() == "next"


async def test_half_close_reset_and_close_are_what_the_server_sees(
    upstream: ScriptedUpstream, connect: Connect
) -> None:
    gate = Gate()
    upstream.always(json_answer(b"{}").do(gate, 0))
    seen = []
    for index, end in enumerate(["half_close", "reset", "close"]):
        client = await connect(upstream.url)
        client.post(CHAT, {})
        await upstream.saw("gate", request=index)
        await _end(client, end)
        seen.append((await upstream.saw("closed", request=index)).detail)
    assert seen == ["closed its end", "reset the connection", "closed its end"]


async def _end(client: RawClient, how: str) -> None:
    if how == "half_close":
        client.half_close()
    elif how == "reset":
        await client.reset()
    else:
        await client.close()


async def test_more_bytes_where_the_end_was_expected_fail(upstream: ScriptedUpstream, connect: Connect) -> None:
    upstream.always(json_answer(b"{}"))
    client = await connect(upstream.url)
    client.post(CHAT, {})
    with pytest.raises(AssertionError, match=r"expected the end, got b'HTTP/1.1 200 OK"):
        await client.ended()


async def test_silence_fails_with_what_was_received(
    upstream: ScriptedUpstream, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = json_answer(b"{}")
    upstream.always(script.do(Do.UNTIL_READ, 10).do(Do.HANG, 10))
    client = await connect(upstream.url)
    client.post(CHAT, {})
    await upstream.saw("hanging")
    monkeypatch.setattr("tests.support.client.PATIENCE", 0)
    with pytest.raises(AssertionError, match=r"nothing more came; received so far: b'HTTP/1.1 2'"):
        await client.head()


@each(
    ("wire", "complaint"),
    [
        (b"x\r\n", "not a chunk size: b'x'"),
        (b"\r\n", "not a chunk size: b''"),
        (b"-1\r\n", "not a chunk size"),
        (b"0x1\r\na\r\n", "not a chunk size"),
        (b"1\r\nab\r\n", "a chunk of 1 bytes is not followed by a line end"),
        (b"1" * 40, "no chunk size in"),
        (b"0\r\nno trailer\r\n\r\n", "not a header line"),
    ],
)
def test_malformed_chunks_are_refused(wire: bytes, complaint: str) -> None:
    with pytest.raises(ProtocolError, match=complaint):
        BodyReader("chunked").feed(bytearray(wire))


def test_chunks_are_read_the_same_at_every_split() -> None:
    wire = encode_chunk(b"hello") + encode_chunk(b"\r\n0\r\n\r\n") + last_chunk([("a", "1"), ("b", "2")])
    for cut in range(len(wire) + 1):
        reader, buffer = BodyReader("chunked"), bytearray()
        for part in (wire[:cut], wire[cut:] + b"next answer"):
            buffer += part
            reader.feed(buffer)
        assert (reader.chunks, reader.trailers, reader.done) == (
            [b"hello", b"\r\n0\r\n\r\n"],
            [("a", "1"), ("b", "2")],
            True,
        )
        assert buffer == b"next answer"


def test_head_parsing_keeps_case_and_order_and_refuses_what_is_no_header() -> None:
    start_line, headers = parse_head(b"HTTP/1.1 200 OK\r\nA-b: 1\r\na-B:2\r\n\r\n")
    assert (start_line, headers) == ("HTTP/1.1 200 OK", [("A-b", "1"), ("a-B", "2")])
    assert header(headers, "a-b") == "1"
    for line in (b"no colon", b" folded: 1", b": empty", b"space : 1", b"a: 1\nb: 2"):
        with pytest.raises(ProtocolError, match="not a header line"):
            parse_head(b"HTTP/1.1 200 OK\r\n" + line + b"\r\n\r\n")


def test_an_empty_chunk_would_end_the_body() -> None:
    with pytest.raises(ValueError, match="an empty chunk ends a body"):
        encode_chunk(b"")
