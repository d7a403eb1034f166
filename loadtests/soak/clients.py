"""Clients of the soak. What each was told is kept: the ledger and the engines' counters are held against it.

Rule 1: every answer is read to its end, or left on purpose; a stream's last words are looked at.
Rule 2: whoever is refused comes back when told; whoever finds nobody tries another gateway at once, as SDKs do.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loadtests.children import Child
from loadtests.limits.traffic import Line, request_of, usage_of
from loadtests.soak.plan import KEYS_EACH, Crowd, key_of

HUNG = 180.0
"""Seconds after which a request counts as hung. A real engine on a busy processor takes its time."""
_RETRY = 0.1
_READ_LIMIT = 1 << 20


class End(enum.StrEnum):
    """How an answer ended, as its client saw it."""

    WHOLE = "whole"
    """Not streamed, or with the end mark."""
    ERROR_EVENT = "error event"
    CUT = "cut"
    """The connection ended within the answer, or a stream without its end mark."""
    LEFT = "left"
    """By the client, on purpose."""
    NOTHING = "nothing"
    """Not a byte of an answer came."""
    HUNG = "hung"


@dataclass(slots=True)
class Asked:
    """One attempt and what became of it. Times are Unix time; ``status`` 0: no answer was read."""

    id: str
    tenant: str
    model: str
    replica: int
    stream: bool
    leaves: bool
    began: float
    ended: float = 0.0
    status: int = 0
    end: End = End.NOTHING
    prompt: int | None = None
    output: int | None = None
    retry_after: float = 1.0
    said: str = ""
    """The error that was told, shortened."""


class Clients:
    """All of them. ``living`` tells which of ``replicas`` a balancer would send to now."""

    def __init__(self, replicas: Sequence[Child], living: Callable[[], list[int]], seed: int) -> None:
        self._replicas = replicas
        self._living = living
        self._chance = random.Random(seed)
        self._idle: dict[int, list[Line]] = {}
        self._until = 0.0
        self._number = 0
        self.asked: list[Asked] = []

    async def run(self, crowds: Sequence[Crowd], seconds: float) -> None:
        """Ask for so long; returns when the last answer is there."""
        self._until = time.monotonic() + seconds
        async with asyncio.TaskGroup() as group:
            for crowd in crowds:
                for number in range(crowd.clients):
                    group.create_task(self._client(crowd, number))
        for lines in self._idle.values():
            for line in lines:
                line.close()

    async def _client(self, crowd: Crowd, number: int) -> None:
        key = key_of(crowd.tenant, number % KEYS_EACH)
        while time.monotonic() < self._until:
            asked = await self._ask(crowd, key)
            pause = crowd.pause
            if asked.status == 429:
                pause = asked.retry_after
            elif asked.status != 200:
                pause = _RETRY
            await asyncio.sleep(max(pause, 0.01))

    async def _ask(self, crowd: Crowd, key: str) -> Asked:
        self._number += 1
        stream = self._chance.random() < crowd.streams
        leaves = self._chance.random() < crowd.leaves
        replica = self._chance.choice(self._living())
        asked = Asked(f"s{self._number}", crowd.tenant, crowd.model, replica, stream, leaves, time.time())
        line = None
        try:
            async with asyncio.timeout(HUNG):
                idle = self._idle.setdefault(replica, [])
                line = idle.pop() if idle else await self._connect(replica)
                line.writer.write(request_of(asked.id, key, _body(crowd, asked, self._number)))
                if await self._read(line, asked):
                    idle.append(line)
                    line = None
        except TimeoutError:
            asked.end = End.HUNG
        except (OSError, EOFError):
            asked.end = End.CUT if asked.status else End.NOTHING
        finally:
            if line is not None:
                line.close()
        asked.ended = time.time()
        self.asked.append(asked)
        return asked

    async def _connect(self, replica: int) -> Line:
        port = self._replicas[replica].port
        return Line(*await asyncio.open_connection("127.0.0.1", port, limit=_READ_LIMIT))

    async def _read(self, line: Line, asked: Asked) -> bool:
        """Read the answer, or leave within it; tell whether the connection can be used again."""
        if asked.leaves and not asked.stream:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._chance.uniform(0.05, 0.5)):
                    return await self._whole(line, asked)
            asked.end = End.LEFT
            return False
        if not asked.leaves:
            return await self._whole(line, asked)
        asked.status, headers = await line.head()
        if asked.status != 200:
            await self._rest(line, asked, headers)
            return headers.get(b"connection") != b"close"
        for _ in range(self._chance.randrange(1, 4)):
            await line.reader.readuntil(b"\n\n")
        asked.end = End.LEFT
        return False

    async def _whole(self, line: Line, asked: Asked) -> bool:
        asked.status, headers = await line.head()
        await self._rest(line, asked, headers)
        return headers.get(b"connection") != b"close" and asked.end is End.WHOLE

    async def _rest(self, line: Line, asked: Asked, headers: dict[bytes, bytes]) -> None:
        body = await line.body(headers)
        if (milliseconds := headers.get(b"retry-after-ms")) is not None:
            asked.retry_after = float(milliseconds) / 1000
        asked.end = ended(body, stream=asked.stream and asked.status == 200)
        if asked.end is End.WHOLE and asked.status == 200:
            asked.prompt, asked.output = usage_of(body)
        elif asked.end is not End.CUT:
            asked.said = body[-200:].decode(errors="replace")


def ended(body: bytes, *, stream: bool) -> End:
    """How a body ended that came whole: a stream as its last words say, chunks as they are."""
    if not stream:
        return End.WHOLE
    if b"data: [DONE]\n\n" in body[-64:]:
        return End.WHOLE
    last = body[body.rfind(b"data: ") :] if b"data: " in body else b""
    return End.ERROR_EVENT if last.startswith(b'data: {"error":') else End.CUT


def _body(crowd: Crowd, asked: Asked, number: int) -> bytes:
    told: dict[str, object] = {
        "model": crowd.model,
        "messages": [{"role": "user", "content": f"Of story number {number:08}, tell me more"}],
        "max_tokens": crowd.tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
    if asked.stream:
        told |= {"stream": True, "stream_options": {"include_usage": True}}
    return json.dumps(told).encode()
