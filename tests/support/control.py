"""A control port that answers what a test wants: an agent that is busy, that lies, that says nothing of use."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

Answer = Callable[[str, asyncio.StreamWriter], Awaitable[None]]
"""Answers one request; the first argument is its method and path, without the query."""

STATE: dict[str, Any] = {
    "name": "fake",
    "phase": "serving",
    "since": 1.0,
    "minder_pid": 1,
    "address": None,
    "arguments": "",
    "log": "engine.log",
    "kept": True,
    "owned": False,
    "gated": False,
    "starts": 1,
}


def said(tree: Any, status: int = 200) -> bytes:
    """A whole answer in JSON."""
    body = json.dumps(tree).encode()
    return b"HTTP/1.1 %d OK\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%b" % (status, len(body), body)


EVENTS = b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n"
"""How a stream begins; it ends with the connection."""


def event(**changes: Any) -> bytes:
    """One line of a stream of events."""
    return json.dumps({"state": STATE | changes}).encode() + b"\n"


@asynccontextmanager
async def control_port(path: Path, answer: Answer) -> AsyncIterator[None]:
    """Listen on a Unix socket; every request goes to ``answer``, one a connection."""

    tasks: set[asyncio.Task[Any]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        # Also a cancellation, which is the end of the test: what stands behind the stream takes none.
        with suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            method, target, _ = head.partition("\r\n")[0].split(" ")
            await answer(f"{method} {target.partition('?')[0]}", writer)
            await writer.drain()
        writer.close()
        tasks.discard(task)

    server = await asyncio.start_unix_server(serve, str(path))
    try:
        yield
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks)
