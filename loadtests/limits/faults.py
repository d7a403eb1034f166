"""What is done to a fleet in the middle of its load, and what it may cost by the documentation."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import redis

from loadtests.children import FleetError, wait_ready
from loadtests.limits.fleet import Fleet
from tests.store.servers import Server

FROZEN = 2.5
"""Seconds for which the store does not answer."""
GONE = 2.0
"""Seconds for which there is none."""
BACK = 2.0
"""Seconds within which every replica has found the store again: its attempts are at most one second apart."""
PATIENCE = 20.0


@dataclass(slots=True)
class Happened:
    """When it was done, in Unix time, and for how long the store was away (0: never)."""

    began: float
    away: float = 0.0
    lag: float = 0.0
    """Seconds of writes that the store may have lost."""


@dataclass(frozen=True, slots=True)
class Fault:
    """``excess``: whether the limit may be given out once more, by shares. ``empties``: whether the store forgets, so
    that what was left in its buckets is not given out."""

    name: str
    said: str
    do: Callable[[Fleet], Happened]
    excess: bool = False
    empties: bool = False
    sentinel: bool = False


def _none(_: Fleet) -> Happened:
    return Happened(time.time())


def _kill(fleet: Fleet) -> Happened:
    """The replica with the most load; another one comes in its place, as Kubernetes would see to."""
    happened = Happened(time.time())
    fleet.kill_replica(0)
    time.sleep(0.5)
    wait_ready(fleet.add_replica(), "/health/ready")
    return happened


def _freeze(fleet: Fleet) -> Happened:
    happened = Happened(time.time(), FROZEN)
    fleet.server.freeze()
    try:
        time.sleep(FROZEN)
    finally:
        fleet.server.thaw()
    return happened


def _flush(fleet: Fleet) -> Happened:
    happened = Happened(time.time())
    fleet.server.command("FLUSHALL")
    return happened


def _restart(fleet: Fleet) -> Happened:
    happened = Happened(time.time(), GONE)
    fleet.server.kill()
    time.sleep(GONE)
    fleet.server.start()
    return happened


def _failover(fleet: Fleet) -> Happened:
    """The primary dies, the Sentinel promotes the other."""
    if fleet.spare is None:
        raise FleetError("there is no second Redis")
    lag = _lag(fleet)
    happened = Happened(time.time(), lag=lag)
    fleet.server.kill()
    deadline = time.monotonic() + PATIENCE
    while not _is_primary(fleet.spare):
        if time.monotonic() > deadline:
            raise FleetError("the Sentinel promotes nobody")
        time.sleep(0.01)
    happened.away = time.time() - happened.began
    fleet.server, fleet.spare = fleet.spare, fleet.server
    return happened


def _is_primary(server: Server) -> bool:
    # A server that is promoted ends its connections.
    with contextlib.suppress(redis.ConnectionError):
        return bool(server.command("ROLE")[0] == b"master")
    return False


def _lag(fleet: Fleet) -> float:
    """How far the second Redis is behind at the most: all that it has now the first had that many seconds ago."""
    assert fleet.spare is not None
    began = time.monotonic()
    there = fleet.server.command("INFO", "replication")["master_repl_offset"]
    while fleet.spare.command("INFO", "replication")["slave_repl_offset"] < there:
        if time.monotonic() - began > PATIENCE:
            raise FleetError("the second Redis does not follow the first")
    return time.monotonic() - began


FAULTS = {
    fault.name: fault
    for fault in (
        Fault("none", "nothing", _none),
        Fault("kill", "the replica with the most load is killed, another one started", _kill),
        Fault("freeze", f"the store does not answer for {FROZEN} s", _freeze, excess=True),
        Fault("flush", "the store is emptied", _flush, empties=True),
        Fault("restart", f"the store is killed, and comes back empty {GONE} s later", _restart, True, True),
        Fault("failover", "the primary is killed, a Sentinel promotes the other", _failover, True, sentinel=True),
    )
}
