"""Clients that together ask for more than they may have: skewed over tenants, keys and replicas, and not all of them
wait for their answers.

Rule 1: everything a client was told is kept (``Asked``): what the ledgers say is held against it.
Rule 2: a refused client comes back when it was told to, as SDKs do; one that wants a slot comes back all the time.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import itertools
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from loadtests.children import Child
from loadtests.limits.fleet import KEYS_EACH, LEAVES, STAYS, TOKENS, key_of

TIME_OUT = 10.0
"""Seconds after which a request counts as hung."""
LONG = 700
"""Tokens of an answer that holds a slot: more than a second."""
POLL = 0.05
"""Seconds after which a client asks for a slot again."""
REFUSED_BY_ENGINE = "refuse me"
"""Words of a prompt that the engines refuse."""
ROAMING = 0.25
"""Share of the attempts that go to whatever replica."""
_RECONNECT = 0.02


class Manner(enum.StrEnum):
    """What becomes of a request."""

    WHOLE = "whole"
    STREAM = "stream"
    SOON = "leaves before the answer"
    MIDWAY = "leaves in the stream"
    UNWANTED = "refused by the engine"


@dataclass(slots=True)
class Asked:
    """One attempt and what became of it. Times are Unix time; ``status`` 0: no answer was read."""

    id: str
    tenant: str
    replica: int
    model: str
    manner: Manner
    began: float
    ended: float = 0.0
    status: int = 0
    attempt: int = 0
    retry_after: float | None = None
    standing: str = ""
    """By whose word, where it was not the store's."""
    prompt: int | None = None
    output: int | None = None
    error: str = ""


@dataclass(frozen=True, slots=True)
class Crowd:
    """Clients of one tenant. ``waits``: a refused one comes back when it was told."""

    tenant: str
    clients: int
    pause: float = 0.0
    tokens: int = TOKENS
    waits: bool = True
    manners: tuple[tuple[Manner, float], ...] = ((Manner.WHOLE, 1.0),)


_MIXED = ((Manner.WHOLE, 0.8), (Manner.STREAM, 0.12), (Manner.SOON, 0.04), (Manner.MIDWAY, 0.04))
CROWDS = (
    Crowd("asks", 40, manners=_MIXED),
    Crowd("writes", 40, manners=_MIXED),
    Crowd("holds", 20, tokens=LONG, waits=False),
    Crowd("light", 2, pause=0.2, manners=((Manner.WHOLE, 0.9), (Manner.UNWANTED, 0.1))),
)


