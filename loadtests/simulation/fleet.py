"""Simulated engines as the gateway sees them: its own ``Endpoint``, with a model of batching behind it."""

from __future__ import annotations

from engines.registry import ENGINES
from engines.simulation.batching import EngineModel
from engines.simulation.profiles import Profile
from gateway.policy.prefix import BLOCK
from gateway.serving.pool import Endpoint, EndpointSpec, HealthRules
from gateway.serving.upstream import Address
from loadtests.simulation.flight import Flight
from loadtests.simulation.workloads import BYTES

NS = 1_000_000_000
SCRAPED = 0.05
"""Seconds between two looks at an engine's metrics, as llm-d has it."""
SPEAKERS = 8
UNIT = BLOCK // BYTES
"""Tokens that one hash stands for, to the router and to the engines."""


def hashed(profile: Profile) -> Profile:
    """Return a profile whose cache is found by the router's own blocks."""
    return profile.changed(hash_tokens=UNIT)


class SimulatedEndpoint(Endpoint):
    """An engine without a process. ``alive``: whether it answers at all."""

    def __init__(self, number: int, profile: Profile) -> None:
        name = f"e{number}"
        address = Address(name, 80)
        models = (("model", "model"),)
        super().__init__(EndpointSpec(name, name, ENGINES["vllm"], address, models=models, max_connections=1_000_000))
        self.rules = HealthRules()
        self.seen = True  # It has been up for long: nobody has to be careful with it.
        self.number = number
        self.profile = profile
        self.model = EngineModel(profile)
        self.alive = True
        self.flights: dict[str, Flight] = {}
        self.streams = 0
        """Requests whose first token has come and whose last has not."""
        self.due: int | None = None
        """When something will happen there, as the loop has it noted; in nanoseconds, as all times of the model."""
        self._began = 0
        """What the model's clock calls 0."""
        self._looked = 0
        self._steps = 0
        self._scraped = -1.0
        self._waiting = 0
        self._used = 0.0

    def replaced(self, ns: int) -> None:
        """Begin anew: another process with an empty cache."""
        self.model = EngineModel(self.profile)
        self.model.advance(ns)
        self.alive = True
        self.streams = self._steps = 0
        self._looked = ns

    def look(self, ns: int) -> None:
        """Note how far apart the last tokens were, as the relay does; of streams that are alike a few speak for all."""
        steps = self.model.counters.steps - self._steps
        if steps and self.streams:
            window, gap = self.window, (ns - self._looked) / steps / NS
            for _ in range(steps * min(self.streams, SPEAKERS)):
                window.gap(gap)
        self._steps += steps
        self._looked = ns

    def scrape(self, now: float) -> tuple[int, float]:
        """Return how many wait in it and what part of its cache is used, as its metrics said at the last look."""
        if now - self._scraped >= SCRAPED:
            self._scraped = now
            self._waiting, self._used = self.model.waiting, self.model.cache_used
        return self._waiting, self._used
