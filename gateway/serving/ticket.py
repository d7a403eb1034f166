"""What one request holds from the moment it is let in, and the one place where it is given back."""

from __future__ import annotations

import enum
from bisect import bisect_left
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from gateway.metrics import Metrics
from gateway.policy.routing import Choice
from gateway.serving.limiter import Charges, Hold
from gateway.serving.meter import Usage

if TYPE_CHECKING:
    from gateway.serving.pool import Endpoint


class Outcome(enum.StrEnum):
    """How a request ended; a metric label and a word in the log."""

    # An enum's own would be a call of Python for each look into a table.
    __hash__ = str.__hash__

    OK = "ok"
    REFUSED = "refused"
    CLIENT_GONE = "client_gone"
    ENGINE_FAILED = "engine_failed"
    ENGINE_SLOW = "engine_slow"
    NO_ENGINE = "no_engine"
    BUSY = "busy"
    LIMITS_AWAY = "limits_away"
    SHUTDOWN = "shutdown"
    INTERNAL = "internal_error"


OK = Outcome.OK
"""Under a name of its own: looked up in its class it costs a call of the enum's."""
_EXPECTED = frozenset({OK, Outcome.REFUSED, Outcome.CLIENT_GONE})


def to_ms(seconds: float) -> float:
    """Return seconds in milliseconds with three digits; ``round`` would take three times as long."""
    return int(seconds * 1e6 + 0.5) / 1000


class LogLine(msgspec.Struct, omit_defaults=True, gc=False):
    """One request, one line. Times in milliseconds; never a prompt, never a key."""

    time: str
    level: str
    event: str
    request_id: str
    path: str
    outcome: str
    status: int
    duration_ms: float
    model: str = ""
    tenant: str = ""
    key: str = ""
    client: str = ""
    client_request_id: str = ""
    endpoint: str = ""
    stream: bool = False
    attempts: int = 0
    queued_ms: float | None = None
    ttft_ms: float | None = None
    events: int = 0
    tokens_in: int | None = None
    tokens_out: int | None = None
    tokens_cached: int | None = None
    served: str = ""
    """The model that served it, where the name it asked for stands for several."""
    via: str = ""
    mirrors: str = ""
    bytes_in: int = 0
    sdk_retry: int = 0
    settlement: str = ""
    resumed: int = 0
    error: str = ""


class Attempt(msgspec.Struct, gc=False):
    """One attempt at an engine. Times are the clock's; ``cause`` is empty while it runs and where it went well."""

    endpoint: str
    began: float
    load: int
    """What the endpoint had in flight when it was chosen."""
    choice: Choice[Endpoint] | None
    """How it was chosen."""
    again: bool
    """Whether the connection before was found closed, and this is the same attempt once more."""
    connected: float = 0.0
    ended: float = 0.0
    cause: str = ""
    events: int = 0
    """That it brought, where it broke off after that."""
    resumes: bool = False
    """Whether it goes on with what an attempt before has begun."""


