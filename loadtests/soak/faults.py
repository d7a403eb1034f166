"""What is done to the fleet while it is loaded. Each step returns when it is done; all run in one thread."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from loadtests.children import kill_all, start_engine, wait_ended, wait_ready
from loadtests.soak.fleet import Fleet, engine_leader

FROZEN, GONE, AWAY = 2.5, 2.0, 5.0
"""Seconds for which the store does not answer, is not there, and the database is not there."""


@dataclass(frozen=True, slots=True)
class Happened:
    """A step that was done, from when to when (Unix time); ``about``: whom it was done to."""

    does: str
    began: float
    ended: float
    about: str = ""


def _kill_replica(fleet: Fleet) -> str:
    at = fleet.living()[0]
    fleet.replicas[at].kill()
    wait_ready(fleet.add_replica(), "/health/ready")
    return fleet.replicas[at].name


def _stop_replica(fleet: Fleet) -> str:
    """As a rolling update has it: the new one serves before the old one is told to end. It has to end well."""
    wait_ready(fleet.add_replica(), "/health/ready")
    at = fleet.living()[0]
    fleet.leaving[at] = time.time()
    fleet.replicas[at].process.terminate()
    wait_ended(fleet.replicas[at])
    return fleet.replicas[at].name


def _kill_real(fleet: Fleet) -> str:
    """The engine's own process; its agent starts another one, which takes a minute: the other faults come meanwhile."""
    name = fleet.plan.real[0]
    engine_leader(fleet.engines[name]).kill()
    return name


def _kill_simulated(fleet: Fleet) -> str:
    name = fleet.plan.simulated[0]
    old = fleet.engines[name]
    kill_all([old])
    command = old.process.args
    assert isinstance(command, list)
    new = start_engine(name, fleet.folder, old.port, *command[command.index(str(old.port)) + 1 :])
    wait_ready(new, "/health")
    fleet.engines[name] = new
    return name


def _freeze_redis(fleet: Fleet) -> str:
    fleet.redis.freeze()
    try:
        time.sleep(FROZEN)
    finally:
        fleet.redis.thaw()
    return "redis"


def _kill_redis(fleet: Fleet) -> str:
    fleet.redis.kill()
    time.sleep(GONE)
    fleet.redis.start()
    return "redis"


def _kill_database(fleet: Fleet) -> str:
    fleet.database.kill()
    time.sleep(AWAY)
    fleet.database.start()
    return "postgresql"


STEPS: dict[str, Callable[[Fleet], str]] = {
    "kill_replica": _kill_replica,
    "stop_replica": _stop_replica,
    "kill_real": _kill_real,
    "kill_simulated": _kill_simulated,
    "freeze_redis": _freeze_redis,
    "kill_redis": _kill_redis,
    "kill_database": _kill_database,
}


def do(fleet: Fleet, step: str) -> Happened:
    """Do one step. FleetError when something does not come back."""
    began = time.time()
    about = STEPS[step](fleet)
    return Happened(step, began, time.time(), about)
