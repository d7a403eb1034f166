"""What the soak runs: gateways that share a Redis and a PostgreSQL server, in front of real engines and simulated ones.

Every process is a child that ends with whoever started it. An engine is minded as everywhere: killed, it comes back.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from loadtests.children import Child, FleetError, kill_all, start, start_engine, start_gateway, wait_ready
from loadtests.soak.plan import DRAIN, KEYS_EACH, REAL, SIMULATED, TENANTS, Plan, key_of, limits
from tests.store.servers import Server as Redis
from tests.support import postgresql
from tests.support.postgresql import Server as Postgresql
from tests.support.real_engine import data_directory, prepared
from tests.support.sockets import free_port

ENGINE_WITHIN = 600.0
"""Seconds for a real engine to answer, on a machine that also starts another one."""
STORE_TIMEOUT = "1s"
"""Twenty times what is usual: two cores carry all of it, and a store that is only late must not count as lost."""


@dataclass(slots=True)
class Fleet:
    """What runs."""

    folder: Path
    plan: Plan
    redis: Redis
    database: Postgresql
    engines: dict[str, Child] = field(default_factory=dict)
    """By the names of the upstreams."""
    replicas: list[Child] = field(default_factory=list)
    """All that were ever started; those that are leaving are in ``leaving``."""
    leaving: dict[int, float] = field(default_factory=dict)
    """Replicas that were told to stop, and when (Unix time)."""
    hands: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "hands"))
    """The thread that starts and ends things: the kernel ends children with the thread that started them."""

    def add_replica(self) -> Child:
        """Start one more gateway; it answers after ``wait_ready``."""
        number = len(self.replicas)
        own = {
            "FOREBAY_LOG__FILE": str(self.folder / f"replica-{number}.jsonl"),
            "FOREBAY_STATE__URL": self.database.url,
        }
        child = start_gateway(f"replica-{number}", self.folder, free_port(), free_port(), own)
        self.replicas.append(child)
        return child

    def all_back(self) -> None:
        """Return when every engine answers, those that were killed too. FleetError when one does not."""
        for engine in self.engines.values():
            wait_ready(engine, "/health", ENGINE_WITHIN)

    def living(self) -> list[int]:
        """Which replicas a balancer would send to."""
        return [
            at
            for at, one in enumerate(self.replicas)
            if one.ready and one.killed_at is None and at not in self.leaving and one.alive()
        ]

    def close(self) -> None:
        """Kill whatever still runs."""
        for name in REAL:
            if (engine := self.engines.get(name)) is not None and engine.alive():
                end_engine(engine)
        kill_all((*self.replicas, *self.engines.values()))
        self.redis.close()
        self.hands.shutdown()


def configuration(fleet: Fleet) -> str:
    """The file of every gateway."""
    plan = fleet.plan
    upstreams: list[dict[str, Any]] = []
    for name, child in fleet.engines.items():
        real = name in REAL
        model = plan.model if real else SIMULATED
        one = {"name": name, "url": f"http://127.0.0.1:{child.port}", "models": {model: model}}
        upstreams.append(one | {"engine": "vllm" if real else "simulated", "max_running": plan.running(name)})
    told: dict[str, Any] = {
        "listen": {"host": "127.0.0.1"},
        "admin": {"host": "127.0.0.1"},
        "keys": [
            {"name": f"{tenant}-{number}", "tenant": tenant, "key": key_of(tenant, number)}
            for tenant in TENANTS
            for number in range(KEYS_EACH)
        ],
        "upstreams": upstreams,
        "shutdown": {"announce": 0, "drain": DRAIN},
        "data_dir": str(fleet.folder / "data"),
        "limits": limits()
        | {
            "store": {
                "url": fleet.redis.url,
                "timeout": STORE_TIMEOUT,
                "replicas": plan.replicas,
            }
        },
    }
    return yaml.safe_dump(told, sort_keys=False)


@contextlib.contextmanager
def start_fleet(plan: Plan) -> Iterator[Fleet]:
    """Everything of a plan, answering; nothing of it is left afterwards. FleetError."""
    # What takes long is made before anything runs beside it.
    if plan.real:
        prepared()
    with (
        tempfile.TemporaryDirectory(prefix="forebay-soak-") as name,
        postgresql.running(Path(name)) as database,
        contextlib.ExitStack() as last,
    ):
        folder = Path(name)
        fleet = Fleet(folder, plan, Redis(), database)
        last.callback(fleet.close)
        fleet.redis.start()
        for upstream in plan.simulated:
            fleet.engines[upstream] = _simulated(upstream, folder)
        for upstream in plan.real:
            fleet.engines[upstream] = _real(upstream, folder)
        for upstream in plan.simulated:
            wait_ready(fleet.engines[upstream], "/health")
        for upstream in plan.real:
            wait_ready(fleet.engines[upstream], "/health", ENGINE_WITHIN)
        (folder / "forebay.yaml").write_text(configuration(fleet), encoding="utf-8")
        for _ in range(plan.replicas):
            fleet.add_replica()
        for replica in fleet.replicas:
            wait_ready(replica, "/health/ready")
        yield fleet


def _simulated(name: str, folder: Path) -> Child:
    own = ["--profile", "h100-8b", "--speed", "4", "--served-model-name", SIMULATED, "--max-model-len", "4096"]
    return start_engine(name, folder, free_port(), *own)


def _real(name: str, folder: Path) -> Child:
    """vLLM under its agent, as `forebay engines run` has it. Each has a folder of its own: two agents, two sockets."""
    home = folder / name
    home.mkdir()
    port = free_port()
    command = [sys.executable, "-m", "gateway.cli", "engines", "run", "vllm", "--port", str(port)]
    environment = {"FOREBAY_HOME": str(data_directory()), "OMP_NUM_THREADS": "1"}
    return start(name, command, home, port, environment=environment)


def engine_leader(engine: Child) -> psutil.Process:
    """The first process of a real engine: below the agent, which is below its keeper. FleetError: it has none now."""
    for process in psutil.Process(engine.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "minder.py" in " ".join(process.cmdline()):
                for agent in process.children():
                    for leader in agent.children():
                        return leader
    raise FleetError(f"{engine.name} has no process now; it said:\n{engine.said()}")


def end_engine(engine: Child) -> None:
    """End a real engine with its agent: its owner is told, and killed where that does not help."""
    engine.process.terminate()
    with contextlib.suppress(Exception):
        engine.process.wait(30)
