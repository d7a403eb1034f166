"""Engines that come and go: found by a DNS name or by Kubernetes' EndpointSlices.

A source yields everything it knows each time that changes. What it yields counts until it yields again: a name server
or an API server that does not answer takes no engine away.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import httpx

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
WATCH_SECONDS = 290
"""How long one watch lasts before it is opened anew; the API server ends them at random between 30 and 60 minutes."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds between two attempts while the API server does not answer; doubled each time."""


@dataclass(frozen=True, slots=True, order=True)
class Found:
    """An engine's address. ``host`` is an IP address."""

    host: str
    port: int

    @property
    def authority(self) -> str:
        """The address as it stands in a URL."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Source(Protocol):
    """Where engines are found."""

    def changes(self) -> AsyncGenerator[frozenset[Found]]:
        """Yield everything that is there, first at once and then each time it changes, for ever."""
        ...


Resolve = Callable[[str, int], Awaitable[list[str]]]
"""A name and a port → the addresses behind it. OSError when the name server does not answer or knows no such name."""
Tell = Callable[[str], None]
"""Is told in one line what went wrong; called once a trouble, not once an attempt."""


async def resolve(name: str, port: int) -> list[str]:
    """Ask the system's resolver."""
    found = await asyncio.get_running_loop().getaddrinfo(name, port, proto=6)
    return sorted({address[0] for *_, address in found if isinstance(address[0], str)})


@dataclass(frozen=True, slots=True)
class DnsSource:
    """Every address a name stands for, such as that of a headless Service; asked every ``interval`` seconds."""

    name: str
    port: int
    interval: float
    tell: Tell
    ask: Resolve = resolve
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep

    async def changes(self) -> AsyncGenerator[frozenset[Found]]:
        """Yield the addresses each time they change."""
        known: frozenset[Found] | None = None
        troubled = False
        while True:
            try:
                found = frozenset(Found(host, self.port) for host in await self.ask(self.name, self.port))
            except OSError as error:
                if not troubled:
                    self.tell(f"{self.name} cannot be resolved ({error}); what was found before stays")
                troubled = True
            else:
                troubled = False
                if found != known:
                    known = found
                    yield found
            await self.sleep(self.interval)


@dataclass(frozen=True, slots=True)
class Cluster:
    """How the API server is reached. ``token_file`` is read anew for each request: Kubernetes rotates it."""

    url: str
    token_file: Path | None
    ca_file: Path | None
    namespace: str

    def client(self) -> httpx.AsyncClient:
        """Return a client without a limit on how long a watch may be silent."""
        context = ssl.create_default_context(cafile=str(self.ca_file)) if self.ca_file else True
        timeout = httpx.Timeout(10.0, read=WATCH_SECONDS + 30.0)
        return httpx.AsyncClient(base_url=self.url, verify=context, timeout=timeout, trust_env=False)

    def headers(self) -> dict[str, str]:
        """Return who asks. OSError when the token cannot be read."""
        return {"authorization": f"Bearer {self.token_file.read_text().strip()}"} if self.token_file else {}


def in_cluster(environment: Mapping[str, str] = os.environ, account: Path = SERVICE_ACCOUNT) -> Cluster | None:
    """Return the cluster this process runs in, None when it runs in none."""
    host, port = environment.get("KUBERNETES_SERVICE_HOST"), environment.get("KUBERNETES_SERVICE_PORT")
    if not host or not port or not (account / "token").exists():
        return None
    authority = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    namespace = (account / "namespace").read_text().strip()
    return Cluster(f"https://{authority}", account / "token", account / "ca.crt", namespace)


class SliceError(Exception):
    """What the API server said cannot be used; the list is asked for again."""


