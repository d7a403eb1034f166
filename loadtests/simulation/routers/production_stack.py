"""vLLM's production-stack: ``session`` and ``prefixaware`` (vllm-project/production-stack, routing_logic.py).

session: the session's place on a hash ring; without a session whoever has the lowest rate of requests. Its ring is the
gateway's here (``policy.ring``): which session falls where is chance in both.
prefixaware: a trie of 128-character pieces; of those that hold the longest beginning any one; whoever is sent a prompt
holds it for ever. Pieces are the gateway's blocks of 256 here.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from gateway.policy.ring import Ring
from gateway.policy.routing import Job
from loadtests.simulation.routers import Draw, Rule

if TYPE_CHECKING:
    from loadtests.simulation.fleet import SimulatedEndpoint

WINDOW = 60.0
"""Seconds over which its rate of requests is a mean."""


class Session(Rule):
    """``--routing-logic session``."""

    def __init__(self) -> None:
        self._rings: dict[tuple[str, ...], Ring] = {}
        self._sent: dict[str, deque[float]] = {}

    def pick(self, job: Job, left: list[SimulatedEndpoint], draw: Draw, now: float) -> SimulatedEndpoint:
        """Return the session's home, or whoever had the fewest requests in the last minute."""
        if job.session:
            chosen = left[self._ring(tuple(one.name for one in left)).home(job.session)]
        else:
            chosen = min(left, key=lambda one: self._rate(one.name, now))
        self._sent.setdefault(chosen.name, deque()).append(now)
        return chosen

    def _ring(self, names: tuple[str, ...]) -> Ring:
        ring = self._rings.get(names)
        if ring is None:
            if len(self._rings) >= 256:
                self._rings.clear()
            ring = self._rings[names] = Ring(names)
        return ring

    def _rate(self, name: str, now: float) -> int:
        sent = self._sent.get(name, deque())
        while sent and sent[0] < now - WINDOW:
            sent.popleft()
        return len(sent)


class PrefixAware(Rule):
    """``--routing-logic prefixaware``."""

    def __init__(self) -> None:
        self._held: dict[int, int] = {}
        """Of each block, who holds it: one bit for each endpoint's number."""

    def pick(self, job: Job, left: list[SimulatedEndpoint], draw: Draw, now: float) -> SimulatedEndpoint:
        """Return any of those that hold the longest beginning."""
        holders = sum(1 << one.number for one in left)
        for block in job.blocks:
            deeper = self._held.get(block, 0) & holders
            if not deeper:
                break
            holders = deeper
        among = [one for one in left if holders >> one.number & 1]
        return among[draw(len(among))]

    def sent(self, job: Job, endpoint: SimulatedEndpoint) -> None:
        """Note that it holds the prompt."""
        bit = 1 << endpoint.number
        for block in job.blocks:
            self._held[block] = self._held.get(block, 0) | bit
