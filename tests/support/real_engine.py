"""One real vLLM on the CPU for a whole test session: the one that a real ``forebay serve`` has started.

Loading an engine is what takes longest of all, so the command under test and the engine under test are one: every test
of a real engine speaks to that engine's own socket, those of the command to the command, and the last one stops both.
Environment and model live in the data directory that ``FOREBAY_HOME`` names, else in ``.forebay/`` of this checkout,
and are made there on first use. What takes long is told on standard error, past pytest's capture.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from engines.devices import Device
from engines.environments import EngineEnvironment, ensure_environment, recipe_for
from engines.launch import LaunchSpec, process_environment
from engines.minder import Address, Minder
from engines.models import ModelFiles, prepare_model
from engines.steps import Step
from engines.vllm import Vllm
from tests.support.served import Served

START_WITHIN = 600.0
"""Seconds for the engine to be ready; a quiet machine needs 30, a busy one minutes."""
PREPARE_WITHIN = 900.0
"""Seconds for its environment and its model to be made, where they are not there yet."""
ANSWER_WITHIN = 120.0
"""Seconds for an answer of the engine."""


@dataclass(frozen=True, slots=True)
class RealEngine:
    """A vLLM that answers. ``start_seconds`` is how long it took to be ready; ``url`` is as an upstream's."""

    url: str
    model: str
    pid: int
    log_path: Path
    start_seconds: float

    @property
    def port(self) -> int:
        """Its loopback port. Raises ``ValueError`` when it listens on a Unix socket."""
        return int(self.url.removeprefix("http://127.0.0.1:"))

    def client(self) -> httpx.Client:
        """Return a client that speaks to the engine itself."""
        if self.url.startswith("unix:"):
            transport = httpx.HTTPTransport(uds=self.url.removeprefix("unix:"))
            return httpx.Client(base_url="http://engine", transport=transport, timeout=ANSWER_WITHIN)
        return httpx.Client(base_url=self.url, timeout=ANSWER_WITHIN)


def data_directory() -> Path:
    """Return where engines and models of the tests live."""
    default = Path(__file__).resolve().parents[2] / ".forebay"
    return Path(os.environ.get("FOREBAY_HOME") or default)


def prepared() -> tuple[EngineEnvironment, ModelFiles]:
    """Return vLLM's CPU environment and the packaged model, made first where they are missing."""
    environment = ensure_environment(recipe_for("vllm", Device.CPU), data_directory(), _tell_step)
    return environment, prepare_model("smollm2-135m-instruct", data_directory(), environment, _tell_step)


def spec_for(model: ModelFiles, port: int, *extra_args: str) -> LaunchSpec:
    """Return the launch of the packaged model on a loopback port."""
    return LaunchSpec(
        name="vllm",
        kind="vllm",
        device=Device.CPU,
        model=model.path,
        served_name=model.served_name,
        address=Address(port=port),
        extra_args=extra_args,
    )


def engine_port() -> int:
    """Return a port for an engine. It listens half a minute later, so from a range that no other test uses."""
    for port in random.sample(range(11000, 20000), 100):
        with socket.socket() as candidate:
            try:
                candidate.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("no free port between 11000 and 19999 on 127.0.0.1")


@contextmanager
def running_vllm(*extra_args: str) -> Iterator[RealEngine]:
    """Run a vLLM until the block ends. Raises ``MinderError`` with its last words when it does not start."""
    environment, model = prepared()
    spec, engine = spec_for(model, engine_port(), *extra_args), Vllm()
    minder = Minder(
        spec.name,
        engine.command_line(spec, environment.python),
        environment=process_environment(engine, spec),
        address=spec.address,
        log_path=data_directory() / "logs" / f"test-{spec.address.port}.log",
        ready_path=engine.ready_path,
        phases=engine.loading_phases,
        on_phase=_tell_phase,
    )
    with _event_loop() as loop:

        async def start() -> float:
            await minder.start()
            return await minder.wait_ready(START_WITHIN)

        try:
            seconds = asyncio.run_coroutine_threadsafe(start(), loop).result()
            assert minder.engine_pid is not None
            yield RealEngine(str(spec.address), spec.served_name, minder.engine_pid, minder.log_path, seconds)
        finally:
            asyncio.run_coroutine_threadsafe(minder.stop(), loop).result()
    minder.log_path.unlink()


_SERVED = pytest.StashKey[Served]()


@pytest.fixture(scope="session")
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """The session's one ``forebay serve`` with a real engine, also when several conftest files import this fixture."""
    stash = request.config.stash
    if _SERVED not in stash:
        ports = (engine_port(), engine_port())
        home = {"FOREBAY_HOME": str(data_directory())}
        stash[_SERVED] = started = Served((), tmp_path_factory.mktemp("served"), ports, _tell, **home)
        request.config.add_cleanup(started.stop)
    try:
        stash[_SERVED].wait_ready(PREPARE_WITHIN + START_WITHIN)
    except AssertionError:
        # Every other test that wants it fails at once, with the same words.
        stash[_SERVED].stop()
        raise
    return stash[_SERVED]


@pytest.fixture(scope="session")
def vllm_engine(served: Served) -> RealEngine:
    """The engine of the session's ``forebay serve``, spoken to past the gateway that stands in front of it."""
    supervisor = next(process for process in served.family() if "minder.py" in " ".join(process.cmdline()))
    leader = supervisor.children()[0]
    arguments = leader.cmdline()
    said = dict(itertools.pairwise(arguments))
    return RealEngine(
        url=f"unix:{said['--uds']}",
        model=said["--served-model-name"],
        pid=leader.pid,
        log_path=data_directory() / "logs" / "local.log",
        start_seconds=served.start_seconds,
    )


@contextmanager
def _event_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """Run an event loop in a thread: the engine outlives the loop of any one test."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="minder of the session's engine")
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def _tell_step(step: Step) -> None:
    _tell(f"{step.phase}: {step.text}")


def _tell_phase(text: str, done: int | None, total: int | None) -> None:
    _tell(f"vllm: {text}" + (f" {done}/{total}" if total is not None else ""))


def _tell(text: str) -> None:
    print(text, file=sys.__stderr__, flush=True)
