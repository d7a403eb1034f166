"""Gateway processes on one Redis and two simulated engines, all of them children that end with whoever started them.

Nothing is shared but what replicas of one machine share: the configuration, the state database, the store.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from loadtests.children import (
    Child,
    FleetError,
    engine_figures,
    kill_all,
    start_engine,
    start_gateway,
    wait_ended,
    wait_ready,
)
from tests.store.servers import Server
from tests.support.sockets import free_port

STAYS, LEAVES = "stays", "leaves"
"""Models, each of an engine of its own: of clients that wait for their answers, and of those of which some do not."""
TOKENS = 24
"""Tokens of every answer that is waited for."""
STORE_TIMEOUT = 1.0
"""Seconds. Twenty times what is usual: two cores carry all processes of a run, and nothing of it may count as lost."""
_PATIENCE = 60.0


@dataclass(frozen=True, slots=True)
class Rate:
    """A limit that is used up: ``burst`` at once, ``rate`` of them each second."""

    rate: int
    burst: int

    def declared(self) -> dict[str, object]:
        """As forebay.yaml has it."""
        return {"rate": f"{self.rate * 60}/m", "burst": self.burst}


REQUESTS = Rate(100, 100)
"""Of tenant `asks`."""
WEIGHED = Rate(8000, 8000)
"""Tokens of tenant `writes`."""
AT_ONCE = 12
"""Requests at once of tenant `holds`."""
BUDGET = 10**9
"""Tokens a month of each tenant, so many that none is refused for them: never refilled, they are a second account."""
TENANTS = ("asks", "writes", "holds", "light")
KEYS_EACH = 4
_PLENTY = {"rate": "1M/s"}


def key_of(tenant: str, number: int) -> str:
    """The secret of one of a tenant's keys."""
    return f"sk-load-{tenant}-{number}"


def limits(budgets: bool) -> dict[str, object]:
    """What is declared: each tenant has one limit that is used up, and all have several that are not."""
    own: dict[str, dict[str, object]] = {
        "asks": {"requests": REQUESTS.declared(), "tokens": _PLENTY},
        "writes": {"requests": _PLENTY, "tokens": WEIGHED.declared()},
        "holds": {"requests": _PLENTY, "tokens": _PLENTY, "concurrent": AT_ONCE},
        "light": {"requests": {"rate": "60k/m", "burst": 1000}, "tokens": _PLENTY},
    }
    more: dict[str, object] = {"budgets": {"tokens": BUDGET, "per": "month"}} if budgets else {}
    return {
        "defaults": {"key": {"requests": _PLENTY, "tokens": _PLENTY, "concurrent": 1000}},
        "tenants": {tenant: {"limits": {**declared, **more}} for tenant, declared in own.items()},
    }


@dataclass(frozen=True, slots=True)
class Plan:
    """What is started. ``mode`` is `leased`, `exact`, or `memory` for replicas that share nothing."""

    replicas: int
    mode: str = "leased"
    when_lost: str = "degraded"
    sentinel: bool = False
    budgets: bool = True
    """Whether tenants have budgets of the calendar: a store that is emptied has none left until the next month."""
    limits: Mapping[str, object] | None = None
    """Other limits than those of the load test."""
    keys: Sequence[tuple[str, str]] = ()
    """Other keys (tenant, secret)."""


@dataclass(slots=True)
class Fleet:
    """What runs. ``server`` is the primary Redis."""

    folder: Path
    plan: Plan
    server: Server
    spare: Server | None = None
    """The replica of the primary, where a Sentinel looks after both."""
    sentinel: Server | None = None
    engines: dict[str, Child] = field(default_factory=dict)
    replicas: list[Child] = field(default_factory=list)
    hands: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "fault"))
    """A thread for what takes time. It lives as long as what it has started: the kernel ends children with the thread
    that started them."""

    @property
    def database(self) -> Path:
        """The state database, with the ledger of all replicas."""
        return self.folder / "state.db"

    def add_replica(self) -> Child:
        """Start one more; it answers after ``wait_ready``."""
        number = len(self.replicas)
        own = {
            "FOREBAY_LOG__FILE": str(self.folder / f"replica-{number}.jsonl"),
            "FOREBAY_STATE__URL": f"sqlite:///{self.database}",
        }
        child = start_gateway(f"replica-{number}", self.folder, free_port(), free_port(), own)
        self.replicas.append(child)
        return child

    def kill_replica(self, number: int) -> None:
        """SIGKILL, and wait for its end."""
        self.replicas[number].kill()

    def stop_replicas(self) -> None:
        """SIGTERM to all, and wait: the ledger is whole when this returns. FleetError when one does not end."""
        for child in self.replicas:
            if child.alive():
                child.process.terminate()
        for child in self.replicas:
            if child.killed_at is None:
                wait_ended(child)

    def figures(self, model: str) -> dict[str, int]:
        """What an engine itself counts, see ``engine_figures``."""
        return engine_figures(self.engines[model].port)


