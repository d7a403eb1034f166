"""Who is sent where: the gateway's own router, and others' rules as they are published, one small file a source.

All of them choose among the endpoints that have room, so that each can be put behind any admission; all share the
gateway's knowledge of which endpoints are up and which keep failing.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import TYPE_CHECKING, Protocol

from gateway.policy.routing import Choice, Job

if TYPE_CHECKING:
    from loadtests.simulation.fleet import SimulatedEndpoint

Able = tuple["SimulatedEndpoint", ...]
Draw = Callable[[int], int]


class Routes(Protocol):
    """What ``gateway.policy.routing.Router`` is to the admission."""

    def choose(
        self,
        job: Job,
        able: Able,
        tried: Container[SimulatedEndpoint],
        draw: Draw,
        now: float,
        *,
        near: SimulatedEndpoint | None = None,
    ) -> Choice[SimulatedEndpoint] | None:
        """Return who serves a job, None when nobody has room."""
        ...

    def sent(self, job: Job, endpoint: SimulatedEndpoint) -> None:
        """Note that an endpoint was given a job."""
        ...

    def emptied(self, endpoint: SimulatedEndpoint) -> None:
        """Note that an endpoint holds nothing any more."""
        ...


class Rule:
    """A published rule: ``pick`` chooses out of those that can be given the job, at least one."""

    def choose(
        self,
        job: Job,
        able: Able,
        tried: Container[SimulatedEndpoint],
        draw: Draw,
        now: float,
        *,
        near: SimulatedEndpoint | None = None,
    ) -> Choice[SimulatedEndpoint] | None:
        """Return who serves a job, None when nobody has room."""
        tokens = job.prompt + job.output
        left = [one for one in able if one.available and one not in tried and one.room(tokens)]
        if not left:
            return None
        good = [one for one in left if one.trusted(now)]
        return Choice(self.pick(job, good or left, draw, now), job.prompt, trusted=bool(good))

    def pick(self, job: Job, left: list[SimulatedEndpoint], draw: Draw, now: float) -> SimulatedEndpoint:
        """Return one of those that are left."""
        raise NotImplementedError

    def sent(self, job: Job, endpoint: SimulatedEndpoint) -> None:
        """Note that an endpoint was given a job."""

    def emptied(self, endpoint: SimulatedEndpoint) -> None:
        """Note that an endpoint holds nothing any more."""
