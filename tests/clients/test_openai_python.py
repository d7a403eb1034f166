"""The official openai client for Python gets what an application expects, from every server alike.

Assertions name the contract (types, fields, exception classes), not one model's wording, so that they hold on
recordings, through the gateway and on a real engine.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import pytest

from tests.clients.server import Server

if TYPE_CHECKING:
    from openai import AsyncOpenAI
    from openai.types.chat import ChatCompletionChunk


def client_for(server: Server, key: str | None = None) -> AsyncOpenAI:
    """Return a client that does not try again."""
    # Here, so that only who runs these tests loads it.
    from openai import AsyncOpenAI, DefaultAsyncHttpxClient

    # Reading all authorities' certificates at the start of each client takes longer than a test.
    plain = DefaultAsyncHttpxClient(verify=server.base_url.startswith("https:"))
    return AsyncOpenAI(
        base_url=server.base_url, api_key=key or server.api_key or "unused", max_retries=0, http_client=plain
    )


@pytest.fixture
async def client(server: Server) -> AsyncIterator[AsyncOpenAI]:
    async with client_for(server) as opened:
        yield opened


async def stream_chat(client: AsyncOpenAI, body: dict[str, Any]) -> list[ChatCompletionChunk]:
    """Read a whole streamed chat completion."""
    return [chunk async for chunk in await client.chat.completions.create(**body)]


def text_of(chunks: list[ChatCompletionChunk], index: int = 0) -> str:
    """Put together the text of one choice."""
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices if choice.index == index)


async def test_chat(client: AsyncOpenAI, server: Server) -> None:
    answer = await client.chat.completions.create(**server.request("chat_basic"))
    assert answer.model == server.model
    assert answer.id.startswith("chatcmpl-")
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.completion_tokens <= 24


async def test_stream_with_usage_ends_with_a_chunk_without_choices(client: AsyncOpenAI, server: Server) -> None:
    chunks = await stream_chat(client, server.request("chat_stream_usage"))
    *content, last = chunks
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens > 0
    assert all(chunk.usage is None for chunk in content)
    assert "Paris" in text_of(chunks)
    assert {chunk.model for chunk in chunks} == {server.model}
    assert len({chunk.id for chunk in chunks}) == 1
    assert content[0].choices[0].delta.role == "assistant"
    assert content[-1].choices[0].finish_reason in ("stop", "length")


async def test_stream_without_usage_shows_none(client: AsyncOpenAI, server: Server) -> None:
    """Also when the gateway asks the engine for it: no chunk without choices, no usage."""
    chunks = await stream_chat(client, server.request("chat_stream"))
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)
    assert "Paris" in text_of(chunks)


async def test_streamed_and_whole_answers_say_the_same(client: AsyncOpenAI, server: Server) -> None:
    whole = await client.chat.completions.create(**server.request("chat_basic"))
    chunks = await stream_chat(client, server.request("chat_stream"))
    assert text_of(chunks) == whole.choices[0].message.content


async def test_two_choices(client: AsyncOpenAI, server: Server) -> None:
    answer = await client.chat.completions.create(**server.request("chat_n2"))
    assert [choice.index for choice in answer.choices] == [0, 1]
    chunks = await stream_chat(client, server.request("chat_stream_n2"))
    assert text_of(chunks, 0)
    assert text_of(chunks, 1)


async def test_a_required_tool_is_called_with_its_schema(client: AsyncOpenAI, server: Server) -> None:
    answer = await client.chat.completions.create(**server.request("chat_tool_required_strict", max_tokens=128))
    calls = answer.choices[0].message.tool_calls
    assert calls
    assert calls[0].type == "function"
    assert calls[0].function.name == "get_weather"
    assert set(json.loads(calls[0].function.arguments)) == {"city"}


async def test_a_named_tool_is_called(client: AsyncOpenAI, server: Server) -> None:
    answer = await client.chat.completions.create(**server.request("chat_tool_named"))
    calls = answer.choices[0].message.tool_calls
    assert calls
    assert calls[0].type == "function"
    assert calls[0].function.name == "get_weather"


async def test_a_streamed_tool_call_can_be_put_together(client: AsyncOpenAI, server: Server) -> None:
    """The first piece of a call brings its id and name, the arguments of all pieces are JSON."""
    chunks = await stream_chat(client, server.request("chat_stream_tool_required"))
    parts = [call for chunk in chunks for choice in chunk.choices for call in choice.delta.tool_calls or []]
    assert parts[0].id
    assert parts[0].function is not None
    assert parts[0].function.name == "get_weather"
    first = [part for part in parts if part.index == parts[0].index]
    json.loads("".join(part.function.arguments or "" for part in first if part.function))


async def test_a_json_schema_is_followed(client: AsyncOpenAI, server: Server) -> None:
    answer = await client.chat.completions.create(**server.request("chat_json_schema"))
    chunks = await stream_chat(client, server.request("chat_stream_json_schema"))
    for text in (answer.choices[0].message.content or "", text_of(chunks)):
        value = json.loads(text)
        assert set(value) == {"city", "n"}
        assert isinstance(value["n"], int)


async def test_logprobs(client: AsyncOpenAI, server: Server) -> None:
    answer = await client.chat.completions.create(**server.request("chat_logprobs"))
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content
    assert all(token.logprob <= 0 and len(token.top_logprobs) >= 2 for token in logprobs.content)
    chunks = await stream_chat(client, server.request("chat_stream_logprobs"))
    assert any(choice.logprobs and choice.logprobs.content for chunk in chunks for choice in chunk.choices)


async def test_completions(client: AsyncOpenAI, server: Server) -> None:
    answer = await client.completions.create(**server.request("comp_basic"))
    assert answer.object == "text_completion"
    assert answer.model == server.model
    assert "Paris" in answer.choices[0].text
    chunks = [chunk async for chunk in await client.completions.create(**server.request("comp_stream_usage"))]
    assert "Paris" in "".join(choice.text for chunk in chunks for choice in chunk.choices)
    assert chunks[-1].usage is not None
    assert {chunk.model for chunk in chunks} == {server.model}


async def test_responses(client: AsyncOpenAI, server: Server) -> None:
    answer = await client.responses.create(**server.request("responses"))
    assert answer.model == server.model
    assert answer.status in ("completed", "incomplete")
    assert answer.usage is not None
    assert answer.output_text


async def test_streamed_responses_end_with_their_typed_event(client: AsyncOpenAI, server: Server) -> None:
    events = [event async for event in await client.responses.create(**server.request("responses_stream"))]
    assert events[0].type == "response.created"
    assert events[0].response.model == server.model
    assert events[-1].type in ("response.completed", "response.incomplete")
    assert events[-1].response.usage is not None
    assert [event.sequence_number for event in events] == list(range(len(events)))


async def test_models(client: AsyncOpenAI, server: Server) -> None:
    models = [model async for model in client.models.list()]
    assert server.model in [model.id for model in models]


@pytest.mark.parametrize("recording", ["lora_unknown_model", "lora_unknown_model_stream"])
async def test_an_unknown_model_is_not_found(client: AsyncOpenAI, server: Server, recording: str) -> None:
    import openai

    with pytest.raises(openai.NotFoundError, match="ghost") as caught:
        await client.chat.completions.create(**server.request(recording))
    if server.speaks_for_itself:
        assert (caught.value.code, caught.value.type) == ("model_not_found", "invalid_request_error")


async def test_a_wrong_value_is_a_bad_request(client: AsyncOpenAI, server: Server) -> None:
    import openai

    with pytest.raises(openai.BadRequestError, match="temperature") as caught:
        await client.chat.completions.create(**server.request("err_temperature_neg"))
    if server.speaks_for_itself:
        assert caught.value.type == "invalid_request_error"


@pytest.mark.parametrize("recording", ["err_prompt_too_long", "err_prompt_too_long_stream"])
async def test_too_long_a_prompt_is_a_bad_request(client: AsyncOpenAI, server: Server, recording: str) -> None:
    """Streamed or not: the status is the error's, no stream is begun."""
    import openai

    with pytest.raises(openai.BadRequestError, match="context length") as caught:
        await client.chat.completions.create(**server.request(recording))
    if server.speaks_for_itself:
        assert caught.value.code == "context_length_exceeded"


async def test_a_wrong_key_is_an_authentication_error(server: Server) -> None:
    import openai

    if not server.api_key:
        pytest.skip("the server at --server-url takes any key")
    async with client_for(server, "sk-wrong") as stranger:
        with pytest.raises(openai.AuthenticationError) as caught:
            await stranger.chat.completions.create(**server.request("chat_basic"))
    if server.speaks_for_itself:
        assert caught.value.code == "invalid_api_key"
        assert caught.value.request_id


async def test_the_synchronous_client_streams_too(server: Server) -> None:
    """It reads on a thread of its own while the server runs on this loop."""

    from openai import OpenAI

    def read() -> list[ChatCompletionChunk]:
        with OpenAI(base_url=server.base_url, api_key=server.api_key or "unused", max_retries=0) as blocking:
            return list(blocking.chat.completions.create(**server.request("chat_stream_usage")))

    chunks = await asyncio.to_thread(read)
    assert "Paris" in text_of(chunks)
    assert chunks[-1].usage is not None
