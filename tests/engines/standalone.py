"""The agent as a program of its own in front of a fake engine, as in an engine's image, and a client of its port."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, suppress
from pathlib import Path

import psutil
import pytest

from engines import minder as minder_module
from engines.minder import State, this_program
from engines.minding import MinderClient, MinderError
from tests.engines.test_minder import FAKE, GONE_WITHIN, assert_gone
from tests.support.sockets import free_port

AS_A_FILE = [sys.executable, "-I", "-S", str(Path(minder_module.__file__))]
"""As it is run in an engine's image; ``this_program`` starts sooner."""
TOKEN = "a-token-of-some-length"
SETTLE = 0.1
"""Seconds that what an engine leaves behind gets to end by itself."""
QUICK = ("--restart", "first=0.01")


class Standalone:
    """`minder.py run` in front of a fake engine. ``process`` is the keeper, whose child is the agent."""

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        engine: tuple[str, ...] = (),
        tcp: bool = False,
        program: Sequence[str] | None = None,
    ) -> None:
        self.engine_address = f"unix:{folder / 'engine.sock'}"
        self.control = f"http://127.0.0.1:{free_port()}" if tcp else f"unix:{folder / 'control'}"
        self.log = folder / "engine.log"
        self.command = [*FAKE, "--unix", str(folder / "engine.sock"), *engine]
        said = ["--name", "fake", "--control", self.control, "--log", str(self.log), "--address", self.engine_address]
        said += ["--settle", str(SETTLE)]
        self.process = subprocess.Popen(
            [*(program or this_program()), "run", *said, *arguments, "--", *self.command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, **({"FOREBAY_MINDER_TOKEN": TOKEN} if tcp else {})},
        )
        self.client = MinderClient(self.control, TOKEN if tcp else None)

    async def until(self, phase: str, starts: int = 1) -> State:
        """Wait for a phase; return the state."""
        async with asyncio.timeout(GONE_WITHIN):
            while True:
                with suppress(MinderError):
                    async with aclosing(self.client.events()) as events:
                        async for item in events:
                            if isinstance(item, State) and item.phase == phase and item.starts >= starts:
                                return item
                await asyncio.sleep(0.02)

    def family(self) -> list[int]:
        """Return every process that it has started, itself first, then the agent, the engine and what that started."""
        keeper = psutil.Process(self.process.pid)
        return [keeper.pid, *(process.pid for process in keeper.children(recursive=True))]

    def wait(self) -> int:
        """Return its exit code once it has ended."""
        return self.process.wait(GONE_WITHIN)

    def end(self) -> None:
        """End all of it, in whichever state it is. An agent that is killed is cleaned up after by its keeper."""
        if self.process.poll() is None:
            with suppress(ProcessLookupError, psutil.NoSuchProcess):
                family = self.family()
                for agent in family[1:2]:
                    os.kill(agent, signal.SIGKILL)
                assert_gone(*family)
        self.process.communicate()


Start = Callable[..., Standalone]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """Start agents of fake engines: ``start("--gated", engine=("--child",))``."""
    started: list[Standalone] = []

    def make(*arguments: str, **more: object) -> Standalone:
        started.append(Standalone(tmp_path, *arguments, **more))  # type: ignore[arg-type]
        return started[-1]

    yield make
    for one in started:
        await one.client.close()
        one.end()
