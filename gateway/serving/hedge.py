"""The second attempt at a request whose first engine is silent: whoever begins an answer first serves it.

It is on its own until it has something that a client could use; then the relay takes it over with what it holds, or has
cut it off because the first was faster. What it holds is an answer's beginning: all before and in the first event.
"""

from __future__ import annotations

from typing import Protocol

from gateway.serving.meter import Meter
from gateway.serving.pool import Endpoint
from gateway.serving.ticket import Attempt
from gateway.serving.upstream import Connection, Loss, Receiver


class Owner(Receiver, Protocol):
    """The relay that it is of."""

    def rival_began(self, rival: Rival) -> None:
        """Take that it has begun an answer."""
        ...

    def rival_failed(self, rival: Rival, loss: Loss | None) -> None:
        """Take that it has failed; ``loss`` None: its engine answered something that is no good beginning."""
        ...


class Rival:
    """One second attempt. ``prompt``, ``tokens``, ``prefill``: as its endpoint counts it; ``meter`` reads streams."""

    __slots__ = (
        "_held",
        "_owner",
        "attempt",
        "connected",
        "connection",
        "content_type",
        "endpoint",
        "meter",
        "prefill",
        "prompt",
        "status",
        "tokens",
        "won",
    )

    def __init__(
        self, owner: Owner, endpoint: Endpoint, attempt: Attempt, meter: Meter, prompt: int, tokens: int
    ) -> None:
        self._owner = owner
        self._held: list[bytes] = []
        self.endpoint = endpoint
        self.attempt = attempt
        self.meter = meter
        self.prefill = endpoint.prefilling
        self.prompt = prompt
        self.tokens = tokens
        self.connection: Connection | None = None
        self.connected = False
        self.status = 0
        self.content_type = b""
        self.won = False

    @property
    def held(self) -> bytes:
        """What it has read of an answer."""
        return b"".join(self._held)

    def take_over(self) -> None:
        """Tell the relay, which goes on with it, what it holds, and from here on all that comes."""
        self.won = True
        held, self._held = self.held, []
        if self.status:
            self._owner.on_head(self.status, self.content_type)
        if held:
            self._owner.on_data(held)

    # --- what its engine does -------------------------------------------------------------------------------------

    def on_connected(self) -> None:
        """Note that its connection stands."""
        self.connected = True
        if self.won:
            self._owner.on_connected()

    def on_head(self, status: int, content_type: bytes) -> None:
        """Note how its answer is to be read."""
        self.status, self.content_type = status, content_type
        if self.won:
            self._owner.on_head(status, content_type)

    def on_data(self, data: bytes) -> None:
        """Take one read's worth of its answer."""
        if self.won:
            self._owner.on_data(data)
            return
        self._held.append(data)
        if self.status != 200:
            return
        if self.content_type.startswith(b"text/event-stream"):
            began = bool(self.meter.feed(data))
            if self.meter.failure is not None or self.meter.overflow or (self.meter.ended and not began):
                self._owner.rival_failed(self, None)
                return
        else:
            began = True
        if began:
            self._owner.rival_began(self)

    def on_complete(self) -> None:
        """Take the end of its answer: one that has not won by then is none."""
        self.connection = None
        if self.won:
            self._owner.on_complete()
        else:
            self._owner.rival_failed(self, None)

    def on_lost(self, loss: Loss, detail: str) -> None:
        """Take that its connection ended."""
        self.connection = None
        if self.won:
            self._owner.on_lost(loss, detail)
        else:
            self._owner.rival_failed(self, loss)
