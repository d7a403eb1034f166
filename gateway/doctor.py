"""`forebay doctor`: what is installed, what is missing and what to type; it changes nothing."""

from __future__ import annotations

import asyncio
import enum
import platform
import random
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

from engines.devices import Device, detect
from engines.environments import RECIPES, find_environment, find_uv, problems
from engines.registry import ENGINES
from gateway.local import StartError, check_ports
from gateway.redis_url import Target
from gateway.settings import ConfigError, Settings, Upstream, load
from gateway.state.database import StateError, describe, open_database, translated

PROBE_TIMEOUT = 3.0
"""Seconds an upstream gets to answer."""


class State(enum.Enum):
    """How a finding is to be taken."""

    GOOD = "ok"
    ABSENT = "-"
    """Not there; needed only by those who want it."""
    BAD = "!!"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. `remedy` is what to type or do, where there is something to do."""

    subject: str
    state: State
    detail: str
    remedy: str | None = None


def examine(config: Path | None) -> Iterator[Finding]:
    """Look at everything `serve` would need, one finding after the other."""
    yield Finding("python", State.GOOD, f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    try:
        settings = load(config)
    except ConfigError as error:
        for problem in error.problems:
            yield Finding("configuration", State.BAD, problem, f"forebay config check {config or ''}".strip())
        return
    yield Finding("configuration", State.GOOD, f"{config} is valid" if config else "none, the defaults hold")
    yield _ports(settings)
    yield _database(settings)
    server = settings.limits.store.server()
    if server is not None:
        yield asyncio.run(_limits_store(server[1]))
    for upstream in settings.upstreams:
        yield _upstream(upstream)
    yield _installer(settings)
    for found in detect():
        yield from _device(found.device, f"{found.count} x {found.description}", found.problem, settings.data_dir)


def _ports(settings: Settings) -> Finding:
    try:
        check_ports(settings)
    except StartError as error:
        return Finding("ports", State.BAD, str(error))
    return Finding("ports", State.GOOD, f"{settings.listen.port} and {settings.admin.port} are free")


def _database(settings: Settings) -> Finding:
    """Whether the state database can be opened; one that is not there yet is made by the first start."""
    try:
        engine = open_database(settings.state_url)
        place = describe(engine.url)
        if engine.dialect.name == "sqlite" and not Path(place).exists():
            return Finding("state", State.ABSENT, f"{place} is made at the first start")
        with translated(engine), engine.connect():
            pass
        engine.dispose()
        return Finding("state", State.GOOD, place)
    except StateError as error:
        return Finding("state", State.BAD, str(error))


async def _limits_store(target: Target) -> Finding:
    """Whether the server that limits are shared through lets a gateway in and takes its scripts."""
    # The client's library takes a while to read, and most configurations have no such server.
    from gateway.store.link import Link

    up = asyncio.Event()
    link = Link(target, up.set, up.clear, random.Random())  # noqa: S311
    link.start()
    try:
        await asyncio.wait_for(up.wait(), PROBE_TIMEOUT)
    except TimeoutError:
        return Finding("limits.store", State.BAD, f"{target} cannot be used ({link.trouble or 'no answer'})")
    finally:
        await link.close()
    return Finding("limits.store", State.GOOD, str(target))


def _upstream(upstream: Upstream) -> Finding:
    """Whether a configured engine answers, and to its key."""
    subject = f"upstream {upstream.name or upstream.url}"
    socket_path = upstream.url.removeprefix("unix:") if upstream.url.startswith("unix:") else None
    base = "http://engine" if socket_path else upstream.url
    key = upstream.credential()
    try:
        context = ssl.create_default_context(cafile=str(upstream.ca_file) if upstream.ca_file else None)
        transport = httpx.HTTPTransport(verify=context, uds=socket_path)
        with httpx.Client(transport=transport, timeout=PROBE_TIMEOUT) as client:
            headers = {"authorization": f"Bearer {key}"} if key else {}
            answer = client.get(base + ENGINES[upstream.engine].models_path, headers=headers)
            models = [model["id"] for model in answer.raise_for_status().json()["data"]]
    except httpx.HTTPStatusError as error:
        return Finding(subject, State.BAD, f"answers {error.response.status_code} to {error.request.url.path}", None)
    except (OSError, httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        return Finding(subject, State.BAD, f"does not answer as {upstream.engine} does ({error})", None)
    return Finding(subject, State.GOOD, f"serves {', '.join(models) or 'nothing'}")


def _installer(settings: Settings) -> Finding:
    found = find_uv(settings.data_dir)
    if found is None:
        return Finding("uv", State.ABSENT, "is fetched when an engine is installed")
    return Finding("uv", State.GOOD, str(found))


def _device(device: Device, description: str, problem: str | None, data_dir: Path) -> Iterator[Finding]:
    """A device of this machine, and each engine that could be installed for it."""
    yield Finding(device.value, State.BAD if problem else State.GOOD, problem or description)
    for (kind, on), recipe in RECIPES.items():
        if on is not device:
            continue
        found = find_environment(recipe, data_dir)
        if found is not None:
            yield Finding(f"{kind} on {on}", State.GOOD, str(found.directory))
            continue
        obstacles = list(problems(recipe, data_dir))
        for obstacle in obstacles:
            yield Finding(f"{kind} on {on}", State.BAD, obstacle)
        if not obstacles:
            remedy = f"forebay engines install {kind} --device {on}"
            yield Finding(f"{kind} on {on}", State.ABSENT, "is not installed; `forebay serve` would do it", remedy)
