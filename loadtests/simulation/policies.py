"""What is compared: routers, admissions and whole systems, by the names the tables have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

from gateway.policy.routing import Router
from gateway.policy.scorers import Weights
from loadtests.simulation.admissions.forebay import Told
from loadtests.simulation.admissions.forebay import gate as forebay_gate
from loadtests.simulation.admissions.llmd import FlowControl
from loadtests.simulation.admissions.others import Fcfs, NoAdmission
from loadtests.simulation.fleet import SimulatedEndpoint
from loadtests.simulation.routers import Routes, llmd, plain, production_stack, smg
from loadtests.simulation.world import Gate, World

OURS = "forebay"


def forebay_router(weights: Weights | None = None) -> Routes:
    """Return the gateway's own router."""
    return cast(Routes, Router(weights, stretches=SimulatedEndpoint.stretches))


ROUTERS: Mapping[str, Callable[[], Routes]] = {
    "random": plain.Random,
    "round-robin": plain.RoundRobin,
    "least-requests": plain.LeastRequests,
    "p2c": plain.TwoChoices,
    "production-stack-session": production_stack.Session,
    "production-stack-prefix": production_stack.PrefixAware,
    "smg": smg.CacheAware,
    "llm-d": llmd.DefaultProfile,
    OURS: forebay_router,
}

ADMISSIONS: Mapping[str, Callable[[World], Gate]] = {
    "none": NoAdmission(),
    "llm-d": FlowControl(),
    "llm-d-slo": FlowControl(patience=None),
    "fcfs": Fcfs(),
    "fcfs-slo": Fcfs(length=100_000, patience=None),
    OURS: forebay_gate(Told()),
}

SYSTEMS: Mapping[str, tuple[str, str]] = {
    "production-stack-session": ("production-stack-session", "none"),
    "production-stack-prefix": ("production-stack-prefix", "none"),
    "smg": ("smg", "none"),
    "smg-fcfs": ("smg", "fcfs"),
    "llm-d": ("llm-d", "none"),
    "llm-d-flow-control": ("llm-d", "llm-d"),
    "llm-d-flow-control-slo": ("llm-d", "llm-d-slo"),
    OURS: (OURS, OURS),
}
"""Whole systems as they come, and with what of them can be told of an SLO."""
