"""The least a relay in Python can cost: bytes both ways on uvloop, one engine connection a client, no HTTP at all.

It knows no key, no model, no end of a request. What it costs is the event loop and the kernel; a gateway's own work is
what it costs beyond that.
"""

from __future__ import annotations

import argparse
import asyncio
from typing import cast

import uvloop


class EngineSide(asyncio.Protocol):
    """The connection to the engine."""

    def __init__(self, client: ClientSide) -> None:
        self._client = client

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send what the client has sent meanwhile."""
        self.transport = cast(asyncio.Transport, transport)
        self._client.engine = self
        self.transport.write(b"".join(self._client.waiting))

    def data_received(self, data: bytes) -> None:
        """Hand on."""
        self._client.transport.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """End with the engine."""
        self._client.transport.close()


class ClientSide(asyncio.Protocol):
    """The connection of a client; ``waiting`` is what came before the engine's connection stood."""

    def __init__(self, engine_port: int) -> None:
        self._engine_port = engine_port
        self.engine: EngineSide | None = None
        self.waiting: list[bytes] = []
        self._connecting: asyncio.Task[object] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Open the engine's connection."""
        self.transport = cast(asyncio.Transport, transport)
        loop = asyncio.get_running_loop()
        opening = loop.create_connection(lambda: EngineSide(self), "127.0.0.1", self._engine_port)
        self._connecting = loop.create_task(opening)

    def data_received(self, data: bytes) -> None:
        """Hand on."""
        if self.engine is None:
            self.waiting.append(data)
        else:
            self.engine.transport.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """End with the client."""
        if self.engine is not None:
            self.engine.transport.close()


async def serve(port: int, engine_port: int) -> None:
    """Relay until the process ends."""
    server = await asyncio.get_running_loop().create_server(lambda: ClientSide(engine_port), "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--engine-port", type=int, required=True)
    options = parser.parse_args()
    uvloop.run(serve(options.port, options.engine_port))