@dataclass(slots=True)
class Slices:
    """The EndpointSlices of one Service, as a list and the events after it tell them."""

    port: str
    """The port's name, or its number."""
    version: str = ""
    """Where the next watch begins."""
    held: dict[str, frozenset[Found]] = field(default_factory=dict)

    def take_list(self, answer: Mapping[str, Any]) -> None:
        """Begin anew with a whole list."""
        self.held = {}
        for item in answer.get("items") or ():
            self.held[item["metadata"]["name"]] = self._found(item)
        self.version = answer["metadata"]["resourceVersion"]

    def take_event(self, event: Mapping[str, Any]) -> None:
        """Take one line of a watch. SliceError when the list must be asked for again (its version is too old)."""
        kind, item = event["type"], event["object"]
        if kind == "ERROR":
            raise SliceError(str(item.get("message", item)))
        self.version = item["metadata"]["resourceVersion"]
        if kind == "DELETED":
            self.held.pop(item["metadata"]["name"], None)
        elif kind in ("ADDED", "MODIFIED"):
            self.held[item["metadata"]["name"]] = self._found(item)

    @property
    def all(self) -> frozenset[Found]:
        """Every engine that is ready: one may stand in two slices while it moves from one to the other."""
        return frozenset().union(*self.held.values())

    def _found(self, item: Mapping[str, Any]) -> frozenset[Found]:
        port = self._port(item)
        if port is None:
            return frozenset()
        addresses = (
            address
            for endpoint in item.get("endpoints") or ()
            # Unknown counts as ready; one that ends is not ready any more, and finishes what it has.
            if (endpoint.get("conditions") or {}).get("ready") is not False
            for address in endpoint["addresses"]
        )
        return frozenset(Found(address, port) for address in addresses)

    def _port(self, item: Mapping[str, Any]) -> int | None:
        for port in item.get("ports") or ():
            if port.get("port") is not None and self.port in (port.get("name"), str(port["port"])):
                return int(port["port"])
        return None


@dataclass(frozen=True, slots=True)
class KubernetesSource:
    """The ready endpoints of a Service, watched through the API server."""

    cluster: Cluster
    service: str
    port: str
    tell: Tell
    namespace: str | None = None
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep

    async def changes(self) -> AsyncGenerator[frozenset[Found]]:
        """Yield the endpoints each time they change; a watch that breaks goes on where it was."""
        slices = Slices(self.port)
        known: frozenset[Found] | None = None
        pause = FIRST_PAUSE
        troubled = False
        async with self.cluster.client() as client:
            while True:
                try:
                    async for _ in self._follow(client, slices):
                        pause, troubled = FIRST_PAUSE, False
                        if slices.all != known:
                            known = slices.all
                            yield known
                    # Over, as every watch is one day; a pause in case it is over at once each time.
                    await self.sleep(FIRST_PAUSE)
                except SliceError:
                    # Too old: the next round asks for the whole list.
                    slices.version = ""
                    await self.sleep(FIRST_PAUSE)
                except (httpx.HTTPError, OSError, ValueError, KeyError, TypeError) as error:
                    if not troubled:
                        self.tell(f"Service {self.service}: {_reason(error)}; what was found before stays")
                    troubled = True
                    await self.sleep(pause)
                    pause = min(pause * 2, LONGEST_PAUSE)

    async def _follow(self, client: httpx.AsyncClient, slices: Slices) -> AsyncIterator[None]:
        """List where that is needed, then watch to the watch's end; yields after each thing learnt."""
        path = f"/apis/discovery.k8s.io/v1/namespaces/{self.namespace or self.cluster.namespace}/endpointslices"
        chosen = {"labelSelector": f"kubernetes.io/service-name={self.service}"}
        if not slices.version:
            answer = await client.get(path, params=chosen, headers=self.cluster.headers())
            answer.raise_for_status()
            slices.take_list(answer.json())
            yield
        watch = {
            **chosen,
            "watch": "1",
            "allowWatchBookmarks": "true",
            "resourceVersion": slices.version,
            "timeoutSeconds": str(WATCH_SECONDS),
        }
        async with client.stream("GET", path, params=watch, headers=self.cluster.headers()) as events:
            if events.status_code == httpx.codes.GONE:
                raise SliceError("the version is too old")
            events.raise_for_status()
            async for line in events.aiter_lines():
                if line:
                    slices.take_event(json.loads(line))
                    yield


def _reason(error: Exception) -> str:
    if isinstance(error, httpx.HTTPStatusError):
        status = error.response.status_code
        hint = " (its service account may not list and watch endpointslices)" if status == httpx.codes.FORBIDDEN else ""
        return f"the API server answered {status}{hint}"
    return f"the API server cannot be reached ({str(error) or type(error).__name__})"


async def follow(source: Source, take: Callable[[frozenset[Found]], Awaitable[None]]) -> None:
    """Hand on what a source finds, for ever."""
    async with contextlib.aclosing(source.changes()) as changes:
        async for found in changes:
            await take(found)
