"""The composition root: builds a replica out of settings, once; nothing else constructs.

A replica is one process and one event loop. ``run`` is the process; ``Replica`` can also be started inside a loop that
exists, which is what the tests do.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

from adapters.catalogue import Catalogue
from engines.discovery import Found
from engines.registry import ENGINES
from gateway.api.asgi import AsgiFace
from gateway.api.auth import Authenticator
from gateway.api.edge import Edge, EdgeRules
from gateway.api.media import MediaRules
from gateway.api.protocol import SUPPORTED, ConnectionRules, ForebayProtocol, bound
from gateway.api.rest import SmallBodies, WithRequestId, admin_app, public_app
from gateway.api.routes import RELAYED
from gateway.finder import Finder
from gateway.keyring import Keyring
from gateway.limits import declared
from gateway.listener import Listener, ListenError, bind, bind_unix
from gateway.log import Log
from gateway.metrics import Metrics
from gateway.models import aliases, published
from gateway.policy.breaker import BreakerRules
from gateway.policy.concurrency import ConcurrencyRules, Targets
from gateway.policy.hedge import HedgeRules
from gateway.policy.queue import QueueRules
from gateway.policy.resume import ResumeRules
from gateway.policy.retry import BudgetRules
from gateway.serving.admission import Admission, AdmissionRules
from gateway.serving.bookkeeper import Bookkeeper
from gateway.serving.deadlines import Deadlines
from gateway.serving.explain import ledger_row
from gateway.serving.limiter import Limiter
from gateway.serving.minded import Minders
from gateway.serving.mirror import MirrorRules
from gateway.serving.pool import EndpointSpec, HealthRules, MinderAt, Pool, Wake
from gateway.serving.relay import RelayLimits
from gateway.serving.sharing import Sharing
from gateway.serving.upstream import Address, parse_address
from gateway.serving.watch import Watcher
from gateway.settings import ConfigError, Settings, Upstream, diff, fingerprint, load
from gateway.state.database import StateError
from gateway.state.ledger import Ledger
from gateway.store.memory import MemoryStore
from gateway.store.protocol import Standing, Store, Turn

HOUSEKEEPING = 0.1
"""Seconds between two flushes of the log."""

SWITCH_INTERVAL = 0.0001
"""Seconds after which a thread (metrics, large bodies) lets the event loop run: what a stream may be delayed by one."""


COLLECT_AFTER = (10_000, 20, 20)
"""Allocations between two looks of the garbage collector, by generation: requests leave no cycles behind, and a look
at everything that lives stops the event loop."""


def microseconds() -> int:
    """Return the time of the wall clock."""
    return time.time_ns() // 1000


@cache
def _release() -> str:
    return metadata.version("forebay")


class Replica:
    """One gateway. ``path`` is the file that a reload reads again; ``clock`` returns monotonic seconds, ``wall``
    microseconds since 1970, ``draw`` a random number below another."""

    def __init__(
        self,
        settings: Settings,
        path: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], int] = microseconds,
        draw: Callable[[int], int] | None = None,
    ) -> None:
        self.settings = settings
        self._path = path
        self.log = _open_log(settings)
        self.metrics = Metrics(settings.metrics.max_label_values)
        self.deadlines = Deadlines(clock)
        self.pool = Pool(Catalogue(), health_rules(settings))
        self.pool.catalogue.publish(aliases(settings.models), wall() // 1_000_000)
        self.admission = Admission(self.pool, self.metrics, clock, admission_rules(settings), _soon, draw or _draw)
        self.metrics.queue = self.admission.waiting
        self.metrics.capacity = self.pool.capacity
        self.metrics.pools = self.admission.waiting_by_pool
        self.executor = ThreadPoolExecutor(max_workers=2, thread_name_prefix="forebay")
        self.authenticator = Authenticator({})
        self.limits_place = ""
        """Where limits are kept together with other replicas; empty: they are this one's alone."""
        self._limits_lost = False
        store = self._open_store(settings, wall)
        if self.limits_place:
            store.join(Sharing(self.admission, self.metrics, clock, store.hurry))
        self.limiter = Limiter(store, declared(settings.limits), self.metrics, wall)
        self.keyring = Keyring(settings, self.authenticator, self.log, clock, self.limiter.configure)
        self.edge = Edge(
            self.authenticator,
            self.admission,
            self.deadlines,
            self.metrics,
            self.log,
            self.executor,
            edge_rules(settings),
            self.limiter,
        )
        self.books = self._open_books(settings, clock)
        looks = settings.discovery
        self.watcher = Watcher(self.pool, self.metrics, self.log, clock, looks.interval, looks.down_interval)
        self.minders = Minders(self.log)
        self.finder = Finder(endpoint_spec, self._refresh_endpoints, self.log)
        self._named: list[EndpointSpec] = []
        """The endpoints that the configuration names one by one."""
        self.listeners: list[Listener] = []
        self._protocols: list[type[ForebayProtocol]] = []
        self._stamp = self._file_stamp()
        self._reloading = asyncio.Lock()
        self._reloads: set[asyncio.Task[list[str]]] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self._stop = asyncio.Event()
        self._force = asyncio.Event()

    def _open_store(self, settings: Settings, wall: Callable[[], int]) -> Store:
        store = settings.limits.store
        server = store.server()
        if server is None:
            return MemoryStore(wall)
        # Not for everybody to wait for: the client's library takes longer than the rest of a small gateway.
        from gateway.store.redis import Mode, RedisStore

        url, target = server
        self.limits_place = str(target)
        return RedisStore(
            url=url,
            replica_id=f"{socket.gethostname()}-{os.getpid()}",
            clock=wall,
            mode=Mode(store.mode),
            when_lost=Standing(store.when_lost),
            timeout=store.timeout,
            namespace=store.namespace,
            ca=str(store.ca_file) if store.ca_file else None,
            replicas=store.replicas,
            heard=self._store_turned,
        )

    def _store_turned(self, turn: Turn) -> None:
        """Tell what happens to the store of limits, each loss once."""
        if turn is Turn.EMPTIED:
            self.log.say("warning", "limits_emptied", store=self.limits_place, why="the server has forgotten them all")
        elif turn is Turn.FOUND and self._limits_lost:
            self._limits_lost = False
            self.log.say("info", "limits_found", store=self.limits_place)
        elif turn is Turn.LOST and not self._limits_lost:
            self._limits_lost = True
            self.metrics.limits_lost += 1
            store = self.limiter.store
            self.log.say(
                "error",
                "limits_lost",
                store=self.limits_place,
                when_lost=store.standing,
                why=store.trouble or f"no answer within {self.settings.limits.store.timeout * 1000:.0f} ms",
            )

    def _open_books(self, settings: Settings, clock: Callable[[], float]) -> Bookkeeper | None:
        state = settings.state
        if not state.ledger:
            return None
        folder = settings.data_dir / "spool"
        ledger = Ledger(
            settings.state_url, folder, ledger_row, days=state.usage_days, spool_bytes=state.spool, clock=clock
        )
        self.edge.account = ledger.add
        return Bookkeeper(ledger, self.metrics, self.log)

    @property
    def port(self) -> int:
        """The port clients reach it on."""
        return self.listeners[0].port

    @property
    def admin_port(self) -> int:
        """The port operators reach it on."""
        return self.listeners[1].port

    # --- start ------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Listen, read the keys and look at every engine once. Raises ListenError, ConfigError or StateError."""
        settings = self.settings
        # Bound before anything that takes time: an address in use is told at once.
        self._make_listeners()
        await self.keyring.start()
        await self.limiter.store.start()
        if self.limiter.standing is not Standing.STORE:
            self._store_turned(Turn.LOST)
        plan = self.finder.plan(settings.upstreams, settings.discovery.dns_interval)
        self._named = endpoint_specs(settings)
        self.pool.wake_for(wakes(settings), int(time.time()))
        added, _ = self.pool.configure(self._named, int(time.time()))
        await self.minders.watch(added)
        await self.watcher.watch(added)
        await self.finder.follow(plan)
        for listener in self.listeners:
            await listener.open()
        self.deadlines.watch(self.admission)
        self.deadlines.start()
        if self.books is not None:
            self.books.start()
        self._tasks.append(asyncio.create_task(self._keep_house(), name="housekeeping"))
        self._tasks.append(asyncio.create_task(self.keyring.keep_current(), name="keys"))
        self.log.say("info", "started", port=self.port, face=settings.listen.face, configuration=_mark(settings))
        self._warn_of_open_doors()

    def _warn_of_open_doors(self) -> None:
        listen = self.settings.listen
        if self.settings.auth == "none" and not listen.is_loopback:
            told = f"auth is 'none' and {listen.host} can be reached from other machines: anybody may use it"
            self.log.say("warning", "open_to_everybody", why=told)

    def _make_listeners(self) -> None:
        settings, listen = self.settings, self.settings.listen
        version = _release()
        public = public_app(self.edge, version)
        rest = WithRequestId(public, self.edge)
        rules = connection_rules(settings, listen.keep_alive)
        fast = listen.face == "protocol"
        sock = bind_unix(str(listen.unix_socket)) if listen.unix_socket else bind(listen.host, listen.port)
        tls = (str(listen.tls.certificate), str(listen.tls.private_key)) if listen.tls else None
        face = AsgiFace(self.edge, RELAYED, rest)
        self._protocols.append(bound(self.edge, rules, RELAYED, fast=fast))
        self.listeners.append(Listener(face, sock, self._protocols[0], tls, listen.backlog))
        if settings.admin.enabled:
            operators = admin_app(self.edge, self.minders, self.keyring, self.books, public, version)
            admin = WithRequestId(SmallBodies(operators), self.edge)
            sock = bind(settings.admin.host, settings.admin.port)
            self._protocols.append(bound(self.edge, rules, RELAYED, fast=False))
            self.listeners.append(Listener(admin, sock, self._protocols[1], None, listen.backlog))

    async def _keep_house(self) -> None:
        """Write the log, keep the date, and notice a changed file."""
        ticks = 0
        while True:
            await asyncio.sleep(HOUSEKEEPING)
            self.log.flush()
            ticks += 1
            if ticks % 10 == 0:
                for listener in self.listeners:
                    listener.tick()
                if self._file_stamp() != self._stamp:
                    await self.reload()

    def _file_stamp(self) -> tuple[int, int] | None:
        if self._path is None:
            return None
        try:
            facts = self._path.stat()
        except OSError:
            return None
        return facts.st_mtime_ns, facts.st_size

    # --- reload -----------------------------------------------------------------------------------------------------

    async def reload(self) -> list[str]:
        """Read the file again and swap what can change while running. Returns what went wrong; then nothing changed."""
        async with self._reloading:
            return await self._reload()

    def reload_soon(self) -> None:
        """Reload in the background, as SIGHUP asks for."""
        task = asyncio.get_running_loop().create_task(self.reload())
        self._reloads.add(task)
        task.add_done_callback(self._reloads.discard)

    async def _reload(self) -> list[str]:
        try:
            self.log.reopen()
        except OSError as error:
            self.log.say("error", "log_not_reopened", error=str(error), why="lines go on to the file opened before")
        if self._path is None:
            return []
        self._stamp = self._file_stamp()
        try:
            # A file of a thousand keys takes a while to read: the streams go on meanwhile.
            settings, configuration = await asyncio.to_thread(_load_and_mark, self._path)
            named = endpoint_specs(settings)
            plan = self.finder.plan(settings.upstreams, settings.discovery.dns_interval)
            await self.keyring.reconfigure(settings)
        except (ConfigError, StateError, ValueError) as error:
            problems = error.problems if isinstance(error, ConfigError) else [str(error)]
            self.metrics.reloaded(False)
            self.log.say("error", "reload_refused", problems=problems)
            return problems
        changes = diff(self.settings, settings)
        self._apply(settings)
        self._named = named
        await self.finder.follow(plan)
        await self._change_endpoints()
        self.metrics.reloaded(True)
        self.log.say("info", "reloaded", changed=changes.live, configuration=configuration)
        if "auth" in changes.live:
            self._warn_of_open_doors()
        if changes.needs_restart:
            self.log.say("warning", "restart_needed", for_changes_in=changes.needs_restart)
        return []

    def _apply(self, settings: Settings) -> None:
        """Swap the rules that everything goes by; ``NEEDS_RESTART`` names what is left out."""
        rules = connection_rules(settings, self._protocols[0].rules.keep_alive)
        for protocol in self._protocols:
            protocol.rules = rules
        self.settings = settings
        self.edge.rules = edge_rules(settings)
        self.pool.catalogue.publish(aliases(settings.models), int(time.time()))
        self.pool.wake_for(wakes(settings), int(time.time()))
        self.pool.judge_by(health_rules(settings))
        self.admission.configure(admission_rules(settings))
        self.watcher.interval = settings.discovery.interval
        self.watcher.down_interval = settings.discovery.down_interval
        self.log.configure(settings.log.format, settings.log.level)
        self.metrics.bound_labels(settings.metrics.max_label_values)

    async def _refresh_endpoints(self) -> None:
        """Take over what was found to have come or gone."""
        async with self._reloading:
            await self._change_endpoints(configured=False)

    async def _change_endpoints(self, *, configured: bool = True) -> None:
        """Take endpoints in and out; requests under way at one that goes finish there."""
        added, gone = self.pool.configure([*self._named, *self.finder.specs()], int(time.time()))
        await self.minders.watch(added)
        await self.watcher.watch(added)
        await self.watcher.forget(gone)
        await self.minders.forget(gone)
        for endpoint in gone:
            self.admission.router.gone(endpoint)
            endpoint.connections.retire()
        served = {name for endpoint in self.pool.endpoints for name in endpoint.models} | self.pool.wakes.keys()
        # Engines that merely went away will be back: their models are known, only not served at the moment.
        if gone and configured:
            self.pool.catalogue.retain(served)

    # --- end --------------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Begin to stop; the second call ends now."""
        if self._stop.is_set():
            self._force.set()
        self._stop.set()

    async def until_stopped(self) -> None:
        """Wait for ``stop``, then leave as a load balancer likes it: announce, close, drain, end what is left."""
        await self._stop.wait()
        shutdown = self.settings.shutdown
        self.edge.closing = True
        self.log.say("info", "stopping", announce=shutdown.announce, drain=shutdown.drain, active=len(self.edge.active))
        await self._wait_for(lambda: False, shutdown.announce)
        for listener in self.listeners[:1]:
            listener.close()
        await self._wait_for(self._drained, shutdown.drain)
        left = len(self.edge.active)
        self.edge.shut_down()
        await self._wait_for(lambda: not self.listeners[0].state.connections, 1.0)
        await self.close()
        self.log.say("info", "stopped", cut_off=left)
        self.log.close()

    def _drained(self) -> bool:
        return not self.edge.active and not self.listeners[0].busy

    async def _wait_for(self, ready: Callable[[], bool], seconds: float) -> None:
        """Wait until ``ready``, the time is over, or somebody insists."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while not ready() and not self._force.is_set() and loop.time() < end:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._force.wait(), min(0.02, max(0.0, end - loop.time())))

    async def close(self) -> None:
        """Let go of everything."""
        tasks = [*self._tasks, *self._reloads]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.finder.stop()
        await self.watcher.stop()
        await self.minders.stop()
        await self.deadlines.stop()
        for listener in self.listeners:
            listener.close()
            await listener.abandon()
        for request in list(self.edge.active):
            # A client that takes nothing is told last, after the ledger has closed: its request ends here.
            self.edge.client_gone(request)
        self.edge.mirrors.close()
        self.pool.close()
        # After the last request has settled: what it gives back is carried on.
        await self.limiter.store.stop()
        await self.keyring.stop()
        # Last, when no request can end any more.
        if self.books is not None:
            await self.books.stop()
        self.executor.shutdown(wait=False)
        await asyncio.sleep(0)


def _load_and_mark(path: Path) -> tuple[Settings, str]:
    settings = load(path)
    return settings, _mark(settings)


def _mark(settings: Settings) -> str:
    """What the log calls a configuration."""
    return fingerprint(settings)[:12]


def _open_log(settings: Settings) -> Log:
    try:
        return Log(settings.log.format, settings.log.file, settings.log.level)
    except OSError as error:
        told = f"log.file: {settings.log.file} cannot be opened ({error.strerror}); make its directory or name another"
        raise ConfigError([told]) from None


def connection_rules(settings: Settings, keep_alive: float) -> ConnectionRules:
    """Return what connections go by; how long they are kept belongs to the listener, which is bound once."""
    return ConnectionRules(
        headers=settings.timeouts.headers,
        body=settings.timeouts.body,
        keep_alive=keep_alive,
        header_bytes=settings.bounds.header_bytes,
        header_count=settings.bounds.header_count,
        connections=settings.bounds.connections,
    )


def health_rules(settings: Settings) -> HealthRules:
    """Return how endpoints are judged."""
    health = settings.health
    breaker = BreakerRules(health.failures, health.eject, max(health.eject, health.eject_at_most))
    return HealthRules(breaker, health.ramp)


def edge_rules(settings: Settings) -> EdgeRules:
    """Return what the edge goes by."""
    bounds, timeouts, media = settings.bounds, settings.timeouts, settings.media
    return EdgeRules(
        body=bounds.body,
        offload_above=bounds.offload_above,
        parse_budget=bounds.parse_budget,
        trusted_proxies=settings.trusted_proxies,
        media=MediaRules(
            hosts=frozenset(host.lower() for host in media.hosts) if media.remote == "engine" else frozenset(),
            data_url=media.data_url,
            paths=dict(media.paths),
        ),
        relay=RelayLimits(
            connect=timeouts.connect,
            first_byte=timeouts.first_byte,
            idle=timeouts.idle,
            total=timeouts.total,
            write=timeouts.write,
            heartbeat_after=settings.stream.heartbeat_after,
            retries=settings.stream.retries,
            response=bounds.response,
            event=bounds.event,
            resume=ResumeRules(**settings.stream.resume.model_dump()),
        ),
        models=published(settings.models),
        debug_for_all=settings.routing.debug == "everybody",
        mirrors=MirrorRules(bounds.mirrors, bounds.mirror_bytes),
    )


def endpoint_specs(settings: Settings) -> list[EndpointSpec]:
    """Return the endpoints that the configuration names one by one. Raises ConfigError."""
    return [endpoint_spec(upstream) for upstream in settings.upstreams if upstream.discover is None]


def endpoint_spec(upstream: Upstream) -> EndpointSpec:
    """Return an endpoint as it is configured. Raises ConfigError."""
    engine = ENGINES.get(upstream.engine)
    if engine is None:
        raise ConfigError([f"upstream {upstream.url}: unknown engine {upstream.engine!r}"])
    return EndpointSpec(
        name=upstream.name or upstream.url,
        url=upstream.url,
        engine=engine,
        address=_address(upstream),
        api_key=upstream.credential(),
        models=tuple(sorted(upstream.models.items())) if upstream.models is not None else None,
        max_connections=upstream.max_connections,
        minder=_minder_at(upstream),
        pool=upstream.pool or "",
        max_running=upstream.max_running,
        device=upstream.device or "",
        max_model_len=upstream.max_model_len,
    )


def wakes(settings: Settings) -> dict[str, Wake]:
    """Return the models whose engines are started when somebody waits for them."""
    found = {}
    for upstream in settings.upstreams:
        if upstream.wakeable:
            wake = Wake(upstream.pool or "", upstream.wake_timeout, frozenset(ENGINES[upstream.engine].paths))
            found.update(dict.fromkeys(upstream.models or (), wake))
    return found


def _minder_at(upstream: Upstream) -> MinderAt | None:
    """Return where its agent is; of one that is discovered, on the host of the name that stands for them all."""
    address = upstream.minder
    if upstream.minder_port is not None:
        address = f"http://{Found(urlsplit(upstream.url).hostname or '', upstream.minder_port).authority}"
    return MinderAt(address, upstream.minder_token()) if address is not None else None


def admission_rules(settings: Settings) -> AdmissionRules:
    """Return who may wait how long, and how much endpoints are given at once."""
    queue, capacity = settings.queue, settings.capacity
    classes = queue.classes
    return AdmissionRules(
        queue=QueueRules(queue.requests, queue.tokens, queue.bytes, queue.aged),
        capacity=ConcurrencyRules(
            Targets(capacity.ttft_p95, capacity.itl_p95), capacity.start, capacity.least, capacity.most
        ),
        patience=tuple(one.max_wait for one in (classes.priority, classes.default, classes.flex)),
        output_weight=queue.output_weight,
        retries=BudgetRules(share=settings.stream.retry_share),
        hedge=_hedge_rules(settings),
    )


def _hedge_rules(settings: Settings) -> HedgeRules | None:
    hedge = settings.stream.hedge
    if hedge is None:
        return None
    return HedgeRules(hedge.after if isinstance(hedge.after, float) else None, hedge.share)


def _draw(below: int) -> int:
    return int(random.random() * below)  # noqa: S311 - spreads work, keeps no secret


def _soon(callback: Callable[[], None]) -> None:
    asyncio.get_running_loop().call_soon(callback)


def _address(upstream: Upstream) -> Address:
    try:
        return parse_address(upstream.url, str(upstream.ca_file) if upstream.ca_file else None)
    except OSError as error:
        # What ssl finds wrong in a file of certificates is an OSError too.
        told = f"upstream {upstream.url}: ca_file {upstream.ca_file} cannot be read ({error.strerror or error})"
        raise ConfigError([told]) from None


async def serve(settings: Settings, path: Path | None = None) -> int:
    """Run a replica until SIGTERM or SIGINT; SIGHUP reloads. Returns the exit code."""
    replica = Replica(settings, path)
    loop = asyncio.get_running_loop()
    try:
        await replica.start()
    except BaseException:
        await replica.close()
        raise
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, replica.stop)
    loop.add_signal_handler(signal.SIGHUP, replica.reload_soon)
    # What is built by now stays: the collector need not look at it ever again.
    gc.collect()
    gc.freeze()
    await replica.until_stopped()
    return 0


def run(settings: Settings, path: Path | None = None) -> int:
    """Run a replica as this process. Returns the exit code; what keeps it from starting is one line on stderr."""
    import uvicorn
    import uvloop

    if settings.listen.face == "protocol" and uvicorn.__version__ != SUPPORTED:
        print(
            f"forebay: the fast face is written for uvicorn {SUPPORTED}, {uvicorn.__version__} is installed;"
            " install the locked version or set 'listen.face: asgi'",
            file=sys.stderr,
        )
        return 1
    sys.setswitchinterval(SWITCH_INTERVAL)
    gc.set_threshold(*COLLECT_AFTER)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(serve(settings, path))
    except (ListenError, ConfigError, StateError) as error:
        print(f"forebay: {error}", file=sys.stderr)
        return 1


def main(argv: list[str] | None = None) -> int:
    """Run one replica from a configuration file and the environment (``python -m gateway.app``)."""
    parser = argparse.ArgumentParser(prog="python -m gateway.app", description="Run one gateway replica.")
    parser.add_argument("--config", type=Path, help="forebay.yaml; the environment (FOREBAY_…) goes before it")
    given = parser.parse_args(argv)
    try:
        settings = load(given.config)
    except ConfigError as error:
        for problem in error.problems:
            print(f"forebay: {problem}", file=sys.stderr)
        return 1
    return run(settings, given.config)


if __name__ == "__main__":
    sys.exit(main())
