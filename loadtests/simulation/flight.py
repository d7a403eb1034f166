"""One request on its way through a simulation, and how it ended."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from gateway.policy.routing import Job
from loadtests.simulation.workloads import Ask

if TYPE_CHECKING:
    from gateway.policy.queue import Waiting
    from loadtests.simulation.fleet import SimulatedEndpoint


class End(enum.Enum):
    """How a request ended; each does once."""

    SERVED = "served"
    """It has all its tokens, in time or not."""
    REFUSED = "refused"
    LOST = "lost"
    """Its engine died, and no other was asked or would do."""
    LEFT = "left"
    """Its client had no patience left."""


class Flight:
    """A request and what became of it so far. Times in seconds, -1 where it has not come to it."""

    __slots__ = (
        "ahead",
        "arrived",
        "ask",
        "cached",
        "computed",
        "end",
        "ended",
        "endpoint",
        "expires",
        "first",
        "hashes",
        "id",
        "job",
        "refused",
        "sent",
        "started",
        "tenant",
        "tokens",
        "tried",
        "turn",
        "uncached",
        "waiting",
    )

    bytes_in = 0

    def __init__(self, ask: Ask, job: Job, hashes: tuple[int, ...]) -> None:
        self.ask = ask
        self.id = str(ask.number)
        self.tenant = ask.tenant
        self.arrived = self.started = ask.at
        self.job = job
        self.hashes = hashes
        self.tried: list[SimulatedEndpoint] = []
        self.endpoint: SimulatedEndpoint | None = None
        self.sent = self.first = self.ended = -1.0
        self.end: End | None = None
        self.refused = ""
        """Why, where it was."""
        self.ahead = self.uncached = self.tokens = 0
        """What the gateway noted at the endpoint with it."""
        self.cached = 0
        """Tokens of the prompt that the engine had."""
        self.computed = 0
        """Tokens that engines computed for it in vain: in attempts that failed."""
        self.expires = -1.0
        self.waiting: Waiting | None = None
        """Its place in Forebay's queue, the last it had."""
        self.turn: Waiting | None = None
        """The place its tenant was charged for."""

    def answered(self) -> int:
        """Return how many tokens of its answer there are."""
        if self.end is End.SERVED:
            return self.ask.output
        if self.endpoint is None or self.first < 0 or self.id not in self.endpoint.flights:
            return 0
        return self.endpoint.model.emitted(self.id)
