"""`forebay serve`: what runs on one machine, and in which order it starts and stops.

Engines configured: this process is the parent. It prepares each engine's environment and model, has each minded by an
agent of its own and runs one replica of the gateway as a child; it stops the replica first, which drains, then the
engines, except those that are to be kept: the next start finds them and takes them over.
Only upstreams configured: this process becomes the replica itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import dataclasses
import errno
import hashlib
import json
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import httpx

from engines.devices import Device
from engines.environments import EngineEnvironment, ensure_environment, recipe_for
from engines.launch import Launchable, LaunchSpec, process_environment
from engines.minder import FAILED, Address
from engines.minding import Minder
from engines.models import ModelFiles, prepare_model
from engines.protocol import Capability
from engines.registry import ENGINES
from engines.simulated import own_environment, pretended_model
from engines.steps import Step
from gateway.greeting import Display, Greeting, base_url
from gateway.operate import admin_url, pass_file
from gateway.settings import LocalEngine, Settings, Upstream, load, merge_trees, to_environment, warnings_about
from gateway.state.database import StateError, upgrade
from gateway.state.keys import KeyStore

ENGINE_READY_WITHIN = 1800.0
"""Seconds an engine may take to load; the first start of a large model reads it from a slow disk."""
REPLICA_READY_WITHIN = 60.0
"""Seconds a replica may take until it is ready: its engines are already."""
STOP_MARGIN = 10.0
"""Seconds a replica gets to end beyond what it was told to announce and drain."""
ENGINE_GRACE = 10.0
"""Seconds an engine gets to end; no request reaches it any more."""
UPSTREAM_PATIENCE = 5.0
"""Seconds after which a person is told that no upstream answers."""
FIRST_ENGINE_PORT = 8101
"""Where the search for an engine's port begins, for engines that listen on no Unix socket."""
POLL = 0.1
"""Seconds between two looks at whether the gateway is ready."""
MAX_RUN_DIRECTORY = 86
"""Bytes: a socket's path has at most 107 on Linux and 103 on macOS, and its name is added to the directory's."""
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


class StartError(Exception):
    """`serve` cannot start, or cannot go on; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to serve. `overrides` is what the command line says beyond the file `config` and the environment."""

    settings: Settings
    config: Path | None
    overrides: Mapping[str, object]


def serve(plan: Plan) -> int:
    """Serve until SIGINT or SIGTERM; return the exit code. StartError when something keeps it from starting."""
    check_ports(plan.settings)
    with Display() as display:
        for warning in warnings_about(plan.settings):
            display.say(warning)
        if not plan.settings.engines:
            return _serve_upstreams(plan, display)
        try:
            with interruptible(), run_directory(plan.settings) as directory:
                return _prepare_and_run(plan, directory, display)
        except (StopRequested, asyncio.CancelledError):
            display.say("stopped")
            return 0


def make_plan(config: Path | None, said: Mapping[str, object], model: str | None, device: str | None) -> Plan:
    """Complete what was typed: without any engine or upstream, the packaged model is served on the CPU.

    `said` is a tree like the file's; `model` and `device` change the one engine of this machine. StartError when there
    are several of those, or none because upstreams were named.
    """
    settings = load(config, said)
    engines: list[dict[str, object]] = [
        engine.model_dump(mode="json", exclude_unset=True) for engine in settings.engines
    ]
    if not engines and not settings.upstreams:
        engines = [{"name": "local"}]
    chosen = {name: value for name, value in (("model", model), ("device", device)) if value is not None}
    if chosen and len(engines) != 1:
        there = f"{len(engines)} of them are configured" if engines else "only upstreams are configured"
        raise StartError(f"--model and --device change the one engine of this machine, but {there}")
    if chosen:
        engines[0] |= chosen
    overrides = merge_trees(said, {**_comforts(settings), "engines": engines})
    return Plan(load(config, overrides), config, overrides)


