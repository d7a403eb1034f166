"""Simulated engines and a gateway for a scenario, on free loopback ports; all of them end with whoever started them."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from loadtests.children import (
    Child,
    engine_figures,
    kill_all,
    start_engine,
    start_gateway,
    wait_ended,
    wait_ready,
)
from loadtests.scenarios.schema import Scenario, gateway_part
from tests.support.sockets import free_port

_IDLE = 30.0
"""Seconds an engine may go on with what its clients have left."""


@dataclass(slots=True)
class Fleet:
    """What runs. ``deaths``: engines killed so far."""

    scenario: Scenario
    folder: Path
    engines: list[Child] = field(default_factory=list)
    gateway: Child | None = None
    deaths: int = 0
    _dead: list[tuple[float, int]] = field(default_factory=list)
    """Engines that are away, and when each is to be started again."""

    @property
    def url(self) -> str:
        """Where the gateway listens."""
        assert self.gateway is not None
        return f"http://127.0.0.1:{self.gateway.port}"

    def add_engine(self, number: int, port: int) -> Child:
        """Start one; it answers after ``wait_ready``."""
        told = self.scenario.fleet
        own = ["--profile", told.profile, "--speed", str(told.speed), "--served-model-name", *_models(self.scenario)]
        return start_engine(f"engine-{number}", self.folder, port, "--enable-prompt-tokens-details", *own, *told.args)

    def hurt(self, since: float, now: float) -> None:
        """Kill and start engines as the scenario has it; ``since``: when requests began. Called again and again."""
        told = self.scenario.fleet.deaths
        if told is None:
            return
        for back, number in [one for one in self._dead if one[0] <= now]:
            self._dead.remove((back, number))
            self.engines[number] = self.add_engine(number, self.engines[number].port)
        if now - since >= told.every * (self.deaths + 1) and now - since < self.scenario.seconds:
            number = self.deaths % len(self.engines)
            self.deaths += 1
            if all(number != gone for _, gone in self._dead):
                self.engines[number].kill()
                self._dead.append((now + told.back, number))

    def figures(self) -> dict[str, int]:
        """What the engines count together, when they are idle (or patience is over); of those that were started again
        since then only. OSError, FleetError."""
        living = [engine for engine in self.engines if engine.alive()]
        deadline = time.monotonic() + _IDLE
        while True:
            found = [engine_figures(engine.port) for engine in living]
            summed = {name: sum(one[name] for one in found) for name in found[0]} if found else {}
            busy = summed.get("running", 0) + summed.get("waiting", 0)
            if not busy or time.monotonic() > deadline:
                return summed
            time.sleep(0.1)


def _models(scenario: Scenario) -> list[str]:
    return list(dict.fromkeys([scenario.model, *(one.model for one in scenario.classes.values() if one.model)]))


def _merged(base: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Both mappings as one, ``more`` before ``base``."""
    found = dict(base)
    for name, value in more.items():
        old = found.get(name)
        found[name] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return found


def configuration(scenario: Scenario, folder: Path, engine_ports: list[int]) -> str:
    """The gateway's forebay.yaml."""
    models = {name: name for name in _models(scenario)}
    own: dict[str, Any] = {
        "listen": {"host": "127.0.0.1"},
        "admin": {"host": "127.0.0.1"},
        "upstreams": [
            {"url": f"http://127.0.0.1:{port}", "engine": "simulated", "models": models} for port in engine_ports
        ],
        "shutdown": {"announce": 0, "drain": 5},
        "data_dir": str(folder / "data"),
        **gateway_part(scenario, plain_keys=True),
    }
    return yaml.safe_dump(_merged(own, scenario.fleet.gateway), sort_keys=False)


@contextlib.contextmanager
def start_fleet(scenario: Scenario) -> Iterator[Fleet]:
    """Engines and gateway of a scenario, answering; nothing of it is left afterwards. FleetError."""
    with tempfile.TemporaryDirectory(prefix="forebay-load-") as name:
        folder = Path(name)
        fleet = Fleet(scenario, folder)
        try:
            ports = [free_port() for _ in range(scenario.fleet.engines)]
            for number, port in enumerate(ports):
                fleet.engines.append(fleet.add_engine(number, port))
            (folder / "forebay.yaml").write_text(configuration(scenario, folder, ports), encoding="utf-8")
            for engine in fleet.engines:
                wait_ready(engine, "/health")
            own = {"FOREBAY_STATE__URL": f"sqlite:///{folder / 'state.db'}"}
            fleet.gateway = start_gateway("gateway", folder, free_port(), free_port(), own)
            wait_ready(fleet.gateway, "/health/ready")
            yield fleet
            fleet.gateway.process.terminate()
            wait_ended(fleet.gateway)
        finally:
            kill_all([*fleet.engines, *([fleet.gateway] if fleet.gateway else ())])
