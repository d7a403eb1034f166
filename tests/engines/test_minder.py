"""The minder owns an engine's whole process tree: shown with small processes that obey, crash or do not listen."""

from __future__ import annotations

import asyncio
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines import minder as minder_module
from engines.minder import Address, Exit, Lines, Phase, RestartPolicy, cause_of, probe
from engines.minding import PERSONS, Minder, MinderError
from tests.support.sockets import bind_free, free_port
from tests.support.table import each

FAKE = [sys.executable, "-I", "-S", str(Path(__file__).with_name("fake_engine.py"))]
GONE_WITHIN = 20.0
"""Seconds after which a process that should be gone counts as left behind; it is not waited out when all is well."""

NOWHERE = Address()
"""The address of an engine that does not come as far as listening."""


class Watched:
    """A minder and what it said; its engine is stopped at the end of the test."""

    def __init__(
        self,
        tmp_path: Path,
        *arguments: str,
        address: Address,
        phases: tuple[Phase, ...] = (),
        policy: RestartPolicy = PERSONS,
    ) -> None:
        self.lines: list[str] = []
        self.phases: list[tuple[str, int | None, int | None]] = []
        self._arrived = asyncio.Event()
        self.minder = Minder(
            "fake",
            [*FAKE, *arguments],
            environment=os.environ,
            address=address,
            log_path=tmp_path / "logs" / "fake.log",
            phases=phases,
            policy=policy,
            settle=0.1,
            on_line=self._take,
            on_phase=lambda *told: self.phases.append(told),
        )

    def _take(self, line: str) -> None:
        self.lines.append(line)
        self._arrived.set()

    @property
    def ended(self) -> Exit:
        """How the engine ended last."""
        assert self.minder.state is not None and self.minder.state.last_exit is not None
        return self.minder.state.last_exit

    async def line(self, pattern: str) -> re.Match[str]:
        """Wait for a line of the engine that matches."""
        async with asyncio.timeout(GONE_WITHIN):
            while True:
                for line in self.lines:
                    if match := re.fullmatch(pattern, line):
                        return match
                self._arrived.clear()
                await self._arrived.wait()


Watch = Callable[..., Watched]


@pytest.fixture
async def watch(tmp_path: Path) -> AsyncIterator[Watch]:
    """Make minders of fake engines: ``watch("--child", address=...)``."""
    made: list[Watched] = []

    def make(*arguments: str, address: Address = NOWHERE, **more: Any) -> Watched:
        made.append(Watched(tmp_path, *arguments, address=address, **more))
        return made[-1]

    yield make
    for watched in made:
        await watched.minder.stop(0)


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """A FIFO at which a fake engine waits; ``open_gate`` lets it go on."""
    path = tmp_path / "gate"
    os.mkfifo(path)
    return path


def open_gate(gate: Path) -> None:
    os.close(os.open(gate, os.O_WRONLY))


def assert_gone(*pids: int) -> None:
    """Assert that processes end, and name those that do not. One that nobody has collected yet has ended."""
    alive = []
    for pid in pids:
        try:
            process = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        ended, _, _ = select.select([process], [], [], GONE_WITHIN)
        os.close(process)
        if not ended:
            alive.append(psutil.Process(pid))
    assert alive == []


async def test_is_ready_when_the_engine_answers_and_not_before(watch: Watch, gate: Path) -> None:
    """Loading is not ready, whatever the engine has written; a 200 on its health path is."""
    address = Address(port=free_port())
    watched = watch("--gate", str(gate), "--port", str(address.port), address=address)
    await watched.minder.start()
    ready = asyncio.create_task(watched.minder.wait_ready(60))
    await watched.line("waiting at the gate")
    assert not await probe(address, "/health")
    assert not ready.done()
    open_gate(gate)
    assert await ready > 0
    assert not await probe(address, "/elsewhere")


