"""Both sides of a relay without sockets: a client that checks what it is told, engines that do what a test says."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import msgspec

from adapters.catalogue import Catalogue
from engines.registry import ENGINES
from gateway.api.routes import RELAYED
from gateway.headers import to_pairs
from gateway.metrics import Metrics
from gateway.serving.admission import Admission, AdmissionRules
from gateway.serving.deadlines import Deadlines
from gateway.serving.pool import Endpoint, EndpointSpec, Pool
from gateway.serving.relay import HEARTBEAT, Order, Relay, RelayLimits
from gateway.serving.ticket import Outcome, Ticket
from gateway.serving.upstream import Address, Connections, Loss, Receiver
from tests.support.clock import ManualClock

MODEL, OWN = "public/model", "own-name"
CHAT = "/v1/chat/completions"
SSE, JSON = b"text/event-stream; charset=utf-8", b"application/json"


class FakeConnection:
    """One attempt, as its engine sees it. ``ended`` tells how it ended: released, aborted, whole or lost."""

    def __init__(self, payload: bytes, receiver: Receiver, *, reused: bool, fresh: bool, endpoint: str) -> None:
        self.payload = payload
        self.receiver = receiver
        self.reused = reused
        self.fresh = fresh
        self.endpoint = endpoint
        self.connected = reused
        self.headed = False
        self.paused = False
        self.ended = ""

    @property
    def body(self) -> Any:
        """What the engine was asked for."""
        return json.loads(self.payload.partition(b"\r\n\r\n")[2])

    # What the relay does.

    def release(self) -> None:
        assert self.ended == "", f"released after it was {self.ended}"
        self.ended = "released"

    def abort(self) -> None:
        assert self.ended == "", f"aborted after it was {self.ended}"
        self.ended = "aborted"

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    # What the engine does; nothing of it reaches a relay that let go.

    def connect(self) -> None:
        self.connected = True
        self.receiver.on_connected()

    def head(self, status: int = 200, content_type: bytes = SSE) -> None:
        self.headed = True
        self.receiver.on_head(status, content_type)

    def data(self, data: bytes) -> None:
        if self.ended == "":
            self.receiver.on_data(data)

    def complete(self) -> None:
        if self.ended == "":
            self.ended = "whole"
            self.receiver.on_complete()

    def lose(self, loss: Loss) -> None:
        self.ended = "lost"
        self.receiver.on_lost(loss, "as the test says")

    def answer(self, status: int, body: bytes, content_type: bytes = JSON) -> None:
        """Answer whole, on a connection that may still have to be made."""
        if not self.connected:
            self.connect()
        self.head(status, content_type)
        self.data(body)
        self.complete()


class FakeConnections:
    """Stands for an endpoint's connections; ``attempts`` is shared by all endpoints, in order."""

    def __init__(self, endpoint: str, attempts: list[FakeConnection]) -> None:
        self.endpoint = endpoint
        self.attempts = attempts
        self.full = False
        self.kept = False
        """Whether the next request finds an idle connection."""

    def send(self, payload: bytes, receiver: Receiver, *, fresh: bool = False) -> FakeConnection:
        connection = FakeConnection(
            payload, receiver, reused=self.kept and not fresh, fresh=fresh, endpoint=self.endpoint
        )
        self.attempts.append(connection)
        return connection

    def close(self) -> None:
        """Nothing is open."""


