"""`forebay engines check`: the project's own conformance checks against an engine that somebody else runs.

A gateway is started in this process in front of the engine, on a free loopback port, and asked as a client would ask.
"""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import httpx

from engines.conformance import CHECKS, Result, Subject, TrialError, Verdict, run_checks
from gateway.app import Replica, endpoint_spec
from gateway.serving.watch import client_for, read_load
from gateway.settings import Settings, Upstream, load

ANSWER_WITHIN = 300.0
"""Seconds for one answer: an engine on a CPU is slow."""


@asynccontextmanager
async def gateway_before(upstream: Upstream) -> AsyncIterator[httpx.AsyncClient]:
    """Run a gateway in front of one engine; yield a client of it."""
    with tempfile.TemporaryDirectory(prefix="forebay-") as directory:
        settings = _settings(upstream, Path(directory))
        replica = Replica(settings)
        try:
            await replica.start()
            base = f"http://127.0.0.1:{replica.port}"
            async with httpx.AsyncClient(base_url=base, timeout=ANSWER_WITHIN, trust_env=False) as client:
                yield client
        finally:
            await replica.close()
            replica.log.close()


def _settings(upstream: Upstream, directory: Path) -> Settings:
    return load(
        None,
        {
            "listen": {"port": 0},
            "admin": {"enabled": False},
            "auth": "none",
            "upstreams": [upstream.model_dump(exclude_unset=True)],
            "data_dir": str(directory),
            "log": {"format": "json", "file": str(directory / "log")},
        },
    )


@asynccontextmanager
async def subject_of(
    upstream: Upstream, model: str | None, adapter: str | None, max_model_len: int | None
) -> AsyncIterator[Subject]:
    """Make an engine the subject of checks. Raises TrialError when it does not answer or serve what was named."""
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(gateway_before(upstream))
        listed = {entry["id"]: entry for entry in (await client.get("/v1/models")).json()["data"]}
        if not listed:
            raise TrialError(f"no engine of kind {upstream.engine} answers at {upstream.url}, or it serves nothing")
        names = [name for name in listed if name != adapter]
        chosen = model or (names[0] if len(names) == 1 else None)
        for name in (chosen, adapter):
            if name is not None and name not in listed:
                raise TrialError(f"the engine serves {', '.join(listed)}, not {name!r}; correct --model or --adapter")
        if chosen is None:
            raise TrialError(f"the engine serves {', '.join(listed)}; say which one to check: --model NAME")
        length = max_model_len or listed[chosen].get("max_model_len")
        if length is None:
            raise TrialError("the engine does not tell how long its context is; say it: --max-model-len TOKENS")
        spec = endpoint_spec(upstream)
        direct = await stack.enter_async_context(client_for(spec))
        capabilities = spec.engine.capabilities
        yield Subject(client, chosen, capabilities, length, adapter, partial(read_load, direct, spec.engine))


async def check_engine(
    upstream: Upstream,
    model: str | None,
    adapter: str | None,
    max_model_len: int | None,
    names: Sequence[str],
    tell: Callable[[Result], None],
) -> bool:
    """Run the checks, telling each result as it comes; True when none failed. Raises TrialError."""
    unknown = [name for name in names if name not in CHECKS]
    if unknown:
        raise TrialError(f"there is no check {unknown[0]!r}; there are {', '.join(CHECKS)}")
    good = True
    async with subject_of(upstream, model, adapter, max_model_len) as subject:
        async for result in run_checks(subject, names):
            good &= result.verdict is not Verdict.FAILED
            tell(result)
    return good
