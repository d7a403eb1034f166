"""Gateway processes on one Redis and two simulated engines, all of them children that end with whoever started them.

Rule 1: whatever is started is known by its process id and killed by it, on every way out; the kernel does it where
        this process itself is killed.
Rule 2: nothing is shared but what replicas of one machine share: the configuration, the state database, the store.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import yaml

from tests.store.servers import Server
from tests.support.leash import leash
from tests.support.sockets import free_port

STAYS, LEAVES = "stays", "leaves"
"""Models, each of an engine of its own: of clients that wait for their answers, and of those of which some do not."""
TOKENS = 24
"""Tokens of every answer that is waited for."""
STORE_TIMEOUT = 1.0
"""Seconds. Twenty times what is usual: two cores carry all processes of a run, and nothing of it may count as lost."""
_PATIENCE = 60.0


class FleetError(Exception):
    """Something did not start, or did not do what it was told; the text says what."""


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
class Child:
    """A process of ours."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    port: int
    admin_port: int = 0
    killed_at: float | None = None
    """Unix time at which it was killed."""
    ready: bool = False
    """Whether it has answered."""

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    def alive(self) -> bool:
        """Whether it runs."""
        return self.process.poll() is None


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
        child = _start(
            f"replica-{number}",
            [sys.executable, "-m", "gateway.cli", "serve", "--config", str(self.folder / "forebay.yaml")],
            self.folder,
            free_port(),
            free_port(),
            {
                "FOREBAY_LOG__FILE": str(self.folder / f"replica-{number}.jsonl"),
                "FOREBAY_STATE__URL": f"sqlite:///{self.database}",
            },
        )
        self.replicas.append(child)
        return child

    def kill_replica(self, number: int) -> None:
        """SIGKILL, and wait for its end."""
        child = self.replicas[number]
        child.killed_at = time.time()
        child.process.kill()
        child.process.wait()

    def stop_replicas(self) -> None:
        """SIGTERM to all, and wait: the ledger is whole when this returns. FleetError when one does not end."""
        for child in self.replicas:
            if child.alive():
                child.process.terminate()
        for child in self.replicas:
            if child.killed_at is not None:
                continue
            try:
                code = child.process.wait(30)
            except subprocess.TimeoutExpired:
                raise FleetError(f"{child.name} does not end:\n{_tail(child.log)}") from None
            if code:
                raise FleetError(f"{child.name} ended with {code}:\n{_tail(child.log)}")

    def figures(self, model: str) -> dict[str, int]:
        """What an engine itself counts: `prompt`, `generation` tokens, requests `running` and `waiting`."""
        text = get(self.engines[model].port, "/metrics").decode()
        names = {
            "prompt": "prompt_tokens_total",
            "generation": "generation_tokens_total",
            "running": "num_requests_running",
            "waiting": "num_requests_waiting",
        }
        found = {}
        for short, name in names.items():
            match = re.search(rf"^vllm:{name}\{{\S* (\S+)$", text, re.MULTILINE)
            if match is None:
                raise FleetError(f"the engine of {model} does not count {name}")
            found[short] = int(float(match[1]))
        return found


def _start(
    name: str,
    command: Sequence[str],
    folder: Path,
    port: int,
    admin_port: int = 0,
    environment: Mapping[str, str] | None = None,
) -> Child:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FOREBAY_")}
    kept["PYTHONPATH"] = str(Path(__file__).parents[2])
    if admin_port:
        kept |= {"FOREBAY_LISTEN__PORT": str(port), "FOREBAY_ADMIN__PORT": str(admin_port)}
    log = folder / f"{name}.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=leash(signal.SIGKILL),  # noqa: PLW1509 - one system call
            env={**kept, **(environment or {})},
        )
    return Child(name, process, log, port, admin_port)


def get(port: int, path: str) -> bytes:
    """The body of a GET on 127.0.0.1. OSError; FleetError where the answer is not 200."""
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read()
    except HTTPException as error:
        raise OSError(str(error)) from error
    finally:
        connection.close()
    if answer.status != 200:
        raise FleetError(f"{path} on port {port} answers {answer.status}")
    return body


def wait_ready(child: Child, path: str) -> None:
    """Return when it answers. FleetError with the end of what it said when it does not."""
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline and child.alive():
        with contextlib.suppress(OSError, FleetError):
            get(child.port, path)
            child.ready = True
            return
        time.sleep(0.02)
    raise FleetError(f"{child.name} does not answer; it said:\n{_tail(child.log)}")


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-1500:]


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
    port = free_port()
    command = [sys.executable, "-m", "engines.simulation", "--profile", "h100-8b", "--speed", "4", "--faults"]
    command += ["--served-model-name", model, "--max-model-len", "4096", "--port", str(port)]
    return _start(f"engine-{model}", command, folder, port)


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
    for child in (*fleet.replicas, *fleet.engines.values()):
        with contextlib.suppress(ProcessLookupError):
            child.process.kill()
    for child in (*fleet.replicas, *fleet.engines.values()):
        child.process.wait()
    for server in (fleet.sentinel, fleet.spare, fleet.server):
        if server is not None:
            server.close()
    fleet.hands.shutdown()
