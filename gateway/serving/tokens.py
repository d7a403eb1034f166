"""Counting a prompt's tokens where the tokenizer is: at an engine."""

from __future__ import annotations

import asyncio
import enum
from typing import Any

import msgspec

from engines.protocol import Fields
from gateway.serving.pool import Endpoint, Pool
from gateway.serving.upstream import Loss

COUNT_TIMEOUT = 10.0
"""Seconds a count may take before the request is refused."""

TEMPLATE_TOKENS = 512
"""What a chat template may add of its own: a system prompt, the rules for calling tools."""

MAX_COUNT_ANSWER = 16 * 1024 * 1024

_PATH = "/tokenize"
_NUMBER = frozenset({b"-", *(b"%d" % digit for digit in range(10))})
_decode_list = msgspec.json.Decoder(list[msgspec.Raw]).decode
_PASSING = (401, 403, 404, 408, 429)
"""The engine's key, its model or its load: not the request's fault."""
_PROMPT_FIELDS = ("prompt", "input", "messages", "system", "instructions", "tools")
_CHAT_TOO = ("/v1/embeddings", "/tokenize")
_CHAT_FIELDS = ("messages", "tools", "chat_template_kwargs", "add_generation_prompt", "continue_final_message")


class Uncounted(enum.Enum):
    """Why there is no count."""

    NOT_NOW = "not now"
    """No engine answered."""
    NEVER = "never"
    """No tokenizer takes such a request."""


class _Count(msgspec.Struct):
    count: int


_Answered = tuple[int, bytes]
"""Status and body; ``_LOST``: none came, or one too large to be a count; ``_STALE``: a kept connection was closed."""
_LOST, _STALE = 0, -1


class _Answer:
    """Receives one small answer."""

    def __init__(self, done: asyncio.Future[_Answered]) -> None:
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
        self._finish(self._status if self._size <= MAX_COUNT_ANSWER else _LOST)

    def on_lost(self, loss: Loss, detail: str) -> None:
        self._finish(_STALE if loss is Loss.STALE else _LOST)

    def _finish(self, status: int) -> None:
        if not self._done.done():
            self._done.set_result((status, b"".join(self._parts)))


async def count_tokens(pool: Pool, model: str, path: str, fields: Fields, enough: int = 0) -> int | Uncounted:
    """Return how many tokens a request's prompt has, as an engine that serves the model counts them.

    Of several prompts the longest counts. One that cannot have more than ``enough`` is not counted but taken for the
    most it can have, so that a body of ten thousand short prompts does not become as many requests.
    """
    prompts = _prompts(path, fields)
    if prompts is None:
        return Uncounted.NEVER
    endpoint = pool.choose(model, _PATH, ())
    if endpoint is None:
        return Uncounted.NOT_NOW
    longest = 0
    for prompt in prompts:
        most = sum(len(value) for value in prompt.values()) + TEMPLATE_TOKENS
        if len(prompts) > 1 and most <= enough:
            longest = max(longest, most)
            continue
        count = await _ask(endpoint, endpoint.models[model].model, prompt)
        if isinstance(count, Uncounted):
            return count
        longest = max(longest, count)
    return longest


def count_prompts(raw: msgspec.Raw | None) -> int:
    """Return how many prompts a completion request holds: a list of strings or of lists is that many."""
    if raw is None or not bytes(raw).lstrip().startswith(b"["):
        return 1
    try:
        prompts = _decode_list(raw)
    except RecursionError:
        # Nested so deep that no engine takes it for prompts.
        return 1
    # One prompt as token ids begins with a number; engines take numbers in strings as such too, so "1" counts as text.
    return 1 if prompts and bytes(prompts[0])[:1] in _NUMBER else max(1, len(prompts))


def _prompts(path: str, fields: Fields) -> list[Fields] | None:
    """Return the bodies for the tokenizer, one a prompt; None: not countable."""
    try:
        if path == "/v1/chat/completions" or (path in _CHAT_TOO and "messages" in fields):
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


async def _ask(endpoint: Endpoint, model: msgspec.Raw, prompt: Fields) -> int | Uncounted:
    value = prompt.get("prompt")
    if value is not None and bytes(value).startswith(b"["):
        return len(_decode_list(value))
    body = msgspec.json.encode({**prompt, "model": model})
    head = endpoint.request_head(_PATH)
    payload = b"%bcount\r\ncontent-length: %d\r\n\r\n%b" % (head, len(body), body)
    status, answer = await _send(endpoint, payload, fresh=False)
    if status == _STALE:
        status, answer = await _send(endpoint, payload, fresh=True)
    if status != 200:
        # A refused request would be refused again, and by the engine that should serve it too.
        return Uncounted.NEVER if 400 <= status < 500 and status not in _PASSING else Uncounted.NOT_NOW
    try:
        return msgspec.json.decode(answer, type=_Count).count
    except (ValueError, RecursionError):
        return Uncounted.NOT_NOW


async def _send(endpoint: Endpoint, payload: bytes, *, fresh: bool) -> _Answered:
    done: asyncio.Future[_Answered] = asyncio.get_running_loop().create_future()
    connection = endpoint.connections.send(payload, _Answer(done), fresh=fresh)
    try:
        return await asyncio.wait_for(done, COUNT_TIMEOUT)
    except TimeoutError:
        return _LOST, b""
    finally:
        # Too late, or the client left while it waited; a connection that has answered is no longer ours to close.
        if done.cancelled() or not done.done():
            connection.abort()
