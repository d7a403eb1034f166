"""The conformance checks, all of them, on the simulated engine behind the gateway."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import httpx
import pytest

from engines.conformance import CHECKS, Subject, Verdict, run_check
from engines.registry import ENGINES
from gateway.serving.watch import read_load
from gateway.settings import Upstream
from tests.engines.simulated.conftest import Start, make_adapter
from tests.support.gateway import AUTH, StartGateway


@pytest.fixture
async def subject(start: Start, start_gateway: StartGateway, tmp_path: Path) -> AsyncIterator[Subject]:
    """An engine with an adapter, at ten times an H100's pace: slow enough for a client to leave it."""
    engine = await start("--profile", "h100-8b", "--speed", "10")
    call = {"lora_name": "support@1", "lora_path": str(make_adapter(tmp_path / "adapter"))}
    assert (await engine.client.post("/v1/load_lora_adapter", json=call)).status_code == 200
    models = {"smollm2": "smollm2", "support": "support@1"}
    gateway = await start_gateway(Upstream(url=engine.url, engine="simulated", models=models))
    async with httpx.AsyncClient(base_url=gateway.url, headers=dict(AUTH), timeout=20, trust_env=False) as client:
        simulated = ENGINES["simulated"]
        load = partial(read_load, engine.client, simulated)
        yield Subject(client, "smollm2", simulated.capabilities, 2048, "support", load)


@pytest.mark.parametrize("name", CHECKS)
async def test_conformance(subject: Subject, name: str) -> None:
    result = await run_check(CHECKS[name], subject)
    assert (result.verdict, result.detail) == (Verdict.PASSED, "")
