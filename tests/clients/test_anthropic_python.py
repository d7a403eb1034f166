"""The official anthropic client for Python gets what an application expects from ``/v1/messages``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import pytest

from tests.clients.server import Server

if TYPE_CHECKING:
    from anthropic import AsyncAnthropic


def client_for(server: Server, **credential: str) -> AsyncAnthropic:
    """Return a client that appends ``/v1/messages`` itself and sends its key as ``x-api-key``."""
    # Here, so that only who runs these tests loads it: that takes a second.
    from anthropic import AsyncAnthropic, DefaultAsyncHttpxClient

    return AsyncAnthropic(
        base_url=server.base_url.removesuffix("/v1"),
        max_retries=0,
        # Reading all authorities' certificates at the start of each client takes longer than a test.
        http_client=DefaultAsyncHttpxClient(verify=server.base_url.startswith("https:")),
        **(credential or {"api_key": server.api_key or "unused"}),  # type: ignore[arg-type]
    )


def message(server: Server, recording: str, **extra: Any) -> dict[str, Any]:
    """Return what an application passes to ``create``; this client has no argument for a temperature."""
    body = server.request(recording)
    more = {name: body.pop(name) for name in ("temperature",) if name in body}
    return {**body, "extra_body": {**more, **extra}}


@pytest.fixture
async def client(gateway_server: Server) -> AsyncIterator[AsyncAnthropic]:
    async with client_for(gateway_server) as opened:
        yield opened


async def test_a_message(client: AsyncAnthropic, gateway_server: Server) -> None:
    answer = await client.messages.create(**message(gateway_server, "messages"))
    assert (answer.type, answer.role, answer.model) == ("message", "assistant", gateway_server.model)
    [block] = answer.content
    assert block.type == "text"
    assert "Paris" in block.text
    assert answer.stop_reason in ("end_turn", "max_tokens")
    assert answer.usage.input_tokens > 0
    assert 0 < answer.usage.output_tokens <= 12


async def test_a_streamed_message_is_put_together(client: AsyncAnthropic, gateway_server: Server) -> None:
    """By the client's own accumulator, which needs every typed event in its place."""
    body = message(gateway_server, "messages_stream")
    del body["stream"]
    async with client.messages.stream(**body) as stream:
        pieces = [piece async for piece in stream.text_stream]
        whole = await stream.get_final_message()
    [block] = whole.content
    assert block.type == "text"
    assert block.text == "".join(pieces) == "The capital of France"
    assert whole.model == gateway_server.model
    assert whole.stop_reason == "max_tokens"
    assert whole.usage.output_tokens == 4


async def test_the_events_come_in_their_order(client: AsyncAnthropic, gateway_server: Server) -> None:
    events = [event async for event in await client.messages.create(**message(gateway_server, "messages_stream"))]
    first, *_, last = events
    assert first.type == "message_start"
    assert first.message.model == gateway_server.model
    assert last.type == "message_stop"
    kinds = [event.type for event in events]
    assert kinds.index("content_block_start") < kinds.index("content_block_delta") < kinds.index("content_block_stop")


async def test_an_unknown_model_is_not_found(client: AsyncAnthropic, gateway_server: Server) -> None:
    import anthropic

    with pytest.raises(anthropic.NotFoundError, match="ghost") as caught:
        await client.messages.create(**message(gateway_server, "messages_err"))
    if gateway_server.speaks_for_itself:
        assert isinstance(caught.value.body, dict)
        assert caught.value.body["type"] == "error"
        assert caught.value.body["error"]["type"] == "not_found_error"
        assert caught.value.body["request_id"] == caught.value.response.headers["x-request-id"]


async def test_a_wrong_field_is_a_bad_request(client: AsyncAnthropic, gateway_server: Server) -> None:
    """A field that steers the engine is no client's to send; the request is refused before any engine hears of it."""
    import anthropic

    with pytest.raises(anthropic.BadRequestError, match="'priority'") as caught:
        await client.messages.create(**message(gateway_server, "messages", priority=-1))
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["error"]["type"] == "invalid_request_error"


async def test_a_wrong_key_is_an_authentication_error(gateway_server: Server) -> None:
    import anthropic

    if not gateway_server.api_key:
        pytest.skip("the server at --server-url takes any key")
    async with client_for(gateway_server, api_key="sk-wrong") as stranger:
        with pytest.raises(anthropic.AuthenticationError) as caught:
            await stranger.messages.create(**message(gateway_server, "messages"))
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["error"]["type"] == "authentication_error"


async def test_a_token_is_as_good_as_a_key(gateway_server: Server) -> None:
    """``ANTHROPIC_AUTH_TOKEN`` goes as ``Authorization: Bearer``."""
    async with client_for(gateway_server, auth_token=gateway_server.api_key) as client:
        answer = await client.messages.create(**message(gateway_server, "messages"))
    assert answer.content
