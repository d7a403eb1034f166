"""Whatever becomes of requests, nothing stays held, and the ledger says what the engine itself counted.

`make load` runs this with ten thousand clients; the suite with as many as show each stage a few times.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
from collections import Counter
from typing import Any

from gateway.limits import Limits
from gateway.settings import Upstream
from gateway.state.usage import Wanted
from gateway.store.memory import MemoryStore
from tests.engines.simulated.conftest import RunningEngine, Start
from tests.support.client import ConnectionEndedError, RawClient
from tests.support.gateway import Gateway, StartGateway, post_bytes, until

CLIENTS = int(os.environ.get("CLIENTS", "280"))
AT_ONCE = 40
PLENTY = {"rate": "1000M/s"}
LIMITS = Limits.model_validate(
    {
        "defaults": {
            "key": {"requests": PLENTY, "tokens": PLENTY, "concurrent": 1000, "tokens_in_flight": 10**9},
            "tenant": {"tokens": PLENTY, "budgets": {"tokens": 10**12, "per": "month"}},
        }
    }
)


def body(number: int, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"Tell me story number {number}"}]
    return {"model": "smollm2", "messages": messages, "max_tokens": 24, "ignore_eos": True, **more}


async def whole(client: RawClient, number: int) -> None:
    client.send(post_bytes(body(number)))
    await client.response()


async def streamed(client: RawClient, number: int) -> None:
    client.send(post_bytes(body(number, stream=True)))
    await client.response()


async def in_the_headers(client: RawClient, number: int) -> None:
    client.send(post_bytes(body(number))[:60])


async def in_the_body(client: RawClient, number: int) -> None:
    client.send(post_bytes(body(number))[:-5])


async def before_the_answer(client: RawClient, number: int) -> None:
    client.send(post_bytes(body(number, stream=number % 2 == 0)))


async def after_the_headers(client: RawClient, number: int) -> None:
    client.send(post_bytes(body(number, stream=True)))
    await client.head()


async def in_the_stream(client: RawClient, number: int) -> None:
    client.send(post_bytes(body(number, stream=True)))
    await client.head()
    for _ in range(number % 20):
        await client.event()


STAGES = (whole, streamed, in_the_headers, in_the_body, before_the_answer, after_the_headers, in_the_stream)


async def one(gateway: Gateway, number: int, turn: asyncio.Semaphore, chance: random.Random) -> None:
    async with turn:
        client = await RawClient.connect(gateway.url)
        try:
            await STAGES[number % len(STAGES)](client, number)
        except ConnectionEndedError:
            raise AssertionError("the gateway closed first") from None
        finally:
            await (client.reset() if chance.random() < 0.5 else client.close())


async def counted_by(engine: RunningEngine) -> tuple[int, int]:
    """What the engine counts: prompt and answer tokens of all it worked on."""
    text = (await engine.client.get("/metrics")).text
    values = [
        re.search(rf"^vllm:{kind}_tokens_total\S* (\S+)$", text, re.MULTILINE) for kind in ("prompt", "generation")
    ]
    return tuple(int(float(value[1])) for value in values if value is not None)  # type: ignore[return-value]


async def test_clients_that_leave_at_every_stage_leave_nothing_behind(
    start: Start, start_gateway: StartGateway
) -> None:
    engine = await start("--profile", "h100-8b", "--speed", "20")
    gateway = await start_gateway(Upstream(url=engine.url, engine="simulated"), limits=LIMITS, database=True)
    turn, chance = asyncio.Semaphore(AT_ONCE), random.Random(7)
    await asyncio.gather(*(one(gateway, number, turn, chance) for number in range(CLIENTS)))
    await gateway.idle()
    await until(lambda: engine.under_way == 0, "the engine works on")

    store = gateway.replica.edge.limiter.store
    assert isinstance(store, MemoryStore)
    levels = {name: cell.bucket(0).level for name, cell in store._cells.items() if cell.shape.slots}
    assert levels == {"key:alice:concurrent": 0, "key:alice:tokens_in_flight": 0}

    lines = gateway.lines("request")
    rows = Counter(line.get("settlement", "") for line in lines)
    sent = [line for line in lines if line.get("settlement")]
    assert len(sent) == sum(number % len(STAGES) not in (2, 3) for number in range(CLIENTS))
    exact = [line for line in sent if line["settlement"] == "exact"]
    assert len(exact) >= 2 * (CLIENTS // len(STAGES))
    ledger = await ledger_says(gateway)
    prompt, output = await counted_by(engine)
    said = sum(line["tokens_in"] + line["tokens_out"] for line in exact)
    assert ledger["exact"] == said
    # What the engine counted beyond that belongs to those that left: known by their events, or kept as reserved. Each
    # had at most its 24 tokens, and a prompt of some forty.
    rest = prompt + output - said
    assert 0 <= rest <= (len(sent) - len(exact)) * (24 + 60)
    print(f"{dict(rows)}; the engine: {prompt} + {output} tokens; the ledger by settlement: {dict(ledger)}")


async def ledger_says(gateway: Gateway) -> Counter[str]:
    """Return what the ledger says of the tokens, by how they are known."""
    books = gateway.replica.books
    assert books is not None
    await books.flush()
    sums = books.ledger.store.sums(("settlement",), Wanted())
    return Counter({row["settlement"]: row["tokens_in"] + row["tokens_out"] for row in sums})