def _comforts(settings: Settings) -> dict[str, object]:
    """What suits a laptop, where the configuration leaves it open: no announcement to a load balancer, a log that
    people can read on a terminal, and a number in place of port 0, so that the address can be told."""
    comforts: dict[str, object] = {}
    if settings.listen.is_loopback and "announce" not in settings.shutdown.model_fields_set:
        comforts["shutdown"] = {"announce": 0}
    if sys.stderr.isatty() and settings.log.file is None and "format" not in settings.log.model_fields_set:
        comforts["log"] = {"format": "console"}
    for section, (host, port) in {
        "listen": (settings.listen.host, settings.listen.port),
        "admin": (settings.admin.host, settings.admin.port),
    }.items():
        if port == 0:
            comforts[section] = {"port": _bind(host, 0)}
    return comforts


# --- before anything starts --------------------------------------------------------------------------------------


def check_ports(settings: Settings) -> None:
    """See that both listeners can be bound, before anything is installed. StartError when one cannot."""
    listen, admin = settings.listen, settings.admin
    if listen.unix_socket is None:
        _check_port(listen.host, listen.port, f"forebay serve --port {listen.port + 10}")
    if admin.enabled:
        _check_port(admin.host, admin.port, f"FOREBAY_ADMIN__PORT={admin.port + 10} forebay serve")


