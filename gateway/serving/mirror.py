"""Copies of requests for another model: nobody waits for them, nobody sees their answers, nobody pays.

Rule 1: a copy takes nothing that anybody waits for: it is sent where an engine has room and nobody waits, and ended as
        soon as somebody does.
Rule 2: all of them are bounded in number and bytes, each has one attempt and a time of its own.
Rule 3: each is accounted for like a request, and told apart from them everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import msgspec

from gateway.errors import SHUTTING_DOWN, Kind, Refusal
from gateway.metrics import Metrics
from gateway.models import ModelMirror
from gateway.policy.split import Arm
from gateway.serving.admission import Admission
from gateway.serving.deadlines import Deadlines
from gateway.serving.pool import Group
from gateway.serving.relay import Order, Relay, RelayLimits
from gateway.serving.ticket import Ticket

_SHED = Refusal(Kind.BUSY, "Requests wait for the engine: this copy of one made room.")


@dataclass(frozen=True, slots=True)
class MirrorRules:
    """How many copies may run at once, and bytes that they may hold together: their bodies and one event each."""

    most: int = 64
    bytes: int = 64 * 1024 * 1024


class _Nobody:
    """Takes an answer and drops it."""

    def respond(self, status: int, headers: bytes, body: bytes) -> None:
        """Drop a whole answer."""

    def start_stream(self, headers: bytes, data: bytes) -> None:
        """Drop the beginning of a stream."""

    def send(self, data: bytes) -> None:
        """Drop more of it."""

    def end_stream(self, data: bytes, *, close: bool) -> None:
        """Drop its end."""

    def abort(self) -> None:
        """There is no connection to cut."""


_NOBODY = _Nobody()


class Mirrors:
    """The copies of one replica that run. ``open_ticket`` opens the account of one, on a path."""

    def __init__(
        self, admission: Admission, deadlines: Deadlines, metrics: Metrics, open_ticket: Callable[[str], Ticket]
    ) -> None:
        self._admission = admission
        self._deadlines = deadlines
        self._metrics = metrics
        self._open_ticket = open_ticket
        self._running: dict[Relay, int] = {}
        """Each with the bytes it may hold."""
        self._bytes = 0
        admission.on_wait.append(self._make_room)

    def __len__(self) -> int:
        return len(self._running)

    def send(self, order: Order, ticket: Ticket, mirror: ModelMirror, limits: RelayLimits, rules: MirrorRules) -> None:
        """Send a copy of a request that is under way, if there is room for one. ``ticket`` is that of the request."""
        hold, model = ticket.hold, mirror.model
        assert hold is not None
        size = ticket.bytes_in + limits.event
        if len(self._running) >= rules.most or self._bytes + size > rules.bytes:
            self._metrics.mirror_shed("bound")
            return
        now = self._deadlines.clock()
        group = self._admission.pool.group(model, order.route.path, order.cache_salt is not None)
        if not self._admission.idle(group, sum(hold.expected()), now):
            self._metrics.mirror_shed("busy")
            return
        copy = self._open_ticket(order.route.path)
        copy.mirrors, copy.via = ticket.request_id, "mirror"
        copy.hold = hold.copied()
        copy.bytes_in = ticket.bytes_in
        copy.sent_at = now
        copy.serve(model, order.stream)
        order = msgspec.structs.replace(
            order, model=model, fields=dict(order.fields), lineup=(Arm(model),), mirror=True
        )
        # A whole answer is held until it is there: no longer than an event may be.
        limits = replace(
            limits, total=mirror.timeout, retries=0, heartbeat_after=0.0, response=min(limits.response, limits.event)
        )
        relay = Relay(order, copy, _NOBODY, self._admission, self._deadlines, limits, self._metrics, self._ended)
        self._running[relay] = size
        self._bytes += size
        relay.start(now)

    def close(self) -> None:
        """End all of them."""
        for relay in list(self._running):
            relay.give_up(SHUTTING_DOWN)

    def _make_room(self, group: Group) -> None:
        """End those that are served where somebody waits now."""
        for relay in [one for one in self._running if one.endpoint in group.endpoints]:
            relay.give_up(_SHED)

    def _ended(self, relay: Relay) -> None:
        self._bytes -= self._running.pop(relay)
