"""The conformance checks on the session's real vLLM, through the gateway of the session's ``forebay serve``."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator, Iterator
from functools import partial

import httpx
import pytest

from engines.conformance import CHECKS, Subject, Verdict, run_check
from engines.registry import ENGINES
from gateway.app import endpoint_spec
from gateway.serving.watch import client_for, read_load
from gateway.settings import Upstream
from tests.support.real_engine import ANSWER_WITHIN, RealEngine
from tests.support.served import PROGRAM, Served

pytestmark = pytest.mark.real_engine


@pytest.fixture
def client(served: Served) -> Iterator[httpx.AsyncClient]:
    headers = {"authorization": f"Bearer {served.key}"}
    yield httpx.AsyncClient(base_url=served.url, headers=headers, timeout=ANSWER_WITHIN, trust_env=False)


@pytest.fixture
async def subject(client: httpx.AsyncClient, vllm_engine: RealEngine) -> AsyncIterator[Subject]:
    """The engine as its own gateway shows it."""
    async with client, client_for(endpoint_spec(Upstream(url=vllm_engine.url))) as direct:
        vllm = ENGINES["vllm"]
        yield Subject(client, vllm_engine.model, vllm.capabilities, 2048, None, partial(read_load, direct, vllm))


# The session's engine is the plain command's own and has no adapters.
@pytest.mark.parametrize("name", [name for name, one in CHECKS.items() if not one.with_adapter])
async def test_conformance(subject: Subject, name: str) -> None:
    result = await run_check(CHECKS[name], subject)
    assert (result.verdict, result.detail) == (Verdict.PASSED, "")


def test_the_command_checks_an_engine_of_one_s_own(served: Served, vllm_engine: RealEngine) -> None:
    """A gateway of its own in front of it; what cannot be tried is said and is no failure."""
    chosen = [word for name in ("models", "length", "left_client", "adapter") for word in ("--only", name)]
    command = [PROGRAM, "engines", "check", vllm_engine.url, *chosen]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=ANSWER_WITHIN)
    assert (done.returncode, done.stderr) == (0, "")
    verdicts = [line[:11].strip() for line in done.stdout.splitlines()]
    assert verdicts == ["passed", "passed", "passed", "not tried"]
