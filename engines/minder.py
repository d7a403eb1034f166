"""The agent beside an engine. Standard library only, one file, so that it can be copied into any engine's image.

Its law: **an engine never outlives its owner unwatched**. The owner holds one end of a socket; the *supervisor*, a tiny
process of this same file, holds the other and is the parent of everything the engine starts:

    owner  <-- control socket -->  supervisor  -->  engine, in a process group of its own
    owner  <-- output pipe    ---  supervisor  <--  the engine's output, also written to its log

- The owner asks with ``stop SECONDS``; the supervisor sends SIGTERM to the engine, waits that long, sends SIGKILL, and
  ends what is left of its process tree. vLLM needs the bound: after SIGTERM it waits for ever on open responses.
- When the owner dies, even by SIGKILL, the socket ends and the supervisor does the same on its own.
- When the supervisor dies, the kernel kills the engine (Linux), and the owner ends the group.
- The supervisor's side has no thread and no lock: one ``select`` loop over signals, socket, pipe and deadlines.

The owner's side is asynchronous (``Minder``). A short-lived command that must not outlive its owner either, such as an
installer, is run through the same supervisor by ``engines.steps``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ORPHAN_GRACE = 5.0
"""Seconds an engine gets to end after its owner has died."""
SETTLE = 2.0
"""Seconds the engine's other processes get to end by themselves after its first one has ended."""
GIVE_UP = 5.0
"""Seconds after SIGKILL at which the supervisor leaves even if a process hangs in the kernel."""
LOG_LIMIT = 64 * 1024 * 1024
"""Bytes at which the log becomes ``NAME.log.1`` and a new one begins."""

_PENDING_LIMIT = 1024 * 1024
_LINE_LIMIT = 64 * 1024
_SIGNAL_BASE = 128
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_LISTENING = "0A"
_UNIX_PATH_LIMIT = 107


class Lines:
    """Cuts a byte stream into lines of text; a carriage return ends one too, since progress bars use it."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[str]:
        """Return the lines that ``data`` completes, without empty ones."""
        *whole, self._rest = re.split(rb"[\r\n]", self._rest + data)
        if len(self._rest) > _LINE_LIMIT:
            whole.append(self._rest)
            self._rest = b""
        return [line.decode(errors="replace").rstrip() for line in whole if line.strip()]

    def end(self) -> list[str]:
        """Return what came after the last line end."""
        return self.feed(b"\n")


# ---------------------------------------------------------------------------------------------------------------------
# The supervisor's side
# ---------------------------------------------------------------------------------------------------------------------


def _prctl(option: int, value: int) -> None:
    """Ask the Linux kernel; elsewhere this is not available and the socket alone has to do."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _die_with_parent() -> None:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class _Log:
    """The engine's log file: appended to, readable by its owner only, at most two files of ``limit`` bytes."""

    def __init__(self, path: Path, limit: int = LOG_LIMIT) -> None:
        self._path = path
        self._limit = limit
        path.parent.mkdir(parents=True, exist_ok=True)
        self._open()

    def _open(self) -> None:
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._file = os.fdopen(descriptor, "ab", buffering=0)
        self._size = os.fstat(descriptor).st_size

    def write(self, data: bytes) -> None:
        """Append; a full disk loses log lines, never the engine."""
        if self._size + len(data) > self._limit:
            self._file.close()
            self._path.replace(self._path.with_name(self._path.name + ".1"))
            self._open()
        with contextlib.suppress(OSError):
            self._size += self._file.write(data) or 0

    def close(self) -> None:
        self._file.close()


