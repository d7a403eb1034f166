"""What the tests of the whole house share: the real engine, and a gateway on each face in front of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Protocol

import pytest

from gateway.settings import Upstream
from tests.e2e.watched import WatchedEngine
from tests.support import client as raw_client
from tests.support import gateway as gateway_support
from tests.support.gateway import MODEL, Gateway, StartGateway, face, start_gateway
from tests.support.real_engine import ANSWER_WITHIN, RealEngine, served, vllm_engine

__all__ = ["face", "served", "start_gateway", "vllm_engine"]

_MEASURED = "measured"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Tell what was measured on the real engine: no test judges it, somebody may want to."""
    reports = terminalreporter.getreports("passed")
    lines = [value for report in reports for name, value in report.user_properties if name == _MEASURED]
    if lines:
        terminalreporter.section("measured on the real engine")
    for line in lines:
        terminalreporter.write_line(str(line))


class Measure(Protocol):
    """Keeps a figure for the summary."""

    def __call__(self, what: str, seconds: float) -> None:
        """Say what took how many seconds."""
        ...


@pytest.fixture
def measure(record_property: Callable[[str, object], None]) -> Measure:
    """Keep figures that are told at the end of the session."""

    def keep(what: str, seconds: float) -> None:
        record_property(_MEASURED, f"{what}: {seconds:.3g} s")

    return keep


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for a real engine on a busy machine longer than for a scripted one."""
    for module in (raw_client, gateway_support):
        monkeypatch.setattr(module, "PATIENCE", ANSWER_WITHIN)


@pytest.fixture
def upstream_of_engine(vllm_engine: RealEngine) -> Upstream:
    """The real engine as a gateway's upstream, under a public name that it does not know itself."""
    return Upstream(url=vllm_engine.url, models={MODEL: vllm_engine.model})


@pytest.fixture
async def gateway(start_gateway: StartGateway, upstream_of_engine: Upstream, patience: None) -> Gateway:
    """A gateway on this face in front of the real engine."""
    return await start_gateway(upstream_of_engine)


@pytest.fixture
async def engine(vllm_engine: RealEngine) -> AsyncIterator[WatchedEngine]:
    """The real engine, idle, and its own figures."""
    async with WatchedEngine(vllm_engine) as watched:
        await watched.stops()
        yield watched
