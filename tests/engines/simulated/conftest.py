"""A simulated engine on a socket, on the test's own event loop."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import httpx
import pytest

from engines.simulation.__main__ import Server, arguments
from tests.support.gateway import Face, start_gateway

__all__ = ["start_gateway"]

Start = Callable[..., Awaitable["RunningEngine"]]


@pytest.fixture
def face() -> Face:
    """One face: the engine is what is tried here."""
    return "protocol"


class RunningEngine:
    """A server, and a client for it."""

    def __init__(self, server: Server, url: str, client: httpx.AsyncClient) -> None:
        self.server = server
        self.url = url
        self.client = client

    @property
    def under_way(self) -> int:
        """Sequences the model knows."""
        return self.server.driver.model.running + self.server.driver.model.waiting


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """Start engines with these arguments: an instant one named smollm2 unless they say otherwise."""
    async with AsyncExitStack() as stack:

        async def begin(*more: str) -> RunningEngine:
            usual = ["--profile", "instant", "--served-model-name", "smollm2", "--max-model-len", "2048", "--port", "0"]
            server = Server(arguments().parse_args([*usual, *more]))
            listener = await server.start()
            url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
            client = await stack.enter_async_context(httpx.AsyncClient(base_url=url, timeout=10, verify=False))

            async def stop() -> None:
                listener.close()
                server.driver.close()
                for connection in list(server.connections):
                    connection.close()

            stack.push_async_callback(stop)
            return RunningEngine(server, url, client)

        yield begin


def make_adapter(folder: Path, text: str = "weights", **config: object) -> Path:
    """Write an adapter's directory; ``text`` makes its weights, and so its version."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"r": 8, **config}))
    header = json.dumps({"__metadata__": {"for": text}}).encode()
    (folder / "adapter_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    return folder