class _Forward:
    """What still has to go to the owner. A slow owner loses lines (the log has them); it never holds up the engine."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.open = True
        self.pending = bytearray()
        os.set_blocking(descriptor, False)

    def add(self, data: bytes) -> None:
        if self.open and len(self.pending) + len(data) <= _PENDING_LIMIT:
            self.pending += data

    def flush(self) -> None:
        """Write as much as the pipe takes now."""
        try:
            while self.pending:
                del self.pending[: os.write(self.descriptor, self.pending)]
        except BlockingIOError:
            return
        except OSError:
            self.open = False
            self.pending.clear()


class _Supervisor:
    """Runs one engine to its end. Deadlines are on the monotonic clock, in seconds."""

    def __init__(self, command: Sequence[str], control: socket.socket, log: _Log) -> None:
        self._control = control
        self._log = log
        self._forward = _Forward(sys.stdout.fileno())
        self._selector = selectors.DefaultSelector()
        self._asked: deque[float] = deque()
        self._kill_leader_at: float | None = None
        self._kill_rest_at: float | None = None
        self._give_up_at: float | None = None
        self._code: int | None = None
        self._alone = False
        self._wake_up_on_signals()
        # One thread, no lock held: a function between fork and exec is safe here.
        self._leader = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            process_group=0,
            preexec_fn=_die_with_parent,  # noqa: PLW1509
        )

    def _wake_up_on_signals(self) -> None:
        reading, writing = os.pipe()
        for end in (reading, writing):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(writing)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: self._asked.append(ORPHAN_GRACE))
        self._selector.register(reading, selectors.EVENT_READ, lambda: os.read(reading, 4096))

    def run(self) -> int:
        """Supervise until the engine and all its descendants are gone; return the engine's return code."""
        output: IO[bytes] = self._leader.stdout  # type: ignore[assignment]
        os.set_blocking(output.fileno(), False)
        self._selector.register(output, selectors.EVENT_READ, lambda: self._read_output(output))
        self._selector.register(self._control, selectors.EVENT_READ, self._read_control)
        with contextlib.suppress(OSError):
            self._control.sendall(b"started %d\n" % self._leader.pid)
        while not self._finished():
            self._watch_forward()
            for key, _ in self._selector.select(self._until_next_deadline()):
                key.data()
            self._reap()
            self._act()
        self._read_output(output)
        # The engine is gone, so nothing is held up any more: the owner gets the last lines however slowly it reads.
        os.set_blocking(self._forward.descriptor, True)
        self._forward.flush()
        if sys.platform != "linux":
            # No subreaper there: the group is all that is known.
            self._kill_rest()
        assert self._code is not None
        return self._code

    def _read_output(self, output: IO[bytes]) -> None:
        while True:
            try:
                data = os.read(output.fileno(), 65536)
            except BlockingIOError:
                return
            if not data:
                with contextlib.suppress(KeyError):
                    self._selector.unregister(output)
                return
            self._log.write(data)
            self._forward.add(data)
            self._forward.flush()

    def _read_control(self) -> None:
        try:
            data = self._control.recv(4096)
        except OSError:
            data = b""
        if not data:
            self._selector.unregister(self._control)
            self._asked.append(ORPHAN_GRACE)
        for line in data.decode(errors="replace").split("\n"):
            if line.startswith("stop "):
                self._asked.append(float(line.removeprefix("stop ")))

    def _watch_forward(self) -> None:
        """Be woken when the owner reads again, only while there is something to give it."""
        watched = self._forward.descriptor in self._selector.get_map()
        if self._forward.pending and not watched:
            self._selector.register(self._forward.descriptor, selectors.EVENT_WRITE, self._forward.flush)
        elif watched and not self._forward.pending:
            self._selector.unregister(self._forward.descriptor)

    def _until_next_deadline(self) -> float | None:
        deadlines = [at for at in (self._kill_leader_at, self._kill_rest_at, self._give_up_at) if at is not None]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _reap(self) -> None:
        """Collect the dead, orphans of the engine included: as their subreaper this process inherits them."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                self._alone = True
                return
            if pid == 0:
                return
            if pid == self._leader.pid:
                self._code = os.waitstatus_to_exitcode(status)
                self._leader.returncode = self._code
                self._kill_leader_at = None
                self._kill_rest_at = time.monotonic() + SETTLE

    def _act(self) -> None:
        now = time.monotonic()
        while self._asked:
            grace = self._asked.popleft()
            if self._code is None:
                if self._kill_leader_at is None:
                    self._signal_leader(signal.SIGTERM)
                # Asked again, the shorter wait counts.
                self._kill_leader_at = min(now + grace, self._kill_leader_at or now + grace)
        if self._kill_leader_at is not None and now >= self._kill_leader_at:
            self._kill_leader_at = None
            self._signal_leader(signal.SIGKILL)
        if self._kill_rest_at is not None and now >= self._kill_rest_at:
            # A killed process hands its children to this one, so it takes several rounds to get them all.
            self._kill_rest_at = now + 0.05
            self._give_up_at = self._give_up_at or now + GIVE_UP
            self._kill_rest()

    def _signal_leader(self, number: signal.Signals) -> None:
        # Not Popen's own method: that one reaps, and this loop must see every death itself.
        os.kill(self._leader.pid, number)

    def _kill_rest(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._leader.pid, signal.SIGKILL)
        for pid in _children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _finished(self) -> bool:
        if self._code is None:
            return False
        return self._alone or (self._give_up_at is not None and time.monotonic() >= self._give_up_at)


def _children() -> list[int]:
    """Return this process's children as Linux tells them; empty elsewhere."""
    try:
        return [int(pid) for pid in Path("/proc/thread-self/children").read_text().split()]
    except OSError:
        return []


