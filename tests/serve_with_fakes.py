"""Runs the `forebay` command with fake_child.py in place of an engine, and of the gateway where told.

    FAKE_ORDER=FILE [FAKE_GATEWAY=ARGUMENTS] [FAKE_INSTALL=FIFO] python -m tests.serve_with_fakes serve …

FAKE_INSTALL is a FIFO the installation waits at until somebody opens it for writing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from engines.environments import EngineEnvironment
from engines.launch import LaunchSpec
from engines.minder import Phase
from engines.models import ModelFiles
from engines.steps import Step
from gateway import cli, local
from gateway.greeting import Display
from gateway.settings import LocalEngine, Settings

FAKE = [sys.executable, "-I", "-S", str(Path(__file__).with_name("fake_child.py"))]
ORDER = os.environ["FAKE_ORDER"]


class FakeEngine:
    """An engine that is a fake child."""

    loading_phases: tuple[Phase, ...] = ()

    def obstacles(self, spec: LaunchSpec) -> Iterator[str]:
        return iter(())

    def command_line(self, spec: LaunchSpec, python: Path) -> list[str]:
        return [*FAKE, "engine", ORDER, "--unix", str(spec.address.unix)]

    def environment(self, spec: LaunchSpec) -> dict[str, str]:
        return {}


def prepare(engine: LocalEngine, settings: Settings, display: Display) -> local.PreparedEngine:
    display.report(Step("install fake", "pretending"))
    if gate := os.environ.get("FAKE_INSTALL"):
        Path(gate).read_bytes()
    return local.PreparedEngine(engine, EngineEnvironment(Path("unused")), ModelFiles("unused", "fake-model"))


def fake_gateway(plan: local.Plan) -> list[str]:
    more = os.environ["FAKE_GATEWAY"].split()
    return [*FAKE, "gateway", ORDER, "--port", str(plan.settings.listen.port), *more]


local.launchable = lambda kind: FakeEngine()
local.prepare = prepare
if "FAKE_GATEWAY" in os.environ:
    local.replica_command = fake_gateway
cli.main()