async def test_a_stranger_on_the_port_is_not_taken_for_the_engine(watch: Watch, gate: Path) -> None:
    """An engine listens late; another program that takes its port meanwhile would be sent everybody's requests."""
    address = Address(port=free_port())
    watched = watch("--gate", str(gate), "--port", str(address.port), address=address)
    await watched.minder.start()
    ready = asyncio.create_task(watched.minder.wait_ready(60))
    await watched.line("waiting at the gate")
    asked = asyncio.Queue[None]()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
        writer.close()
        asked.put_nowait(None)

    async with await asyncio.start_server(answer, address.host, address.port):
        for _ in range(2):
            await asyncio.wait_for(asked.get(), GONE_WITHIN)
        assert not ready.done()
    open_gate(gate)
    await ready


async def test_a_unix_socket_is_waited_for_like_a_port(watch: Watch, tmp_path: Path) -> None:
    """The file a killed engine left is removed, since no engine can listen on it; what this one leaves is too."""
    path = tmp_path / "engine.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    watched = watch("--unix", str(path), address=Address(unix=path))
    await watched.minder.start()
    await watched.minder.wait_ready(60)
    assert path.exists()
    await watched.minder.stop()
    assert not path.exists()


async def test_what_the_engine_writes_goes_to_the_log_and_the_owner(watch: Watch) -> None:
    watched = watch("--say", "one", "--say", "two", "--crash", "three")
    await watched.minder.start()
    await watched.minder.wait()
    assert watched.lines == ["one", "two", "three"]
    assert watched.minder.log_path.read_text() == "one\ntwo\nthree\n"
    assert watched.ended.cause == "three"


async def test_stages_of_loading_are_told_once_each(watch: Watch) -> None:
    phases = (
        Phase(re.compile(r"shards: .* (?P<done>\d+)/(?P<total>\d+)"), "loading weights"),
        Phase(re.compile(r"cache"), "warming up"),
    )
    said = ["shards: 0% 0/2", "noise", "shards: 50% 1/2", "shards: 50% 1/2", "KV cache"]
    watched = watch(*(part for line in said for part in ("--say", line)), phases=phases)
    await watched.minder.start()
    await watched.minder.wait()
    assert watched.phases == [("loading weights", 0, 2), ("loading weights", 1, 2), ("warming up", None, None)]


async def test_a_crash_while_loading_is_told_with_its_cause(watch: Watch, gate: Path) -> None:
    """Whoever waits for the engine learns at once that it is gone, why, and where to read more."""
    address = Address(port=free_port())
    watched = watch("--gate", str(gate), "--crash", "ValueError: no such model", address=address)
    await watched.minder.start()
    ready = asyncio.create_task(watched.minder.wait_ready(60))
    await watched.line("waiting at the gate")
    open_gate(gate)
    with pytest.raises(
        MinderError, match=r"fake ended by itself after \d+ s \(exit code 3\): ValueError: no such model"
    ):
        await ready
    with pytest.raises(MinderError, match=re.escape(f"the whole log: {watched.minder.log_path}")):
        await watched.minder.wait_ready(60)


async def test_an_engine_that_is_not_there_is_named(tmp_path: Path) -> None:
    missing = str(tmp_path / "no-engine")
    log_path = tmp_path / "engine.log"
    address = Address(unix=tmp_path / "engine.sock")
    minder = Minder("fake", [missing], environment={}, address=address, log_path=log_path)
    await minder.start()
    with pytest.raises(MinderError, match=f"^{missing} cannot be started: No such file or directory"):
        await minder.wait_ready(60)
    await minder.stop()
    assert log_path.read_text() == f"{missing} cannot be started: No such file or directory\n"


async def test_slow_loading_ends_the_wait_but_not_the_engine(watch: Watch, gate: Path) -> None:
    watched = watch("--gate", str(gate), address=Address(port=free_port()))
    await watched.minder.start()
    await watched.line("waiting at the gate")
    with pytest.raises(MinderError, match=r"fake is not ready after 0 s; its log, .*fake\.log, says how far it came"):
        await watched.minder.wait_ready(0)
    assert watched.minder.engine_pid is not None
    assert psutil.pid_exists(watched.minder.engine_pid)


