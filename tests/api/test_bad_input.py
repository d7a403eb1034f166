"""Bad input gets a clear error and changes nothing: no engine sees it and the connection stays sane or ends."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest
from pydantic import SecretStr

from gateway.api.routes import RELAYED
from gateway.settings import Bounds, Caps, KeySettings, Timeouts
from tests.conftest import Connect
from tests.support.client import RawClient, Response
from tests.support.gateway import AUTH, CHAT, JSON, MODEL, Gateway, StartGateway, chat, post_bytes, relayed
from tests.support.http1 import encode_chunk, encode_head
from tests.support.recordings import load
from tests.support.script import play
from tests.support.table import each
from tests.support.upstream import ScriptedUpstream

GOOD = play(load("vllm", "chat_basic"))


def error_of(answer: Response) -> dict[str, Any]:
    """Return the error of an answer in OpenAI's envelope."""
    error: dict[str, Any] = answer.json()["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert (answer.header("x-request-id") or "").startswith("req_")
    return error


def head_of(path: str = CHAT, *extra: tuple[str, str], method: str = "POST") -> bytes:
    """Return the head of a request with a key."""
    return encode_head(f"{method} {path} HTTP/1.1", [("host", "test"), *JSON, *AUTH, *extra])


# --- bodies ----------------------------------------------------------------------------------------------------------

NOT_JSON = {
    "empty": b"",
    "blank": b"  \n ",
    "word": b"hello",
    "cut": b'{"model": "public/model", "mess',
    "cut in a string": b'{"model": "publ',
    "trailing comma": b'{"model": "public/model",}',
    "two values": b'{"model": "public/model"}{"model": "public/model"}',
    "rubbish after": b'{"model": "public/model"} x',
    "single quotes": b"{'model': 'public/model'}",
    "NaN": b'{"model": "public/model", "messages": [], "temperature": NaN}',
    "Infinity": b'{"model": "public/model", "messages": [], "temperature": -Infinity}',
    "hex": b'{"model": "public/model", "max_tokens": 0x10}',
    "leading zero": b'{"model": "public/model", "max_tokens": 010}',
    "not UTF-8": b'{"model": "public/model", "messages": [{"role": "user", "content": "\xff"}]}',
    "UTF-16": '{"model": "public/model"}'.encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf" + b'{"model": "public/model"}',
    "NUL": b'{"model": "public/model", "x": "\x00"}',
    "line end in a string": b'{"model": "public/model", "x": "a\nb"}',
    "100,000 brackets": b'{"model": "public/model", "messages": ' + b"[" * 100_000,
    "100,000 brackets closed": b'{"model": "public/model", "messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "100,000 braces": b'{"a":' * 100_000,
    "only brackets": b"[" * 100_000,
    "brackets in a field nobody reads": b'{"model": "public/model", "x": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    "large and cut": b'{"model": "public/model", "x": "' + b"a" * 400_000,
}
NO_OBJECT = {
    "list": b"[]",
    "list of objects": b'[{"model": "public/model"}]',
    "string": b'"x"',
    "number": b"1",
    "null": b"null",
    "true": b"true",
}


async def test_a_body_that_is_no_json_object_is_refused(
    gateway: Gateway, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """All on one connection: each is a 400 that says what is wrong, and the next request is read as one."""
    client = await connect(gateway.url)
    for name, body in {**NOT_JSON, **NO_OBJECT}.items():
        client.post(CHAT, body, AUTH)
        answer = await client.response()
        assert answer.status == 400, name
        error = error_of(answer)
        assert error["message"].startswith("The body is"), name
        assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", None, None), name
    assert relayed(upstream) == []
    upstream.always(GOOD, path=CHAT)
    client.post(CHAT, chat(), AUTH)
    assert (await client.response()).status == 200
    await gateway.idle()


WRONG_FIELDS: list[tuple[dict[str, Any], str | None]] = [
    ({"model": None}, "model"),
    ({"model": 1}, "model"),
    ({"model": ["public/model"]}, "model"),
    ({"model": {"name": "public/model"}}, "model"),
    ({"model": ""}, "model"),
    ({"model": "x" * 257}, "model"),
    ({"stream": "true"}, "stream"),
    ({"stream": 1}, "stream"),
    ({"stream": []}, "stream"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 2**31}, "max_tokens"),
    ({"max_tokens": 10**40}, "max_tokens"),
    ({"max_completion_tokens": [5]}, "max_completion_tokens"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, None),
]


async def test_a_field_of_a_wrong_type_is_named(gateway: Gateway, upstream: ScriptedUpstream, connect: Connect) -> None:
    """``param`` says which field it is."""
    client = await connect(gateway.url)
    for fields, param in WRONG_FIELDS:
        client.post(CHAT, chat(**fields), AUTH)
        answer = await client.response()
        assert (answer.status, error_of(answer)["param"]) == (400, param), fields
    assert relayed(upstream) == []


@each("number", ["1e999", "-1e400", "1E+1000"])
async def test_a_number_beyond_every_float_is_refused(
    gateway: Gateway, upstream: ScriptedUpstream, number: str
) -> None:
    """JSON allows it, and an engine would compute with infinity."""
    body = json.dumps(chat()).replace("}]", '}], "temperature": ' + number, 1).encode()
    answer = await gateway.ask(body)
    assert (answer.status, error_of(answer)["param"]) == (400, "temperature")
    assert relayed(upstream) == []


async def test_a_key_that_stands_twice_is_sent_once(start_gateway: StartGateway, upstream: ScriptedUpstream) -> None:
    """What is authorised is what is sent: the last one counts for both, and the first one never reaches an engine."""
    keys = (KeySettings(name="alice", key=SecretStr("fb-alice-secret"), models=(MODEL,)),)
    gateway = await start_gateway(upstream, keys=keys)
    upstream.always(GOOD, path=CHAT)
    twice = b'{"model":"secret","model":"public/model","messages":[],"messages":[{"role":"user","content":"b"}]}'
    assert (await gateway.ask(twice)).status == 200
    assert relayed(upstream)[0].body == b'{"model":"smollm2","messages":[{"role":"user","content":"b"}]}'
    answer = await gateway.ask(b'{"model":"public/model","model":"secret","messages":[]}')
    assert (answer.status, error_of(answer)["code"]) == (404, "model_not_found")
    escaped = rb'{"model":"public/model","mode\u006c":"secret","messages":[]}'
    assert (await gateway.ask(escaped)).status == 404
    assert len(relayed(upstream)) == 1


async def test_a_control_field_cannot_hide_behind_an_escape(gateway: Gateway, upstream: ScriptedUpstream) -> None:
    answer = await gateway.ask(rb'{"model":"public/model","messages":[],"pri\u006frity":-1}')
    assert (answer.status, error_of(answer)["param"]) == (400, "priority")
    assert relayed(upstream) == []


# --- sizes -----------------------------------------------------------------------------------------------------------


async def test_a_body_over_the_limit_is_refused_by_its_length(
    start_gateway: StartGateway, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """The answer comes on the head alone: nothing of the body is read, and nobody was told to send it."""
    gateway = await start_gateway(upstream, bounds=Bounds(body=1000))
    for extra in ([], [("expect", "100-continue")]):
        client = await connect(gateway.url)
        client.send(head_of(CHAT, ("content-length", "1001"), *extra))
        answer = await client.response()
        assert answer.raw.startswith(b"HTTP/1.1 413 ")
        assert (answer.status, error_of(answer)["code"]) == (413, "request_too_large")
        assert answer.header("connection") == "close"
        assert await client.ended() == "close"
    assert relayed(upstream) == []
    await gateway.idle()


async def test_a_refused_body_may_be_sent_to_its_end(
    start_gateway: StartGateway, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """A client that writes its whole body first still gets to read the answer: no reset overtakes it."""
    gateway = await start_gateway(upstream, bounds=Bounds(body=1000))
    client = await connect(gateway.url)
    client.post(CHAT, chat(user="x" * 3_000_000), AUTH)
    answer = await client.response()
    assert (answer.status, answer.complete, error_of(answer)["code"]) == (413, True, "request_too_large")
    assert await client.ended() == "close"


async def test_a_chunked_body_is_refused_as_it_grows(
    start_gateway: StartGateway, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """Without a length the limit is noticed at the first byte too many, not at the end."""
    gateway = await start_gateway(upstream, bounds=Bounds(body=1000))
    client = await connect(gateway.url)
    client.send(head_of(CHAT, ("transfer-encoding", "chunked")) + encode_chunk(b"x" * 1000))
    await client.send_pieces([encode_chunk(b"y")])
    answer = await client.response()
    assert (answer.status, error_of(answer)["code"]) == (413, "request_too_large")
    assert await client.ended() == "close"
    assert relayed(upstream) == []
    await gateway.idle()


async def test_a_body_of_exactly_the_limit_passes(start_gateway: StartGateway, upstream: ScriptedUpstream) -> None:
    gateway = await start_gateway(upstream, bounds=Bounds(body=1000))
    upstream.always(GOOD, path=CHAT)
    body = json.dumps(chat()).encode().ljust(1000)
    assert (await gateway.ask(body)).status == 200
    assert (await gateway.ask(body + b" ")).status == 413


async def test_a_key_may_have_a_smaller_limit(start_gateway: StartGateway, upstream: ScriptedUpstream) -> None:
    """The cap of a key counts where it is the smaller one."""
    keys = tuple(
        KeySettings(name=name, key=SecretStr(f"fb-{name}"), caps=Caps(body=size))
        for name, size in (("small", 500), ("large", 50_000))
    )
    gateway = await start_gateway(upstream, keys=keys, bounds=Bounds(body=1000))
    upstream.always(GOOD, path=CHAT)
    wanted = {("small", 500): 200, ("small", 501): 413, ("large", 1000): 200, ("large", 1001): 413}
    for (name, size), status in wanted.items():
        body = json.dumps(chat()).encode().ljust(size)
        assert (await gateway.ask(body, headers=[("authorization", f"Bearer fb-{name}")])).status == status


async def test_large_bodies_together_are_bounded(
    start_gateway: StartGateway, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """The process holds so many bytes of large bodies; what would be more is told to come back, and then it may."""
    bounds = Bounds(offload_above=10_000, parse_budget=50_000)
    gateway = await start_gateway(upstream, bounds=bounds)
    upstream.always(GOOD, path=CHAT)
    first = await connect(gateway.url)
    first.send(head_of(CHAT, ("content-length", "40000")))
    second = await connect(gateway.url)
    body = json.dumps(chat()).encode().ljust(20_000)
    # The first one's head is read once a request sent after it is answered.
    assert (await gateway.ask(chat())).status == 200
    second.post(CHAT, body, AUTH)
    answer = await second.response()
    assert (answer.status, error_of(answer)["code"]) == (503, "server_is_overloaded")
    assert answer.header("retry-after") == "1"
    await first.close()
    await gateway.idle()
    assert (await gateway.ask(body)).status == 200
    chunked = await connect(gateway.url)
    chunked.request("POST", CHAT, [*JSON, *AUTH], [body[:15_000], body[15_000:], b" " * 40_000])
    assert (await chunked.response()).status == 503
    await gateway.idle()


@pytest.mark.parametrize("size", [300_000, 3_000_000])
async def test_a_large_body_comes_through(gateway: Gateway, upstream: ScriptedUpstream, size: int) -> None:
    """Bodies beyond 256 KB are taken apart off the loop; nothing of them is lost."""
    upstream.always(GOOD, path=CHAT)
    content = "é" * (size // 2)
    body = json.dumps(chat(messages=[{"role": "user", "content": content}]), ensure_ascii=False).encode()
    assert (await gateway.ask(body)).status == 200
    assert relayed(upstream)[0].json()["messages"][0]["content"] == content
    assert (await gateway.line())["bytes_in"] == len(body)
    await gateway.idle()


# --- slow clients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [CHAT, "/v1/models", "/nothing"])
async def test_headers_that_do_not_come_are_given_up(
    start_gateway: StartGateway, upstream: ScriptedUpstream, connect: Connect, path: str
) -> None:
    """A trickle moves no deadline: the whole head has so many seconds, on every path."""
    gateway = await start_gateway(upstream, timeouts=Timeouts(headers=5))
    client = await connect(gateway.url)
    await client.send_pieces([f"POST {path} HTTP/1.1\r\nho".encode()])
    gateway.advance(4.9)
    await client.send_pieces([b"st: test\r\nx-a: 1\r\n"])
    assert client.end is None
    gateway.advance(0.2)
    answer = await client.response()
    assert (answer.status, error_of(answer)["code"]) == (408, "request_timeout")
    assert error_of(answer)["message"] == "The headers took longer than 5 s to arrive."
    assert await client.ended() == "close"


async def test_a_connection_that_says_nothing_is_closed(gateway: Gateway, connect: Connect) -> None:
    """Nothing was asked, so nothing is answered."""
    client = await connect(gateway.url)
    await gateway.get("/health/live")
    gateway.advance(10)
    assert await client.ended() == "close"


async def test_an_idle_connection_is_kept_for_its_time(
    gateway: Gateway, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """75 s by default, counted from the last answer, on relayed and other paths."""
    upstream.always(GOOD, path=CHAT)
    client = await connect(gateway.url)
    for _ in range(2):
        client.send(post_bytes(chat()))
        assert (await client.response()).status == 200
        gateway.advance(74)
        client.request("GET", "/health/live")
        assert (await client.response()).status == 200
        gateway.advance(74)
    gateway.advance(2)
    assert await client.ended() == "close"


async def test_the_next_head_on_a_kept_connection_has_its_time_too(
    gateway: Gateway, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """A second request's head that stops in the middle is given up like the first one's."""
    upstream.always(GOOD, path=CHAT)
    client = await connect(gateway.url)
    client.send(post_bytes(chat()))
    await client.response()
    gateway.advance(60)
    await client.send_pieces([b"POST /v1/chat/completions HTTP/1.1\r\n"])
    gateway.advance(10)
    assert (await client.response()).status == 408


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_that_does_not_come_is_given_up(
    start_gateway: StartGateway, upstream: ScriptedUpstream, connect: Connect, chunked: bool
) -> None:
    """The whole body has so many seconds, trickled or not; the answer says so and the connection ends."""
    gateway = await start_gateway(upstream, timeouts=Timeouts(body=20))
    client = await connect(gateway.url)
    framing = ("transfer-encoding", "chunked") if chunked else ("content-length", "100")
    await client.send_pieces([head_of(CHAT, framing), b"5\r\nhello\r\n" if chunked else b"hello"])
    gateway.advance(19.9)
    await client.send_pieces([b"1\r\n!\r\n" if chunked else b"!"])
    assert not client.received
    gateway.advance(0.2)
    answer = await client.response()
    assert (answer.status, error_of(answer)["code"]) == (408, "request_timeout")
    assert error_of(answer)["message"] == "The body took longer than 20 s to arrive."
    assert answer.header("connection") == "close"
    assert await client.ended() == "close"
    assert relayed(upstream) == []
    line = await gateway.line()
    assert (line["outcome"], line["status"], line["key"]) == ("refused", 408, "alice")
    assert len(gateway.lines("request")) == 1
    await gateway.idle()


async def test_a_body_nobody_asked_for_holds_no_connection(gateway: Gateway, connect: Connect) -> None:
    """FastAPI answers without reading it; the connection is idle from then on, and its rest is awaited no longer."""
    client = await connect(gateway.url)
    await client.send_pieces([head_of("/v1/models", ("content-length", "100")), b"hello"])
    assert (await client.response()).status == 405
    gateway.advance(61)
    assert await client.ended() in ("close", "reset")


async def test_a_connection_is_idle_once_a_body_nobody_asked_for_is_through(gateway: Gateway, connect: Connect) -> None:
    """Its end comes after the answer: from then on the connection has the time of a kept one, not for ever."""
    client = await connect(gateway.url)
    await client.send_pieces([head_of("/v1/models", ("content-length", "10")), b"hello"])
    assert (await client.response()).status == 405
    await client.send_pieces([b"world"])
    gateway.advance(74)
    client.request("GET", "/health/live")
    assert (await client.response()).status == 200
    gateway.advance(76)
    assert await client.ended() == "close"
    other = await connect(gateway.url)
    await other.send_pieces([head_of("/v1/models", ("content-length", "10")), b"hello"])
    assert (await other.response()).status == 405
    await other.send_pieces([b"world"])
    gateway.advance(76)
    assert await other.ended() == "close"


# --- content types and encodings -------------------------------------------------------------------------------------


async def test_a_compressed_body_is_refused(gateway: Gateway, upstream: ScriptedUpstream) -> None:
    """A few bytes could become gigabytes; the answer says to send it plain."""
    body = gzip.compress(json.dumps(chat()).encode())
    for encoding in ("gzip", "br", "deflate", "GZIP", "gzip, gzip", "zstd"):
        answer = await gateway.ask(body, headers=[*AUTH, ("content-encoding", encoding)])
        assert (answer.status, error_of(answer)["code"]) == (415, "unsupported_media_type"), encoding
    assert relayed(upstream) == []


@each("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""])
async def test_a_body_of_another_type_is_refused(gateway: Gateway, upstream: ScriptedUpstream, kind: str) -> None:
    """A form or plain text can be sent by any web page without asking: only JSON is read."""
    async with await RawClient.connect(gateway.url) as client:
        client.request("POST", CHAT, [("content-type", kind), *AUTH], json.dumps(chat()).encode())
        answer = await client.response()
    assert (answer.status, error_of(answer)["code"]) == (415, "unsupported_media_type")
    assert relayed(upstream) == []


@each("kind", ["application/json", "Application/JSON; charset=utf-8", "application/vnd.x+json", None])
async def test_json_by_any_name_is_read(gateway: Gateway, upstream: ScriptedUpstream, kind: str | None) -> None:
    upstream.always(GOOD, path=CHAT)
    async with await RawClient.connect(gateway.url) as client:
        headers = [("content-encoding", "identity"), *AUTH]
        if kind is not None:
            headers.append(("content-type", kind))
        client.request("POST", CHAT, headers, json.dumps(chat()).encode())
        assert (await client.response()).status == 200


# --- methods and paths -----------------------------------------------------------------------------------------------


async def test_another_method_on_a_relayed_path_is_a_405(
    gateway: Gateway, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """With the one that is allowed, as HTTP asks for; the connection is kept."""
    client = await connect(gateway.url)
    for path in RELAYED:
        for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"):
            client.request(method, path, AUTH)
            answer = await client.response()
            assert (answer.status, answer.header("allow")) == (405, "POST"), (method, path)
            if method != "HEAD":
                assert error_of(answer)["message"] == f"{method} is not offered on {path}. Use POST."
    assert relayed(upstream) == []


async def test_another_method_on_other_paths_is_a_405(gateway: Gateway) -> None:
    for path in ("/v1/models", "/health/live", "/v1/models/x"):
        answer = await gateway.get(path, [*AUTH, ("content-length", "0")], method="POST")
        assert (answer.status, answer.header("allow")) == (405, "GET")
        assert error_of(answer)["code"] == "method_not_allowed"


NOWHERE = ("/", "/v1", "/v1/chat", "/v1/chat/completions/", "//v1/chat/completions", "/v1/files", "/docs", "/metrics")


async def test_what_is_not_there_is_a_404(gateway: Gateway, upstream: ScriptedUpstream) -> None:
    """Also the documentation and the metrics, which only operators reach; a redirect never."""
    for path in NOWHERE:
        for method in ("GET", "POST"):
            answer = await gateway.get(path, [*AUTH, ("content-length", "0")], method=method)
            assert (answer.status, error_of(answer)["code"]) == (404, "unknown_url"), (method, path)
    assert relayed(upstream) == []


SPELLINGS = (
    f"{CHAT}?api-version=2024-10-21",
    f"{CHAT}?",
    f"http://gateway.example{CHAT}",
    f"http://gateway.example{CHAT}?a=b",
    "/v1/chat%2Fcompletions",
    "/v1/%63hat/completions",
)


async def test_other_spellings_of_a_relayed_path_are_the_same_path(
    gateway: Gateway, upstream: ScriptedUpstream
) -> None:
    """A query, the absolute form and percent-encoding; the engine gets its own path and nothing of them."""
    upstream.always(GOOD, path=CHAT)
    for target in SPELLINGS:
        answer = await gateway.ask(chat(), target)
        assert answer.status == 200, target
        assert relayed(upstream)[-1].target == CHAT
        refused = await gateway.ask(chat(), target, headers=[])
        assert (refused.status, error_of(refused)["code"]) == (401, "invalid_api_key"), target
    assert len(relayed(upstream)) == len(SPELLINGS)
