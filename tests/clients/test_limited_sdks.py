"""The official clients, left to their own retries, against a limit they all contend for.

Real time passes here, a second of it: what is shown is that the SDKs' own sleeping and our promises fit together.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from gateway.app import Replica, microseconds
from gateway.limits import Limits
from tests.support import node
from tests.support.gateway import CHAT, KEY, MODEL, give_database, settings_for
from tests.support.script import json_answer
from tests.support.upstream import ScriptedUpstream

CLIENTS = 100
RETRIES = 2
"""What both SDKs do unless told otherwise: one more than it takes."""
ANSWER = {"id": "x", "object": "chat.completion", "created": 1, "model": "smollm2", "choices": []}

alike_or_not = pytest.mark.parametrize("alike", [False, True], ids=["bodies of their own", "the same body"])


@asynccontextmanager
async def contended(upstream: ScriptedUpstream, folder: Path, rate: str, burst: int) -> AsyncIterator[str]:
    """Serve ``burst`` of the clients at once and the others at ``rate``; nobody may come before its time.

    A bucket keeps what it promised until it is full: with a burst of some tenths of a second a busy machine may hold
    the clients up for so long.
    """
    upstream.always(json_answer(json.dumps(ANSWER).encode()), path=CHAT)
    limits = Limits.model_validate({"defaults": {"key": {"requests": {"rate": rate, "burst": burst}}}})
    replica = Replica(settings_for("protocol", folder, [upstream], limits=limits), None, time.monotonic, microseconds)
    give_database(folder / "forebay.db")
    await replica.start()
    try:
        yield f"http://127.0.0.1:{replica.port}/v1"
    finally:
        await replica.close()
        replica.log.close()
    assert replica.metrics.early_retries <= 1


def body_of(number: int, alike: bool) -> dict[str, Any]:
    """Return what the client of that number asks."""
    return {"model": MODEL, "messages": [{"role": "user", "content": "Hi" if alike else f"Hi, number {number}"}]}


@pytest.mark.parametrize("alike", [False, True], ids=["bodies of their own", "the same body"])
async def test_every_client_of_a_hundred_is_served_at_the_time_it_was_promised(
    upstream: ScriptedUpstream, tmp_path: Path, alike: bool
) -> None:
    from openai import AsyncOpenAI, DefaultAsyncHttpxClient

    async with contended(upstream, tmp_path, "60/s", 40) as base_url:
        plain = DefaultAsyncHttpxClient(verify=False)
        async with AsyncOpenAI(base_url=base_url, api_key=KEY, max_retries=RETRIES, http_client=plain) as client:

            async def ask(number: int) -> str:
                answer = await client.chat.completions.create(**body_of(number, alike))
                return str(answer.model)

            answers = await asyncio.gather(*(ask(number) for number in range(CLIENTS)), return_exceptions=True)
    failed = [answer for answer in answers if answer != MODEL]
    assert len(failed) <= 1, failed


async def test_every_client_for_node_of_a_hundred_is_served_at_the_time_it_was_promised(
    upstream: ScriptedUpstream, node_client: node.Client, tmp_path: Path
) -> None:
    """Half of the bodies are the same."""
    calls = [
        {"name": f"{number}", "resource": "chat", "body": body_of(number, number % 2 == 0), "maxRetries": RETRIES}
        for number in range(CLIENTS)
    ]
    async with contended(upstream, tmp_path, "40/s", 40) as base_url:
        results = await node_client.run(base_url, KEY, calls, together=True)
    assert sum(result.get("value", {}).get("model") == MODEL for result in results.values()) >= 99
