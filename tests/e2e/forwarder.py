"""Carries bytes between a loopback port and the engine's Unix socket: a process that can be killed in its place.

    python forwarder.py PORT PATH

It says ``ready`` when it listens. To whoever is connected, its death is the engine's: the kernel closes the connection.
``forwarding`` runs it.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import Iterator

from tests.support.real_engine import RealEngine
from tests.support.sockets import free_port


async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Carry one direction until its end."""
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


async def main(port: int, path: str) -> None:
    """Forward until somebody kills this process."""

    async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        engine_reader, engine_writer = await asyncio.open_unix_connection(path)
        await asyncio.gather(carry(reader, engine_writer), carry(engine_reader, writer))

    server = await asyncio.start_server(on_connection, "127.0.0.1", port)
    print("ready", flush=True)
    await server.serve_forever()


@contextlib.contextmanager
def forwarding(engine: RealEngine) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Give the engine another address, and the process that may be killed there: the engine itself is needed on."""
    port = free_port()
    command = [sys.executable, "-m", "tests.e2e.forwarder", str(port), engine.url.removeprefix("unix:")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield f"http://127.0.0.1:{port}", process
        finally:
            process.kill()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), sys.argv[2]))
