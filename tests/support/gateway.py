"""A gateway started inside the test's event loop, in front of scripted engines, on either of its faces.

Import the fixtures into a room's ``conftest.py``: ``face`` runs a test once on each face, ``start_gateway`` starts a
gateway as the test wants it, ``gateway`` is one in front of the ``upstream`` fixture.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import cache
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, Protocol

import pytest
from pydantic import SecretStr

from gateway.app import Replica
from gateway.settings import (
    AdminListen,
    Discovery,
    KeySettings,
    Listen,
    Log,
    Settings,
    Shutdown,
    Upstream,
    _cross_field_problems,
    load,
)
from gateway.state.database import upgrade
from gateway.store.memory import MemoryStore
from gateway.values import Section
from tests.support.client import RawClient, Response, request_bytes
from tests.support.clock import ManualClock
from tests.support.http1 import Headers
from tests.support.journal import EAGER_TURNS, PATIENCE
from tests.support.recordings import load as load_recording
from tests.support.script import Script, play
from tests.support.sockets import bind_free
from tests.support.upstream import ScriptedUpstream, SeenRequest

Face = Literal["protocol", "asgi"]

KEY = "fb-alice-secret"
MODEL = "public/model"
"""The name clients know: with a slash, as many published names have."""
ENGINE_MODEL = "smollm2"
"""The name the recorded engines know it by."""
CHAT = "/v1/chat/completions"
BEGAN = 1_790_000_000_000_000
"""What the wall clock shows when a test's clock is at 0, in microseconds."""
AUTH = (("authorization", f"Bearer {KEY}"),)
JSON = (("content-type", "application/json"),)


def chat(**fields: Any) -> dict[str, Any]:
    """Return the body of a small chat request, with more fields or other ones."""
    return {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], **fields}


def post_bytes(body: Any, path: str = CHAT, headers: Headers = AUTH) -> bytes:
    """Return a whole POST request as bytes; ``body`` is JSON-encoded unless it is bytes."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return request_bytes("POST", path, [*JSON, *headers], data)


class Gateway:
    """A running replica and what a test asks of it. ``log_file`` is None where the test's settings name none."""

    def __init__(self, replica: Replica, clock: ManualClock, face: Face, log_file: Path | None) -> None:
        self.replica = replica
        self.clock = clock
        self.face = face
        self.log_file = log_file

    @property
    def url(self) -> str:
        """Where clients reach it."""
        return f"http://127.0.0.1:{self.replica.port}"

    @property
    def admin_url(self) -> str:
        """Where operators reach it."""
        return f"http://127.0.0.1:{self.replica.admin_port}"

    async def ask(self, body: Any, path: str = CHAT, headers: Headers = AUTH) -> Response:
        """POST on a connection of its own and return the whole answer; ``body`` is JSON-encoded unless it is bytes."""
        async with await RawClient.connect(self.url) as client:
            client.post(path, body, headers)
            return await client.response()

    async def admin(self, method: str, path: str, body: Any = None, *, key: str, headers: Headers = ()) -> Response:
        """Ask the admin API something with a key, on a connection of its own; ``body`` is JSON-encoded."""
        async with await RawClient.connect(self.admin_url) as client:
            data = b"" if body is None else json.dumps(body).encode()
            all_headers = [("authorization", f"Bearer {key}"), *headers, *(JSON if data else ())]
            client.request(method, path, all_headers, data)
            return await client.response()

    async def get(self, path: str, headers: Headers = (), *, method: str = "GET", admin: bool = False) -> Response:
        """Send a request without a body on a connection of its own and return the whole answer."""
        async with await RawClient.connect(self.admin_url if admin else self.url) as client:
            client.request(method, path, headers)
            return await client.response()

    def advance(self, seconds: float) -> None:
        """Let time pass and act on everything that is due."""
        self.clock.advance(seconds)
        self.replica.deadlines.run_due()

    def lines(self, event: str | None = None) -> list[dict[str, Any]]:
        """Return the log, or only the lines of one event (``request``: one a request)."""
        assert self.log_file is not None, "this gateway logs to standard error"
        self.replica.log.flush()
        lines = [json.loads(line) for line in self.log_file.read_text().splitlines()]
        return [line for line in lines if event in (None, line["event"])]

    async def line(self, event: str = "request", index: int = 0) -> dict[str, Any]:
        """Wait until the log has that many lines of an event and return the one asked for."""
        await until(lambda: len(self.lines(event)) > index, f"no line {index} of {event!r}")
        return self.lines(event)[index]

    def hold_little(self) -> None:
        """Have the kernel take little that the clients do not read: of connections opened from now on."""
        for listener in self.replica.listeners:
            listener._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)

    async def paused(self) -> None:
        """Wait until a client takes so little that the engine's stream is no longer read for it."""
        await until(
            lambda: any(request.relay is not None and request.relay._paused for request in self.replica.edge.active),
            "no stream was paused",
        )

    async def idle(self) -> None:
        """Wait until no request is alive, and check that each gave back what it held."""
        await until(lambda: not self.replica.edge.active, "a request is still alive")
        assert [endpoint.in_flight for endpoint in self.replica.pool.endpoints] == [
            0 for _ in self.replica.pool.endpoints
        ]


