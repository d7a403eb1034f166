"""Looks at every endpoint from time to time: is it there, and what does it serve.

A failed connection of a request makes the next look come sooner; a look that succeeds lets an endpoint back in.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import Callable, Iterable, Mapping
from functools import cache

import httpx
from tenacity import AsyncRetrying, RetryError, retry_if_exception_type, stop_after_attempt, wait_fixed

from adapters.catalogue import Model
from engines.protocol import Engine, EngineLoad, Target
from gateway.log import Log
from gateway.metrics import Metrics
from gateway.serving.pool import Endpoint, EndpointSpec, Pool

LOOK_TIMEOUT = 5.0
"""Seconds an endpoint has to answer a look."""


class Watcher:
    """Keeps the pool's picture of its endpoints true. ``interval`` and ``down_interval`` are in seconds."""

    def __init__(
        self,
        pool: Pool,
        metrics: Metrics,
        log: Log,
        clock: Callable[[], float],
        interval: float,
        down_interval: float,
    ) -> None:
        self._pool = pool
        self._metrics = metrics
        self._log = log
        self._clock = clock
        self.interval = interval
        self.down_interval = down_interval
        self._tasks: dict[Endpoint, asyncio.Task[None]] = {}
        self._clients: dict[Endpoint, httpx.AsyncClient] = {}

    async def watch(self, endpoints: Iterable[Endpoint]) -> None:
        """Look at new endpoints once, all at the same time, and keep looking from then on."""
        endpoints = list(endpoints)
        for endpoint in endpoints:
            self._clients[endpoint] = client_for(endpoint.spec)
        await asyncio.gather(*(self.look(endpoint) for endpoint in endpoints))
        for endpoint in endpoints:
            self._tasks[endpoint] = asyncio.create_task(self._keep_looking(endpoint), name=f"watch {endpoint.name}")

    async def forget(self, endpoints: Iterable[Endpoint]) -> None:
        """Stop looking at endpoints that are gone."""
        for endpoint in list(endpoints):
            task = self._tasks.pop(endpoint, None)
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            client = self._clients.pop(endpoint, None)
            if client is not None:
                await client.aclose()
            self._metrics.endpoint_gone(endpoint.name)

    async def stop(self) -> None:
        """Stop looking at all."""
        await self.forget(list(self._clients))

    async def _keep_looking(self, endpoint: Endpoint) -> None:
        disturbed = asyncio.Event()
        endpoint.on_trouble = disturbed.set
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(disturbed.wait(), self.interval if endpoint.healthy else self.down_interval)
            if disturbed.is_set():
                disturbed.clear()
                await asyncio.sleep(min(self.down_interval, self.interval))
            await self.look(endpoint)

    async def look(self, endpoint: Endpoint) -> None:
        """Ask an endpoint whether it can work and, unless the configuration says so, what it serves."""
        was_healthy, was_seen = endpoint.healthy, endpoint.seen
        try:
            await self._ask(endpoint)
        except (httpx.HTTPError, RetryError, ValueError, OSError) as error:
            endpoint.down(_reason(error))
        else:
            endpoint.up(self._clock())
        self._metrics.endpoint_state(endpoint.name, endpoint.healthy, endpoint.in_flight)
        if endpoint.healthy and not was_healthy:
            if was_seen and self._pool.on_return is not None:
                self._pool.on_return(endpoint)
            self._pool.came_up(endpoint)
        if endpoint.healthy and not (was_healthy and was_seen):
            self._log.say("info", "endpoint_up", endpoint=endpoint.name, models=sorted(endpoint.models))
        elif was_healthy and not endpoint.healthy:
            self._log.say("warning", "endpoint_down", endpoint=endpoint.name, reason=endpoint.trouble)

    async def _ask(self, endpoint: Endpoint) -> None:
        engine = endpoint.engine
        await self._get(endpoint, engine.ready_path)
        if endpoint.seen:
            # Not at the first look: nothing should keep an engine from its first request.
            await self._read_load(endpoint)
        if not endpoint.asked:
            return
        served = engine.read_models((await self._get(endpoint, engine.models_path)).content)
        targets = {model.name: engine.target(model.name, model.base) for model in served}
        lengths = {model.name: model.max_model_len for model in served if model.max_model_len is not None}
        if endpoint.spec.models is None:
            self._pool.catalogue.learn(Model(model.name, model.created, model.max_model_len) for model in served)
        else:
            targets = _named(endpoint, targets)
            lengths = {public: lengths[own] for public, own in endpoint.spec.models if own in lengths}
        if targets != endpoint.models or lengths != endpoint.lengths:
            endpoint.name_models(targets.items())
            endpoint.lengths = lengths
            self._pool.index()
            if missing := [public for public, _ in endpoint.spec.models or () if public not in targets]:
                self._log.say("warning", "models_missing", endpoint=endpoint.name, models=missing)

    async def _read_load(self, endpoint: Endpoint) -> None:
        """Read what the engine says of its load. That it does not tell is no failure: nothing waits for it."""
        with contextlib.suppress(httpx.HTTPError, OSError):
            load = await read_load(self._clients[endpoint], endpoint.engine)
            if load is not None:
                self._metrics.engine_load(endpoint.name, load, time.time())
                endpoint.heard(load, self._clock())

    async def _get(self, endpoint: Endpoint, path: str) -> httpx.Response:
        # One kept connection may have been closed by the engine just now: that alone is no failure.
        async for attempt in AsyncRetrying(
            stop=stop_after_attempt(2), wait=wait_fixed(0), retry=retry_if_exception_type(httpx.RemoteProtocolError)
        ):
            with attempt:
                response = await self._clients[endpoint].get(path)
        response.raise_for_status()
        return response


async def read_load(client: httpx.AsyncClient, engine: Engine) -> EngineLoad | None:
    """Return what an engine says of its own load, None when it does not tell. Raises httpx.HTTPError."""
    answer = await client.get(engine.metrics_path)
    return engine.read_load(answer.content) if answer.status_code == 200 else None


def client_for(spec: EndpointSpec) -> httpx.AsyncClient:
    """Return a client that speaks to an engine itself, past the relay."""
    address = spec.address
    headers = {} if spec.api_key is None else {"authorization": f"Bearer {spec.api_key}"}
    if address.unix is not None:
        transport = httpx.AsyncHTTPTransport(verify=_no_tls(), uds=address.unix)
        base = "http://localhost"
    else:
        transport = httpx.AsyncHTTPTransport(verify=address.tls or _no_tls())
        base = spec.url
    return httpx.AsyncClient(base_url=base, transport=transport, headers=headers, timeout=LOOK_TIMEOUT, trust_env=False)


@cache
def _no_tls() -> ssl.SSLContext:
    """What httpx wants for every client, also for one that speaks plain HTTP: to make one takes ten times as long as
    the client itself. It trusts nobody."""
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def _named(endpoint: Endpoint, listed: Mapping[str, Target]) -> dict[str, Target]:
    """Return how the models that the configuration names are named, as far as the engine lists them.

    An adapter may be written with its base, or alone: the list says which base it belongs to.
    """
    known = list(listed.values())
    wanted = {public: listed.get(own) or endpoint.engine.target(own) for public, own in endpoint.spec.models or ()}
    return {public: target for public, target in wanted.items() if target in known}


def _reason(error: Exception) -> str:
    if isinstance(error, httpx.HTTPStatusError):
        return f"{error.request.url.path} answered {error.response.status_code}"
    if isinstance(error, httpx.TimeoutException):
        return f"no answer within {LOOK_TIMEOUT:g} s"
    return str(error) or type(error).__name__