async def test_a_taken_port_is_refused_before_anything_starts(watch: Watch) -> None:
    """Else a stranger's answer would be taken for the engine's readiness."""
    with bind_free() as stranger:
        stranger.listen()
        port = stranger.getsockname()[1]
        watched = watch(address=Address(port=port))
        with pytest.raises(MinderError, match=f"fake cannot listen on 127.0.0.1 port {port}: address already in use; "):
            await watched.minder.start()
    assert not watched.minder.log_path.exists()
    assert await watched.minder.stop() is None


async def test_a_taken_unix_socket_is_refused(watch: Watch, tmp_path: Path) -> None:
    path = tmp_path / "engine.sock"
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.bind(str(path))
        stranger.listen()
        with pytest.raises(MinderError, match=r"engine.sock: another program does; stop it or name another path"):
            await watch(address=Address(unix=path)).minder.start()
    assert path.exists()


async def test_a_unix_socket_that_cannot_be_made_is_refused(watch: Watch, tmp_path: Path) -> None:
    with pytest.raises(MinderError, match="the path of a Unix socket has at most 107 bytes; name a shorter one"):
        await watch(address=Address(unix=tmp_path / ("x" * 108))).minder.start()
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").write_text("somebody's")
    for name in ("directory", "file"):
        with pytest.raises(MinderError, match=f"{name}: it is no socket; remove it or name another path"):
            await watch(address=Address(unix=tmp_path / name)).minder.start()
    assert (tmp_path / "file").read_text() == "somebody's"


async def test_a_program_that_hangs_is_not_waited_for(watch: Watch, tmp_path: Path) -> None:
    """It accepts nobody: its queue is full, and whoever waited to get in would wait for ever."""
    path = tmp_path / "engine.sock"
    with socket.socket(socket.AF_UNIX) as stranger, socket.socket(socket.AF_UNIX) as queued:
        stranger.bind(str(path))
        stranger.listen(0)
        queued.connect(str(path))
        with pytest.raises(MinderError, match=r"engine.sock: another program does; stop it or name another path"):
            await watch(address=Address(unix=path)).minder.start()


async def test_an_obedient_engine_ends_on_sigterm(watch: Watch, gate: Path) -> None:
    """It has the time to say goodbye, and its end is no failure."""
    watched = watch("--gate", str(gate))
    await watched.minder.start()
    await watched.line("waiting at the gate")
    ended = await watched.minder.stop(60)
    assert ended is not None
    assert (ended.code, ended.asked, watched.lines[-1]) == (0, True, "bye")
    assert str(ended) == "fake stopped (exit code 0)"
    assert await watched.minder.stop() == ended


async def test_a_stubborn_engine_is_killed_with_all_it_started(watch: Watch, gate: Path) -> None:
    """SIGTERM alone leaves vLLM waiting on open responses for ever, so the wait is bounded."""
    watched = watch("--stubborn", "--child", "--gate", str(gate))
    await watched.minder.start()
    child = int((await watched.line(r"child (\d+)")).group(1))
    await watched.line("waiting at the gate")
    assert watched.minder.engine_pid is not None
    pid = watched.minder.engine_pid
    ended = await watched.minder.stop(0.1)
    assert ended is not None
    assert ended.code == -signal.SIGKILL
    assert_gone(pid, child)


async def test_asked_again_the_shorter_wait_counts(watch: Watch, gate: Path) -> None:
    """A second Ctrl-C must not wait out the first one's patience."""
    watched = watch("--stubborn", "--gate", str(gate))
    await watched.minder.start()
    await watched.line("waiting at the gate")
    patient = asyncio.create_task(watched.minder.stop(3600))
    ended = await asyncio.wait_for(watched.minder.stop(0), GONE_WITHIN)
    assert await patient == ended