async def until(condition: Any, otherwise: str) -> None:
    """Give way to the event loop until ``condition()`` holds. Raises ``AssertionError`` when it does not come true."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + PATIENCE
    turns = 0
    while not condition():
        assert loop.time() < deadline, otherwise
        turns += 1
        await asyncio.sleep(0 if turns < EAGER_TURNS else 0.001)


def relayed(upstream: ScriptedUpstream) -> list[SeenRequest]:
    """Return what an engine was asked by clients, without the gateway's own looks at it."""
    return [request for request in upstream.requests if request.method == "POST"]


def serving(upstream: ScriptedUpstream, *, models: dict[str, str] | None = None, **more: Any) -> Upstream:
    """Return the configuration of a scripted engine that serves ``MODEL``, and have it answer that it is well."""
    upstream.always(Script(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"), path="/health")
    return Upstream(url=upstream.url, models=models or {MODEL: ENGINE_MODEL}, **more)


def asking(upstream: ScriptedUpstream, recording: str = "get_models", **more: Any) -> Upstream:
    """Return the configuration of a scripted engine that is asked for its models and answers as recorded."""
    serving(upstream)
    upstream.always(play(load_recording("vllm", recording)), path="/v1/models")
    return Upstream(url=upstream.url, **more)


def settings_for(face: Face, folder: Path, upstreams: Iterable[ScriptedUpstream | Upstream], **more: Any) -> Settings:
    """Return settings for a test: free ports, one key, nothing that waits for real time; ``more`` replaces parts."""
    given = [one if isinstance(one, Upstream) else serving(one) for one in upstreams]
    # Both held at once, so that they differ.
    with bind_free() as public, bind_free() as admin:
        public_port, admin_port = public.getsockname()[1], admin.getsockname()[1]
    parts: dict[str, Any] = {
        "listen": Listen(port=public_port, face=face),
        "admin": AdminListen(port=admin_port),
        "data_dir": folder,
        "keys": (KeySettings(name="alice", key=SecretStr(KEY)),),
        "upstreams": tuple(given),
        "shutdown": Shutdown(announce=0, drain=PATIENCE),
        "log": Log(file=folder / "log.jsonl"),
        # An engine is looked at when the gateway starts, and again only when a request finds it gone.
        "discovery": Discovery(interval=3600),
    }
    return _settings({**parts, **more})


def _settings(parts: dict[str, Any]) -> Settings:
    if not all(isinstance(part, Section | Path | tuple) for part in parts.values()):
        return Settings(**parts)
    # Each section was checked when it was made; what is left to check is how they fit together.
    settings = _defaults().model_copy(update=parts)
    assert not list(_cross_field_problems(settings))
    return settings


@cache
def _defaults() -> Settings:
    return Settings()


def give_database(file: Path) -> None:
    """Put an up-to-date state database there, unless there is something: making one costs more than many a test."""
    if not file.exists():
        file.touch(mode=0o600)
        file.write_bytes(_empty_database())


@cache
def _empty_database() -> bytes:
    with TemporaryDirectory() as folder:
        file = Path(folder) / "forebay.db"
        upgrade(f"sqlite:///{file}")
        assert [path.name for path in file.parent.iterdir()] == [file.name], "the file is not the whole database"
        return file.read_bytes()


class StartGateway(Protocol):
    """Starts a gateway that ends with the test."""

    async def __call__(self, *upstreams: ScriptedUpstream | Upstream, **settings: Any) -> Gateway:
        """Start in front of these engines; ``settings`` are sections of the configuration, or ``path``: a file.

        ``database``: it has one, with keys and a ledger, as every gateway that is served. Without the word only one
        with a ``path``, an ``auth`` or a ``state`` of its own has: that is more than half of what a gateway costs.
        """
        ...


@asynccontextmanager
async def running(
    settings: Settings, clock: ManualClock, path: Path | None = None, *, database: bool = True
) -> AsyncIterator[Gateway]:
    """Run a gateway; at its end nothing may be left in flight. Without ``database`` its keys are those of the
    configuration, and what its ledger would store in one is made and counted, and written nowhere."""
    # Both clocks are the test's: what refills does so when the test says that time passed.
    # Equal engines take turns, the first one first.
    turns = count(1)
    wall = lambda: BEGAN + int(clock() * 1_000_000)  # noqa: E731
    replica = Replica(settings, path, clock, wall, lambda below: next(turns) % below)
    if not database:
        replica.keyring._open_if_needed = _left_closed  # type: ignore[method-assign, assignment]
        if replica.books is not None:
            replica.books.ledger.store._write = _written_nowhere  # type: ignore[method-assign, assignment]
    elif settings.auth == "keys" and settings.state.url is None:
        give_database(settings.data_dir / "forebay.db")
    try:
        await replica.start()
        yield Gateway(replica, clock, settings.listen.face, settings.log.file)
    finally:
        await replica.close()
        replica.log.close()
    assert not replica.edge.active, "a request outlived the gateway"
    assert all(ticket.hold is None for ticket in replica.edge.recent), "a request's body is kept to be explained"
    assert accounted(replica) >= settled(replica), "a request is in no ledger"
    assert not any(endpoint.in_flight for endpoint in replica.pool.endpoints), "a request gave its place never back"
    store = replica.edge.limiter.store
    if isinstance(store, MemoryStore):
        held = [name for name, cell in store._cells.items() if cell.shape.slots and cell.bucket(0).level]
        assert not held, "a request gave a slot never back"
    # Of a store that is shared: what this gateway's own requests use.
    leases = getattr(store, "_leases", {})
    assert not any(lease.used for lease in leases.values()), "a request gave a slot never back"


async def _left_closed(_: Settings) -> None:
    """What a keyring without a state database does."""


def _written_nowhere(_: list[Any]) -> None:
    """What a table without a state database takes."""


def settled(replica: Replica) -> int:
    """Return how many requests have ended."""
    return sum(sum(series.outcomes.values()) for series in replica.metrics._series.values())


def accounted(replica: Replica) -> int:
    """Return how many rows a gateway that is closed has written, left for the next start or lost, and says so."""
    if replica.books is None:
        return settled(replica)
    metrics = replica.metrics
    return metrics._usage_stored + metrics._usage_waiting[0] + sum(metrics._usage_lost.values())


@pytest.fixture(params=["protocol", "asgi"])
def face(request: pytest.FixtureRequest) -> Face:
    """Each face in turn."""
    chosen: Face = request.param
    return chosen


@pytest.fixture
async def start_gateway(face: Face, tmp_path: Path, clock: ManualClock) -> AsyncIterator[StartGateway]:
    """Start gateways on this face; all of them end with the test."""
    async with AsyncExitStack() as stack:

        async def start(
            *upstreams: ScriptedUpstream | Upstream,
            path: Path | None = None,
            database: bool = False,
            **settings: Any,
        ) -> Gateway:
            made = load(path) if path is not None else settings_for(face, tmp_path, upstreams, **settings)
            opened = path is not None or not settings.keys().isdisjoint(("auth", "state"))
            return await stack.enter_async_context(running(made, clock, path, database=opened or database))

        yield start


@pytest.fixture
async def gateway(start_gateway: StartGateway, upstream: ScriptedUpstream) -> Gateway:
    """A gateway in front of the test's scripted engine."""
    return await start_gateway(upstream)