def _configuration(plan: Plan, folder: Path, engines: Mapping[str, Child], url: str) -> str:
    declared = dict(plan.limits) if plan.limits is not None else limits(plan.budgets)
    if plan.mode != "memory":
        declared["store"] = {
            "url": url,
            "mode": plan.mode,
            "when_lost": plan.when_lost,
            "timeout": f"{round(STORE_TIMEOUT * 1000)}ms",
            "replicas": plan.replicas,
        }
    keys = plan.keys or [(tenant, key_of(tenant, number)) for tenant in TENANTS for number in range(KEYS_EACH)]
    told: dict[str, Any] = {
        "listen": {"host": "127.0.0.1"},
        "admin": {"host": "127.0.0.1"},
        "keys": [
            {"name": f"{tenant}-{number}", "tenant": tenant, "key": secret}
            for number, (tenant, secret) in enumerate(keys)
        ],
        "upstreams": [
            {"url": f"http://127.0.0.1:{engine.port}", "engine": "simulated", "models": {model: model}}
            for model, engine in engines.items()
        ],
        # An engine that refuses on demand is not left out for it.
        "health": {"failures": 1000},
        "shutdown": {"announce": 0, "drain": 5},
        "data_dir": str(folder / "data"),
        "limits": declared,
    }
    return yaml.safe_dump(told, sort_keys=False)


@contextlib.contextmanager
def start_fleet(plan: Plan) -> Iterator[Fleet]:
    """Everything of a plan, answering; nothing of it is left afterwards. FleetError."""
    with tempfile.TemporaryDirectory(prefix="forebay-limits-") as name, contextlib.ExitStack() as last:
        folder = Path(name)
        fleet = Fleet(folder, plan, Server())
        last.callback(_kill_all, fleet)
        fleet.server.start()
        url = fleet.server.url
        if plan.sentinel:
            url = _start_sentinel(fleet)
        for model in (STAYS, LEAVES):
            fleet.engines[model] = _start_engine(model, folder)
        (folder / "forebay.yaml").write_text(_configuration(plan, folder, fleet.engines, url), encoding="utf-8")
        for engine in fleet.engines.values():
            wait_ready(engine, "/health")
        for _ in range(plan.replicas):
            fleet.add_replica()
        for replica in fleet.replicas:
            wait_ready(replica, "/health/ready")
        yield fleet


def _start_engine(model: str, folder: Path) -> Child:
    own = ["--profile", "h100-8b", "--speed", "4", "--faults", "--served-model-name", model, "--max-model-len", "4096"]
    return start_engine(f"engine-{model}", folder, free_port(), *own)


def _start_sentinel(fleet: Fleet) -> str:
    fleet.spare = Server(f"replicaof 127.0.0.1 {fleet.server.port}", "replica-priority 1")
    fleet.spare.start()
    deadline = time.monotonic() + _PATIENCE
    with fleet.spare.client() as client:
        while client.info("replication")["master_link_status"] != "up":
            if time.monotonic() > deadline:
                raise FleetError("the second Redis does not follow the first")
            time.sleep(0.02)
    watched = f"sentinel monitor limits 127.0.0.1 {fleet.server.port} 1"
    times = ("sentinel down-after-milliseconds limits 500", "sentinel failover-timeout limits 2000")
    fleet.sentinel = Server(watched, *times, sentinel_of=fleet.server)
    fleet.sentinel.start()
    return f"redis+sentinel://127.0.0.1:{fleet.sentinel.port}/limits"


def _kill_all(fleet: Fleet) -> None:
    kill_all((*fleet.replicas, *fleet.engines.values()))
    for server in (fleet.sentinel, fleet.spare, fleet.server):
        if server is not None:
            server.close()
    fleet.hands.shutdown()


def slots_held(server: Server) -> dict[bytes, int]:
    """Slots in use by the name of what the store keeps them under, of replicas that live by the store's word."""
    with server.client() as untyped:
        client: Any = untyped
        seconds, micros = client.time()
        living = client.zrangebyscore("{forebay}:replicas", f"({seconds * 1_000_000 + micros}", "+inf")
        held = {}
        for name in client.scan_iter("{forebay}:b:*:concurrent", count=1000):
            fields = client.hgetall(name).items()
            held[name] = sum(int(value) for holder, value in fields if holder.removeprefix(b"r:") in living)
    return held
