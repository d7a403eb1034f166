"""Follows the upstreams that are discovered, and tells the replica when engines have come or gone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from urllib.parse import urlsplit

from engines.discovery import DnsSource, Found, KubernetesSource, Source, follow, in_cluster
from gateway.log import Log
from gateway.serving.pool import EndpointSpec
from gateway.serving.upstream import parse_address
from gateway.settings import ConfigError, Upstream


@dataclass(frozen=True, slots=True)
class Followed:
    """An upstream with ``discover``: where its engines are found, and what each of them is but for its address."""

    source: Source
    template: EndpointSpec


Plan = Mapping[str, Followed]
"""What is to be followed, by how and under which URL: each is followed once."""


class Finder:
    """One task for each upstream with ``discover``. ``changed`` is awaited after each change."""

    def __init__(
        self, specify: Callable[[Upstream], EndpointSpec], changed: Callable[[], Awaitable[None]], log: Log
    ) -> None:
        self._specify = specify
        self._changed = changed
        self._log = log
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._plan: Plan = {}
        self._found: dict[str, frozenset[Found]] = {}

    def plan(self, upstreams: Iterable[Upstream], dns_interval: float) -> Plan:
        """Return what ``follow`` is to be given; changes nothing. Raises ConfigError."""
        discovered = [upstream for upstream in upstreams if upstream.discover is not None]
        return {
            f"{one.discover} {one.url}": Followed(self._source(one, dns_interval), self._specify(one))
            for one in discovered
        }

    async def follow(self, plan: Plan) -> None:
        """Follow these from now on. Those followed already go on as they were begun."""
        await self._leave([key for key in self._tasks if key not in plan])
        self._plan = plan
        for key, followed in plan.items():
            if key not in self._tasks:
                following = follow(followed.source, partial(self._take, key))
                self._tasks[key] = asyncio.create_task(following, name=f"discover {key}")

    def specs(self) -> list[EndpointSpec]:
        """Return every endpoint that is there now."""
        there = [(self._plan[key].template, found) for key, found in self._found.items()]
        return [_at(template, one) for template, found in there for one in sorted(found)]

    async def stop(self) -> None:
        """Follow nothing any more."""
        await self._leave(list(self._tasks))

    async def _leave(self, keys: Iterable[str]) -> None:
        tasks = []
        for key in keys:
            self._found.pop(key, None)
            tasks.append(self._tasks.pop(key))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _take(self, key: str, found: frozenset[Found]) -> None:
        before = self._found.get(key, frozenset())
        self._found[key] = found
        self._log.say(
            "info",
            "endpoints_found",
            upstream=self._plan[key].template.name,
            came=[one.authority for one in sorted(found - before)],
            went=[one.authority for one in sorted(before - found)],
        )
        await self._changed()

    def _source(self, upstream: Upstream, dns_interval: float) -> Source:
        parts = urlsplit(upstream.url)
        assert parts.hostname is not None and parts.port is not None
        tell = partial(self._trouble, upstream.name or upstream.url)
        if upstream.discover == "dns":
            return DnsSource(parts.hostname, parts.port, dns_interval, tell)
        cluster = in_cluster()
        if cluster is None:
            told = (
                "discover: kubernetes works inside a cluster only, and this is none; use discover: dns, or leave it out"
            )
            raise ConfigError([f"upstream {upstream.url}: {told}"])
        service, _, namespace = parts.hostname.partition(".")
        return KubernetesSource(cluster, service, str(parts.port), tell, namespace or None)

    def _trouble(self, upstream: str, why: str) -> None:
        self._log.say("warning", "discovery_trouble", upstream=upstream, why=why)


def _at(template: EndpointSpec, found: Found) -> EndpointSpec:
    """Return one of the engines that were found."""
    url, minder = f"http://{found.authority}", template.minder
    if minder is not None:
        port = urlsplit(minder.address).port
        assert port is not None
        minder = replace(minder, address=f"http://{Found(found.host, port).authority}")
    name = f"{template.name}/{found.authority}"
    return replace(template, name=name, url=url, address=parse_address(url), minder=minder)
