"""The official clients, left to their own retries, against a limit they all contend for.

Real time passes here, a second of it: what is shown is that the SDKs' own sleeping and our promises fit together.
"""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import pytest

from gateway.app import microseconds
from gateway.limits import Limits
from tests.support.gateway import CHAT, KEY, MODEL, settings_for
from tests.support.script import json_answer
from tests.support.upstream import ScriptedUpstream

CLIENTS = 100
ANSWER = {"id": "x", "object": "chat.completion", "created": 1, "model": "smollm2", "choices": []}


@pytest.mark.parametrize("alike", [False, True], ids=["bodies of their own", "the same body"])
async def test_every_client_of_a_hundred_is_served_at_the_time_it_was_promised(
    upstream: ScriptedUpstream, tmp_path: Path, alike: bool
) -> None:
    from openai import AsyncOpenAI, DefaultAsyncHttpxClient

    from gateway.app import Replica

    upstream.always(json_answer(json.dumps(ANSWER).encode()), path=CHAT)
    limits = Limits.model_validate({"defaults": {"key": {"requests": {"rate": "120/s", "burst": 10}}}})
    settings = settings_for("protocol", tmp_path, [upstream], limits=limits)
    replica = Replica(settings, None, time.monotonic, microseconds)
    await replica.start()
    try:
        plain = DefaultAsyncHttpxClient(verify=False)
        async with AsyncOpenAI(
            base_url=f"http://127.0.0.1:{replica.port}/v1", api_key=KEY, http_client=plain
        ) as client:

            async def ask(number: int) -> str:
                text = "Hi" if alike else f"Hi, number {number}"
                answer = await client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": text}])
                return answer.model

            answers = await asyncio.gather(*(ask(number) for number in range(CLIENTS)), return_exceptions=True)
    finally:
        await replica.close()
        replica.log.close()
    assert sum(answer == MODEL for answer in answers) >= 99
    assert replica.metrics.early_retries <= 1
