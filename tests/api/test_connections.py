"""What a client may do with a connection: the limits of the protocol class, which serves every path on both faces."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
from pathlib import Path

import pytest

from gateway.api.protocol import LINGER, LINGER_BYTES, MAX_PIPELINED, DefaultLines
from gateway.settings import Bounds, Listen, Tls
from tests.conftest import Connect
from tests.support.client import RawClient, Response, request_bytes
from tests.support.gateway import AUTH, CHAT, JSON, MODEL, Face, Gateway, StartGateway, chat, post_bytes, relayed, until
from tests.support.http1 import encode_chunk, encode_head, last_chunk
from tests.support.recordings import load
from tests.support.script import Gate, event_stream, json_answer, play
from tests.support.sockets import free_port
from tests.support.table import named
from tests.support.tls import LOCALHOST, client_context
from tests.support.upstream import ScriptedUpstream

GOOD = play(load("vllm", "chat_basic"))
STREAM = event_stream(load("vllm", "chat_stream").events())
BODY = json.dumps(chat()).encode()
HEALTH = request_bytes("GET", "/health/live")


def code_of(answer: Response) -> str | None:
    """Return the code of an error in OpenAI's envelope."""
    assert (answer.header("x-request-id") or "").startswith("req_")
    code: str | None = answer.json()["error"]["code"]
    return code


def raw_post(*lines: str, body: bytes = BODY) -> bytes:
    """Return a POST with exactly these header lines after host, key and type."""
    head = [f"POST {CHAT} HTTP/1.1", "host: test", f"{AUTH[0][0]}: {AUTH[0][1]}", "content-type: application/json"]
    return "\r\n".join([*head, *lines, "", ""]).encode("latin-1") + body


# --- what is not HTTP ------------------------------------------------------------------------------------------------

GARBAGE = {
    "TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)),
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "text": b"hello\r\n\r\n",
    "zeros": bytes(200),
    "an answer": b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
    "HTTP/9.9": b"GET / HTTP/9.9\r\n\r\n",
    "no such method": b"BREW /pot HTTP/1.1\r\nhost: test\r\n\r\n",
    "lower-case method": b"get / HTTP/1.1\r\nhost: test\r\n\r\n",
    "redis": b"*1\r\n$4\r\nPING\r\n",
    "no target": b"GET  HTTP/1.1\r\nhost: test\r\n\r\n",
    "header without colon": b"GET / HTTP/1.1\r\nhost test\r\n\r\n",
    "space before colon": b"GET / HTTP/1.1\r\nhost : test\r\n\r\n",
    "folded header": b"GET / HTTP/1.1\r\nhost: test\r\n folded\r\n\r\n",
    "NUL in a header": b"GET / HTTP/1.1\r\nhost: te\x00st\r\n\r\n",
    "line end in a name": b"GET / HTTP/1.1\r\nho\nst: test\r\n\r\n",
    "proxy tunnel": b"CONNECT engine:8000 HTTP/1.1\r\nhost: engine:8000\r\n\r\n",
}