def _supervise(arguments: Sequence[str]) -> int:
    """Be the supervisor: ``--control FD --log PATH -- COMMAND ...``; exit as a shell would (128 + signal)."""
    parser = argparse.ArgumentParser(prog="minder.py", description="Run a command that ends with its owner.")
    parser.add_argument("--control", type=int, required=True, help="descriptor of the socket that the owner holds")
    parser.add_argument("--log", type=Path, required=True, help="file to which the command's output is appended")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args(arguments)
    control = socket.socket(fileno=options.control)
    os.set_inheritable(options.control, False)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    log = _Log(options.log)
    try:
        supervisor = _Supervisor(options.command, control, log)
    except OSError as error:
        message = f"{options.command[0]} cannot be started: {error.strerror or error}\n".encode()
        log.write(message)
        os.write(sys.stdout.fileno(), message)
        return 127
    code = supervisor.run()
    log.close()
    return code if code >= 0 else _SIGNAL_BASE - code


# ---------------------------------------------------------------------------------------------------------------------
# The owner's side
# ---------------------------------------------------------------------------------------------------------------------


def supervised(command: Sequence[str], log_path: Path, control: int) -> list[str]:
    """Return the command that runs ``command`` under a supervisor which inherits the socket ``control``.

    Start it in a session of its own, or Ctrl-C reaches the engine before its owner can stop it in order.
    """
    # No site packages, no environment: nothing of the owner's installation can disturb it.
    supervisor = [sys.executable, "-I", "-S", str(Path(__file__).resolve())]
    return [*supervisor, "--control", str(control), "--log", str(log_path), "--", *command]


@dataclass(frozen=True, slots=True)
class Address:
    """Where an engine listens: a Unix socket when ``unix`` is set, else TCP."""

    host: str = "127.0.0.1"
    port: int = 0
    unix: Path | None = None

    def __str__(self) -> str:
        return f"unix:{self.unix}" if self.unix else f"http://{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Phase:
    """A stage of loading as the engine's log tells it.

    ``pattern`` is searched in each line; ``text`` is for a person. Groups named ``done`` and ``total`` are counts.
    """

    pattern: re.Pattern[str]
    text: str


@dataclass(frozen=True, slots=True)
class Exit:
    """How an engine ended: ``code`` as in subprocess (negative: a signal), ``asked`` when its owner stopped it."""

    name: str
    code: int
    seconds: float
    last_lines: tuple[str, ...]
    asked: bool

    def __str__(self) -> str:
        """Say it in one line, with the cause when the log names one."""
        how = f"killed by {signal.Signals(-self.code).name}" if self.code < 0 else f"exit code {self.code}"
        if self.asked:
            return f"{self.name} stopped ({how})"
        if self.code == -signal.SIGKILL:
            how += ", often for lack of memory"
        return f"{self.name} ended by itself after {self.seconds:.0f} s ({how}): {_cause(self.last_lines)}"


_ERROR = re.compile(r"(?<![\w.])(?:[\w.]*(?:Error|Exception)|error): .+|\S+ cannot be started: .+")
_MEANT_ELSEWHERE = re.compile(r"root cause|see (the )?stack trace|\bWARNING\b", re.IGNORECASE)
_CAUSE_LIMIT = 300


def _cause(lines: Sequence[str]) -> str:
    """Find why a process ended: the last error that does not point to another one, with its indented second line."""
    for index in range(len(lines) - 1, -1, -1):
        error = _ERROR.search(lines[index])
        if error is None or _MEANT_ELSEWHERE.search(lines[index]):
            continue
        following = lines[index + 1] if index + 1 < len(lines) else ""
        text = error.group() + (f" {following.strip()}" if following.startswith("  ") else "")
        return text if len(text) <= _CAUSE_LIMIT else text[:_CAUSE_LIMIT] + "..."
    return lines[-1] if lines else "it wrote nothing"


class MinderError(Exception):
    """The engine could not be started; the message says what happened and what to do."""