def _check_port(host: str, port: int, example: str) -> None:
    try:
        _bind(host, port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            problem = f"port {port} of {host} is in use; stop the program that uses it or choose another port"
        elif error.errno == errno.EACCES:
            problem = f"port {port} needs more rights than this user has; choose one above 1023"
        else:
            problem = f"{host} cannot be listened on ({error.strerror}); name an address of this machine"
        raise StartError(f"{problem}, for example: {example}") from None


def _bind(host: str, port: int) -> int:
    """Bind the port and let it go; return its number, which the kernel chooses for 0. OSError when it is not free."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, address = found[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(address)
        return int(probe.getsockname()[1])


class StopRequested(Exception):  # noqa: N818 - a request, not an error
    """SIGINT or SIGTERM came while something blocking was being done."""


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Inside, SIGINT and SIGTERM raise StopRequested, and a second one ends the process at once."""
    seen: list[int] = []

    def on_signal(number: int, _: FrameType | None) -> None:
        seen.append(number)
        if len(seen) > 1:
            os._exit(128 + number)
        raise StopRequested

    before = {number: signal.signal(number, on_signal) for number in _STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- engines -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PreparedEngine:
    """An engine that can be started: its environment and the files of its model are there."""

    settings: LocalEngine
    environment: EngineEnvironment
    model: ModelFiles

    def spec(self, settings: Settings, address: Address, api_key: str | None) -> LaunchSpec:
        """How to start it."""
        asked = self.settings.asked()
        return dataclasses.replace(
            asked,
            model=self.model.path,
            model_is_local=self.model.is_local,
            served_name=self.settings.served_name or self.model.served_name,
            address=address,
            api_key=api_key,
            allowed_media_domains=settings.media.hosts if settings.media.remote == "engine" else (),
        )

    def private_spec(self, settings: Settings, directory: Path) -> LaunchSpec:
        """How to start it for the gateway alone: on a Unix socket in `directory`, or on a port with a key.

        On a port where one is named, and where that is all the engine can listen on.
        """
        if self.settings.port or Capability.UNIX_SOCKET not in ENGINES[self.settings.kind].capabilities:
            port, key = self._port_and_key(settings, self._file(settings, directory, "place"))
            return self.spec(settings, Address(port=port), key)
        return self.spec(settings, Address(unix=self._file(settings, directory, "sock")), None)

    def control(self, settings: Settings, directory: Path) -> Path:
        """Where its minder is spoken to."""
        return self._file(settings, directory, "control")

    def _file(self, settings: Settings, directory: Path, kind: str) -> Path:
        # Short, and another one for each gateway that shares the data directory: a port is one gateway's alone. By name
        # and not by place: an engine that is kept is found again wherever it stands in the file.
        name = hashlib.sha256(self.settings.name.encode()).hexdigest()[:6]
        return directory / f"{settings.listen.port}-{name}.{kind}"

    def _port_and_key(self, settings: Settings, place: Path) -> tuple[int, str]:
        """A port and a key of its own; those of an engine that is kept are kept too, in a file of its user's."""
        if self.settings.keep:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                known = json.loads(place.read_text())
                if self.settings.port in (None, known["port"]):
                    return int(known["port"]), str(known["key"])
        port, key = self.settings.port or _engine_port(self.settings, settings), secrets.token_hex(32)
        if self.settings.keep:
            write_private(place, {"port": port, "key": key})
        return port, key


def _engine_port(engine: LocalEngine, settings: Settings) -> int:
    """A free loopback port. The engine listens a minute later, so none that the kernel gives to whoever connects."""
    index, step = settings.engines.index(engine), len(settings.engines)
    taken = {settings.listen.port, settings.admin.port, *(other.port for other in settings.engines)}
    # Each engine of the configuration has ports of its own to choose from.
    for port in range(FIRST_ENGINE_PORT + index, FIRST_ENGINE_PORT + 1000, step):
        with contextlib.suppress(OSError):
            if port not in taken:
                return _bind("127.0.0.1", port)
    raise StartError(f"no port from {FIRST_ENGINE_PORT} up is free for {engine.name}; name one in its `port`")


def prepare(engine: LocalEngine, settings: Settings, display: Display) -> PreparedEngine:
    """Install the engine's environment and prepare its model, where that was not done yet. Blocks."""
    if engine.kind == "simulated":
        return PreparedEngine(engine, own_environment(), pretended_model(engine.profile))
    recipe = recipe_for(engine.kind, Device(engine.device))
    environment = ensure_environment(recipe, settings.data_dir, display.report)
    model = prepare_model(engine.model, settings.data_dir, environment, display.report)
    return PreparedEngine(engine, environment, model)


def launchable(kind: str) -> Launchable:
    """How a kind of engine is started."""
    return ENGINES[kind]


def make_private(directory: Path) -> None:
    """See that there is a directory that its user alone can enter, also where it was made before. OSError."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    facts = directory.stat()
    if facts.st_uid != os.geteuid():
        raise PermissionError(errno.EPERM, "it belongs to another user")
    if facts.st_mode & 0o077:
        directory.chmod(0o700)


def write_private(file: Path, content: Mapping[str, object]) -> None:
    """Write JSON that its user alone can read, whole or not at all."""
    new = file.with_suffix(".new")
    # A file that lies there, or a link, is not written through: who made it may read it, or means another one.
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as opened:
        json.dump(content, opened)
    new.replace(file)


def minder_for(
    engine: PreparedEngine, spec: LaunchSpec, settings: Settings, display: Display, control: Path | None = None
) -> Minder:
    """A minder that will run the engine and report how its loading goes."""
    kind = launchable(spec.kind)
    phase = f"start {spec.name} ({spec.kind} on {spec.device}, {spec.served_name})"

    def report(text: str, done: int | None = None, total: int | None = None) -> None:
        display.report(Step(phase, text, done, total))

    report("starting its program")
    # What decides beside the command line whether an engine runs as wanted; a digest, since there may be a key in it.
    mark = hashlib.sha256(json.dumps(sorted(kind.environment(spec).items())).encode()).hexdigest()[:16]
    return Minder(
        spec.name,
        kind.command_line(spec, engine.environment.python),
        environment=process_environment(kind, spec),
        address=spec.address,
        log_path=settings.data_dir / "logs" / f"{spec.name}.log",
        ready_path=ENGINES[spec.kind].ready_path,
        control=control,
        phases=kind.loading_phases,
        keep=engine.settings.keep,
        mark=mark,
        on_phase=report,
        on_trouble=display.say,
    )


def run_engine(engine: LocalEngine, settings: Settings) -> int:
    """Run one engine alone on its port, without a key, until SIGINT or SIGTERM; return the exit code."""
    assert engine.port, "an engine that is run alone is reached by its port"
    address = Address(port=engine.port)
    with Display() as display:
        try:
            with interruptible(), run_directory(settings) as directory:
                prepared = prepare(engine, settings, display)
                control = directory / f"alone-{engine.port}.control"
                minder = minder_for(prepared, prepared.spec(settings, address, None), settings, display, control)
                return asyncio.run(_run_alone(minder, display))
        except (StopRequested, asyncio.CancelledError):
            display.say("stopped")
            return 0


async def _run_alone(minder: Minder, display: Display) -> int:
    with _signals_stop_this_task(display):
        try:
            await minder.start()
            seconds = await minder.wait_ready(ENGINE_READY_WITHIN)
            display.done()
            display.say(f"{minder.name} is ready after {seconds:.0f} s: forebay serve --upstream {minder.address}")
            display.say(await minder.wait())
            return 1
        finally:
            await minder.stop(ENGINE_GRACE)


# --- engines and replica together --------------------------------------------------------------------------------


@contextlib.contextmanager
def run_directory(settings: Settings) -> Iterator[Path]:
    """A directory for the engines' sockets that no other user can enter: in the data directory, where no cleaner of
    temporary files comes, unless that makes a path too long for a socket."""
    directory = settings.data_dir.absolute() / "run"
    if len(os.fsencode(directory)) > MAX_RUN_DIRECTORY:
        if any(engine.keep for engine in settings.engines):
            raise StartError(
                f"an engine that is kept is found again in {directory}, but a Unix socket's path may not be so long;"
                " choose a shorter data directory with FOREBAY_HOME or data_dir in the configuration"
            )
        with tempfile.TemporaryDirectory(prefix="forebay-") as short:
            yield Path(short)
    else:
        try:
            make_private(directory)
        except OSError as error:
            raise StartError(
                f"{directory} cannot be made ({error.strerror}); make the data directory writable or choose another one"
                " with FOREBAY_HOME or data_dir in the configuration"
            ) from None
        yield directory


def _prepare_and_run(plan: Plan, directory: Path, display: Display) -> int:
    """Prepare everything, which may take minutes, then run it."""
    started = time.monotonic()
    engines = [prepare(engine, plan.settings, display) for engine in plan.settings.engines]
    display.done()
    specs = [engine.private_spec(plan.settings, directory) for engine in engines]
    controls = [engine.control(plan.settings, directory) for engine in engines]
    minders = [
        minder_for(engine, spec, plan.settings, display, control)
        for engine, spec, control in zip(engines, specs, controls, strict=True)
    ]
    key = make_start_key(plan.settings)
    replica = Replica(replica_command(plan), replica_environment(plan, specs, controls), replica_grace(plan))

    def greet(models: tuple[str, ...]) -> None:
        display.done()
        kept = [minder.name for minder in minders if minder.keep]
        what = "everything" if not kept else f"the gateway; {', '.join(kept)}: forebay engines stop NAME"
        took = f"Started in {time.monotonic() - started:.0f} s. Ctrl-C stops {what}."
        print(Greeting(plan.settings, key, models, (took,)).text(), flush=True)

    with admin_pass(plan.settings, display.say):
        return asyncio.run(run_engines(replica, minders, plan.settings, display, greet))


async def run_engines(
    replica: Replica,
    minders: Sequence[Minder],
    settings: Settings,
    display: Display,
    greet: Callable[[tuple[str, ...]], None],
) -> int:
    """Start engines, then the replica; stop in the opposite order when a signal comes or nothing is left to serve."""
    with _signals_stop_this_task(display, replica):
        async with contextlib.AsyncExitStack() as running:
            for minder in minders:
                running.push_async_callback(_leave_or_stop, minder)
                await minder.start()
            await asyncio.gather(*(minder.wait_ready(ENGINE_READY_WITHIN) for minder in minders))
            running.push_async_callback(replica.stop)
            await replica.start()
            display.report(Step("start the gateway", "waiting until it is ready"))
            models = await _replica_ready(replica, settings)
            replica.ready = True
            greet(models)
            return await _until_nothing_serves(replica, minders, settings, display)


async def _leave_or_stop(minder: Minder) -> None:
    if minder.keep and minder.state is not None and minder.state.phase != FAILED:
        await minder.leave()
    else:
        await minder.stop(ENGINE_GRACE)


async def _replica_ready(replica: Replica, settings: Settings) -> tuple[str, ...]:
    """Wait until the replica serves; return the models it serves."""
    ready = asyncio.create_task(look_until_ready(settings))
    ended = asyncio.create_task(replica.wait())
    try:
        await asyncio.wait({ready, ended}, timeout=REPLICA_READY_WITHIN, return_when=asyncio.FIRST_COMPLETED)
        if ready.done():
            return ready.result()
        if ended.done():
            raise StartError(f"the gateway ended with exit code {ended.result()}; its lines above say why")
        raise StartError(
            f"the gateway is not ready after {REPLICA_READY_WITHIN:.0f} s; {base_url(settings)}/health/ready says why"
        )
    finally:
        for task in (ready, ended):
            task.cancel()


async def _until_nothing_serves(
    replica: Replica, minders: Sequence[Minder], settings: Settings, display: Display
) -> int:
    """Watch all processes; return when the replica has ended, or the last engine is given up and no upstream is there.

    An engine that ends by itself is started again by its minder; only when that gives up is it gone.
    """
    gateway = asyncio.create_task(replica.wait())
    engines = {asyncio.create_task(minder.wait()) for minder in minders}
    try:
        while engines or settings.upstreams:
            await asyncio.wait({gateway, *engines}, return_when=asyncio.FIRST_COMPLETED)
            if gateway.done():
                display.say(f"the gateway ended by itself with exit code {gateway.result()}: stopping")
                return 1
            for engine in [engine for engine in engines if engine.done()]:
                display.say(engine.result())
                engines.remove(engine)
        display.say("no engine is left: stopping")
        return 1
    finally:
        for task in (gateway, *engines):
            task.cancel()


@contextlib.contextmanager
def _signals_stop_this_task(display: Display, replica: Replica | None = None) -> Iterator[None]:
    """Inside, the first SIGINT or SIGTERM cancels this task; the second ends the replica and this process now.

    The engines' agents then notice that their owner is gone and end the engines. SIGHUP is the replica's: reload.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None

    def on_signal(number: int) -> None:
        if task.cancelling():
            if replica is not None:
                replica.send(signal.SIGKILL)
            os._exit(128 + number)
        display.say("stopping in order; Ctrl-C again ends it now")
        task.cancel()

    for number in _STOP_SIGNALS:
        loop.add_signal_handler(number, on_signal, number)
    if replica is not None:
        loop.add_signal_handler(signal.SIGHUP, replica.reload)
    try:
        yield
    finally:
        for number in (*_STOP_SIGNALS, signal.SIGHUP):
            loop.remove_signal_handler(number)


async def look_until_ready(settings: Settings) -> tuple[str, ...]:
    """Ask the gateway until it is ready; return the models it serves."""
    socket_path = settings.listen.unix_socket
    # It is our own process that answers; its certificate names the public host.
    transport = httpx.AsyncHTTPTransport(verify=False, uds=str(socket_path) if socket_path else None)
    async with httpx.AsyncClient(transport=transport) as client:
        while True:
            with contextlib.suppress(httpx.TransportError):
                told = (await client.get(f"{base_url(settings)}/health/ready")).json()
                # A store of limits that is away is no reason to end engines that took minutes to load.
                if told["status"] in ("ok", "limits cannot be checked"):
                    endpoints = told["endpoints"]
                    return tuple(sorted({model for endpoint in endpoints for model in endpoint["models"]}))
            await asyncio.sleep(POLL)


# --- the replica as a child --------------------------------------------------------------------------------------


def replica_command(plan: Plan) -> list[str]:
    """The command line of one replica."""
    return [sys.executable, "-m", "gateway.app", *(["--config", str(plan.config)] if plan.config else [])]


def replica_environment(plan: Plan, specs: Sequence[LaunchSpec], controls: Sequence[Path]) -> dict[str, str]:
    """What the replica is told beyond the file: the command line's words, and the engines of this machine, each with
    where its minder is spoken to."""
    pools = {engine.name: engine.pool for engine in plan.settings.engines if engine.pool is not None}
    upstreams = [
        *(_upstream_tree(upstream) for upstream in plan.settings.upstreams),
        *(
            {"url": str(spec.address), "engine": spec.kind, "name": spec.name, "minder": f"unix:{control}"}
            | ({"api_key": spec.api_key} if spec.api_key else {})
            | ({"pool": pools[spec.name]} if spec.name in pools else {})
            | {"device": spec.device.value}
            for spec, control in zip(specs, controls, strict=True)
        ),
    ]
    said = {name: value for name, value in plan.overrides.items() if name != "engines"}
    return to_environment({**said, "upstreams": upstreams})


def _upstream_tree(upstream: Upstream) -> dict[str, object]:
    """The upstream as it stands in a file; the environment of our own child may hold its key."""
    tree = upstream.model_dump(mode="json", exclude_unset=True, exclude={"api_key"})
    return tree | ({"api_key": upstream.api_key.get_secret_value()} if upstream.api_key else {})


def replica_grace(plan: Plan) -> float:
    """Seconds the replica may take to stop."""
    return plan.settings.shutdown.announce + plan.settings.shutdown.drain + STOP_MARGIN


def _end_with_parent() -> None:
    """Runs in the child before its program: SIGTERM when the parent ends, whatever ends it (Linux)."""
    assert _LIBC is not None
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class Replica:
    """The gateway as a child process, in a session of its own: Ctrl-C in a terminal reaches its parent alone."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], grace: float) -> None:
        self._command = tuple(command)
        self._environment = {**os.environ, **environment}
        self._grace = grace
        self._process: asyncio.subprocess.Process | None = None
        self.ready = False
        """Whether it has started so far that it knows what a signal asks for."""

    async def start(self) -> None:
        """Start it; its output goes where the parent's goes."""
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.DEVNULL,
            env=self._environment,
            start_new_session=True,
            preexec_fn=_end_with_parent if _LIBC else None,
        )

    async def wait(self) -> int:
        """Wait for its end and return its exit code (negative: a signal)."""
        assert self._process is not None, "start() comes first"
        return await self._process.wait()

    async def stop(self) -> None:
        """SIGTERM, the time it was given to announce and drain, SIGKILL; the last at once when this is cancelled."""
        if self._process is None or self._process.returncode is not None:
            return
        self._process.terminate()
        try:
            await asyncio.wait({asyncio.ensure_future(self._process.wait())}, timeout=self._grace)
        finally:
            self.send(signal.SIGKILL)
            await self._process.wait()

    def reload(self) -> None:
        """Have it read its file again. One that still starts would be ended by the signal, and reads the file anyway:
        what changes meanwhile it notices by itself."""
        if self.ready:
            self.send(signal.SIGHUP)

    def send(self, number: signal.Signals) -> None:
        """Send it a signal, if it runs."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)


# --- the replica as this process ---------------------------------------------------------------------------------


def _serve_upstreams(plan: Plan, display: Display) -> int:
    """Become a replica in front of engines that run already; greet when the first of them answers."""
    # The web framework is loaded by whoever serves: the parent of engines never does.
    from gateway.app import run

    # A reload reads file and environment again, and must find there what was typed.
    os.environ.update(to_environment(plan.overrides))
    key, notes = key_or_note(plan.settings)
    greeting = greet_when_ready(plan.settings, key, notes, display)
    threading.Thread(target=asyncio.run, args=(greeting,), name="greeting", daemon=True).start()
    with admin_pass(plan.settings, display.say):
        return run(plan.settings, plan.config)


async def greet_when_ready(
    settings: Settings, key: str | None, notes: tuple[str, ...], display: Display, patience: float = UPSTREAM_PATIENCE
) -> None:
    """Print the greeting as soon as an engine answers; after `patience` seconds say that none does yet."""
    try:
        models = await asyncio.wait_for(look_until_ready(settings), patience)
    except TimeoutError:
        urls = ", ".join(upstream.url for upstream in settings.upstreams)
        display.say(f"no engine answers at {urls}; requests get a 503 until one does")
        models = await look_until_ready(settings)
    print(Greeting(settings, key, models, notes).text(), flush=True)


def key_or_note(settings: Settings) -> tuple[str | None, tuple[str, ...]]:
    """A fresh key where there is none yet, so that a first request works; else a word on where keys come from.

    It is shown to a person only: where the output may be a log that others read, no key is made.
    """
    if settings.auth == "none":
        return None, ()
    upgrade(settings.state_url)
    with KeyStore(settings.state_url) as store:
        known = {record.name for record in store.load_all().records.values()}
        own = known - {_start_key_name(settings), _admin_key_name(settings)}
    more = "forebay keys create --name NAME"
    if settings.keys or own:
        return None, (f"Keys: {len(settings.keys) + len(own)} known by name; make another with: {more}",)
    if settings.listen.is_loopback or sys.stdout.isatty():
        return make_start_key(settings), ()
    return None, (f"Keys: none yet, nobody is let in; make one with: {more}",)


# --- keys for a start --------------------------------------------------------------------------------------------


def make_start_key(settings: Settings) -> str | None:
    """A fresh key for whoever typed `serve`, in place of the one the last start on this port made. None: no keys asked.

    Named after the port, which one start at a time can have: two gateways on one machine keep their keys apart.
    """
    if settings.auth == "none":
        return None
    upgrade(settings.state_url)
    with KeyStore(settings.state_url) as store:
        return store.create(_start_key_name(settings), replace=True).key


def _start_key_name(settings: Settings) -> str:
    return f"serve-{settings.listen.unix_socket or settings.listen.port}"


def _admin_key_name(settings: Settings) -> str:
    return f"admin-of-{_start_key_name(settings)}"


@contextlib.contextmanager
def admin_pass(settings: Settings, say: Callable[[str], None]) -> Iterator[None]:
    """Inside, `forebay engines list` and its like work for this user on this machine: an admin key, made for this
    start, lies with the admin listener's address in a file that nobody else can read.

    With ``auth: none`` nothing else needs the state database: where there can be none, that is said, and that is all.
    """
    if not settings.admin.enabled:
        yield
        return
    try:
        file: Path | None = _leave_admin_pass(settings)
    except (StartError, StateError) as error:
        if settings.auth != "none":
            raise
        say(f"{error}; until then `forebay engines list` and its like do not find this gateway")
        file = None
    try:
        yield
    finally:
        if file is not None:
            file.unlink(missing_ok=True)


def _leave_admin_pass(settings: Settings) -> Path:
    file = pass_file(settings)
    upgrade(settings.state_url)
    with KeyStore(settings.state_url) as store:
        key = store.create(_admin_key_name(settings), models=(), admin=True, replace=True).key
    try:
        make_private(file.parent)
        write_private(file, {"url": admin_url(settings), "key": key})
    except OSError as error:
        raise StartError(
            f"{file} cannot be written ({error.strerror}); make the data directory writable or choose another one with"
            " FOREBAY_HOME or data_dir in the configuration"
        ) from None
    return file
