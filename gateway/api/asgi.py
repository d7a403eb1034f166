"""The portable face: the relayed paths as a plain ASGI function, under any server; everything else is FastAPI's."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from gateway.api.edge import Edge, Refused
from gateway.api.protocol import CLOSE_EXTENSION, REFUSAL_EXTENSION
from gateway.api.request import Request
from gateway.errors import Refusal
from gateway.headers import Header, to_pairs
from gateway.serving.dialect import Route

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

HIGH_WATER = 64 * 1024
"""Bytes that may wait for a slow client before the engine's stream waits too."""


class AsgiFace:
    """The outermost application: a dictionary look-up decides who serves."""

    def __init__(self, edge: Edge, routes: Mapping[str, Route], rest: App) -> None:
        self._edge = edge
        self._routes = routes
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        route = self._routes.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if route is None:
            await self._rest(scope, receive, send)
            return
        peer = scope["client"][0] if scope.get("client") else ""
        opened = self._edge.open(route, scope["headers"], peer)
        if isinstance(opened, Refused):
            await _answer(send, *self._edge.refusal(opened.route, opened.ticket, opened.refusal), close=True)
            return
        await self._serve(opened, scope, receive, send)

    async def _serve(self, request: Request, scope: Scope, receive: Receive, send: Send) -> None:
        extensions = scope.get("extensions", {})
        client = AsgiClient(request, self._edge, extensions.get(CLOSE_EXTENSION))
        try:
            body = await self._read(request, receive, extensions)
            if body is None:
                return
            client.read = not isinstance(body, Refusal)
            if isinstance(body, Refusal):
                self._edge.refuse(request, body, client)
            else:
                self._edge.run(request, body, client)
            await self._pass_on(request, client, receive, send)
        finally:
            # However this ends, cancelled included: an answer not finished is one whose client is gone.
            self._edge.client_gone(request)

    async def _read(self, request: Request, receive: Receive, extensions: dict[str, Any]) -> bytes | Refusal | None:
        """Return the body, why it is refused, or None when the client left."""
        parts: list[bytes] = []
        size = 0
        reading = Reading(request)
        while True:
            message = await reading.next(receive)
            if isinstance(message, Refusal):
                return message
            if message["type"] == "http.disconnect":
                return None
            if REFUSAL_EXTENSION in extensions:
                refusal: Refusal = extensions[REFUSAL_EXTENSION]
                return refusal
            part = message.get("body", b"")
            size += len(part)
            parts.append(part)
            too_large = self._edge.grow(request, size)
            if too_large is not None:
                return too_large
            if not message.get("more_body", False):
                return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _pass_on(self, request: Request, client: AsgiClient, receive: Receive, send: Send) -> None:
        """Send what the relay says, while somebody watches for the client to leave."""
        watcher = asyncio.get_running_loop().create_task(self._watch(request, client, receive))
        try:
            while True:
                message = client.take()
                if message is None:
                    if client.finished:
                        return
                    await client.wait()
                    continue
                await send(message)
        finally:
            watcher.cancel()

    async def _watch(self, request: Request, client: AsgiClient, receive: Receive) -> None:
        # A server drops what is sent after a disconnect without a word: only this tells.
        while (await receive())["type"] != "http.disconnect":
            continue
        if not client.finished:
            client.gone()
            self._edge.client_gone(request)


class Reading:
    """A body being read, which the edge may interrupt: the gateway does not wait for a client when it ends."""

    def __init__(self, request: Request) -> None:
        self._task = asyncio.current_task()
        self._refusal: Refusal | None = None
        request.interrupt = self._interrupt

    def _interrupt(self, refusal: Refusal) -> None:
        self._refusal = refusal
        if self._task is not None:
            self._task.cancel()

    async def next(self, receive: Receive) -> Message | Refusal:
        """Return the next message, or why no more is waited for."""
        try:
            return await receive()
        except asyncio.CancelledError:
            if self._refusal is None or self._task is None:
                raise
            self._task.uncancel()
            return self._refusal


class AsgiClient:
    """The client as the relay sees it: messages to send, kept until the server takes them."""

    def __init__(self, request: Request, edge: Edge, close_after: Callable[[], None] | None) -> None:
        self._request = request
        self._edge = edge
        self._close_after = close_after
        self._messages: deque[Message] = deque()
        self._held = 0
        self._paused = False
        self._waiter: asyncio.Future[None] | None = None
        self.finished = False
        """Whether nothing more will be said."""
        self.read = False

    def take(self) -> Message | None:
        """Return the next message to send, None when there is none yet."""
        if not self._messages:
            return None
        message = self._messages.popleft()
        self._held -= len(message.get("body", b""))
        if self._paused and self._held < HIGH_WATER // 4 and self._request.relay is not None:
            self._paused = False
            self._request.relay.resume()
        return message

    async def wait(self) -> None:
        """Wait until there is something to send or nothing more will be."""
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def gone(self) -> None:
        """The client left."""
        self.finished = True
        self._messages.clear()
        self._wake()

    def respond(self, status: int, headers: bytes, body: bytes) -> None:
        """Send a whole answer."""
        length = (b"content-length", b"%d" % len(body))
        self._start(status, [*to_pairs(headers), length])
        self._body(body, more=False)

    def start_stream(self, headers: bytes, data: bytes) -> None:
        """Send status, headers and the first bytes of a stream."""
        self._start(200, to_pairs(headers))
        if data:
            self._body(data, more=True)

    def send(self, data: bytes) -> None:
        """Send more of a stream."""
        self._body(data, more=True)

    def end_stream(self, data: bytes, *, close: bool) -> None:
        """Send the last bytes of a stream."""
        if close and self._close_after is not None:
            self._close_after()
        self._body(data, more=False)

    def abort(self) -> None:
        """Stop in the middle: the server closes a connection whose answer is not finished."""
        self.gone()

    def _start(self, status: int, headers: list[Header]) -> None:
        if self._edge.closing or not self.read:
            headers.append((b"connection", b"close"))
        self._messages.append({"type": "http.response.start", "status": status, "headers": headers})

    def _body(self, data: bytes, *, more: bool) -> None:
        self._messages.append({"type": "http.response.body", "body": data, "more_body": more})
        self._held += len(data)
        self.finished = not more
        if more and not self._paused and self._held > HIGH_WATER and self._request.relay is not None:
            self._paused = True
            self._request.relay.pause()
        self._wake()


async def _answer(send: Send, status: int, headers: bytes, body: bytes, *, close: bool) -> None:
    extra = [(b"content-length", b"%d" % len(body))]
    if close:
        extra.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": [*to_pairs(headers), *extra]})
    await send({"type": "http.response.body", "body": body, "more_body": False})