class Line:
    """A connection to a replica that is kept."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def head(self) -> tuple[int, dict[bytes, bytes]]:
        """Status and headers of the next answer."""
        first, *rest = (await self.reader.readuntil(b"\r\n\r\n"))[:-4].split(b"\r\n")
        return int(first[9:12]), dict(line.lower().split(b": ", 1) for line in rest)

    async def body(self, headers: dict[bytes, bytes]) -> bytes:
        """The rest of an answer, chunks as they are."""
        length = headers.get(b"content-length")
        if length is not None:
            return await self.reader.readexactly(int(length))
        return await self.reader.readuntil(b"\r\n0\r\n\r\n")

    def close(self) -> None:
        """End it at once."""
        self.writer.transport.abort()


class Traffic:
    """All clients. ``replicas`` may grow, and its dead are left alone."""

    def __init__(self, replicas: Sequence[Child], seed: int, crowds: Sequence[Crowd] = CROWDS) -> None:
        self._replicas = replicas
        self._crowds = crowds
        self._chance = random.Random(seed)
        self._idle: dict[int, list[Line]] = {}
        self._number = 0
        self._until = 0.0
        self.asked: list[Asked] = []

    async def run(self, seconds: float) -> None:
        """Ask for so long; returns when the last answer is there."""
        self._until = time.monotonic() + seconds
        async with asyncio.TaskGroup() as clients:
            for crowd in self._crowds:
                for number in range(crowd.clients):
                    clients.create_task(self._client(crowd, number))
        for lines in self._idle.values():
            for line in lines:
                line.close()

    async def _client(self, crowd: Crowd, number: int) -> None:
        # The first key of a tenant has half of its clients, the next a quarter.
        at = min(KEYS_EACH - 1, ((number + 1) & -(number + 1)).bit_length() - 1)
        key = key_of(crowd.tenant, at)
        manners, weights = zip(*crowd.manners, strict=True)
        while time.monotonic() < self._until:
            manner = self._chance.choices(manners, weights)[0]
            if not await self._until_served(crowd, key, manner):
                return
            await asyncio.sleep(crowd.pause)

    async def _until_served(self, crowd: Crowd, key: str, manner: Manner) -> bool:
        """Ask, and ask again when told to; False when that would be after the end."""
        self._number += 1
        number = self._number
        model = STAYS if manner in (Manner.WHOLE, Manner.UNWANTED) else LEAVES
        body = _body(crowd, manner, model, number)
        replica = self._route()
        for attempt in itertools.count():
            # Most keep their connection, as SDKs do; some are sent elsewhere.
            if self._replicas[replica].killed_at is not None or self._chance.random() < ROAMING:
                replica = self._route()
            asked = Asked(f"c{number}-{attempt}", crowd.tenant, replica, model, manner, time.time())
            asked.attempt = attempt
            await self._ask(asked, key, body)
            if asked.manner is Manner.SOON and not asked.status and not asked.error:
                # It does not know whether it was refused: it asks once more, and what it was promised is its own.
                manner = Manner.WHOLE
                continue
            if asked.status != 429 and not asked.error:
                return True
            pause = _RECONNECT if asked.error else asked.retry_after or 0.0 if crowd.waits else POLL
            if time.monotonic() + pause >= self._until:
                return False
            await asyncio.sleep(pause)
        raise AssertionError

    def _route(self) -> int:
        """A replica that lives: the first has most of the load, the last next to nothing."""
        living = [at for at, replica in enumerate(self._replicas) if replica.ready and replica.killed_at is None]
        return self._chance.choices(living, [1 / (place + 1) for place in range(len(living))])[0]

    async def _ask(self, asked: Asked, key: str, body: bytes) -> None:
        line = None
        try:
            async with asyncio.timeout(TIME_OUT):
                idle = self._idle.setdefault(asked.replica, [])
                line = idle.pop() if idle else await self._connect(asked.replica)
                asked.began = time.time()
                retries = f"x-stainless-retry-count: {asked.attempt}"
                line.writer.write(request_of(asked.id, key, body, retries))
                if await self._answer(line, asked):
                    idle.append(line)
                    line = None
        except TimeoutError:
            asked.error = "hung"
        except (OSError, EOFError) as error:
            asked.error = type(error).__name__
        finally:
            if line is not None:
                line.close()
        asked.ended = time.time()
        self.asked.append(asked)

    async def _connect(self, replica: int) -> Line:
        return Line(*await asyncio.open_connection("127.0.0.1", self._replicas[replica].port))

    async def _answer(self, line: Line, asked: Asked) -> bool:
        """Read the answer, or leave; tells whether the connection can be used again."""
        if asked.manner is Manner.SOON:
            # An answer that is there by then is a refusal.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._chance.uniform(0.04, 0.1)):
                    status, headers = await line.head()
                    _told(asked, status, headers)
                    await line.body(headers)
                    return True
            return False
        status, headers = await line.head()
        _told(asked, status, headers)
        if asked.manner is Manner.MIDWAY and status == 200:
            for _ in range(self._chance.randrange(1, TOKENS)):
                await line.reader.readuntil(b"\n\n")
            return False
        body = await line.body(headers)
        if status == 200:
            asked.prompt, asked.output = usage_of(body)
        return headers.get(b"connection") != b"close"


def _body(crowd: Crowd, manner: Manner, model: str, number: int) -> bytes:
    leaves = manner in (Manner.SOON, Manner.MIDWAY)
    said = REFUSED_BY_ENGINE if manner is Manner.UNWANTED else "tell me more"
    told: dict[str, object] = {
        "model": model,
        "messages": [{"role": "user", "content": f"Of story number {number:08}, {said}"}],
        # Long enough that whoever leaves has left before the end.
        "max_tokens": 10 * TOKENS if leaves else crowd.tokens,
        "ignore_eos": True,
    }
    if manner in (Manner.STREAM, Manner.MIDWAY):
        told |= {"stream": True, "stream_options": {"include_usage": True}}
    return json.dumps(told).encode()


def request_of(id: str, key: str, body: bytes, *headers: str) -> bytes:
    """A chat request, known by its client's own ``id``, with more whole lines of headers."""
    told = "".join(f"{header}\r\n" for header in headers)
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: replica\r\nauthorization: Bearer {key}\r\n"
        f"content-type: application/json\r\nx-client-request-id: {id}\r\n"
        f"{told}content-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def _told(asked: Asked, status: int, headers: dict[bytes, bytes]) -> None:
    asked.status = status
    asked.standing = headers.get(b"x-forebay-limits", b"").decode()
    milliseconds = headers.get(b"retry-after-ms")
    if milliseconds is not None:
        asked.retry_after = float(milliseconds) / 1000


def usage_of(body: bytes) -> tuple[int, int]:
    """Prompt and answer tokens of an answer, whole or streamed."""
    at = body.rindex(b'"usage"')
    told, _ = json.JSONDecoder().raw_decode(body[at + 8 :].decode().lstrip(" :"))
    return int(told["prompt_tokens"]), int(told["completion_tokens"])
