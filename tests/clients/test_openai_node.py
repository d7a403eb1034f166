"""The official openai client for Node gets what an application expects, from every server alike."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.clients.server import Server
from tests.support import node


def chat(server: Server, recording: str, *, max_tokens: int | None = None, **more: Any) -> dict[str, Any]:
    """Return a call of chat.completions.create named like the recording whose request it sends."""
    body = server.request(recording, max_tokens=max_tokens)
    return {"name": recording, "resource": "chat", "body": body, **more}


def text_of(chunks: list[dict[str, Any]]) -> str:
    """Put together the text of a streamed chat completion."""
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


async def test_chat_tools_and_schema(server: Server, node_client: node.Client) -> None:
    results = await node_client.run(
        server.base_url,
        server.api_key,
        [
            chat(server, "chat_basic"),
            chat(server, "chat_tool_required_strict", max_tokens=128),
            chat(server, "chat_json_schema"),
        ],
    )
    answer = results["chat_basic"]["value"]
    assert answer["model"] == server.model
    assert "Paris" in answer["choices"][0]["message"]["content"]
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    call = results["chat_tool_required_strict"]["value"]["choices"][0]["message"]["tool_calls"][0]["function"]
    assert call["name"] == "get_weather"
    assert set(json.loads(call["arguments"])) == {"city"}
    text = results["chat_json_schema"]["value"]["choices"][0]["message"]["content"]
    assert set(json.loads(text)) == {"city", "n"}


async def test_streams(server: Server, node_client: node.Client) -> None:
    """With usage the last chunk has no choices; without it there is neither usage nor such a chunk."""
    names = ("chat_stream_usage", "chat_stream", "chat_stream_tool_required")
    results = await node_client.run(server.base_url, server.api_key, [chat(server, name) for name in names])
    assert all("error" not in result for result in results.values())
    *content, last = results["chat_stream_usage"]["chunks"]
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] > 0
    assert "Paris" in text_of(content)
    assert {chunk["model"] for chunk in [*content, last]} == {server.model}
    plain = results["chat_stream"]["chunks"]
    assert all(chunk["choices"] and not chunk.get("usage") for chunk in plain)
    assert text_of(plain) == text_of(content)
    parts = [
        part
        for chunk in results["chat_stream_tool_required"]["chunks"]
        for choice in chunk["choices"]
        for part in choice["delta"].get("tool_calls") or []
    ]
    assert parts[0]["function"]["name"] == "get_weather"


async def test_completions_responses_and_models(server: Server, node_client: node.Client) -> None:
    results = await node_client.run(
        server.base_url,
        server.api_key,
        [
            {"name": "completion", "resource": "completions", "body": server.request("comp_basic")},
            {"name": "stream", "resource": "completions", "body": server.request("comp_stream_usage")},
            {"name": "response", "resource": "responses", "body": server.request("responses")},
            {"name": "events", "resource": "responses", "body": server.request("responses_stream")},
            {"name": "models", "resource": "models"},
        ],
    )
    assert "Paris" in results["completion"]["value"]["choices"][0]["text"]
    assert results["stream"]["chunks"][-1]["usage"]
    assert results["response"]["value"]["model"] == server.model
    assert results["events"]["chunks"][-1]["type"] in ("response.completed", "response.incomplete")
    assert server.model in [model["id"] for model in results["models"]["value"]["data"]]


async def test_errors_are_the_right_classes(server: Server, node_client: node.Client) -> None:
    results = await node_client.run(
        server.base_url,
        server.api_key,
        [chat(server, name) for name in ("lora_unknown_model_stream", "err_temperature_neg", "err_prompt_too_long")],
    )
    errors = {name: result["error"] for name, result in results.items()}
    assert {name: (error["class"], error["status"]) for name, error in errors.items()} == {
        "lora_unknown_model_stream": ("NotFoundError", 404),
        "err_temperature_neg": ("BadRequestError", 400),
        "err_prompt_too_long": ("BadRequestError", 400),
    }
    if server.speaks_for_itself:
        assert errors["lora_unknown_model_stream"]["code"] == "model_not_found"
        assert all(error["type"] == "invalid_request_error" and error["requestID"] for error in errors.values())


async def test_a_wrong_key_is_an_authentication_error(server: Server, node_client: node.Client) -> None:
    if not server.api_key:
        pytest.skip("the server at --server-url takes any key")
    results = await node_client.run(server.base_url, server.api_key, [chat(server, "chat_basic", apiKey="sk-wrong")])
    error = results["chat_basic"]["error"]
    assert (error["class"], error["status"]) == ("AuthenticationError", 401)
    if server.speaks_for_itself:
        assert error["code"] == "invalid_api_key"


async def test_an_application_may_leave_a_stream_early(server: Server, node_client: node.Client) -> None:
    """``break`` after two chunks: no error, and the next call works."""
    results = await node_client.run(
        server.base_url, server.api_key, [chat(server, "chat_stream", stopAfter=2), chat(server, "chat_basic")]
    )
    assert len(results["chat_stream"]["chunks"]) == 2
    assert "error" not in results["chat_stream"]
    assert results["chat_basic"]["value"]["choices"]
