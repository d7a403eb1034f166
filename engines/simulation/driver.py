"""Runs the model of an engine in time: one timer, and whoever listens is told what came.

Model time is real time times ``speed``, in whole nanoseconds since the driver began.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from engines.simulation.batching import AdapterLoaded, EngineModel, Finished, FirstToken, Preempted, Refusal, Request

_SHORTEST_WAIT = 0.0005
"""Seconds: an engine faster than that tells of several steps at once."""


class Listener(Protocol):
    """Who is told of a sequence."""

    streams: bool
    """Whether every token is told, or only the end."""

    def first_token(self, outcome: FirstToken) -> None:
        """The prompt is computed."""
        ...

    def tokens(self, request_id: str, count: int) -> None:
        """So many tokens are there by now."""
        ...

    def finished(self, outcome: Finished) -> None:
        """All tokens are there."""
        ...


class Driver:
    """The owner of a model. Everything happens on one event loop."""

    def __init__(self, model: EngineModel, speed: float, clock: Callable[[], float] | None = None) -> None:
        self.model = model
        self.speed = speed
        self._loop = asyncio.get_running_loop()
        self._clock = clock or self._loop.time
        self._began = self._clock()
        self._frozen_at: int | None = None
        self._listeners: dict[str, Listener] = {}
        self._streams: dict[str, Listener] = {}
        self._loads: dict[str, list[asyncio.Future[None]]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def now(self) -> int:
        """Model time."""
        if self._frozen_at is not None:
            return self._frozen_at
        return max(self.model.now, int((self._clock() - self._began) * 1e9 * self.speed))

    def submit(self, requests: Sequence[Request], listener: Listener) -> Refusal | None:
        """Hand requests to the engine, all or none."""
        refusal = self.model.arrive_all(requests, self.now())
        if refusal is None:
            for request in requests:
                self._listeners[request.id] = listener
        self._tell()
        return refusal

    def abort(self, request_ids: Sequence[str]) -> int:
        """End requests; return how many were there."""
        now = self.now()
        found = 0
        for request_id in request_ids:
            found += self.model.abort(request_id, now) is not None
            self._listeners.pop(request_id, None)
            self._streams.pop(request_id, None)
        self._tell()
        return found

    async def load_adapter(self, adapter: str) -> None:
        """Load an adapter; returns when the engine has it."""
        done = self._loop.create_future()
        self._loads.setdefault(adapter, []).append(done)
        self.model.load_adapter(adapter, self.now())
        self._tell()
        await done

    def freeze(self) -> None:
        """Let time stand still: nothing more comes, ever."""
        self._frozen_at = self.now()
        self.close()

    def close(self) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _tell(self) -> None:
        """Bring the model to now, tell what came, and set the timer for what comes next."""
        if self._frozen_at is not None:
            return
        for outcome in self.model.advance(self.now()):
            match outcome:
                case FirstToken():
                    self._first_token(outcome)
                case Finished():
                    self._streams.pop(outcome.id, None)
                    if (listener := self._listeners.pop(outcome.id, None)) is not None:
                        listener.finished(outcome)
                case AdapterLoaded():
                    for done in self._loads.pop(outcome.adapter, ()):
                        if not done.done():
                            done.set_result(None)
                case Preempted():
                    pass
        for request_id, listener in list(self._streams.items()):
            if request_id in self._streams:
                listener.tokens(request_id, self.model.emitted(request_id))
        self._set_timer()

    def _first_token(self, outcome: FirstToken) -> None:
        listener = self._listeners.get(outcome.id)
        if listener is not None:
            listener.first_token(outcome)
            if listener.streams and outcome.id in self._listeners:
                self._streams[outcome.id] = listener

    def _set_timer(self) -> None:
        self.close()
        at = self.model.next_step() if self._streams else self.model.next_event()
        if at is not None:
            wait = (at - self.model.now) / 1e9 / self.speed
            self._timer = self._loop.call_later(max(wait, _SHORTEST_WAIT), self._tell)
