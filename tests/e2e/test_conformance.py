"""The conformance checks on the session's real vLLM, through the gateway of the session's ``forebay serve``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import httpx
import pytest

from engines.conformance import CHECKS, Subject, Verdict, run_check
from engines.registry import ENGINES
from gateway.settings import Upstream
from gateway.trial import direct_client, load_reader
from tests.support.real_engine import ANSWER_WITHIN, RealEngine
from tests.support.served import Served

pytestmark = pytest.mark.real_engine


@pytest.fixture
def client(served: Served) -> Iterator[httpx.AsyncClient]:
    headers = {"authorization": f"Bearer {served.key}"}
    yield httpx.AsyncClient(base_url=served.url, headers=headers, timeout=ANSWER_WITHIN, trust_env=False)


@pytest.fixture
async def subject(client: httpx.AsyncClient, vllm_engine: RealEngine) -> AsyncIterator[Subject]:
    """The engine as its own gateway shows it."""
    async with client, direct_client(Upstream(url=vllm_engine.url)) as direct:
        capabilities = ENGINES["vllm"].capabilities
        yield Subject(client, vllm_engine.model, capabilities, 2048, None, load_reader("vllm", direct))


# The session's engine is the plain command's own and has no adapters.
@pytest.mark.parametrize("name", [name for name, one in CHECKS.items() if not one.with_adapter])
async def test_conformance(subject: Subject, name: str) -> None:
    result = await run_check(CHECKS[name], subject)
    assert (result.verdict, result.detail) == (Verdict.PASSED, "")