async def test_what_is_not_http_gets_a_400_and_the_end(
    gateway: Gateway, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """An answer that a person with a wrong port or scheme can read, in the envelope, with an id."""
    for index, (name, garbage) in enumerate(GARBAGE.items()):
        with named(name=name):
            client = await connect(gateway.url)
            client.send(garbage)
            answer = await client.response()
            assert answer.status == 400
            assert answer.json()["error"]["type"] == "invalid_request_error"
            assert code_of(answer) is None
            assert answer.header("connection") == "close"
            assert await client.ended() in ("close", "reset")
            assert relayed(upstream) == []
            assert (await gateway.line(index=index))["status"] == 400


SMUGGLED = {
    "length and chunked": ("content-length: 5", "transfer-encoding: chunked"),
    "chunked and length": ("transfer-encoding: chunked", "content-length: 5"),
    "two lengths": (f"content-length: {len(BODY)}", "content-length: 5"),
    "the same length twice": (f"content-length: {len(BODY)}", f"content-length: {len(BODY)}"),
    "a list of lengths": ("content-length: 5, 5",),
    "a signed length": ("content-length: +5",),
    "a negative length": ("content-length: -5",),
    "a hexadecimal length": ("content-length: 0x5",),
    "an empty length": ("content-length: ",),
    "a length beyond 64 bits": ("content-length: 99999999999999999999999",),
    "an unknown coding": ("transfer-encoding: xchunked",),
    "chunked not last": ("transfer-encoding: chunked, identity",),
    "a coding hidden by a space": ("transfer-encoding : chunked",),
    "a coding hidden by a fold": ("transfer-encoding:\r\n chunked",),
}


async def test_a_body_of_two_meanings_is_refused(
    gateway: Gateway, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """Where two readers could disagree on the end of a body, the connection ends: nothing after it is a request."""
    for name, lines in SMUGGLED.items():
        with named(name=name):
            client = await connect(gateway.url)
            client.send(raw_post(*lines, body=b"0\r\n\r\n" + HEALTH))
            answer = await client.response()
            assert answer.status == 400
            assert code_of(answer) is None
            assert await client.ended() in ("close", "reset")
            assert relayed(upstream) == []
            assert bytes(client.received).count(b"HTTP/1.1 ") == 1


CHUNKS = {
    "no hexadecimal size": b"zz\r\nhello\r\n",
    "a size beyond 64 bits": b"fffffffffffffffff\r\nhello\r\n",
    "a chunk longer than its size": b"2\r\nhello\r\n",
    "a negative size": b"-5\r\nhello\r\n",
    "a bare line end": b"5\nhello\n0\n\n",
}


async def test_malformed_chunks_are_refused(gateway: Gateway, upstream: ScriptedUpstream, connect: Connect) -> None:
    """No engine sees the request, and nothing of it stays alive."""
    for name, chunks in CHUNKS.items():
        with named(name=name):
            client = await connect(gateway.url)
            client.send(raw_post("transfer-encoding: chunked", body=chunks))
            answer = await client.response()
            assert answer.status == 400
            assert code_of(answer) is None
            assert await client.ended() in ("close", "reset")
            assert relayed(upstream) == []
            await gateway.idle()


async def test_a_chunked_body_is_read_however_it_is_cut(
    gateway: Gateway, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """One byte a chunk, each chunk in a read of its own, extensions and trailers included."""
    upstream.always(GOOD, path=CHAT)
    client = await connect(gateway.url)
    pieces = [encode_chunk(BODY[index : index + 1]) for index in range(len(BODY) - 3)]
    pieces.append(b"3;ext=1\r\n" + BODY[-3:] + b"\r\n")
    await client.send_pieces([raw_post("transfer-encoding: chunked", body=b""), *pieces])
    client.send(last_chunk([("x-trailer", "1")]))
    assert (await client.response()).status == 200
    assert relayed(upstream)[0].json() == {**chat(), "model": "smollm2"}


async def test_trailers_are_no_headers(gateway: Gateway, upstream: ScriptedUpstream, connect: Connect) -> None:
    """A key that comes after the body lets nobody in, also while the request waits for its turn."""
    gate = Gate()
    upstream.always(GOOD.do(gate, 0), path=CHAT)
    head = encode_head(f"POST {CHAT} HTTP/1.1", [("host", "test"), *JSON, ("transfer-encoding", "chunked")])
    late = head + encode_chunk(BODY) + last_chunk([*AUTH, ("x-forwarded-for", "1.2.3.4")])
    client = await connect(gateway.url)
    client.send(post_bytes(chat()) + late)
    await upstream.saw("gate")
    gate.open()
    assert [(await client.response()).status for _ in range(2)] == [200, 401]
    assert len(relayed(upstream)) == 1


@pytest.mark.parametrize(
    "flood",
    [b"x-t: 1\r\n", b"x" * 1000, b"x-long: " + b"y" * 1000],
    ids=["many trailers", "one endless name", "one endless value"],
)
async def test_a_flood_of_trailers_is_cut_off(
    gateway: Gateway, upstream: ScriptedUpstream, connect: Connect, flood: bytes
) -> None:
    """Nothing bounds what may follow the last chunk but us."""
    client = await connect(gateway.url)
    client.send(raw_post("transfer-encoding: chunked", body=encode_chunk(BODY) + b"0\r\n"))
    await _flood(client, flood)
    answer = await client.response()
    assert answer.status in (400, 431)
    assert relayed(upstream) == []
    await gateway.idle()


async def test_a_flood_of_chunk_extensions_is_cut_off(
    gateway: Gateway, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """A size line may carry words that mean nothing, but not megabytes of them."""
    client = await connect(gateway.url)
    client.send(raw_post("transfer-encoding: chunked", body=b"1;"))
    await _flood(client, b"a" * 1000)
    answer = await client.response()
    assert answer.status in (400, 431)
    assert relayed(upstream) == []
    await gateway.idle()


async def _flood(client: RawClient, piece: bytes) -> None:
    """Send until the server says something, at most ten megabytes."""
    sent = 0
    batch = piece * (65536 // len(piece) + 1)
    while not client.received and client.end is None:
        assert sent < 10_000_000, "ten megabytes were taken without a word"
        await client.send_pieces([batch])
        sent += len(batch)


# --- headers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [CHAT, "/v1/models"])
async def test_too_many_headers_are_refused(
    start_gateway: StartGateway, upstream: ScriptedUpstream, connect: Connect, path: str
) -> None:
    """By their number, in one read or many; exactly the limit passes."""
    gateway = await start_gateway(upstream, bounds=Bounds(header_count=20))
    upstream.always(GOOD, path=CHAT)
    # host, content-length, content-type and key are four of them.
    more = [(f"x-{index}", "1") for index in range(17)]
    for count, status in ((16, 200 if path == CHAT else 405), (17, 431)):
        client = await connect(gateway.url)
        request = request_bytes("POST", path, [*JSON, *AUTH, *more[:count]], BODY)
        await client.send_pieces([request[:100], request[100:200], request[200:]])
        answer = await client.response()
        assert answer.status == status
    assert code_of(answer) == "headers_too_large"
    assert await client.ended() == "close"
    assert len(relayed(upstream)) == (1 if path == CHAT else 0)


@pytest.mark.parametrize("path", [CHAT, "/v1/models"])
async def test_too_large_headers_are_refused(
    start_gateway: StartGateway, upstream: ScriptedUpstream, connect: Connect, path: str
) -> None:
    gateway = await start_gateway(upstream, bounds=Bounds(header_bytes=4096))
    client = await connect(gateway.url)
    client.send(request_bytes("POST", path, [*JSON, *AUTH, ("x-large", "y" * 4096)], BODY))
    answer = await client.response()
    assert (answer.status, code_of(answer)) == (431, "headers_too_large")
    assert await client.ended() == "close"
    assert relayed(upstream) == []


@pytest.mark.parametrize(
    "start",
    [
        b"POST /v1/chat/completions HTTP/1.1\r\nx-endless: ",
        b"POST /v1/chat/completions HTTP/1.1\r\nx-end",
        b"POST /v1/",
    ],
    ids=["value", "name", "target"],
)
async def test_an_endless_head_is_cut_off_as_it_grows(gateway: Gateway, connect: Connect, start: bytes) -> None:
    """One header, or a target, without an end: its bytes are counted while they come."""
    client = await connect(gateway.url)
    client.send(start)
    await _flood(client, b"x" * 1000)
    answer = await client.response()
    assert (answer.status, code_of(answer)) == (431, "headers_too_large")
    assert await client.ended() in ("close", "reset")


async def test_a_large_body_in_the_same_read_is_no_large_head(gateway: Gateway, upstream: ScriptedUpstream) -> None:
    """The bound on heads counts heads."""
    upstream.always(GOOD, path=CHAT)
    for _ in range(2):
        assert (await gateway.ask(chat(user="x" * 200_000))).status == 200


async def test_heads_behind_a_body_are_bounded_too(
    gateway: Gateway, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """The second request's head is not measured with the first one's body, and is measured."""
    upstream.always(GOOD, path=CHAT)
    client = await connect(gateway.url)
    client.send(post_bytes(chat(user="x" * 60_000)) + request_bytes("GET", "/health/live", [("x-a", "y" * 10_000)]))
    assert [(await client.response()).status for _ in range(2)] == [200, 200]
    client.send(request_bytes("GET", "/health/live", [("x-a", "y" * 70_000)]))
    assert (await client.response()).status == 431


async def test_refused_clients_are_not_listened_to_for_ever(gateway: Gateway) -> None:
    """After a refusal the rest is read on unseen, so that the answer arrives, but only so much and so long."""
    connections = gateway.replica.listeners[0].state.connections
    for talks_on in (True, False):
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.replica.port)
        writer.write(b"GET / HTTP/1.1\r\nbad header\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 400 ")
        assert len(connections) == 1
        if talks_on:
            with pytest.raises(ConnectionError):
                for _ in range(4 * LINGER_BYTES // 65536):
                    writer.write(bytes(65536))
                    await writer.drain()
        else:
            gateway.advance(LINGER)
        await until(lambda: not connections, "the connection lives on")
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


# --- pipelining ------------------------------------------------------------------------------------------------------


def numbered(upstream: ScriptedUpstream) -> None:
    """Have the engine answer each request with the request's own seed, so that answers can be told apart."""
    upstream.always(lambda request: json_answer(b'{"seed":%d}' % request.json()["seed"]), path=CHAT)


async def test_pipelined_requests_are_answered_in_order(
    gateway: Gateway, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """All in one write; the engine never gets two at once from one connection."""
    numbered(upstream)
    client = await connect(gateway.url)
    client.send(b"".join(post_bytes(chat(seed=number)) for number in range(10)))
    assert [(await client.response()).json()["seed"] for _ in range(10)] == list(range(10))
    assert [request.json()["seed"] for request in relayed(upstream)] == list(range(10))
    assert gateway.replica.pool.endpoints[0].connections.accepted == 1
    await gateway.idle()


async def test_pipelined_requests_of_both_kinds_are_answered_in_order(
    gateway: Gateway, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """Relayed ones and FastAPI's wait for each other, whichever comes first, refused ones in between."""
    numbered(upstream)
    client = await connect(gateway.url)
    refused = post_bytes(chat(seed=9), headers=[("x", "1")], path=f"{CHAT}?")
    await client.send_pieces(
        [
            HEALTH + post_bytes(chat(seed=1)),
            HEALTH + HEALTH + post_bytes(chat(seed=2)) + post_bytes(chat(seed=3)),
            post_bytes(b"{", "/v1/completions") + request_bytes("GET", "/v1/models", AUTH) + post_bytes(chat(seed=4)),
        ]
    )
    answers = [await client.response() for _ in range(9)]
    seen = [next(iter(answer.json().values())) if answer.status == 200 else answer.status for answer in answers]
    assert seen == ["ok", 1, "ok", "ok", 2, 3, 400, "list", 4]
    client.send(refused + HEALTH)
    assert (await client.response()).status == 401
    await gateway.idle()


async def test_a_pipelined_request_waits_for_a_stream(
    gateway: Gateway, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """Nothing of the second answer, and no engine's work on it, before the first is through."""
    gate = Gate()
    upstream.queue(STREAM.do(gate, STREAM.after_frame(1)), GOOD, path=CHAT)
    client = await connect(gateway.url)
    client.send(post_bytes(chat(stream=True)) + HEALTH + post_bytes(chat()))
    await client.head()
    for _ in range(2):
        await client.event()
    await upstream.saw("gate")
    assert len(relayed(upstream)) == 1
    gate.open()
    assert (await client.events())[-1] == b"data: [DONE]\n\n"
    assert (await client.response()).json() == {"status": "ok"}
    assert (await client.response()).json()["object"] == "chat.completion"


async def test_a_body_may_come_late_to_a_request_that_waits(
    gateway: Gateway, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """The second request's head is read while the first is served, its body afterwards, and the other way round."""
    gate = Gate()
    upstream.queue(GOOD.do(gate, 0), GOOD, path=CHAT)
    second = post_bytes(chat(user="second"))
    client = await connect(gateway.url)
    await client.send_pieces([post_bytes(chat()), second[:-20]])
    await upstream.saw("gate")
    gate.open()
    assert (await client.response()).status == 200
    client.send(second[-20:])
    assert (await client.response()).status == 200
    assert relayed(upstream)[1].json()["user"] == "second"


async def test_pipelining_has_a_bound(gateway: Gateway, upstream: ScriptedUpstream, connect: Connect) -> None:
    """What is being answered is answered; then the connection ends and nobody works on the rest."""
    gate = Gate()
    upstream.always(GOOD.do(gate, 0), path=CHAT)
    client = await connect(gateway.url)
    client.send(post_bytes(chat()) * (MAX_PIPELINED + 2))
    await upstream.saw("gate")
    gate.open()
    assert (await client.response()).status == 200
    assert await client.ended() in ("close", "reset")
    assert len(relayed(upstream)) == 1
    await gateway.idle()


async def test_as_many_as_the_bound_may_wait(gateway: Gateway, upstream: ScriptedUpstream, connect: Connect) -> None:
    gate = Gate()
    upstream.always(GOOD.do(gate, 0), path=CHAT)
    client = await connect(gateway.url)
    client.send(post_bytes(chat()) * (MAX_PIPELINED + 1))
    await upstream.saw("gate")
    gate.open()
    assert [(await client.response()).status for _ in range(MAX_PIPELINED + 1)] == [200] * (MAX_PIPELINED + 1)


@pytest.mark.parametrize(
    "refused",
    [
        post_bytes(chat(), headers=()),
        request_bytes("POST", CHAT, [*AUTH, *((f"x-{index}", "1") for index in range(200))], BODY),
        b"GET / HTTP/1.1\r\nbad header\r\n\r\n",
        raw_post("content-length: 99999999"),
    ],
    ids=["no key", "too many headers", "malformed", "too large"],
)
async def test_nothing_is_served_behind_a_refusal_that_ends_the_connection(
    gateway: Gateway, upstream: ScriptedUpstream, connect: Connect, refused: bytes
) -> None:
    """Also when it came in the same read: what follows might be the refused body."""
    upstream.always(GOOD, path=CHAT)
    client = await connect(gateway.url)
    client.send(refused + post_bytes(chat()) * 2 + HEALTH)
    answer = await client.response()
    assert answer.status in (400, 401, 413, 431)
    if answer.header("connection") == "close":
        assert await client.ended() in ("close", "reset")
        assert relayed(upstream) == []
        assert len(gateway.lines("request")) == 1
    else:
        # The ASGI face asks for the body first: then the connection is in order, and the rest is served.
        assert [(await client.response()).status for _ in range(3)] == [200, 200, 200]
    await gateway.idle()


async def test_bodies_that_wait_are_bounded_together(
    start_gateway: StartGateway, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """Sixteen requests may wait on a connection, but not sixteen bodies of the largest size.

    On the ASGI face uvicorn stops reading beyond 64 KiB instead.
    """
    gateway = await start_gateway(upstream, bounds=Bounds(body=100_000))
    gate = Gate()
    upstream.always(STREAM.do(gate, STREAM.after_frame(1)), path=CHAT)
    client = await connect(gateway.url)
    client.send(post_bytes(chat(stream=True)))
    await upstream.saw("gate")
    client.send(post_bytes(chat(user="x" * 90_000)) * 3)
    if gateway.face == "protocol":
        assert await _end_of(client) in ("close", "reset")
        await upstream.saw("closed", request=1)
    else:
        gate.open()
        assert (await client.response()).status == 200
    await client.close()
    await gateway.idle()


async def _end_of(client: RawClient) -> str:
    """Read the answer that was cut off, and return how the connection ended."""
    assert not (await client.response()).complete
    return await client.ended()


@pytest.mark.parametrize("late", [True, False])
async def test_a_waiting_request_that_fails_spares_the_one_being_served(
    gateway: Gateway, upstream: ScriptedUpstream, connect: Connect, late: bool
) -> None:
    """A body that does not come, or comes malformed, behind a stream: the stream ends as it should."""
    gate = Gate()
    upstream.always(STREAM.do(gate, STREAM.after_frame(1)), path=CHAT)
    client = await connect(gateway.url)
    await client.send_pieces([post_bytes(chat(stream=True)), raw_post("transfer-encoding: chunked", body=b"5\r\n")])
    await upstream.saw("gate")
    if late:
        gateway.advance(61)
    else:
        await client.send_pieces([b"hello!!\r\n"])
    gate.open()
    answer = await client.response()
    assert (answer.status, answer.complete, answer.events()[-1]) == (200, True, b"data: [DONE]\n\n")
    assert await client.ended() in ("close", "reset")
    assert len(relayed(upstream)) == 1
    await gateway.idle()


async def test_garbage_behind_a_request_lets_it_finish(
    gateway: Gateway, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """A stream under way ends as it should; then the connection does."""
    gate = Gate()
    upstream.always(STREAM.do(gate, STREAM.after_frame(1)), path=CHAT)
    client = await connect(gateway.url)
    await client.send_pieces([post_bytes(chat(stream=True)), b"\x00\x01garbage\r\n\r\n"])
    await upstream.saw("gate")
    gateway.advance(14)
    gate.open()
    answer = await client.response()
    assert (answer.status, answer.complete, answer.events()[-1]) == (200, True, b"data: [DONE]\n\n")
    assert await client.ended() in ("close", "reset")


# --- ways to leave ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_a_half_closed_client_is_gone(
    gateway: Gateway, upstream: ScriptedUpstream, connect: Connect, stream: bool
) -> None:
    """Who says that nothing more will come is taken to have left: the engine's work stops."""
    gate = Gate()
    upstream.always((STREAM if stream else GOOD).do(gate, 0), path=CHAT)
    client = await connect(gateway.url)
    client.post(CHAT, chat(stream=stream), AUTH)
    await upstream.saw("gate")
    client.half_close()
    await upstream.saw("closed", request=1)
    assert (await gateway.line())["outcome"] == "client_gone"
    await gateway.idle()


async def test_a_client_that_leaves_takes_its_waiting_requests_along(
    gateway: Gateway, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """No engine sees what waited behind the request being served."""
    gate = Gate()
    upstream.always(GOOD.do(gate, 0), path=CHAT)
    client = await connect(gateway.url)
    client.send(post_bytes(chat()) + HEALTH + post_bytes(chat()) * 3)
    await upstream.saw("gate")
    await client.reset()
    await upstream.saw("closed", request=1)
    await gateway.idle()
    assert len(relayed(upstream)) == 1
    assert [line["outcome"] for line in gateway.lines("request")] == ["client_gone"]


async def test_a_client_that_leaves_in_its_body_leaves_nothing(
    gateway: Gateway, upstream: ScriptedUpstream, connect: Connect
) -> None:
    client = await connect(gateway.url)
    await client.send_pieces([raw_post("content-length: 500", body=b"{")])
    await until(lambda: gateway.replica.edge.active, "the request was not let in")
    await client.close()
    await gateway.idle()
    assert (await gateway.line())["outcome"] == "client_gone"
    assert relayed(upstream) == []


# --- other HTTP ------------------------------------------------------------------------------------------------------


async def test_expect_100_continue_is_answered(gateway: Gateway, upstream: ScriptedUpstream, connect: Connect) -> None:
    """curl sends it with larger bodies and waits a second otherwise."""
    upstream.always(GOOD, path=CHAT)
    client = await connect(gateway.url)
    for _ in range(2):
        client.send(raw_post(f"content-length: {len(BODY)}", "expect: 100-continue", body=b""))
        head = await client.head()
        assert head.status == 100
        client.send(BODY)
        assert (await client.response()).status == 200


async def test_nobody_is_told_to_send_a_body_that_is_refused(
    gateway: Gateway, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """Without a key the answer comes at once, and no 100 before it."""
    client = await connect(gateway.url)
    client.send(
        encode_head(
            f"POST {CHAT} HTTP/1.1",
            [("host", "test"), *JSON, ("content-length", "100"), ("expect", "100-continue")],
        )
    )
    assert (await client.head()).status == 401
    assert relayed(upstream) == []


@pytest.mark.parametrize("upgrade", ["websocket", "h2c"])
async def test_an_upgrade_is_not_followed(
    gateway: Gateway, upstream: ScriptedUpstream, connect: Connect, upgrade: str
) -> None:
    """The offer is refused in the envelope, or the request served as if it had not been made; never switched."""
    upstream.always(GOOD, path=CHAT)
    client = await connect(gateway.url)
    client.send(raw_post(f"content-length: {len(BODY)}", "connection: upgrade", f"upgrade: {upgrade}"))
    answer = await client.response()
    assert answer.status in (200, 400)
    assert (answer.header("x-request-id") or "").startswith("req_")
    get = await connect(gateway.url)
    get.send(request_bytes("GET", "/health/live", [("connection", "upgrade"), ("upgrade", upgrade)]))
    assert (await get.response()).status in (200, 400)
    await gateway.idle()


async def test_http_1_0_gets_whole_answers(gateway: Gateway, upstream: ScriptedUpstream, connect: Connect) -> None:
    """With a length and then the end, whatever the client asks for."""
    upstream.always(GOOD, path=CHAT)
    request = post_bytes(chat()).replace(b"HTTP/1.1", b"HTTP/1.0")
    client = await connect(gateway.url)
    client.send(request)
    answer = await client.response()
    assert (answer.status, answer.header("transfer-encoding")) == (200, None)
    assert await client.ended() == "close"
    kept = await connect(gateway.url)
    kept.send(request.replace(b"host: test", b"connection: keep-alive"))
    assert (await kept.response()).header("connection") == "close"
    assert await kept.ended() == "close"


async def test_http_1_0_streams_end_with_the_connection(
    gateway: Gateway, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """HTTP/1.0 knows no chunks: the end is the connection's. On the ASGI face the framing is uvicorn's own."""
    upstream.always(STREAM, path=CHAT)
    client = await connect(gateway.url)
    client.send(post_bytes(chat(stream=True)).replace(b"HTTP/1.1", b"HTTP/1.0"))
    answer = await client.response()
    if gateway.face == "protocol":
        assert answer.header("transfer-encoding") is None
    assert answer.header("connection") == "close"
    assert answer.body == load("vllm", "chat_stream").body.replace(b"smollm2", MODEL.encode())


async def test_connection_close_is_kept_to(gateway: Gateway, upstream: ScriptedUpstream, connect: Connect) -> None:
    """A client that says it will not come back gets its answer and the end."""
    for script in (GOOD, STREAM):
        upstream.queue(script, path=CHAT)
        client = await connect(gateway.url)
        client.post(CHAT, chat(stream=script is STREAM), [*AUTH, ("connection", "close")])
        answer = await client.response()
        assert (answer.complete, answer.header("connection")) == (True, "close")
        assert await client.ended() == "close"


async def test_there_may_be_only_so_many_connections(
    start_gateway: StartGateway, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """One too many is told so at once; a place that becomes free can be taken."""
    gateway = await start_gateway(upstream, bounds=Bounds(connections=2))
    clients = [await connect(gateway.url) for _ in range(2)]
    for client in clients:
        client.send(HEALTH)
        assert (await client.response()).status == 200
    third = await connect(gateway.url)
    answer = await third.response()
    assert (answer.status, code_of(answer)) == (503, "server_is_overloaded")
    assert await third.ended() == "close"
    await clients[0].close()
    await until(lambda: len(gateway.replica.listeners[0].state.connections) == 1, "the place is not free")
    assert (await gateway.get("/health/live")).status == 200


# --- addresses -------------------------------------------------------------------------------------------------------


async def use(connect: Connect, address: str, upstream: ScriptedUpstream, tls: ssl.SSLContext | None) -> None:
    """Ask for an answer and a stream on a kept connection, then for what is refused before its body is read."""
    upstream.queue(GOOD, STREAM, path=CHAT)
    client = await connect(address, tls=tls)
    client.post(CHAT, chat(), AUTH)
    assert (await client.response()).status == 200
    client.post(CHAT, chat(stream=True), AUTH)
    assert (await client.response()).events()[-1] == b"data: [DONE]\n\n"
    client.request("GET", "/health/live")
    assert (await client.response()).status == 200
    client.send(raw_post("content-length: 99999999", body=b""))
    answer = await client.response()
    assert (answer.status, code_of(answer)) == (413, "request_too_large")


async def test_clients_come_over_tls(
    start_gateway: StartGateway, upstream: ScriptedUpstream, connect: Connect, face: Face
) -> None:
    """With the operator's own certificate; plain HTTP on that port is nobody's request."""
    listen = Listen(port=free_port(), face=face, tls=Tls(certificate=LOCALHOST, private_key=LOCALHOST))
    gateway = await start_gateway(upstream, listen=listen)
    await use(connect, f"https://localhost:{gateway.replica.port}", upstream, client_context())
    plain = await connect(gateway.url)
    plain.send(HEALTH)
    assert await plain.ended() in ("close", "reset")


async def test_clients_come_over_a_unix_socket(
    start_gateway: StartGateway, upstream: ScriptedUpstream, connect: Connect, face: Face, tmp_path: Path
) -> None:
    """A socket that a dead process left behind is taken over, and nothing is at the address afterwards but ours."""
    path = tmp_path / "gateway.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    gateway = await start_gateway(upstream, listen=Listen(unix_socket=path, face=face))
    await use(connect, f"unix:{path}", upstream, None)
    assert {line.get("client", "") for line in gateway.lines("request")} == {""}


def test_uvicorn_s_own_headers_are_written_as_it_last_made_them() -> None:
    lines = DefaultLines()
    assert lines.of([(b"date", b"one")]) == b"date: one\r\n"
    later = [(b"date", b"two"), (b"server", b"x")]
    assert lines.of(later) == lines.of(later) == b"date: two\r\nserver: x\r\n"
