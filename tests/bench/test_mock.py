"""The mock engine answers as vLLM does where a gateway can see it."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from loadtests.bench.bodies import chat_body
from loadtests.bench.processes import http_get
from tests.support import recordings


async def post(port: int, body: bytes) -> httpx.Response:
    async with httpx.AsyncClient(verify=False, base_url=f"http://127.0.0.1:{port}") as client:
        return await client.post("/v1/chat/completions", content=body)


def events(text: str) -> list[Any]:
    *whole, end, rest = text.split("\n\n")
    assert (end, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in whole]


async def test_a_stream_has_every_field_of_the_recorded_engine(engine: int) -> None:
    """Role, content, finish: what the real engine puts into each, but for what it never says twice."""
    recorded = events(recordings.load("vllm", "chat_stream").body.decode())
    mocked = events((await post(engine, chat_body("mock-model", 600, stream=True, chunks=3, interval_ms=1))).text)
    for place in (0, 1, -1):
        assert set(recorded[place]) - set(mocked[place]) <= {"prompt_token_ids", "prompt_text", "system_fingerprint"}
        assert recorded[place]["choices"][0].keys() == mocked[place]["choices"][0].keys()
        assert recorded[place]["choices"][0]["delta"].keys() == mocked[place]["choices"][0]["delta"].keys()
    assert len(mocked) == 1 + 3 + 1


@pytest.mark.parametrize("asked", [True, False])
async def test_usage_comes_in_a_chunk_of_its_own_and_only_when_asked(engine: int, asked: bool) -> None:
    mocked = events(
        (
            await post(engine, chat_body("mock-model", 600, stream=True, include_usage=asked, chunks=3, interval_ms=1))
        ).text
    )
    assert [chunk["usage"]["completion_tokens"] for chunk in mocked if "usage" in chunk] == ([3] if asked else [])


async def test_chunks_tell_when_they_were_made_and_their_place(engine: int) -> None:
    mocked = events((await post(engine, chat_body("mock-model", 600, stream=True, chunks=4, interval_ms=5))).text)
    words = [chunk["choices"][0]["delta"]["content"] for chunk in mocked[1:5]]
    stamps = [int(word[2:18]) for word in words]
    assert [word[18:] for word in words] == ["#0 ", "#1 ", "#2 ", "#3 "]
    assert stamps[3] - stamps[0] >= 14_000


async def test_another_models_name_is_not_known(engine: int) -> None:
    """A gateway that forgets to translate the public name is found out."""
    response = await post(engine, chat_body("bench-model", 600))
    assert response.status_code == 404
    assert response.json()["error"]["param"] == "model"


async def test_a_body_may_come_in_chunks(engine: int) -> None:
    async def pieces() -> Any:
        body = chat_body("mock-model", 100_000)
        for start in range(0, len(body), 30_000):
            yield body[start : start + 30_000]

    async with httpx.AsyncClient(verify=False, base_url=f"http://127.0.0.1:{engine}") as client:
        for _ in range(2):
            response = await client.post("/v1/chat/completions", content=pieces())
            assert response.json()["model"] == "mock-model"


async def test_it_counts_connections_and_streams_that_were_hung_up(engine: int) -> None:
    async with (
        httpx.AsyncClient(verify=False, base_url=f"http://127.0.0.1:{engine}") as client,
        client.stream(
            "POST",
            "/v1/chat/completions",
            content=chat_body("mock-model", 600, stream=True, chunks=9, interval_ms=8000),
        ) as response,
    ):
        async for _ in response.aiter_raw():
            break
    stats = {"aborts": 0}
    while stats["aborts"] == 0:
        stats = json.loads(http_get(engine, "/__stats")[1])
    assert stats["streams"] == 1
    assert stats["aborts"] == 1
