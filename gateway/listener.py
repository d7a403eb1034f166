"""A listening socket served by uvicorn's protocol, with a shutdown of our own.

uvicorn's server closes idle connections and waits for its ASGI tasks; it knows nothing of requests that need no task,
nor of a time in which a load balancer takes notice. So the loop of ``uvicorn.Server`` is not used, its parts are.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from email.utils import formatdate
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.server import ServerState


class ListenError(Exception):
    """The address cannot be listened on; the message says why and what to do."""


def bind(host: str, port: int) -> socket.socket:
    """Return a bound TCP socket. Raises ListenError when the address is taken or not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named as TCP: asyncio, unlike uvloop, switches Nagle's algorithm off only then, and events would wait for ACKs.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        # Two sockets may be bound to one port as long as neither listens; then uvloop would not tell that it cannot.
        sock.listen()
    except OSError as error:
        sock.close()
        raise ListenError(
            f"cannot listen on {host}:{port}: {error.strerror}. Stop what uses it or choose another port (--port)."
        ) from None
    return sock


def bind_unix(path: str) -> socket.socket:
    """Return a bound Unix socket; one left behind by a dead process is replaced. Raises ListenError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if sock.connect_ex(path) == 0:
            raise ListenError(f"cannot listen on {path}: another process does. Stop it or choose another path.")
        sock.close()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        _remove_stale(Path(path))
        sock.bind(path)
    except OSError as error:
        sock.close()
        raise ListenError(f"cannot listen on {path}: {error.strerror}.") from None
    except ListenError:
        sock.close()
        raise
    return sock


def _remove_stale(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        if path.is_socket():
            path.unlink()


class Listener:
    """One listening socket and its connections."""

    def __init__(
        self, app: Any, sock: socket.socket, protocol: type[asyncio.Protocol], tls: tuple[str, str] | None, backlog: int
    ) -> None:
        self._sock = sock
        self._config = uvicorn.Config(
            app,
            http=protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            # Whose word counts for a client's address is the edge's to decide; uvicorn would believe anybody local.
            proxy_headers=False,
            ssl_certfile=tls[0] if tls else None,
            ssl_keyfile=tls[1] if tls else None,
            backlog=backlog,
        )
        try:
            self._config.load()
        except OSError as error:
            # What ssl finds wrong in a certificate is an OSError too.
            sock.close()
            files = " and ".join(tls or ())
            told = f"listen.tls: {files} cannot be used: {error.strerror or error}. Give a certificate and its own key."
            raise ListenError(told) from None
        self.state = ServerState()
        self._server: asyncio.Server | None = None

    @property
    def port(self) -> int:
        """The TCP port; 0 on a Unix socket."""
        name = self._sock.getsockname()
        return int(name[1]) if isinstance(name, tuple) else 0

    async def open(self) -> None:
        """Begin to accept connections."""
        self.tick()
        loop = asyncio.get_running_loop()
        config = self._config
        context: ssl.SSLContext | None = config.ssl

        def protocol() -> asyncio.Protocol:
            kind: Any = config.http_protocol_class
            made: asyncio.Protocol = kind(config=config, server_state=self.state, app_state={}, _loop=loop)
            return made

        self._server = await loop.create_server(protocol, sock=self._sock, ssl=context, backlog=config.backlog)

    def tick(self) -> None:
        """Set the date that answers carry; called once a second."""
        self.state.default_headers = [(b"date", formatdate(usegmt=True).encode("ascii"))]

    def close(self) -> None:
        """Accept no more connections, and close those that wait for a request."""
        if self._server is not None:
            self._server.close()
        else:
            self._sock.close()
        for connection in list(self.state.connections):
            connection.shutdown()

    @property
    def busy(self) -> bool:
        """Whether requests that are ASGI's are still being served."""
        return any(not task.done() for task in self.state.tasks)

    async def abandon(self) -> None:
        """Cut what is left."""
        for task in list(self.state.tasks):
            task.cancel()
        await asyncio.gather(*self.state.tasks, return_exceptions=True)
        for connection in list(self.state.connections):
            transport = connection.transport
            if transport is not None:
                transport.abort()
        await asyncio.sleep(0)
