"""The client of load, against a socket that says what it is told to."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from loadtests.scenarios.answers import Outcome, Stream
from loadtests.scenarios.client import Answer, Client
from tests.support.sockets import bind_free, free_port

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
CHUNK = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
DONE = b"data: [DONE]\n\n"


def chunked(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)


WHOLE = HEAD + chunked(CHUNK, CHUNK, DONE) + b"0\r\n\r\n"


@contextmanager
def server(*connections: list[bytes]) -> Iterator[tuple[str, list[bytes]]]:
    """Answers the n-th connection's requests with its pieces, one request a piece; then closes it."""
    heard: list[bytes] = []

    def serve(listener: socket.socket) -> None:
        for pieces in connections:
            connection, _ = listener.accept()
            with connection:
                for piece in pieces:
                    heard.append(connection.recv(65536))
                    connection.sendall(piece)

    with bind_free() as listener:
        listener.listen()
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/below/", heard
        finally:
            thread.join(5)
            assert not thread.is_alive()


def ask(client: Client, stream: Stream | None = None, timeout: float = 5.0) -> Answer:
    return client.ask("/v1/x", {"authorization": "Bearer k"}, b"{}", stream, timeout)


def test_streams_on_one_connection_and_a_new_one_when_it_was_closed() -> None:
    with server([WHOLE, WHOLE], [WHOLE]) as (url, heard):
        client = Client(url, time.monotonic)
        for _ in range(3):
            stream = Stream()
            answer = ask(client, stream)
            assert (answer.status, answer.whole, answer.error) == (200, True, "")
            assert (stream.outcome(), stream.events) == (Outcome.COMPLETE, 2)
        client.close()
    head, _, body = next(one for one in heard if one).partition(b"\r\n\r\n")
    assert head.startswith(b"POST /below/v1/x HTTP/1.1\r\nhost: 127.0.0.1:")
    assert b"authorization: Bearer k" in head
    assert body == b"{}"


def test_a_refusal_has_its_headers_and_body() -> None:
    said = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 429 No\r\nRetry-After: 3\r\ncontent-length: 4\r\n\r\nlate"
    with server([said]) as (url, _):
        client = Client(url, time.monotonic)
        answer = ask(client, Stream())
        client.close()
    assert (answer.status, answer.headers["retry-after"], answer.body, answer.whole) == (429, "3", b"late", True)


def test_a_stream_that_is_cut_is_not_whole() -> None:
    with server([HEAD + chunked(CHUNK)]) as (url, _):
        stream = Stream()
        answer = ask(Client(url, time.monotonic), stream)
    assert (answer.status, answer.whole) == (200, False)
    assert "closed in the middle" in answer.error
    assert (stream.outcome(), stream.events) == (Outcome.BROKEN, 1)


def test_a_body_without_a_length_ends_with_its_connection() -> None:
    with server([b"HTTP/1.1 200 OK\r\n\r\n{}"]) as (url, _):
        answer = ask(Client(url, time.monotonic))
    assert (answer.whole, answer.body) == (True, b"{}")


def test_nobody_there_and_nothing_said() -> None:
    answer = ask(Client(f"http://127.0.0.1:{free_port()}", time.monotonic))
    assert (answer.status, answer.timed_out) == (0, False)
    assert "no connection" in answer.error
    with bind_free() as listener:
        listener.listen()
        answer = ask(Client(f"http://127.0.0.1:{listener.getsockname()[1]}", time.monotonic), timeout=0.01)
    assert answer.timed_out