class Minder:
    """Owns one engine process tree from start to stop.

    ``on_line`` gets each line of the engine's output, ``on_phase`` each stage of loading as (text, done, total) where
    done and total may be None. Both are called in the event loop and must return at once. One Minder starts one engine
    once. Whoever started it calls ``stop``.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        address: Address,
        log_path: Path,
        ready_path: str = "/health",
        phases: Sequence[Phase] = (),
        on_line: Callable[[str], None] | None = None,
        on_phase: Callable[[str, int | None, int | None], None] | None = None,
        last_lines: int = 400,
    ) -> None:
        self.name = name
        self.address = address
        self.log_path = log_path
        self.engine_pid: int | None = None
        """The engine's first process and process group, once started."""
        self._command = tuple(command)
        self._environment = dict(environment)
        self._ready_path = ready_path
        self._phases = tuple(phases)
        self._on_line = on_line
        self._on_phase = on_phase
        self._last_lines: deque[str] = deque(maxlen=last_lines)
        self._told: tuple[str, int | None, int | None] | None = None
        self._asked = False
        self._started_at = 0.0
        self._exit: asyncio.Future[Exit] | None = None
        self._supervisor: asyncio.subprocess.Process | None = None
        self._control: asyncio.StreamWriter | None = None
        self._watching: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the engine. Raises ``MinderError`` when its address is taken."""
        _claim(self.name, self.address)
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self._supervisor = await asyncio.create_subprocess_exec(
                    *supervised(self._command, self.log_path, theirs.fileno()),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    env=self._environment,
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,
                )
            except BaseException:
                ours.close()
                raise
        loop = asyncio.get_running_loop()
        self._started_at = loop.time()
        self._exit = loop.create_future()
        reader, self._control = await asyncio.open_connection(sock=ours)
        self._watching = asyncio.create_task(self._watch(reader), name=f"minder of {self.name}")

    async def _watch(self, control: asyncio.StreamReader) -> None:
        """Follow the engine to its end."""
        assert self._supervisor is not None and self._exit is not None and self._control is not None
        output = asyncio.create_task(self._follow_output(), name=f"output of {self.name}")
        # A supervisor that ends with something unread resets the socket: an end like any other.
        with contextlib.suppress(OSError):
            while line := (await control.readline()).decode():
                self.engine_pid = int(line.removeprefix("started "))
        code = await self._supervisor.wait()
        if code < 0:
            self._end_group()
        elif code > _SIGNAL_BASE:
            code = _SIGNAL_BASE - code
        await output
        self._control.close()
        with contextlib.suppress(OSError):
            await self._control.wait_closed()
        seconds = asyncio.get_running_loop().time() - self._started_at
        self._exit.set_result(Exit(self.name, code, seconds, tuple(self._last_lines), self._asked))

    async def _follow_output(self) -> None:
        assert self._supervisor is not None and self._supervisor.stdout is not None
        lines = Lines()
        while data := await self._supervisor.stdout.read(65536):
            self._take(lines.feed(data))
        self._take(lines.end())

    def _take(self, lines: Iterable[str]) -> None:
        for line in lines:
            self._last_lines.append(line)
            if self._on_line is not None:
                self._on_line(line)
            self._look_for_phase(line)

    def _look_for_phase(self, line: str) -> None:
        for phase in self._phases:
            if match := phase.pattern.search(line):
                counts = match.groupdict()
                told = (phase.text, _count(counts.get("done")), _count(counts.get("total")))
                if told != self._told and self._on_phase is not None:
                    self._on_phase(*told)
                self._told = told
                return

    def _end_group(self) -> None:
        """The supervisor died: end what it can no longer end."""
        if self.engine_pid is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.engine_pid, signal.SIGKILL)

    async def wait_ready(self, within: float, poll: float = 0.25) -> float:
        """Wait until the engine answers 200 on its ready path; return the seconds since its start.

        Raises ``MinderError`` when it ends before, or is not ready ``within`` seconds; it then still runs.
        """
        assert self._exit is not None, "start() comes first"
        loop = asyncio.get_running_loop()
        while not (await probe(self.address, self._ready_path) and self._answered_itself()):
            await asyncio.wait({self._exit}, timeout=poll)
            if self._exit.done():
                raise MinderError(f"{self._exit.result()} (the whole log: {self.log_path})")
            if loop.time() - self._started_at > within:
                raise MinderError(
                    f"{self.name} is not ready after {within:.0f} s; its log, {self.log_path}, says how far it came"
                )
        return loop.time() - self._started_at

    def _answered_itself(self) -> bool:
        assert self._supervisor is not None
        return self.address.unix is not None or _is_ours(self.address.port, self._supervisor.pid)

    async def wait(self) -> Exit:
        """Wait for the engine's end, however it comes."""
        assert self._exit is not None, "start() comes first"
        return await asyncio.shield(self._exit)

    async def stop(self, grace: float = 10.0) -> Exit | None:
        """Stop the engine: SIGTERM, ``grace`` seconds, SIGKILL of all its processes. None when it never started.

        Its Unix socket goes too: many engines leave the file. Calling it again is harmless; a shorter ``grace`` then
        counts.
        """
        if self._exit is None or self._control is None or self._supervisor is None:
            return None
        ran = not self._exit.done()
        if ran:
            self._asked = True
            with contextlib.suppress(OSError):
                self._control.write(f"stop {grace}\n".encode())
            await asyncio.wait({self._exit}, timeout=grace + SETTLE + GIVE_UP + 1)
        if not self._exit.done():
            with contextlib.suppress(ProcessLookupError):
                self._supervisor.kill()
        ended = await asyncio.shield(self._exit)
        if self._watching is not None:
            await self._watching
        # Only now: had it ended before, another engine might listen on that path meanwhile.
        if ran and self.address.unix is not None:
            self.address.unix.unlink(missing_ok=True)
        return ended


