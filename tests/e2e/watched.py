"""What the real engine says of its own work, to see that it stops when nobody listens any more."""

from __future__ import annotations

import asyncio
import re
from types import TracebackType
from typing import Self

import httpx

from tests.support.real_engine import ANSWER_WITHIN, RealEngine

LOOK = 0.01
"""Seconds between two looks at the engine."""
STOPS_WITHIN = 60.0
"""Seconds after which an engine that works for nobody fails the test; how long it really takes is reported."""

_SAMPLE = re.compile(r"^vllm:(\w+)\{[^}]*\} (\S+)$", re.MULTILINE)


class WatchedEngine:
    """The session's engine and its figures. Its client lives inside an ``async with`` block."""

    def __init__(self, engine: RealEngine) -> None:
        self.engine = engine
        # A connection for each question: one that is kept may be closed by the engine the moment it is used again.
        alone = httpx.Limits(max_keepalive_connections=0)
        transport = httpx.AsyncHTTPTransport(uds=engine.url.removeprefix("unix:"), limits=alone)
        self._client = httpx.AsyncClient(base_url="http://engine", transport=transport, timeout=ANSWER_WITHIN)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.aclose()

    async def _figures(self) -> dict[str, float]:
        answer = (await self._client.get("/metrics")).raise_for_status()
        return {name: float(value) for name, value in _SAMPLE.findall(answer.text)}

    async def working(self) -> int:
        """Return how many requests it runs or keeps in its queue."""
        figures = await self._figures()
        return int(figures["num_requests_running"] + figures["num_requests_waiting"])

    async def generated(self) -> int:
        """Return how many tokens it has generated since it started."""
        return int((await self._figures())["generation_tokens_total"])

    async def works(self) -> None:
        """Wait until it works on something."""
        async with asyncio.timeout(STOPS_WITHIN):
            while not await self.working():
                await asyncio.sleep(LOOK)

    async def stops(self) -> None:
        """Wait until it works on nothing."""
        async with asyncio.timeout(STOPS_WITHIN):
            while await self.working():
                await asyncio.sleep(LOOK)

    async def turns(self) -> None:
        """Have it write one token, so that what it was doing before is done and counted."""
        body = {"model": self.engine.model, "prompt": "Hi", "max_tokens": 1}
        (await self._client.post("/v1/completions", json=body)).raise_for_status()

    async def count(self, body: dict[str, object]) -> int:
        """Return how many tokens its tokenizer makes of a prompt."""
        answer = await self._client.post("/tokenize", json={"model": self.engine.model, **body})
        count: int = answer.raise_for_status().json()["count"]
        return count