class FakeClient:
    """A client that fails the test when it is told what HTTP or SSE does not allow."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.out = b""
        self.started = False
        self.over = False
        self.aborted = False
        self.closed = False
        """Whether the connection may not be used again."""

    @property
    def finished(self) -> bool:
        return self.over or self.aborted

    def respond(self, status: int, headers: bytes, body: bytes) -> None:
        assert not self.finished
        assert not self.started, "a second answer after the stream had begun"
        self._head(status, headers)
        self.out = body
        self.over = True

    def start_stream(self, headers: bytes, data: bytes) -> None:
        assert not self.finished
        assert not self.started
        self.started = True
        self._head(200, headers)
        self._take(data)

    def send(self, data: bytes) -> None:
        assert data
        self._take(data)

    def end_stream(self, data: bytes, *, close: bool) -> None:
        self._take(data)
        self.over = True
        self.closed = close

    def abort(self) -> None:
        assert not self.finished
        self.aborted = True

    def _head(self, status: int, headers: bytes) -> None:
        self.status = status
        self.headers = dict(to_pairs(headers))
        assert len(self.headers) == headers.count(b"\r\n")
        assert self.headers[b"x-request-id"]

    def _take(self, data: bytes) -> None:
        assert self.started
        assert not self.finished
        assert data == b"" or data.endswith(b"\n\n")
        self.out += data

    @property
    def json(self) -> Any:
        """The whole answer."""
        return json.loads(self.out)

    @property
    def events(self) -> list[bytes]:
        """What the stream held, heartbeats left out."""
        return [event for event in self.out.replace(HEARTBEAT, b"").split(b"\n\n") if event]


@dataclass
class Stage:
    """A relay between a fake client and fake engines, and everything that is counted on the way."""

    endpoints: int = 1
    path: str = CHAT
    stream: bool = True
    hide_usage: bool = True
    limits: RelayLimits = field(default_factory=RelayLimits)
    kept: bool = False
    rules: AdmissionRules = field(default_factory=AdmissionRules)

    def __post_init__(self) -> None:
        self.clock = ManualClock()
        self.deadlines = Deadlines(self.clock)
        self.metrics = Metrics(100)
        self.pool = Pool(Catalogue())
        self._drawn = -1
        self.called: list[Callable[[], None]] = []
        self.admission = Admission(self.pool, self.metrics, self.clock, self.rules, self.called.append, self.draw)
        self.attempts: list[FakeConnection] = []
        specs = [
            EndpointSpec(f"e{number}", "http://engine", ENGINES["vllm"], Address("engine", 80), models=((MODEL, OWN),))
            for number in range(self.endpoints)
        ]
        self.pool.configure(specs, created=1)
        self.connections = [FakeConnections(endpoint.name, self.attempts) for endpoint in self.pool.endpoints]
        for endpoint, connections in zip(self.pool.endpoints, self.connections, strict=True):
            connections.kept = self.kept
            endpoint.connections = cast(Connections, connections)
        self.client = FakeClient()
        self.settled: list[tuple[Outcome, int]] = []
        self.done: list[Relay] = []
        self.ticket = Ticket(self.metrics, self._sink, "req_1", self.path, self.clock())
        self.ticket.serve(MODEL, self.stream)
        self.fields = {name: msgspec.Raw(value) for name, value in (("model", b'"public/model"'), ("n", b"1"))}
        route = RELAYED[self.path]
        self.order = Order(route, MODEL, self.fields, self.stream, self.stream and route.asks_usage, self.hide_usage)
        self.relay = Relay(
            self.order,
            self.ticket,
            self.client,
            self.admission,
            self.deadlines,
            self.limits,
            self.metrics,
            self.done.append,
        )

    def draw(self, below: int) -> int:
        """Draw whole numbers in turn: equal endpoints take turns."""
        self._drawn += 1
        return self._drawn % below

    def _sink(self, ticket: Ticket, outcome: Outcome, status: int, now: float) -> None:
        self.settled.append((outcome, status))

    def start(self) -> FakeConnection:
        """Begin, and return the first attempt."""
        self.relay.start(self.clock())
        return self.attempt

    @property
    def attempt(self) -> FakeConnection:
        """The newest attempt."""
        return self.attempts[-1]

    @property
    def endpoint(self) -> Endpoint:
        """The first endpoint."""
        return self.pool.endpoints[0]

    @property
    def in_flight(self) -> int:
        return sum(endpoint.in_flight for endpoint in self.pool.endpoints)

    def advance(self, seconds: float) -> None:
        """Let time pass in one step, then look who is late, once."""
        self.clock.advance(seconds)
        self.deadlines.run_due()

    def check_over(self, outcome: Outcome, status: int) -> None:
        """The request is over: everything is given back, once."""
        assert self.settled == [(outcome, status)]
        assert self.done == [self.relay]
        assert self.relay.done
        assert self.in_flight == 0
        assert len(self.deadlines) == 0
        assert self.ticket.series.in_flight == 0
        assert all(attempt.ended for attempt in self.attempts)