class Ticket:
    """One request's identity, its clock marks and its account. Whoever opened it settles it, once, on every way out."""

    __slots__ = (
        "_metrics",
        "_sink",
        "accepted",
        "at",
        "attempts",
        "bytes_in",
        "charges",
        "client",
        "client_request_id",
        "cost",
        "counted",
        "debug",
        "ended",
        "endpoint",
        "error",
        "events",
        "first_at",
        "hold",
        "in_flight",
        "key",
        "key_id",
        "last_at",
        "let_in_at",
        "mirrors",
        "model",
        "organisation",
        "outcome",
        "path",
        "read_at",
        "refused_by",
        "request_id",
        "resumed",
        "sdk_retry",
        "sent_at",
        "series",
        "served",
        "settled",
        "settlement",
        "started",
        "status",
        "stream",
        "tenant",
        "tried",
        "usage",
        "version",
        "via",
        "waited",
    )

    def __init__(
        self,
        metrics: Metrics,
        sink: Callable[[Ticket, Outcome, int, float], Any],
        request_id: str,
        path: str,
        now: float,
        at: float = 0.0,
    ) -> None:
        self._metrics = metrics
        self._sink = sink
        self.request_id = request_id
        self.path = path
        self.at = at
        """Unix time of its start."""
        self.started = now
        # When each stage was over, 0 where it was not reached: headers, body, the steps up to the relay, first event.
        self.let_in_at = 0.0
        self.read_at = 0.0
        self.sent_at = 0.0
        self.first_at = 0.0
        self.last_at = 0.0
        self.model = ""
        self.tenant = ""
        self.organisation = ""
        self.key = ""
        self.key_id = ""
        self.version = ""
        """Of the adapter that served it."""
        self.client = ""
        self.client_request_id = ""
        self.endpoint = ""
        self.error = ""
        self.stream = False
        self.served = ""
        """The model that serves it, where its name stands for several."""
        self.via = ""
        """How it came to that: empty (its own name), `route`, `fallback` or `mirror`."""
        self.debug = False
        """Whether its answer tells how it was routed."""
        self.mirrors = ""
        """The request that this one is a copy of."""
        self.attempts = 0
        self.events = 0
        self.bytes_in = 0
        self.sdk_retry = 0
        self.usage: Usage | None = None
        self.counted = False
        """Whether a part of that was counted rather than told."""
        self.resumed = 0
        """How often its stream went on at another engine."""
        self.hold: Hold | None = None
        """What it holds of its limits, once it has been let in."""
        self.accepted = False
        """Whether an engine may have worked on it."""
        self.settlement = ""
        self.cost = 0
        """In nano-dollars."""
        self.charges: Charges | None = None
        """What its limits were charged, where it fell under any."""
        self.refused_by = ""
        """The bucket that refused it."""
        self.tried: list[Attempt] = []
        self.waited = 0.0
        """Seconds in the queue."""
        self.outcome: Outcome | None = None
        self.status = 0
        self.ended = 0.0
        self.series = metrics.model("")
        self.in_flight = False
        self.settled = False

    def serve(self, model: str, stream: bool) -> None:
        """Note which model serves it: from here on it counts as in flight."""
        self.model = model
        self.stream = stream
        metrics = self._metrics
        self.series = metrics.mirror(model).series if self.mirrors else metrics.model(model)
        self.series.in_flight += 1
        self.in_flight = True

    def mark(self, now: float, events: int) -> None:
        """Note that ``events`` more reached the client."""
        series = self.series
        if self.first_at:
            # Histogram.observe, written out: this is once a chunk.
            gaps = series.inter_token
            gap = now - self.last_at
            gaps.counts[bisect_left(gaps.bounds, gap if events == 1 else gap / events)] += events
            gaps.total += gap
        else:
            self.first_at = now
            series.ttft.observe(now - self.started)
        self.last_at = now
        self.events += events

    def settle(self, outcome: Outcome, status: int, now: float) -> None:
        """Give everything back and account for it. The second call does nothing and is a bug: it raises."""
        if self.settled:
            raise RuntimeError(f"{self.request_id} was settled twice")
        self.settled = True
        self.outcome = outcome
        self.status = status
        self.ended = now
        if self.in_flight:
            self.series.in_flight -= 1
            self.series.duration.observe(now - self.started)
        # Not kept any longer: it knows the request's body, and tickets stay a while to be explained.
        hold, self.hold = self.hold, None
        if hold is not None:
            kind, self.cost, self.charges = hold.settle(
                self.usage, self.events, whole=outcome is OK, accepted=self.accepted, counted=self.counted
            )
            self.settlement = kind.value
            if hold.used is not None:
                self.usage = hold.used
        if self.served:
            first = self.first_at - self.started if self.first_at else None
            self._metrics.served(self.model, self.served, self.via, outcome, first)
        metrics = self._metrics
        counted = metrics.mirror(self.model) if self.mirrors else metrics.tenant(self.model, self.tenant)
        outcomes = counted.outcomes
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        usage = self.usage
        if usage is not None:
            counted.prompt += usage.prompt or 0
            counted.completion += usage.completion or 0
            counted.cached += usage.cached or 0
        self._sink(self, outcome, status, now)

    def line(self, outcome: Outcome, status: int, now: float, time: str) -> LogLine:
        """Return the log line of a settled request; ``time`` is the wall clock's."""
        usage = self.usage or Usage()
        # In the order of the fields: beyond fifteen, names make every call go by a dict.
        return LogLine(
            time,
            "info" if outcome in _EXPECTED else "warning",
            "mirror" if self.mirrors else "request",
            self.request_id,
            self.path,
            outcome,
            status,
            to_ms(now - self.started),
            self.model,
            self.tenant,
            self.key,
            self.client,
            self.client_request_id,
            self.endpoint,
            self.stream,
            self.attempts,
            to_ms(self.waited) if self.waited else None,
            to_ms(self.first_at - self.started) if self.first_at else None,
            self.events,
            usage.prompt,
            usage.completion,
            usage.cached,
            self.served,
            self.via,
            self.mirrors,
            self.bytes_in,
            self.sdk_retry,
            self.settlement,
            self.resumed,
            self.error,
        )
