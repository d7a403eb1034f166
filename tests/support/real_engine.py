"""One real vLLM on the CPU for a whole test session: the one that a real ``forebay serve`` has started.

Loading an engine is what takes longest of all, so the command under test and the engine under test are one: every test
of vLLM speaks to that engine's own socket, those of the command to the command, and the last one stops both. It is
started once; two tests near the end kill it, and it comes back.
Environment and model live in the data directory that ``FOREBAY_HOME`` names, else in ``.forebay/`` of this checkout,
and are made there on first use. What takes long is told on standard error, past pytest's capture.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import os
import random
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from engines.devices import Device
from engines.environments import EngineEnvironment, ensure_environment, recipe_for
from engines.launch import AdapterSlots, LaunchSpec, process_environment
from engines.minder import Address, RestartPolicy
from engines.minding import Minder
from engines.models import ModelFiles, prepare_model
from engines.protocol import EngineLoad
from engines.registry import ENGINES
from engines.simulated import own_environment, pretended_model
from engines.steps import Step
from tests.support import client as raw_client
from tests.support import gateway as gateway_support
from tests.support.served import Served

START_WITHIN = 600.0
"""Seconds for the engine to be ready; a quiet machine needs 30, a busy one minutes."""
PREPARE_WITHIN = 900.0
"""Seconds for its environment and its model to be made, where they are not there yet."""
ANSWER_WITHIN = 120.0
"""Seconds for an answer of the engine."""
FREE_WITHIN = 60.0
"""Seconds after which an engine that works for nobody fails the test; see ``engines.conformance.FREED_WITHIN``."""
LOOK = 0.05
"""Seconds between two looks at an engine's figures."""
STAYS_DEAD = RestartPolicy(never_ready=1, storm=1)
"""What a test kills is not started again behind its back."""


@dataclass(frozen=True, slots=True)
class RealEngine:
    """An engine that answers. ``start_seconds`` is how long it took to be ready; ``url`` is as an upstream's."""

    kind: str
    url: str
    model: str
    pid: int
    log_path: Path
    start_seconds: float
    api_key: str | None = None

    @property
    def port(self) -> int:
        """Its loopback port. Raises ``ValueError`` when it listens on a Unix socket."""
        return int(self.url.removeprefix("http://127.0.0.1:"))

    def family(self) -> list[psutil.Process]:
        """Return its processes, the first one first."""
        leader = psutil.Process(self.pid)
        return [leader, *leader.children(recursive=True)]

    def client(self) -> httpx.Client:
        """Return a client that speaks to the engine itself."""
        if self.url.startswith("unix:"):
            transport = httpx.HTTPTransport(uds=self.url.removeprefix("unix:"))
            return httpx.Client(base_url="http://engine", transport=transport, timeout=ANSWER_WITHIN)
        headers = {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=ANSWER_WITHIN)


def data_directory() -> Path:
    """Return where engines and models of the tests live."""
    default = Path(__file__).resolve().parents[2] / ".forebay"
    return Path(os.environ.get("FOREBAY_HOME") or default)


def prepared(kind: str = "vllm") -> tuple[EngineEnvironment, ModelFiles]:
    """Return an engine's CPU environment and the packaged model, made first where they are missing."""
    if kind == "simulated":
        return own_environment(), pretended_model(None)
    environment = ensure_environment(recipe_for(kind, Device.CPU), data_directory(), _tell_step)
    return environment, prepare_model("smollm2-135m-instruct", data_directory(), environment, _tell_step)


