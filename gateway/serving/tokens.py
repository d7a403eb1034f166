"""Counting a prompt's tokens where the tokenizer is: at an engine."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from engines.protocol import Fields
from gateway.serving.pool import Endpoint, Pool
from gateway.serving.upstream import Connection, Loss

COUNT_TIMEOUT = 10.0
"""Seconds a count may take before the request is refused."""

MAX_COUNT_ANSWER = 16 * 1024 * 1024

_PATH = "/tokenize"
_PROMPT_FIELDS = ("prompt", "input", "messages", "system", "instructions", "tools")
_CHAT_FIELDS = ("messages", "tools", "chat_template_kwargs", "add_generation_prompt", "continue_final_message")


class _Count(msgspec.Struct):
    count: int


class _Answer:
    """Receives one small answer."""

    def __init__(self, done: asyncio.Future[bytes | None]) -> None:
        self._done = done
        self._parts: list[bytes] = []
        self._size = 0
        self._status = 0

    def on_connected(self) -> None:
        """Nothing is measured here."""

    def on_head(self, status: int, content_type: bytes) -> None:
        self._status = status

    def on_data(self, data: bytes) -> None:
        self._size += len(data)
        if self._size <= MAX_COUNT_ANSWER:
            self._parts.append(data)

    def on_complete(self) -> None:
        whole = self._status == 200 and self._size <= MAX_COUNT_ANSWER
        self._finish(b"".join(self._parts) if whole else None)

    def on_lost(self, loss: Loss, detail: str) -> None:
        self._finish(None)

    def _finish(self, body: bytes | None) -> None:
        if not self._done.done():
            self._done.set_result(body)


async def count_tokens(pool: Pool, model: str, path: str, fields: Fields) -> int | None:
    """Return how many tokens a request's prompt has, None when no engine can tell now."""
    endpoint = pool.choose(model, _PATH, ())
    prompts = _prompts(path, fields)
    if endpoint is None or prompts is None:
        return None
    total = 0
    for prompt in prompts:
        count = await _ask(endpoint, endpoint.models[model], prompt)
        if count is None:
            return None
        total = max(total, count)
    return total


def _prompts(path: str, fields: Fields) -> list[Fields] | None:
    """Return the bodies for the tokenizer: one a prompt; the longest of several is what counts. None: not countable."""
    try:
        if path == "/v1/chat/completions":
            chat = {name: fields[name] for name in _CHAT_FIELDS if name in fields}
            return [chat] if "messages" in chat else None
        values = {name: msgspec.json.decode(fields[name]) for name in _PROMPT_FIELDS if name in fields}
    except (msgspec.DecodeError, RecursionError):
        return None
    if path in ("/v1/messages", "/v1/responses"):
        return _as_chat(values)
    value = values.get("prompt", values.get("input"))
    if value is None:
        return None
    prompts = value if isinstance(value, list) and value and isinstance(value[0], str | list) else [value]
    return [{"prompt": _raw(prompt)} for prompt in prompts]


def _as_chat(values: dict[str, Any]) -> list[Fields] | None:
    """Return a request of another dialect as the chat its engine makes of it."""
    turns = values.get("messages", values.get("input"))
    if isinstance(turns, str):
        turns = [{"role": "user", "content": turns}]
    if not isinstance(turns, list):
        return None
    system = values.get("system", values.get("instructions"))
    if system:
        turns = [{"role": "system", "content": system}, *turns]
    chat: Fields = {"messages": _raw(turns)}
    tools = values.get("tools")
    if isinstance(tools, list) and tools:
        chat["tools"] = _raw([_as_function(tool) for tool in tools])
    return [chat]


def _as_function(tool: Any) -> Any:
    if not isinstance(tool, dict) or "name" not in tool:
        return tool
    parameters = tool.get("input_schema", tool.get("parameters", {}))
    function = {"name": tool["name"], "description": tool.get("description", ""), "parameters": parameters}
    return {"type": "function", "function": function}


def _raw(value: Any) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(value))


async def _ask(endpoint: Endpoint, model: msgspec.Raw, prompt: Fields) -> int | None:
    value = prompt.get("prompt")
    if value is not None and bytes(value).startswith(b"["):
        return len(msgspec.json.decode(value, type=list[int]))
    body = msgspec.json.encode({**prompt, "model": model})
    head = endpoint.request_head(_PATH)
    payload = b"%bcount\r\ncontent-length: %d\r\n\r\n%b" % (head, len(body), body)
    done: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()
    connection: Connection | None = None
    try:
        connection = endpoint.connections.send(payload, _Answer(done))
        answer = await asyncio.wait_for(done, COUNT_TIMEOUT)
        connection = None
    except TimeoutError:
        return None
    finally:
        if connection is not None:
            connection.abort()
    try:
        return msgspec.json.decode(answer, type=_Count).count if answer is not None else None
    except msgspec.DecodeError:
        return None
