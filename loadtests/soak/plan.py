"""What the soak is made of: engines, tenants and their limits, and what is done to it when. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

DRAIN = 20.0
"""Seconds that a gateway which is told to end gives to what is under way."""
REAL = ("real-a", "real-b")
"""Upstreams that are real engines; both serve the same model."""
SIMULATED = "pretended"
"""The model of the simulated engines."""
TENANTS = ("steady", "limited", "narrow")
KEYS_EACH = 3
AT_ONCE = 6
"""Requests at once of tenant `narrow`."""


def key_of(tenant: str, number: int) -> str:
    """The secret of one of a tenant's keys."""
    return f"sk-soak-{tenant}-{number}"


def limits() -> dict[str, object]:
    """As forebay.yaml has them: `limited` and `narrow` ask for more than they may have."""
    plenty = {"rate": "1M/s"}
    return {
        "defaults": {"key": {"requests": plenty, "tokens": plenty, "concurrent": 1000}},
        "tenants": {
            "steady": {"limits": {"requests": plenty, "tokens": plenty}},
            "limited": {"limits": {"requests": {"rate": "20/s", "burst": 20}, "tokens": plenty}},
            "narrow": {"limits": {"requests": plenty, "concurrent": AT_ONCE}},
        },
    }


@dataclass(frozen=True, slots=True)
class Plan:
    """What is started, and for how long it is loaded."""

    seconds: float = 300.0
    seed: int = 1
    replicas: int = 3
    model: str = "smollm2-135m-instruct"
    real: tuple[str, ...] = REAL
    simulated: tuple[str, ...] = ("simulated-a", "simulated-b")

    def running(self, upstream: str) -> int:
        """Requests that an upstream is given at once: few enough that others wait."""
        return 4 if upstream in self.real else 24


@dataclass(frozen=True, slots=True)
class Event:
    """Something that is done at a part of the whole time; ``does`` names a step of loadtests/soak/faults.py."""

    at: float
    does: str
    said: str


TIMELINE = (
    Event(0.08, "kill_replica", "a gateway is killed, another one comes in its place"),
    Event(0.18, "stop_replica", "a gateway is told to stop (SIGTERM), another one comes first"),
    Event(0.28, "kill_real", "a real engine is killed; its agent starts it again"),
    Event(0.36, "kill_simulated", "a simulated engine is killed, and started again"),
    Event(0.44, "freeze_redis", "the store of limits does not answer for 2.5 s"),
    Event(0.54, "kill_database", "the state database is killed, and comes back after 5 s"),
    Event(0.64, "kill_replica", "a gateway is killed, another one comes in its place"),
    Event(0.72, "kill_redis", "the store of limits is killed, and comes back empty after 2 s"),
    Event(0.80, "kill_simulated", "a simulated engine is killed, and started again"),
    Event(0.88, "stop_replica", "a gateway is told to stop (SIGTERM), another one comes first"),
)


@dataclass(frozen=True, slots=True)
class Crowd:
    """Clients of one tenant. ``streams``: the share of requests that are streams; ``leaves``: of all, the share of
    those that go before the answer's end."""

    tenant: str
    model: str
    clients: int
    tokens: int
    pause: float
    streams: float = 0.6
    leaves: float = 0.08


def crowds(model: str) -> tuple[Crowd, ...]:
    """Who asks; ``model`` is the real one's."""
    return (
        Crowd("steady", model, 10, 24, 0.2),
        Crowd("narrow", model, 4, 16, 0.5),
        Crowd("steady", SIMULATED, 24, 60, 0.05),
        Crowd("limited", SIMULATED, 24, 30, 0.0),
        Crowd("narrow", SIMULATED, 12, 120, 0.0),
    )


LONGEST: Mapping[str, int] = {SIMULATED: 120}
"""Tokens of a model's longest answer, where it is not ``REAL_LONGEST``."""
REAL_LONGEST = 24
PROMPT = 80
"""Tokens that no prompt of the load is longer than."""


def most_tokens(model: str) -> int:
    """What one request uses at the most."""
    return PROMPT + LONGEST.get(model, REAL_LONGEST)