def spec_for(model: ModelFiles, port: int, *extra_args: str, kind: str = "vllm", **changes: Any) -> LaunchSpec:
    """Return the launch of the packaged model on a loopback port; ``changes`` are other fields of it."""
    plain = LaunchSpec(
        name=kind,
        kind=kind,
        device=Device.CPU,
        model=model.path,
        served_name=model.served_name,
        address=Address(port=port),
        extra_args=extra_args,
    )
    return replace(plain, **changes)


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
def running(kind: str, *extra_args: str, **changes: Any) -> Iterator[RealEngine]:
    """Run an engine until the block ends. Raises ``MinderError`` with its last words when it does not start.

    ``changes`` are fields of its ``LaunchSpec``.
    """
    environment, model = prepared(kind)
    spec, engine = spec_for(model, engine_port(), *extra_args, kind=kind, **changes), ENGINES[kind]
    minder = Minder(
        spec.name,
        engine.command_line(spec, environment.python),
        environment=process_environment(engine, spec),
        address=spec.address,
        log_path=data_directory() / "logs" / f"test-{spec.address.port}.log",
        ready_path=engine.ready_path,
        phases=engine.loading_phases,
        policy=STAYS_DEAD,
        on_phase=functools.partial(_tell_phase, kind),
    )
    with _event_loop() as loop:

        async def start() -> float:
            await minder.start()
            return await minder.wait_ready(START_WITHIN)

        try:
            seconds = asyncio.run_coroutine_threadsafe(start(), loop).result()
            assert minder.engine_pid is not None
            yield RealEngine(
                kind, str(spec.address), spec.served_name, minder.engine_pid, minder.log_path, seconds, spec.api_key
            )
        finally:
            asyncio.run_coroutine_threadsafe(minder.stop(), loop).result()
    minder.log_path.unlink()


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for a real engine longer than for a scripted one."""
    for module in (raw_client, gateway_support):
        monkeypatch.setattr(module, "PATIENCE", ANSWER_WITHIN)


def load_of(engine: RealEngine) -> EngineLoad:
    """Return what an engine says of its load; one that has just started says nothing for a moment."""
    kind, until = ENGINES[engine.kind], time.monotonic() + ANSWER_WITHIN
    with engine.client() as client:
        while (load := kind.read_load(client.get(kind.metrics_path).content)) is None:
            assert time.monotonic() < until, "it says nothing of its load"
            time.sleep(LOOK)
    return load


async def free(engine: RealEngine) -> float:
    """Wait until the engine says that it does nothing; return how many seconds that took."""
    return await busy(engine, running=0, waiting=0, within=FREE_WITHIN)


async def busy(engine: RealEngine, running: int, waiting: int, within: float = ANSWER_WITHIN) -> float:
    """Wait until the engine says that it runs and keeps waiting that many; return how many seconds that took."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    load = None
    try:
        async with asyncio.timeout(within):
            while (load := await asyncio.to_thread(load_of, engine)).running != running or load.waiting != waiting:
                await asyncio.sleep(LOOK)
    except TimeoutError:
        raise AssertionError(f"wanted {running} running and {waiting} waiting, the engine shows {load}") from None
    return loop.time() - began


RUNNING, QUEUED = 8, 2
"""Requests that the session's engine runs, and keeps waiting: a full one is soon had, and eight streams run at once."""
SLOTS = AdapterSlots(active=2, rank=8, targets=("q_proj", "v_proj"))
"""Its room for adapters; it has none until a test loads one."""
_SERVED = pytest.StashKey[Served]()


@pytest.fixture(scope="session")
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """The session's one ``forebay serve`` with a real engine, also when several conftest files import this fixture."""
    stash = request.config.stash
    if _SERVED not in stash:
        ports = (engine_port(), engine_port())
        home = {"FOREBAY_HOME": str(data_directory())}
        folder = tmp_path_factory.mktemp("served")
        slots = {"active": SLOTS.active, "rank": SLOTS.rank, "targets": SLOTS.targets}
        engine = {"name": "local", "max_running": RUNNING, "max_queued": QUEUED, "adapters": slots}
        (folder / "forebay.yaml").write_text(json.dumps({"engines": [engine]}))
        stash[_SERVED] = started = Served((), folder, ports, _tell, **home)
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
    return engine_of(served)


def engine_of(served: Served) -> RealEngine:
    """Return the engine as it is now: another one after each time it was killed."""
    leader = engine_leader(served)
    said = dict(itertools.pairwise(leader.cmdline()))
    return RealEngine(
        kind="vllm",
        url=f"unix:{said['--uds']}",
        model=said["--served-model-name"],
        pid=leader.pid,
        log_path=data_directory() / "logs" / "local.log",
        start_seconds=served.start_seconds,
    )


def engine_leader(served: Served) -> psutil.Process:
    """Return the engine's first process: below the agent, which is below its keeper."""
    keeper = next(process for process in served.family() if "minder.py" in " ".join(process.cmdline()))
    [agent] = keeper.children()
    [leader] = agent.children()
    return leader


def serves_again(served: Served) -> None:
    """Wait until the engine, which a test may just have killed, works again."""
    question = {"model": "smollm2-135m-instruct", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
    until = time.monotonic() + START_WITHIN
    with httpx.Client(base_url=served.url, headers={"authorization": f"Bearer {served.key}"}) as client:
        while client.post("/v1/chat/completions", json=question, timeout=ANSWER_WITHIN).status_code != httpx.codes.OK:
            assert time.monotonic() < until, served.err
            time.sleep(0.2)


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


def _tell_phase(kind: str, text: str, done: int | None, total: int | None) -> None:
    _tell(f"{kind}: {text}" + (f" {done}/{total}" if total is not None else ""))


def _tell(text: str) -> None:
    print(text, file=sys.__stderr__, flush=True)