def _count(text: str | None) -> int | None:
    return int(text) if text is not None else None


def _claim(name: str, address: Address) -> None:
    """See that nothing else listens where the engine will, so that no stranger is taken for it."""
    if address.unix is not None:
        _claim_unix(name, address.unix)
        return
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((address.host, address.port))
        except OSError as error:
            raise MinderError(
                f"{name} cannot listen on {address.host} port {address.port}: {(error.strerror or str(error)).lower()};"
                " stop the program that uses it or choose another port"
            ) from error


def _claim_unix(name: str, path: Path) -> None:
    """Remove the file that a killed engine left; refuse one that somebody listens on."""
    if len(os.fsencode(path)) > _UNIX_PATH_LIMIT:
        raise MinderError(
            f"{name} cannot listen on {path}: the path of a Unix socket has at most {_UNIX_PATH_LIMIT} bytes;"
            " name a shorter one"
        )
    with socket.socket(socket.AF_UNIX) as visitor:
        try:
            visitor.connect(str(path))
        except OSError:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                reason = (error.strerror or str(error)).lower()
                raise MinderError(
                    f"{name} cannot listen on {path}: {reason}; remove it or name another path"
                ) from error
            return
    raise MinderError(f"{name} cannot listen on {path}: another program does; stop it or name another path")


def _is_ours(port: int, ancestor: int) -> bool:
    """Tell whether who listens on a TCP port is a descendant of ``ancestor``. True where Linux does not tell.

    An engine takes half a minute to listen; meanwhile another program may take its port and answer in its place.
    """
    listeners = set()
    for table in ("tcp", "tcp6"):
        for line in _read_lines(Path("/proc/net") / table)[1:]:
            fields = line.split()
            if fields[3] == _LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                listeners.add(f"socket:[{fields[9]}]")
    parents = _parents()
    if not listeners or ancestor not in parents:
        return True
    return any(listeners & _open_files(pid) for pid in parents if ancestor in _ancestors(pid, parents))


def _parents() -> dict[int, int]:
    """Return each process's parent; empty where Linux does not tell."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        for line in _read_lines(status)[-1:]:
            # The second field, the name, is in brackets and may hold anything, line ends too.
            parents[int(status.parent.name)] = int(line.rpartition(")")[2].split()[1])
    return parents


def _ancestors(pid: int, parents: Mapping[int, int]) -> Iterator[int]:
    while pid in parents:
        yield pid
        pid = parents[pid]


def _open_files(pid: int) -> set[str]:
    try:
        return {str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir()}
    except OSError:
        return set()


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []


async def probe(address: Address, path: str, within: float = 5.0) -> bool:
    """Tell whether a GET of ``path`` is answered with 200 ``within`` seconds."""
    try:
        async with asyncio.timeout(within):
            return await _status(address, path) == 200
    except (OSError, TimeoutError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        return False


async def _status(address: Address, path: str) -> int:
    if address.unix is not None:
        reader, writer = await asyncio.open_unix_connection(str(address.unix))
    else:
        reader, writer = await asyncio.open_connection(address.host, address.port)
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nhost: engine\r\nconnection: close\r\n\r\n".encode())
        line = await reader.readuntil(b"\r\n")
        return int(line.split()[1])
    except IndexError as error:
        raise ValueError("not HTTP") from error
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


if __name__ == "__main__":
    sys.exit(_supervise(sys.argv[1:]))