async def test_what_a_dead_engine_left_running_is_ended(watch: Watch, gate: Path) -> None:
    """An engine's own crash leaves workers that hold its memory and its device."""
    watched = watch("--child", "--crash", "RuntimeError: out of luck")
    await watched.minder.start()
    await watched.minder.wait()
    assert (watched.ended.code, watched.ended.asked) == (3, False)
    assert_gone(int((await watched.line(r"child (\d+)")).group(1)))


async def test_a_killed_engine_is_told_by_its_signal(watch: Watch, gate: Path) -> None:
    watched = watch("--gate", str(gate))
    await watched.minder.start()
    await watched.line("waiting at the gate")
    assert watched.minder.engine_pid is not None
    os.kill(watched.minder.engine_pid, signal.SIGKILL)
    assert "killed by SIGKILL, often for lack of memory" in await watched.minder.wait()
    assert watched.ended.code == -signal.SIGKILL


async def test_the_engine_is_out_of_reach_of_ctrl_c(watch: Watch, gate: Path) -> None:
    """The terminal sends SIGINT to the owner's group; the owner then stops the engine in order."""
    watched = watch("--gate", str(gate))
    await watched.minder.start()
    await watched.line("waiting at the gate")
    assert watched.minder.engine_pid is not None
    assert os.getpgid(watched.minder.engine_pid) == watched.minder.engine_pid
    assert os.getsid(watched.minder.engine_pid) != os.getsid(0)


