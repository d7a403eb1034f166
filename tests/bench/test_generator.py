"""The load generator counts what it is sent, and nothing wrong in it goes unnoticed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from loadtests.bench.processes import free_port
from tests.bench.conftest import Generator


async def test_right_answers_have_no_faults(engine: int, generator: Generator) -> None:
    stream, asked = generator.body("n=5 d=0"), generator.body("n=5 d=1", include_usage=True)
    plain = generator.body(stream=False)
    bodies = [word for body in (stream, asked, plain) for word in ("--body", body)]
    result = await generator(engine, *bodies, "--connections", "4", "--requests", "60", "--forbid-model", "x-model")
    assert result["faults"] == {}
    assert result["completed"] == 60
    assert result["chunks"] == result["delay"]["count"]
    assert result["chunks"] % 5 == 0
    assert result["connects"] == 4


@pytest.mark.parametrize(
    ("plan", "fault", "count"),
    [
        ("n=5 drop=2", "lost_chunk", 1),
        ("n=5 drop=4", "wrong_count", 1),
        ("n=5 die=3", "cut_short", 1),
        ("s=503", "status", 1),
    ],
)
async def test_an_engine_that_fails_is_noticed(
    engine: int, generator: Generator, plan: str, fault: str, count: int
) -> None:
    result = await generator(engine, "--body", generator.body(plan), "--requests", "1")
    assert result["faults"] == {fault: count}
    assert result["example"].startswith(fault)


async def test_the_engines_name_in_an_answer_is_noticed(engine: int, generator: Generator) -> None:
    """In every one of the seven chunks: five of content, the role, the finish."""
    arguments = ("--body", generator.body("n=5"), "--requests", "1", "--forbid-model", "mock-model")
    result = await generator(engine, *arguments, expect="bench-model")
    assert result["faults"] == {"wrong_model": 7, "engine_name": 7}


async def test_nobody_listening_is_a_fault_and_the_run_ends(generator: Generator) -> None:
    result = await generator(free_port(19500), "--body", generator.body("n=5"), "--seconds", "20")
    assert result["faults"] == {"connect": 1}
    assert result["elapsed"] < 10


async def test_streams_longer_than_the_window_are_left_open_and_no_fault(engine: int, generator: Generator) -> None:
    body = generator.body("n=1000 d=10")
    result = await generator(engine, "--body", body, "--connections", "8", "--seconds", "0.3", "--drain", "0")
    assert result["left_open"] == 8
    assert result["faults"] == {}
    assert result["chunks"] > 8


async def test_an_open_loop_sends_what_is_due(engine: int, generator: Generator) -> None:
    """200 a second for half a second: random, but from a seed."""
    arguments = ("--connections", "64", "--rate", "200", "--seconds", "0.5", "--seed", "7")
    result = await generator(engine, "--body", generator.body("n=2 d=20"), *arguments)
    assert 60 <= result["first_event"]["count"] <= 150
    assert result["faults"] == {}


# --- answers no engine of ours would give ------------------------------------------------------------------------

Reply = Callable[[asyncio.StreamWriter], None]
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def event(fields: str, chunk_id: str = "chatcmpl-1") -> bytes:
    return b'data: {"id":"%b","model":"mock-model",%b}\n\n' % (chunk_id.encode(), fields.encode())


def content(number: int, chunk_id: str = "chatcmpl-1") -> bytes:
    return event(f'"choices":[{{"delta":{{"content":"@T0000000000000001#{number} "}}}}]', chunk_id)


ROLE = event('"choices":[{"delta":{"role":"assistant"}}]')
FINISH = event('"choices":[{"delta":{},"finish_reason":"stop"}]')
USAGE = event('"choices":[],"usage":{"completion_tokens":2}')
DONE = b"data: [DONE]\n\n"
WHOLE = ROLE + content(0) + content(1) + FINISH + DONE


def framed(stream: bytes, size: int = 10_000) -> bytes:
    pieces = [stream[start : start + size] for start in range(0, len(stream), size)]
    return HEAD + b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


@contextlib.asynccontextmanager
async def server(answer: bytes, keys: list[str] | None = None, close: bool = False) -> AsyncIterator[int]:
    """A server that gives every request the same bytes; notes the keys that came."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                fields = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if line)
                await reader.readexactly(int(fields["content-length"]))
                if keys is not None:
                    keys.append(fields["authorization"].removeprefix("bearer "))
                writer.write(answer)
                await writer.drain()
                if close:
                    break
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with listener:
        yield listener.sockets[0].getsockname()[1]


@pytest.mark.parametrize("size", [1, 7, 10_000])
async def test_a_stream_cut_anywhere_is_right(generator: Generator, size: int) -> None:
    async with server(framed(b": keep-alive\n\n" + WHOLE, size)) as port:
        result = await generator(port, "--body", generator.body("n=2"), "--requests", "3")
    assert result["faults"] == {}
    assert result["completed"] == 3
    assert result["chunks"] == 6


@pytest.mark.parametrize(
    ("stream", "fault"),
    [
        (WHOLE.replace(DONE, USAGE + DONE), "usage_shown"),
        (WHOLE.replace(DONE, b""), "no_done"),
        (WHOLE.replace(FINISH, b""), "no_finish"),
        (WHOLE + content(2), "after_done"),
        (WHOLE.replace(content(1), content(1, "chatcmpl-2")), "foreign_chunk"),
        (WHOLE.replace(content(0) + content(1), content(1) + content(0)), "lost_chunk"),
        (WHOLE.replace(b"\n\n", b"\n"), "bad_framing"),
        (WHOLE.replace(b"data: [", b"event: x\ndata: ["), "bad_framing"),
        (WHOLE[:-1], "bad_framing"),
        (ROLE + content(0) + b'data: {"error":{"message":"broken"}}\n\n', "error_event"),
        (WHOLE.replace(b'"model":"mock-model"', b'"model":"other"', 1), "wrong_model"),
    ],
)
async def test_a_stream_with_something_wrong_is_noticed(generator: Generator, stream: bytes, fault: str) -> None:
    async with server(framed(stream)) as port:
        result = await generator(port, "--body", generator.body("n=2"), "--requests", "1")
    assert fault in result["faults"]


async def test_usage_that_was_asked_for_and_does_not_come_is_noticed(generator: Generator) -> None:
    async with server(framed(WHOLE)) as port:
        result = await generator(port, "--body", generator.body("n=2", include_usage=True), "--requests", "1")
    assert result["faults"] == {"usage_missing": 1}


async def test_a_plain_body_without_its_last_word_is_noticed(generator: Generator) -> None:
    body = b'{"model":"mock-model","choices":"First word. Last","usage":{"total_tokens":1}}'
    head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body)
    async with server(head + body) as port:
        result = await generator(port, "--body", generator.body(stream=False), "--requests", "1")
    assert result["faults"] == {"bad_body": 1}


async def test_keys_are_used_in_turn(generator: Generator, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("first\nsecond\nthird\n")
    keys: list[str] = []
    async with server(framed(WHOLE), keys) as port:
        arguments = ("--requests", "7", "--keys", str(tmp_path / "keys"))
        await generator(port, "--body", generator.body("n=2"), *arguments)
    assert keys == ["first", "second", "third", "first", "second", "third", "first"]


async def test_a_connection_closed_between_answers_is_opened_again(generator: Generator) -> None:
    """The server closes after each answer without saying so: stale, not broken."""
    async with server(framed(WHOLE), close=True) as port:
        result = await generator(port, "--body", generator.body("n=2"), "--requests", "4")
    assert result["faults"] == {}
    assert result["completed"] == 4
    assert result["connects"] == 4
