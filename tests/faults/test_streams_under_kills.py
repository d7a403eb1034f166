"""Eight engines, one of them killed every five seconds under five hundred streams: no client sees it."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from loadtests.children import Child, get, kill_all, start_engine, start_gateway, wait_ready
from tests.support.client import request_bytes
from tests.support.http1 import BodyReader
from tests.support.sockets import free_port

ENGINES, STREAMS, KILLS, EVERY = 8, 500, 3, 5.0
# Ten tokens a second each: as many chunks a second as a laptop's two cores relay, tell and check beside eight engines.
PACE = ("--speed", "0.1", "--served-model-name", "told", "--max-model-len", "4096", "--max-num-seqs", "256")
JSON = [("content-type", "application/json"), ("connection", "close"), ("host", "gateway")]


def body_of(number: int, *, stream: bool) -> bytes:
    turns = [{"role": "user", "content": f"Tell me story {number}"}]
    asked: dict[str, Any] = {"model": "told", "messages": turns, "max_tokens": 150 + number % 100, "ignore_eos": True}
    if stream:
        asked |= {"stream": True, "stream_options": {"include_usage": True}}
    return json.dumps(asked).encode()


async def ask(port: int, body: bytes) -> bytes:
    """Return the body of an answer with status 200."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request_bytes("POST", "/v1/chat/completions", JSON, body))
    data = bytearray(await reader.read(-1))
    writer.close()
    head, _, rest = data.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), bytes(data[:300])
    chunked = b"transfer-encoding: chunked" in head.lower()
    answer = BodyReader("chunked" if chunked else "close")
    answer.feed(rest)
    return answer.body


async def stream(port: int, number: int) -> tuple[str, list[str], dict[str, int]] | str:
    """Return the text of a stream, how it ended and what it used; or what went wrong."""
    events = (await ask(port, body_of(number, stream=True))).decode().split("\n\n")
    if events[-2:] != ["data: [DONE]", ""]:
        return f"{number}: {events[-2:]}"
    chunks = [json.loads(event[6:]) for event in events[:-2] if event.startswith("data: ")]
    if len({chunk["id"] for chunk in chunks}) != 1:
        return f"{number}: several ids"
    choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    text = "".join(choice["delta"].get("content", "") for choice in choices)
    usage = chunks[-1]["usage"]
    counts = {name: usage[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
    return text, [choice["finish_reason"] for choice in choices if choice["finish_reason"]], counts


async def undisturbed(port: int, number: int) -> tuple[str, list[str], dict[str, int]]:
    answer = json.loads(await ask(port, body_of(number, stream=False)))
    choice, usage = answer["choices"][0], answer["usage"]
    counts = {name: usage[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
    return choice["message"]["content"], [choice["finish_reason"]], counts


async def kill_now_and_then(engines: list[Child], folder: Path) -> None:
    """SIGKILL to one after the other, each of which is started anew at once."""
    for number in range(KILLS):
        await asyncio.sleep(EVERY)
        port = engines[number].port
        await asyncio.to_thread(kill_all, [engines[number]])
        engines[number] = start_engine(f"again-{number}", folder, port, *PACE)


@pytest.mark.load
def test_nobody_sees_engines_die(tmp_path: Path) -> None:
    """Every text is the one that an engine tells undisturbed, with the usage of one answer and one end."""
    ports = [free_port() for _ in range(ENGINES + 3)]
    port, admin_port, judge_port = ports[ENGINES:]
    settings = {
        "auth": "none",
        "data_dir": str(tmp_path),
        "log": {"file": str(tmp_path / "requests.jsonl")},
        "upstreams": [
            {"url": f"http://127.0.0.1:{one}", "engine": "simulated", "models": {"told": "told"}}
            for one in ports[:ENGINES]
        ],
    }
    (tmp_path / "forebay.yaml").write_text(yaml.safe_dump(settings))
    engines = [start_engine(f"engine-{at}", tmp_path, one, *PACE) for at, one in enumerate(ports[:ENGINES])]
    judge = start_engine("judge", tmp_path, judge_port, *PACE, "--profile", "instant")
    gateway = start_gateway("gateway", tmp_path, port, admin_port)
    try:
        for one in (*engines, judge):
            wait_ready(one, "/health")
        wait_ready(gateway, "/health/ready")

        async def run() -> tuple[list[Any], list[Any]]:
            killing = asyncio.create_task(kill_now_and_then(engines, tmp_path))
            seen = await asyncio.gather(*(stream(port, number) for number in range(STREAMS)))
            await killing
            return seen, [await undisturbed(judge_port, number) for number in range(STREAMS)]

        seen, wanted = asyncio.run(run())
        metrics = get(admin_port, "/metrics").decode()
    finally:
        kill_all([gateway, judge, *engines])
    lines = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    resumed = Counter(line.get("resumed", 0) for line in lines if line["event"] == "request")
    print(f"streams by how often they went on: {dict(sorted(resumed.items()))}")
    print("\n".join(line for line in metrics.splitlines() if line.startswith("forebay_streams")))
    failures = [one for one in seen if isinstance(one, str)]
    assert not failures, failures[:5]
    assert seen == wanted
    # Each engine that died had a part of them.
    assert sum(count for times, count in resumed.items() if times) >= STREAMS // ENGINES
    assert resumed.total() == STREAMS