def test_no_process_is_left_when_the_owner_is_killed(tmp_path: Path, gate: Path) -> None:
    """The owner has no say in a SIGKILL, the engine's children ignore SIGTERM, and still all of them end."""
    command = [
        sys.executable,
        "-m",
        "tests.engines.owner",
        str(tmp_path / "log"),
        str(tmp_path / "engine.sock"),
        *FAKE,
        "--child",
        "--gate",
        str(gate),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        said = [owner.stdout.readline() for _ in range(3)]
        assert "waiting at the gate\n" in said
        # The child, the agent and the engine, in whichever order they were told.
        pids = [int(pid) for line in said for pid in re.findall(r"\d+", line)]
        assert len(pids) == 3
        assert all(psutil.pid_exists(pid) for pid in pids)
        owner.kill()
    assert_gone(*pids)


async def test_the_engine_ends_when_its_agent_is_killed(watch: Watch, gate: Path) -> None:
    """An agent that is no more cannot end anything: the kernel and the owner do it."""
    watched = watch("--gate", str(gate))
    await watched.minder.start()
    await watched.line("waiting at the gate")
    assert watched.minder.agent_pid is not None and watched.minder.engine_pid is not None
    pid = watched.minder.engine_pid
    os.kill(watched.minder.agent_pid, signal.SIGKILL)
    assert await asyncio.wait_for(watched.minder.wait(), GONE_WITHIN) == "fake ended: its minder was killed"
    assert (watched.ended.code, watched.ended.asked) == (-signal.SIGKILL, False)
    assert_gone(pid)
    assert not watched.minder.control.exists()


def test_a_full_log_is_put_aside(tmp_path: Path) -> None:
    """Two files at most, the older one ending with ``.1``."""
    log = minder_module._Log(tmp_path / "logs" / "engine.log", limit=10)
    for line in (b"first\n", b"second\n", b"third\n"):
        log.write(line)
    log.close()
    assert (tmp_path / "logs" / "engine.log").read_bytes() == b"third\n"
    assert (tmp_path / "logs" / "engine.log.1").read_bytes() == b"second\n"
    assert (tmp_path / "logs" / "engine.log").stat().st_mode & 0o077 == 0


def test_a_log_that_somebody_took_away_never_stops_the_engine(tmp_path: Path) -> None:
    """The file, then its directory too: nothing is raised, and lines go where they can."""
    path = tmp_path / "logs" / "engine.log"
    log = minder_module._Log(path, limit=10)
    log.write(b"12345678\n")
    path.unlink()
    log.write(b"a new one\n")
    assert path.read_bytes() == b"a new one\n"
    path.parent.rename(tmp_path / "elsewhere")
    for _ in range(3):
        log.write(b"and on\n")
    assert (tmp_path / "elsewhere" / "engine.log").read_bytes() == b"a new one\n" + b"and on\n" * 3
    log.close()


@given(st.lists(st.binary()))
def test_lines_do_not_depend_on_how_reads_cut_them(pieces: list[bytes]) -> None:
    whole, cut = Lines(), Lines()
    expected = whole.feed(b"".join(pieces)) + whole.end()
    assert [line for piece in pieces for line in cut.feed(piece)] + cut.end() == expected


def test_a_progress_bar_is_many_lines_and_an_endless_line_is_cut() -> None:
    lines = Lines()
    assert lines.feed(b"\r 10%\r 20%\n\n") == [" 10%", " 20%"]
    assert lines.feed(b"x" * 70_000) == ["x" * 70_000]
    assert lines.end() == []


def test_the_minder_runs_without_anything_installed() -> None:
    """One file, standard library only: it can be copied into any engine's image."""
    path = str(Path(minder_module.__file__))
    result = subprocess.run([sys.executable, "-I", "-S", path, "--help"], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_an_end_without_a_word_is_told_as_such() -> None:
    ended = Exit("vllm", 0, 33.4, cause_of(()), asked=False)
    assert str(ended) == "vllm ended by itself after 33 s (exit code 0): it wrote nothing"


@each(
    ("lines", "cause"),
    [
        (
            # A worker fails, and its two parents each say that somebody else did.
            [
                "(Worker pid=3) ERROR 11-24 05:45:35 [multiproc_executor.py:953] safetensors.SafetensorError: Error"
                " while deserializing header: incomplete metadata",
                "(EngineCore pid=2) ERROR 11-24 05:45:37 [core.py:1510] Exception: WorkerProc initialization failed due"
                " to an exception in a background process. See stack trace for root cause.",
                "    raise RuntimeError(",
                "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}",
            ],
            "safetensors.SafetensorError: Error while deserializing header: incomplete metadata",
        ),
        (
            # The interesting part is on the second line.
            [
                "(APIServer pid=1) WARNING 11-24 05:06:19 [system_utils.py:255] errors like `OSError: [Errno 24]`",
                "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig",
                "  Value error, User-specified max_model_len (100000) is greater than the derived one",
                "    For further information visit the manual",
            ],
            "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig Value error,"
            " User-specified max_model_len (100000) is greater than the derived one",
        ),
        (["OSError: [Errno 98] Address already in use"], "OSError: [Errno 98] Address already in use"),
        (["ValueError: " + "x" * 400], "ValueError: " + "x" * 288 + "..."),
        (["loading", "killed"], "killed"),
    ],
)
def test_the_cause_is_the_error_that_points_to_no_other(lines: list[str], cause: str) -> None:
    """As vLLM's logs read when it fails in a worker, in its arguments, on its port."""
    ended = Exit("vllm", 1, 20.2, cause_of(lines), asked=False)
    assert str(ended) == f"vllm ended by itself after 20 s (exit code 1): {cause}"


def test_the_cause_of_a_long_word_is_found_at_once() -> None:
    """An engine may dump megabytes without a space before it ends; its agent must stay there for its owner."""
    began = time.process_time()
    assert cause_of(["x" * 65536] * 8).startswith("xxx")
    assert time.process_time() - began < 2


def test_a_signal_without_a_name_is_told_by_its_number() -> None:
    assert "(killed by signal 40)" in str(Exit("vllm", -40, 20.2, "it wrote nothing", asked=False))


async def test_who_listens_too_slowly_is_let_go_and_takes_no_memory() -> None:
    feed = minder_module._Feed(states=False, lines=True)
    for number in range(3000):
        feed.put({"line": str(number)})
    assert await feed.get() is None
    assert feed._queue.empty()
