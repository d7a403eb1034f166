"""One relayed request at the edge: what its headers say, and where it is in its life."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from typing import Any

from gateway.errors import Refusal
from gateway.serving.dialect import Route
from gateway.serving.pending import Pending
from gateway.serving.relay import Client, Relay
from gateway.serving.ticket import Ticket
from gateway.state.keys import KeyRecord

Steps = Generator[Pending, Any, None]
"""The way of a request from its body to its relay. It yields what it waits for and is sent what came of it."""


class Request:
    """A request whose headers are read. ``reserved`` is what its body takes of the byte budget."""

    __slots__ = (
        "body_limit",
        "client",
        "expects",
        "first",
        "interrupt",
        "length",
        "patience",
        "relay",
        "reserved",
        "route",
        "silence",
        "steps",
        "task",
        "ticket",
        "who",
    )

    def __init__(self, route: Route, ticket: Ticket, who: KeyRecord, body_limit: int, length: int | None) -> None:
        self.route = route
        self.ticket = ticket
        self.who = who
        self.body_limit = body_limit
        self.length = length
        self.reserved = 0
        self.expects = False
        """Whether its client says that it expects something before it sends the body."""
        self.first = False
        """Whether an SDK says that it sends this for the first time."""
        self.patience: float | None = None
        """Seconds its client waits for an answer, where it says so."""
        self.silence: float | None = None
        """Seconds its client waits for the next byte, where it says so."""
        self.client: Client | None = None
        """Whom the steps answer, once the body is whole."""
        self.interrupt: Callable[[Refusal], None] | None = None
        """How its face refuses it while the body is still coming."""
        self.steps: Steps | None = None
        self.task: asyncio.Future[Any] | None = None
        self.relay: Relay | None = None
