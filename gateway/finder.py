"""Follows the upstreams that are discovered, and tells the replica when engines have come or gone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from urllib.parse import urlsplit

from engines.discovery import DnsSource, Found, KubernetesSource, Source, follow, in_cluster
from gateway.log import Log
from gateway.serving.pool import EndpointSpec
from gateway.settings import ConfigError, Upstream

Specify = Callable[[Upstream, Found], EndpointSpec]


class Finder:
    """One task for each upstream with ``discover``. ``changed`` is awaited after each change."""

    def __init__(self, specify: Specify, changed: Callable[[], Awaitable[None]], log: Log, dns_interval: float) -> None:
        self._specify = specify
        self._changed = changed
        self._log = log
        self.dns_interval = dns_interval
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._upstreams: dict[str, Upstream] = {}
        self._found: dict[str, frozenset[Found]] = {}

    async def configure(self, upstreams: Iterable[Upstream]) -> None:
        """Follow these from now on. Those followed already go on. Raises ConfigError; then nothing has changed."""
        wanted = {f"{one.discover} {one.url}": one for one in upstreams if one.discover is not None}
        sources = {key: self._source(one) for key, one in wanted.items() if key not in self._tasks}
        await self._leave([key for key in self._tasks if key not in wanted])
        self._upstreams = wanted
        for key, source in sources.items():
            self._tasks[key] = asyncio.create_task(follow(source, partial(self._take, key)), name=f"discover {key}")

    def specs(self) -> list[EndpointSpec]:
        """Return every endpoint that is there now."""
        there = [(self._upstreams[key], found) for key, found in self._found.items()]
        return [self._specify(upstream, one) for upstream, found in there for one in sorted(found)]

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
        upstream = self._upstreams[key]
        before = self._found.get(key, frozenset())
        self._found[key] = found
        self._log.say(
            "info",
            "endpoints_found",
            upstream=upstream.name or upstream.url,
            came=[one.authority for one in sorted(found - before)],
            went=[one.authority for one in sorted(before - found)],
        )
        await self._changed()

    def _source(self, upstream: Upstream) -> Source:
        parts = urlsplit(upstream.url)
        assert parts.hostname is not None and parts.port is not None
        tell = partial(self._trouble, upstream.name or upstream.url)
        if upstream.discover == "dns":
            return DnsSource(parts.hostname, parts.port, self.dns_interval, tell)
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
