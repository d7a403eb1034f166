"""The agent beside an engine: standard library only, one file, Python 3.10 or later: it fits into any engine's image.

    python minder.py run --name NAME --control unix:/run/engine.control --log engine.log \\
        --address http://127.0.0.1:8000 -- COMMAND ...

Its law: **an engine never runs unwatched**. The agent is the parent of everything the engine starts:

- It starts the engine in a process group of its own, writes its output to a log, and asks its ready path until it
  answers. An engine that ends by itself is started again, later each time; one that does so too often is given up.
- It stops in order: phase ``draining`` (gateways that follow it send nothing new and tell when they are through),
  SIGTERM, a bounded wait (vLLM waits for ever on open responses), SIGKILL of all that is left.
- When its owner dies, even by SIGKILL, the socket they share ends and the agent ends the engine; told to keep it, it
  goes on, and a new owner finds it by its control port.
- When the agent itself dies, also by SIGKILL, the kernel kills the engine and the agent's keeper, its parent that does
  nothing else, kills what the engine had started (Linux). When the keeper dies, the agent stops in order.
- It has no thread: one event loop over signals, pipes, sockets and deadlines, so that a function may run between fork
  and exec.

The parts, in order: 1 facts, 2 when to start again (pure), 3 addresses, 4 output, 5 one run of a process tree, 6 the
agent, 7 its control port, 8 commands. The owner's side is ``engines.minding``; ``once`` is the same tree without an
agent, for short-lived commands such as installers (``engines.steps``).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import hashlib
import hmac
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import parse_qsl, urlsplit

ORPHAN_GRACE = 5.0
"""Seconds an engine gets to end after its owner has died."""
SETTLE = 2.0
"""Seconds the engine's other processes get to end by themselves after its first one has ended."""
GIVE_UP = 5.0
"""Seconds after SIGKILL at which the agent leaves even if a process hangs in the kernel."""
LOG_LIMIT = 64 * 1024 * 1024
"""Bytes at which the log becomes ``NAME.log.1`` and a new one begins."""
POLL = 0.25
"""Seconds between two looks at an engine that loads."""
LOOK = 5.0
"""Seconds between two looks at an engine that works."""
FIRST_LISTENER = 5.0
"""Seconds an agent that was told to stay waits for its owner to listen before it starts the engine."""
MAX_WAIT = 3600.0
"""Seconds: the most that a drain or a stop may be told to wait."""

_T = TypeVar("_T")

_PENDING_LIMIT = 1024 * 1024
_LINE_LIMIT = 64 * 1024
_KEPT_LINES = 1000
_KEPT_LINE = 4096
_MOST_DIGITS = 19
_SIGNAL_BASE = 128
_CANNOT_START = 127
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_LISTENING = "0A"
_UNIX_PATH_LIMIT = 107


# ---------------------------------------------------------------------------------------------------------------------
# 1. Facts
# ---------------------------------------------------------------------------------------------------------------------

STARTING = "starting"
"""It loads, or is about to be started."""
READY = "ready"
"""It answers, but its owner has something to do before it gets traffic."""
SERVING = "serving"
"""It answers and may be sent requests."""
DRAINING = "draining"
"""It answers what it was asked and is sent nothing new."""
STOPPING = "stopping"
"""It was told to end."""
WAITING = "waiting"
"""It ended by itself and is started again later."""
STOPPED = "stopped"
"""It was told to end, and did."""
FAILED = "failed"
"""It ended by itself too often: nothing happens until somebody says ``start`` or ``restart``."""


@dataclass(frozen=True)
class Phase:
    """A stage of loading as the engine's log tells it.

    ``pattern`` is searched in each line; ``text`` is for a person. Groups named ``done`` and ``total`` are counts.
    """

    pattern: re.Pattern[str]
    text: str


@dataclass(frozen=True)
class Progress:
    """How far loading has come; the counts where the log tells them."""

    text: str
    done: int | None = None
    total: int | None = None


@dataclass(frozen=True)
class Exit:
    """How an engine ended: ``code`` as in subprocess (negative: a signal), ``asked`` when it was told to."""

    name: str
    code: int
    seconds: float
    cause: str
    asked: bool

    def __str__(self) -> str:
        """Say it in one line."""
        how = f"killed by {_signal_name(-self.code)}" if self.code < 0 else f"exit code {self.code}"
        if self.asked:
            return f"{self.name} stopped ({how})"
        if self.code == _CANNOT_START and not self.seconds:
            return self.cause
        if self.code == -signal.SIGKILL:
            how += ", often for lack of memory"
        return f"{self.name} ended by itself after {self.seconds:.0f} s ({how}): {self.cause}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # most real-time signals have none
        return f"signal {number}"


@dataclass(frozen=True)
class State:
    """What the agent tells of its engine, on its control port as JSON.

    ``phase`` is one of the words above, ``since`` when it began (seconds since 1970), ``pid`` the engine's first
    process while it runs. ``starts`` counts every start, ``restarts`` those after an end by itself. ``arguments`` is
    the digest of command and mark (``arguments_digest``). ``message`` says in one line what a person should know.
    ``owned`` tells that an owner holds it, ``kept`` that it outlives one, ``gated`` that it gets no traffic before its
    owner says ``release``.
    """

    name: str
    phase: str
    since: float
    minder_pid: int
    address: str | None
    arguments: str
    log: str
    kept: bool
    owned: bool
    gated: bool
    pid: int | None = None
    starts: int = 0
    restarts: int = 0
    drained: bool = False
    progress: Progress | None = None
    last_exit: Exit | None = None
    message: str = ""


def read_state(tree: Mapping[str, Any]) -> State:
    """Return the state that JSON tells; what a newer agent adds is passed over. ValueError when it tells none."""
    try:
        known = {one.name: tree[one.name] for one in fields(State) if one.name in tree}
        for name, kind in (("progress", Progress), ("last_exit", Exit)):
            if known.get(name) is not None:
                known[name] = _checked(kind(**known[name]))
        return _checked(State(**known))
    except TypeError as error:
        raise ValueError(f"no state of a minder: {error}") from None


_KINDS: dict[str, type] = {
    "str": str,
    "bool": bool,
    "int": int,
    "float": float,
    "None": type(None),
    "Progress": Progress,
    "Exit": Exit,
}
_MOST = 2**53


def _checked(told: _T) -> _T:
    """Return what JSON told if all of it can be shown, counted and written as JSON again. ValueError else."""
    for one in fields(told):  # type: ignore[arg-type]
        value = getattr(told, one.name)
        kinds = [_KINDS[kind] for kind in str(one.type).split(" | ")]
        # A whole number is a time too, but true is no number; neither is what is not finite.
        fits = type(value) in kinds or (type(value) is int and float in kinds)
        if not fits or (isinstance(value, int | float) and not -_MOST < value < _MOST):
            raise ValueError(f"no state of a minder: {one.name} cannot be read")
        if isinstance(value, str):
            value.encode()
    return told


def arguments_digest(command: Sequence[str], mark: str) -> str:
    """Return what tells whether an engine runs as wanted; ``mark`` stands for what else matters, such as variables."""
    return hashlib.sha256(json.dumps([list(command), mark]).encode()).hexdigest()[:16]


_ERROR = re.compile(
    r"(?<![\w.])(?:[\w.]*(?:Error|Exception)|error): .+|\b(?:MemoryError|KeyboardInterrupt)$"
    # From the beginning of a word only: from each of its letters a long one would take hours.
    r"|(?<!\S)\S+ cannot be started: .+"
)
_MEANT_ELSEWHERE = re.compile(r"root cause|see (the )?stack trace|\bWARNING\b", re.IGNORECASE)
_CAUSE_LIMIT = 300


def cause_of(lines: Sequence[str]) -> str:
    """Find why a process ended: the last error that does not point to another one, with its indented second line."""
    for index in range(len(lines) - 1, -1, -1):
        error = _ERROR.search(lines[index])
        if error is None or _MEANT_ELSEWHERE.search(lines[index]):
            continue
        following = lines[index + 1] if index + 1 < len(lines) else ""
        text = error.group() + (f" {following.strip()}" if following.startswith("  ") else "")
        return _shortened(text)
    return _shortened(lines[-1]) if lines else "it wrote nothing"


def _shortened(text: str) -> str:
    return text if len(text) <= _CAUSE_LIMIT else text[:_CAUSE_LIMIT] + "..."


# ---------------------------------------------------------------------------------------------------------------------
# 2. When to start again: pure
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RestartPolicy:
    """How often and how soon an engine that ended by itself is started again. Times in seconds.

    The first wait is ``first``, each further one ``factor`` times as long up to ``cap``, all of them shorter or longer
    by up to ``jitter`` (a share), so that engines of one cause do not all load at the same moment. Given up are
    ``never_ready`` ends before it was ever ready, and ``storm`` ends within ``window``. Ready for ``steady``: whatever
    happened before is forgotten.
    """

    first: float = 1.0
    factor: float = 2.0
    cap: float = 60.0
    jitter: float = 0.2
    never_ready: int = 3
    storm: int = 5
    window: float = 900.0
    steady: float = 300.0


@dataclass(frozen=True)
class History:
    """What the policy remembers: when the engine ended by itself, and whether it was ever ready."""

    ends: tuple[float, ...] = ()
    ever_ready: bool = False


@dataclass(frozen=True)
class Wait:
    """Start it again after so many seconds."""

    seconds: float


@dataclass(frozen=True)
class GiveUp:
    """Start it no more; ``why`` goes on after "given up: "."""

    why: str


def after_end(
    policy: RestartPolicy, history: History, now: float, ready_for: float | None, chance: float
) -> tuple[History, Wait | GiveUp]:
    """Decide what follows an end by itself.

    ``ready_for`` is how long it had been ready, None: it was not. ``chance`` is random, from 0 to 1.
    """
    forgiven = ready_for is not None and ready_for >= policy.steady
    ends = (() if forgiven else history.ends) + (now,)
    history = History(ends, history.ever_ready or ready_for is not None)
    if not history.ever_ready and len(ends) >= policy.never_ready:
        return history, GiveUp(f"it ended {_times(len(ends))} and was never ready")
    recent = sum(1 for end in ends if now - end <= policy.window)
    if recent >= policy.storm:
        return history, GiveUp(f"it ended {_times(recent)} within {policy.window:.0f} s")
    # More of them are not remembered than the longest wait needs.
    history = replace(history, ends=ends[-max(policy.storm, 16) :])
    wait = min(policy.cap, policy.first * policy.factor ** min(len(ends) - 1, 64))
    return history, Wait(wait * (1 + policy.jitter * (2 * chance - 1)))


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


# ---------------------------------------------------------------------------------------------------------------------
# 3. Addresses: where an engine or a control port listens
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Address:
    """Where an engine listens: a Unix socket when ``unix`` is set, else TCP."""

    host: str = "127.0.0.1"
    port: int = 0
    unix: Path | None = None

    def __str__(self) -> str:
        if self.unix is not None:
            return f"unix:{self.unix}"
        return f"http://[{self.host}]:{self.port}" if ":" in self.host else f"http://{self.host}:{self.port}"


class AddressError(Exception):
    """An address cannot be used; the message says why and what to do."""


def parse_address(text: str) -> Address:
    """Read ``unix:/path`` or ``http://host:port``. AddressError when it is neither."""
    if text.startswith("unix:"):
        return Address(unix=Path(text.removeprefix("unix:")))
    parts = urlsplit(text)
    try:
        if parts.scheme == "http" and parts.hostname and parts.port is not None:
            return Address(parts.hostname, parts.port)
    except ValueError:
        pass
    raise AddressError(f"{text!r} is no address; write unix:/path or http://host:port")


def claim(name: str, address: Address) -> None:
    """See that nothing else listens where ``name`` will, so that no stranger is taken for it. AddressError else."""
    if address.unix is not None:
        _claim_unix(name, address.unix)
        return
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((address.host, address.port))
        except OSError as error:
            raise AddressError(
                f"{name} cannot listen on {address.host} port {address.port}: {_reason(error)};"
                " stop the program that uses it or choose another port"
            ) from error


def _claim_unix(name: str, path: Path) -> None:
    """Remove the file that a killed program left; refuse one that somebody listens on."""
    if len(os.fsencode(path)) > _UNIX_PATH_LIMIT:
        raise AddressError(
            f"{name} cannot listen on {path}: the path of a Unix socket has at most {_UNIX_PATH_LIMIT} bytes;"
            " name a shorter one"
        )
    try:
        if not listens(path):
            if path.exists() and not path.is_socket():
                raise AddressError(f"{name} cannot listen on {path}: it is no socket; remove it or name another path")
            path.unlink(missing_ok=True)
            return
    except OSError as error:
        raise AddressError(
            f"{name} cannot listen on {path}: {_reason(error)}; remove it or name another path"
        ) from error
    raise AddressError(f"{name} cannot listen on {path}: another program does; stop it or name another path")


def listens(path: Path) -> bool:
    """Tell whether somebody listens on a Unix socket. OSError when that cannot be known."""
    with socket.socket(socket.AF_UNIX) as visitor:
        # Without waiting: the queue of a program that hangs may be full.
        visitor.setblocking(False)
        try:
            visitor.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except BlockingIOError:
            return True
    return True


def listen_unix(name: str, path: Path) -> socket.socket:
    """Listen on a Unix socket that its user alone can connect to. AddressError when it cannot be done."""
    _claim_unix(name, path)
    listener = socket.socket(socket.AF_UNIX)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        before = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
        listener.listen(64)
    except OSError as error:
        listener.close()
        raise AddressError(f"{name} cannot listen on {path}: {_reason(error)}; name another path") from error
    return listener


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


async def _within(awaitable: Awaitable[_T], seconds: float) -> _T:
    """Wait so long for a result; TimeoutError else. asyncio's own may swallow a cancellation before Python 3.12, and
    raises another error before 3.11."""
    task = asyncio.ensure_future(awaitable)
    try:
        await asyncio.wait({task}, timeout=seconds)
        if not task.done():
            raise TimeoutError
        return task.result()
    finally:
        task.cancel()


async def probe(address: Address, path: str, within: float = 5.0) -> bool:
    """Tell whether a GET of ``path`` is answered with 200 ``within`` seconds."""
    return await _status(address, path, within) == 200


async def _status(address: Address, path: str, within: float) -> int | None:
    """Return the status a GET is answered with: 0 when nothing listens, None when nothing came in time."""
    try:
        return await _within(_get(address, path), within)
    except TimeoutError:
        return None
    except (OSError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        return 0


async def _get(address: Address, path: str) -> int:
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


def _is_ours(port: int, ancestor: int) -> bool:
    """Tell whether who listens on a TCP port is a descendant of ``ancestor``. True where Linux does not tell.

    An engine takes half a minute to listen; meanwhile another program may take its port and answer in its place.
    """
    listeners = set()
    for table in ("tcp", "tcp6"):
        for line in _read_lines(Path("/proc/net") / table)[1:]:
            values = line.split()
            if values[3] == _LISTENING and int(values[1].rpartition(":")[2], 16) == port:
                listeners.add(f"socket:[{values[9]}]")
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
        return {os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()}  # noqa: PTH115 - no Path wanted
    except OSError:
        return set()


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []


# ---------------------------------------------------------------------------------------------------------------------
# 4. Output
# ---------------------------------------------------------------------------------------------------------------------


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
            self._begin_anew()
        with contextlib.suppress(OSError):
            self._size += self._file.write(data) or 0

    def _begin_anew(self) -> None:
        """Put the full file aside. Somebody may have moved or removed it, or its directory: then lines go on to a new
        one, or to the one that is open, and it is tried again after as many bytes."""
        self._size = 0
        with contextlib.suppress(OSError):
            self._path.replace(self._path.with_name(self._path.name + ".1"))
        full = self._file
        with contextlib.suppress(OSError):
            self._open()
            full.close()

    def close(self) -> None:
        self._file.close()


class _Forward:
    """What still has to go to standard output. Who reads it slowly loses lines (the log has them); it never holds up
    the engine."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._open = True
        self._watched = False
        self._pending = bytearray()
        os.set_blocking(descriptor, False)

    def add(self, data: bytes) -> None:
        if self._open and len(self._pending) + len(data) <= _PENDING_LIMIT:
            self._pending += data
            self._flush()

    def _flush(self) -> None:
        """Write as much as is taken now, and be woken for the rest."""
        try:
            while self._pending:
                del self._pending[: os.write(self._descriptor, self._pending)]
        except BlockingIOError:
            pass
        except OSError:
            self._open = False
            self._pending.clear()
        if bool(self._pending) != self._watched:
            self._watched = not self._watched
            loop = asyncio.get_running_loop()
            if self._watched:
                loop.add_writer(self._descriptor, self._flush)
            else:
                loop.remove_writer(self._descriptor)

    def finish(self) -> None:
        """Wait until everything is taken: nothing is held up by it any more."""
        if self._watched:
            asyncio.get_running_loop().remove_writer(self._descriptor)
        os.set_blocking(self._descriptor, True)
        with contextlib.suppress(OSError):
            while self._pending:
                del self._pending[: os.write(self._descriptor, self._pending)]


# ---------------------------------------------------------------------------------------------------------------------
# 5. One run of a process tree
# ---------------------------------------------------------------------------------------------------------------------


def _prctl(option: int, value: int) -> None:
    """Ask the Linux kernel; elsewhere this is not available and the socket alone has to do."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _before_exec() -> None:
    """In the child: a process group of its own, that the kernel kills when its parent dies."""
    os.setpgid(0, 0)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class _Tree:
    """A command and everything it starts, from its start to the end of the last process.

    Its parent must be a subreaper, and call ``reap`` on SIGCHLD. OSError when the command cannot be started.
    """

    def __init__(self, command: Sequence[str], settle: float, on_output: Callable[[bytes], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_output = on_output
        self._settle = settle
        self._code: int | None = None
        self._began = self._loop.time()
        self.seconds = 0.0
        """How long its first process has lived."""
        self._kill_at: float | None = None
        self._give_up_at: float | None = None
        self._timers: list[asyncio.TimerHandle] = []
        self.ended: asyncio.Future[int] = self._loop.create_future()
        """Done with the first process's return code, once all are gone."""
        self.asked = False
        """Whether it was told to end while it ran."""
        # One thread, no lock held: a function between fork and exec is safe here.
        self._leader = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=_before_exec,  # noqa: PLW1509
        )
        self._output: IO[bytes] = self._leader.stdout  # type: ignore[assignment]
        os.set_blocking(self._output.fileno(), False)
        self._loop.add_reader(self._output, self._read)

    @property
    def pid(self) -> int:
        """The first process, and its process group."""
        return self._leader.pid

    def stop(self, grace: float) -> None:
        """SIGTERM now and SIGKILL after ``grace`` seconds; asked again, the shorter wait counts."""
        if self._code is not None:
            return
        at = self._loop.time() + grace
        if self._kill_at is None:
            self.asked = True
            self._signal_leader(signal.SIGTERM)
        if self._kill_at is None or at < self._kill_at:
            self._kill_at = at
            self._timers.append(self._loop.call_at(at, self._kill_leader))

    def _kill_leader(self) -> None:
        if self._code is None:
            self._signal_leader(signal.SIGKILL)

    def _signal_leader(self, number: signal.Signals) -> None:
        # Not Popen's own method: that one reaps, and ``reap`` must see every death itself.
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._leader.pid, number)

    def reap(self) -> None:
        """Collect the dead, orphans of the engine included: as their subreaper this process inherits them."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                if self._code is not None:
                    self._finish()
                return
            if pid == 0:
                return
            if pid == self._leader.pid:
                self._code = self._leader.returncode = os.waitstatus_to_exitcode(status)
                self.seconds = self._loop.time() - self._began
                self._timers.append(self._loop.call_later(self._settle, self._kill_rest))

    def _kill_rest(self) -> None:
        """A killed process hands its children to this one, so it takes several rounds to get them all."""
        now = self._loop.time()
        self._give_up_at = self._give_up_at or now + GIVE_UP
        self._kill_all()
        if now >= self._give_up_at:
            self._finish()
        else:
            self._timers.append(self._loop.call_later(0.05, self._kill_rest))

    def _kill_all(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._leader.pid, signal.SIGKILL)
        for pid in _children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _read(self) -> bool:
        """Take what one read brings; tell whether there may be more."""
        try:
            data = os.read(self._output.fileno(), 65536)
        except BlockingIOError:
            return False
        if data:
            self._on_output(data)
        else:
            self._loop.remove_reader(self._output)
        return bool(data)

    def _finish(self) -> None:
        if self.ended.done():
            return
        for timer in self._timers:
            timer.cancel()
        if sys.platform != "linux":
            # No subreaper there: the group is all that is known.
            self._kill_all()
        while self._read():
            pass
        self._loop.remove_reader(self._output)
        self._output.close()
        assert self._code is not None
        self.ended.set_result(self._code)


def _be_kept() -> None:
    """Go on as a child of this process, which becomes the keeper: it never returns from here.

    The kernel kills an engine whose agent is killed, but not what that engine has started: vLLM's worker would go on,
    and hold its device. All of them become the keeper's children then. Called while there is one thread.
    """
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    kept = (signal.SIGTERM, signal.SIGINT)
    signal.pthread_sigmask(signal.SIG_BLOCK, kept)
    keeper, agent = os.getpid(), os.fork()
    if agent:
        for number in kept:
            signal.signal(number, lambda number, _: os.kill(agent, number))
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, kept)
        os._exit(_keep(agent))
    # Ctrl-C reaches the keeper alone, which hands it on: once, not twice.
    os.setpgid(0, 0)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, kept)
    if os.getppid() != keeper:
        sys.exit(_SIGNAL_BASE + signal.SIGKILL)


def _keep(agent: int) -> int:
    """Wait for the agent's end, then kill all it left; return its exit code as a shell tells it."""
    os.closerange(3, 1024)
    code: int | None = None

    def give_up(*_: object) -> None:
        os._exit(code or 0)

    signal.signal(signal.SIGALRM, give_up)
    while True:
        try:
            pid, status = os.waitpid(-1, 0)
        except ChildProcessError:
            return code or 0
        if pid == agent:
            code = _shell_code(os.waitstatus_to_exitcode(status))
            signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
            # A process that hangs in the kernel is not waited for.
            signal.setitimer(signal.ITIMER_REAL, GIVE_UP)
        if code is not None:
            for child in _children():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)


def _children() -> list[int]:
    """Return this process's children as Linux tells them; empty elsewhere."""
    try:
        return [int(pid) for pid in Path("/proc/thread-self/children").read_text().split()]
    except OSError:
        return []


def _watch_owner(descriptor: int, gone: Callable[[], None]) -> None:
    """Call ``gone`` once the other end of an inherited socket is closed, however its holder died."""
    os.set_inheritable(descriptor, False)
    loop = asyncio.get_running_loop()
    owner = socket.socket(fileno=descriptor)
    owner.setblocking(False)

    def look() -> None:
        try:
            data = owner.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            loop.remove_reader(owner)
            owner.close()
            gone()

    loop.add_reader(owner, look)


def _shell_code(code: int) -> int:
    """Return what a shell says of a return code: 128 + signal for a signal."""
    return code if code >= 0 else _SIGNAL_BASE - code


# ---------------------------------------------------------------------------------------------------------------------
# 6. The agent
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What an agent is told once, when it is started. Times in seconds.

    ``address`` None: the engine counts as serving as soon as it runs. ``stay``: when the engine is given up, remain to
    be asked about it. ``drain`` and ``grace`` are for the agent's own SIGTERM. ``dead_after``: an engine whose ready
    path says for so long that it does not work is ended and started again (0: never); no answer at all is no sign of
    that, an engine may be busy. ``settle``: what the engine's other processes get to end by themselves.
    """

    name: str
    command: tuple[str, ...]
    log: Path
    address: Address | None = None
    ready_path: str = "/health"
    phases: tuple[Phase, ...] = ()
    policy: RestartPolicy = field(default_factory=RestartPolicy)
    mark: str = ""
    keep: bool = False
    gated: bool = False
    stay: bool = False
    drain: float = 30.0
    grace: float = 30.0
    dead_after: float = 30.0
    settle: float = SETTLE


class _Feed:
    """What one listener on the control port has still to be told; one that is too slow is let go."""

    def __init__(self, *, states: bool, lines: bool, follower: str = "") -> None:
        self.states = states
        self.lines = lines
        self.follower = follower
        self.drained = False
        self._over = False
        self._queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue(1024)

    def put(self, item: dict[str, Any] | None) -> None:
        if self._over:
            return
        try:
            self._queue.put_nowait(item)
        except asyncio.QueueFull:
            self._over = True
            self._queue = asyncio.Queue()
            self._queue.put_nowait(None)

    async def get(self) -> dict[str, Any] | None:
        return await self._queue.get()


class Agent:
    """Owns one engine: its runs one after the other, what is known of it, and who is told."""

    def __init__(self, plan: Plan, log: _Log, forward: _Forward | None, *, owned: bool = False) -> None:
        self.plan = plan
        self.command = plan.command
        self.exit_code = 0
        self.last_lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._run_lines: deque[str] = deque(maxlen=400)
        self._log = log
        self._forward = forward
        self._lines = Lines()
        self._tree: _Tree | None = None
        self._history = History()
        self._ready_at: float | None = None
        self._dead: str | None = None
        self._wanted = True
        self._leaving = False
        self._bound_to_leave = False
        self._released = 0
        self._told = asyncio.Event()
        self._drained = asyncio.Event()
        self._listened = asyncio.Event()
        self._taking_down: asyncio.Task[None] | None = None
        self._feeds: list[_Feed] = []
        self._followed = False
        self.state = State(
            name=plan.name,
            phase=STARTING,
            since=time.time(),
            minder_pid=os.getpid(),
            address=str(plan.address) if plan.address else None,
            arguments=arguments_digest(plan.command, plan.mark),
            log=str(plan.log),
            kept=plan.keep,
            owned=owned,
            gated=plan.gated,
        )

    # What is told.

    def _set(self, **changes: Any) -> None:
        if changes.get("phase", self.state.phase) != self.state.phase:
            changes["since"] = time.time()
        self.state = replace(self.state, **changes)
        self._publish({"state": asdict(self.state)}, states=True)

    def _publish(self, item: dict[str, Any] | None, *, states: bool = False, lines: bool = False) -> None:
        for feed in self._feeds:
            if (states and feed.states) or (lines and feed.lines):
                feed.put(item)

    def listen(self, feed: _Feed) -> None:
        """Tell ``feed`` everything from now on, beginning with the state."""
        self._feeds.append(feed)
        self._followed = self._followed or bool(feed.follower)
        self._listened.set()
        if feed.states:
            feed.put({"state": asdict(self.state)})

    def forget(self, feed: _Feed) -> None:
        """Tell ``feed`` nothing more."""
        self._feeds.remove(feed)
        self._look_whether_drained()

    # Its life.

    async def live(self) -> int:
        """Run the engine until told to leave, or until it is given up; return the exit code."""
        if self.plan.stay:
            # Whoever stays with it wants to hear everything from the first line on.
            with contextlib.suppress(TimeoutError):
                await _within(self._listened.wait(), FIRST_LISTENER)
        while not self._leaving:
            if self._wanted:
                await self._run_once()
            else:
                self._told.clear()
                await self._told.wait()
        self._publish(None, states=True, lines=True)
        return self.exit_code

    async def _run_once(self) -> None:
        self._ready_at = self._dead = None
        self._set(phase=STARTING, starts=self.state.starts + 1, progress=None, message="", drained=False)
        code, seconds, cause = await self._run_tree()
        asked = self._taking_down is not None
        if self._taking_down is not None:
            self._taking_down.cancel()
            self._taking_down = None
        ended = Exit(self.plan.name, code, seconds, cause, asked)
        if not asked:
            await self._after_end_by_itself(ended, asyncio.get_running_loop().time())
        elif self._wanted:
            self._set(phase=STARTING, pid=None, last_exit=ended)
        else:
            self._set(phase=STOPPED, pid=None, last_exit=ended, message=str(ended))

    async def _run_tree(self) -> tuple[int, float, str]:
        """Start the engine and see it through; return its return code, the seconds it lived, and why it ended as far
        as its log tells."""
        plan = self.plan
        self._run_lines.clear()
        try:
            if plan.address is not None:
                claim(plan.name, plan.address)
            tree = self._tree = _Tree(self.command, self.plan.settle, self._take_output)
        except AddressError as error:
            self._take_output(f"{error}\n".encode())
            return _CANNOT_START, 0.0, str(error)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            # ValueError: an argument that no program can be given.
            why = f"{self.command[0]} cannot be started: {getattr(error, 'strerror', None) or error}"
            self._take_output(f"{why}\n".encode())
            return _CANNOT_START, 0.0, why
        self._set(pid=tree.pid)
        attending = asyncio.ensure_future(self._attend(tree))
        try:
            code = await tree.ended
        finally:
            attending.cancel()
            self._tree = None
        self._take_lines(self._lines.end())
        if plan.address is not None and plan.address.unix is not None:
            # Many engines leave the file. Only now: had it gone before, another engine might listen there meanwhile.
            with contextlib.suppress(OSError):
                plan.address.unix.unlink(missing_ok=True)
        return code, tree.seconds, self._dead or cause_of(self._run_lines)

    async def _after_end_by_itself(self, ended: Exit, now: float) -> None:
        ready_for = None if self._ready_at is None else now - self._ready_at
        self._history, decision = after_end(self.plan.policy, self._history, now, ready_for, random.random())  # noqa: S311
        where = f" (the whole log: {self.plan.log})"
        if isinstance(decision, GiveUp):
            self._wanted, self._leaving = False, self._leaving or not self.plan.stay
            self.exit_code = _shell_code(ended.code) or 1
            self._set(phase=FAILED, pid=None, last_exit=ended, message=f"{ended}{where}; given up: {decision.why}")
            return
        soon = f"; starting it again in {decision.seconds:.0f} s"
        self._set(phase=WAITING, pid=None, last_exit=ended, message=f"{ended}{soon}{where}")
        self._told.clear()
        try:
            await _within(self._told.wait(), decision.seconds)
        except TimeoutError:
            self.state = replace(self.state, restarts=self.state.restarts + 1)
        else:
            if not self._wanted:
                self._set(phase=STOPPED)

    # What the engine says, and whether it answers.

    def _take_output(self, data: bytes) -> None:
        self._log.write(data)
        if self._forward is not None:
            self._forward.add(data)
        self._take_lines(self._lines.feed(data))

    def _take_lines(self, lines: Sequence[str]) -> None:
        for line in lines:
            self._run_lines.append(line[:_KEPT_LINE])
            self.last_lines.append(line[:_KEPT_LINE])
            self._publish({"line": line}, lines=True)
            if self.state.phase == STARTING:
                self._look_for_progress(line)

    def _look_for_progress(self, line: str) -> None:
        for phase in self.plan.phases:
            if match := phase.pattern.search(line):
                counts = match.groupdict()
                progress = Progress(phase.text, _count(counts.get("done")), _count(counts.get("total")))
                if progress != self.state.progress:
                    self._set(progress=progress)
                return

    async def _attend(self, tree: _Tree) -> None:
        """Wait until the engine is ready, then see that it stays alive."""
        address, loop = self.plan.address, asyncio.get_running_loop()
        while not (address is None or await self._is_ready(address)):  # noqa: ASYNC110 - another process is waited for
            await asyncio.sleep(POLL)
        self._ready_at = loop.time()
        self._history = replace(self._history, ever_ready=True)
        if self.state.phase == STARTING:
            self._set(phase=READY if self.plan.gated else SERVING, progress=None)
        bad_since: float | None = None
        while address is not None and self.plan.dead_after:
            await asyncio.sleep(min(LOOK, self.plan.dead_after))
            status = await _status(address, self.plan.ready_path, LOOK)
            if status in (200, None) or self.state.phase == STOPPING:
                bad_since = None
                continue
            bad_since = bad_since or loop.time()
            if loop.time() - bad_since >= self.plan.dead_after:
                told = f"answered {status}" if status else "refused connections"
                self._dead = f"its {self.plan.ready_path} {told} for {self.plan.dead_after:.0f} s"
                self._set(phase=STOPPING)
                tree.stop(self.plan.grace)
                return

    async def _is_ready(self, address: Address) -> bool:
        if not await probe(address, self.plan.ready_path):
            return False
        return address.unix is not None or _is_ours(address.port, os.getpid())

    # What it is told.

    def reap(self) -> None:
        """Take note that a child has ended."""
        if self._tree is not None:
            self._tree.reap()

    def lose_owner(self) -> None:
        """Act on the owner's death."""
        self._set(owned=False)
        if not self.plan.keep:
            self.leave(ORPHAN_GRACE)

    def leave(self, grace: float, drain: float = 0.0) -> None:
        """End the engine in order and go, whatever is said later: the owner is dead, or a signal came."""
        self._bound_to_leave = True
        self.stop(grace, drain, leave=True)

    def start(self) -> bool:
        """Have it run: again after an end, and back from a drain. False when it is bound to leave."""
        if self._bound_to_leave:
            return False
        self._wanted, self._leaving = True, False
        if self._tree is None:
            self._history = History(ever_ready=self._history.ever_ready)
            self._told.set()
        elif self.state.phase == DRAINING:
            if self._taking_down is not None:
                self._taking_down.cancel()
                self._taking_down = None
            released = not self.plan.gated or self._released == self.state.starts
            self._set(phase=SERVING if released else READY, drained=False)
        return True

    def release(self, starts: int) -> bool:
        """Open the run number ``starts`` to traffic, after whatever its owner had to do. False when it is another."""
        if starts != self.state.starts or self.state.phase not in (READY, SERVING):
            return False
        self._released = starts
        if self.state.phase == READY:
            self._set(phase=SERVING)
        return True

    def drain(self) -> bool:
        """Ask the gateways to send nothing new. False when the engine does not work."""
        if self.state.phase == DRAINING:
            return True
        if self.state.phase not in (READY, SERVING):
            return False
        self._drained.clear()
        for feed in self._feeds:
            feed.drained = False
        self._set(phase=DRAINING, drained=False)
        self._look_whether_drained()
        return True

    def drained_at(self, follower: str) -> None:
        """Take that one gateway has no request left at the engine."""
        for feed in self._feeds:
            if feed.follower == follower:
                feed.drained = True
        self._look_whether_drained()

    def _look_whether_drained(self) -> None:
        # A gateway that has left has no request here any more. Where none has ever followed, whoever sends requests
        # cannot tell, so the whole time is waited.
        followers = [feed for feed in self._feeds if feed.follower]
        if self.state.phase == DRAINING and self._followed and all(feed.drained for feed in followers):
            self._drained.set()
            if not self.state.drained:
                self._set(drained=True)

    def restart(self, grace: float, drain: float = 0.0) -> bool:
        """End it in order and start it anew; what happened before is forgotten. False when it is bound to leave."""
        if self._bound_to_leave:
            return False
        self._wanted, self._leaving = True, False
        self._history = History(ever_ready=self._history.ever_ready)
        self._take_down(drain, grace)
        return True

    def stop(self, grace: float, drain: float = 0.0, *, leave: bool = False) -> None:
        """End it in order; ``leave``: and this agent too."""
        self._wanted = False
        self._leaving = self._leaving or leave
        self._take_down(drain, grace)

    def _take_down(self, drain: float, grace: float) -> None:
        self._told.set()
        if self._tree is None:
            return
        if self._taking_down is not None:
            self._taking_down.cancel()
        # At once, so that who asked sees it in the answer.
        draining = drain > 0 and self.drain()
        if not draining and self.state.phase != STOPPING:
            self._set(phase=STOPPING)
        self._taking_down = asyncio.ensure_future(self._drain_and_end(self._tree, drain if draining else 0.0, grace))

    async def _drain_and_end(self, tree: _Tree, drain: float, grace: float) -> None:
        if drain:
            with contextlib.suppress(TimeoutError):
                await _within(self._drained.wait(), drain)
        if self.state.phase != STOPPING:
            self._set(phase=STOPPING)
        tree.stop(grace)

    def replace_arguments(self, arguments: Sequence[str]) -> None:
        """Take other arguments for the next start; the program stays what it was."""
        self.command = (self.command[0], *arguments)
        self._set(arguments=arguments_digest(self.command, self.plan.mark))


def _count(text: str | None) -> int | None:
    """Return a count as a log tells it; None for what is none, or is longer than any."""
    return int(text) if text is not None and text.isdecimal() and len(text) < _MOST_DIGITS else None


# ---------------------------------------------------------------------------------------------------------------------
# 7. The control port: HTTP/1.1, one request a connection, everything bounded
# ---------------------------------------------------------------------------------------------------------------------

_HEAD_LIMIT = 16 * 1024
_BODY_LIMIT = 1024 * 1024
_REQUEST_WITHIN = 5.0
_WRITE_WITHIN = 30.0
_HEARTBEAT = 15.0
_MOST_CONNECTIONS = 64
_MIN_TOKEN = 16
_MOST_ARGUMENTS = 4096

_LEAVES = "this agent is about to leave, with its engine: its owner is gone, or it was sent a signal"

_REASONS = {
    200: "OK",
    202: "Accepted",
    400: "Bad Request",
    401: "Unauthorized",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    409: "Conflict",
    413: "Content Too Large",
    503: "Service Unavailable",
}


class _Refused(Exception):  # noqa: N818 - an answer on its way
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class _Request:
    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes = b""

    def fields(self, *known: str) -> dict[str, Any]:
        """Return the body's fields, a JSON object; an empty body has none."""
        try:
            tree = json.loads(self.body) if self.body.strip() else {}
        except (ValueError, RecursionError):
            tree = None
        if not isinstance(tree, dict):
            raise _Refused(400, "the body should be a JSON object")
        if unknown := sorted(set(tree) - set(known)):
            raise _Refused(400, f"unknown field {unknown[0]!r}; known here: {', '.join(known) or 'none'}")
        return tree


def _is_argument(text: str) -> bool:
    """Tell whether a program can be given a text; half of a surrogate pair cannot be encoded."""
    try:
        return "\0" not in text and bool(os.fsencode(text) or not text)
    except UnicodeEncodeError:
        return False


def _is_number(text: str) -> bool:
    # Digits of other scripts are digits to Python, and some of them no numbers.
    return text.isascii() and text.isdigit()


def _seconds(tree: Mapping[str, Any], name: str, default: float) -> float:
    value = tree.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_WAIT:
        raise _Refused(400, f"{name} should be seconds from 0 to {MAX_WAIT:.0f}")
    return float(value)


def _truth(tree: Mapping[str, Any], name: str) -> bool:
    value = tree.get(name, False)
    if not isinstance(value, bool):
        raise _Refused(400, f"{name} should be true or false")
    return value


async def _read_request(reader: asyncio.StreamReader, allowed: Callable[[Mapping[str, str]], bool]) -> _Request:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.LimitOverrunError:
        raise _Refused(413, f"the request's head has more than {_HEAD_LIMIT} bytes") from None
    first, *lines = head.decode("latin-1").split("\r\n")
    words = first.split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        raise _Refused(400, "this is no HTTP/1.1 request")
    headers = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if colon:
            headers[name.strip().lower()] = value.strip()
    if not allowed(headers):
        raise _Refused(401, "send the token as 'Authorization: Bearer TOKEN'")
    try:
        target = urlsplit(words[1])
    except ValueError:
        raise _Refused(400, "the request's target cannot be read") from None
    request = _Request(words[0], target.path, dict(parse_qsl(target.query)), headers)
    if "transfer-encoding" in headers:
        raise _Refused(400, "send the body with a content-length")
    length = headers.get("content-length", "0")
    if not _is_number(length):
        raise _Refused(400, "content-length should be a number")
    if len(length) > 9 or int(length) > _BODY_LIMIT:
        raise _Refused(413, f"the body has more than {_BODY_LIMIT} bytes")
    return replace(request, body=await reader.readexactly(int(length)))


class Control:
    """Serves an agent's control port. ``token`` None: who can connect may do everything (a Unix socket's rights)."""

    def __init__(self, agent: Agent, token: str | None) -> None:
        self._agent = agent
        self._token = token
        self._tasks: set[asyncio.Task[None]] = set()
        self._servers: list[asyncio.AbstractServer] = []
        self._routes: dict[tuple[str, str], Callable[[_Request], dict[str, Any]]] = {
            ("GET", "/state"): self._state,
            ("POST", "/start"): self._start,
            ("POST", "/release"): self._release,
            ("POST", "/drain"): self._drain,
            ("POST", "/drained"): self._drained,
            ("POST", "/restart"): self._restart,
            ("POST", "/stop"): self._stop,
            ("PUT", "/arguments"): self._arguments,
        }
        self._streams: dict[tuple[str, str], Callable[[_Request], tuple[str, AsyncIterator[bytes]]]] = {
            ("GET", "/events"): self._events,
            ("GET", "/logs"): self._logs,
        }

    async def serve(self, listener: socket.socket) -> None:
        """Begin to serve on a socket that listens."""
        if listener.family == socket.AF_UNIX:
            server: asyncio.AbstractServer = await asyncio.start_unix_server(
                self._connected, sock=listener, limit=_HEAD_LIMIT
            )
        else:
            server = await asyncio.start_server(self._connected, sock=listener, limit=_HEAD_LIMIT)
        self._servers.append(server)

    async def close(self) -> None:
        """Stop listening; who still listens to the end of a stream has a second for it."""
        for server in self._servers:
            server.close()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=1.0)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._serve(reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await _within(writer.wait_closed(), _WRITE_WITHIN)
            # What a listener that reads nothing has not taken would keep its connection open.
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if len(self._tasks) > _MOST_CONNECTIONS:
                raise _Refused(503, "too many connections; try again")
            try:
                request = await _within(_read_request(reader, self._allowed), _REQUEST_WITHIN)
            except TimeoutError:
                raise _Refused(408, f"send the whole request within {_REQUEST_WITHIN:.0f} s") from None
            await self._answer(request, reader, writer)
        except _Refused as refused:
            body = json.dumps({"error": {"message": str(refused)}}).encode()
            await _write(writer, _head(refused.status, "application/json", len(body)) + body)

    def _allowed(self, headers: Mapping[str, str]) -> bool:
        if self._token is None:
            return True
        scheme, _, given = headers.get("authorization", "").partition(" ")
        # Compared as digests: in constant time whatever their lengths.
        theirs, ours = (hashlib.sha256(text.strip().encode()).digest() for text in (given, self._token))
        return scheme.lower() == "bearer" and hmac.compare_digest(theirs, ours)

    async def _answer(self, request: _Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = (request.method, request.path)
        if asked in self._routes:
            body = json.dumps(self._routes[asked](request)).encode()
            await _write(writer, _head(200 if request.method == "GET" else 202, "application/json", len(body)) + body)
        elif asked in self._streams:
            kind, items = self._streams[asked](request)
            await _write(writer, _head(200, kind, None))
            await _stream(items, reader, writer)
        else:
            methods = sorted(method for method, path in (*self._routes, *self._streams) if path == request.path)
            if methods:
                raise _Refused(405, f"{request.path} is for {' or '.join(methods)}")
            paths = sorted({path for _, path in (*self._routes, *self._streams)})
            raise _Refused(404, f"there is nothing at {request.path}; the paths are {', '.join(paths)}")

    # Calls: each is decided at once, and what follows is seen in the state.

    def _state(self, request: _Request) -> dict[str, Any]:
        return asdict(self._agent.state)

    def _start(self, request: _Request) -> dict[str, Any]:
        request.fields()
        if not self._agent.start():
            raise _Refused(409, _LEAVES)
        return asdict(self._agent.state)

    def _release(self, request: _Request) -> dict[str, Any]:
        starts = request.fields("starts").get("starts")
        if isinstance(starts, bool) or not isinstance(starts, int) or not self._agent.release(starts):
            state = self._agent.state
            raise _Refused(409, f"{state.name} is {state.phase} in its start number {state.starts}")
        return asdict(self._agent.state)

    def _drain(self, request: _Request) -> dict[str, Any]:
        request.fields()
        if not self._agent.drain():
            raise _Refused(409, f"{self._agent.state.name} is {self._agent.state.phase}; there is nothing to drain")
        return asdict(self._agent.state)

    def _drained(self, request: _Request) -> dict[str, Any]:
        self._agent.drained_at(str(request.fields("follower").get("follower", "")))
        return asdict(self._agent.state)

    def _restart(self, request: _Request) -> dict[str, Any]:
        tree = request.fields("drain", "grace")
        grace, drain = _seconds(tree, "grace", self._agent.plan.grace), _seconds(tree, "drain", 0.0)
        if not self._agent.restart(grace, drain):
            raise _Refused(409, _LEAVES)
        return asdict(self._agent.state)

    def _stop(self, request: _Request) -> dict[str, Any]:
        tree = request.fields("drain", "grace", "leave")
        grace, drain = _seconds(tree, "grace", self._agent.plan.grace), _seconds(tree, "drain", 0.0)
        self._agent.stop(grace, drain, leave=_truth(tree, "leave"))
        return asdict(self._agent.state)

    def _arguments(self, request: _Request) -> dict[str, Any]:
        given = request.fields("arguments").get("arguments")
        if not isinstance(given, list) or not all(isinstance(one, str) and _is_argument(one) for one in given):
            raise _Refused(400, "arguments should be a list of texts, all that follows the program's name")
        if len(given) > _MOST_ARGUMENTS:
            raise _Refused(413, f"more than {_MOST_ARGUMENTS} arguments")
        self._agent.replace_arguments(given)
        return asdict(self._agent.state)

    # Streams.

    def _events(self, request: _Request) -> tuple[str, AsyncIterator[bytes]]:
        follower = request.query.get("follower", "")[:128]
        feed = _Feed(states=True, lines=request.query.get("lines") == "1", follower=follower)
        return "application/x-ndjson", self._tell(feed, lambda item: json.dumps(item).encode() + b"\n")

    def _logs(self, request: _Request) -> tuple[str, AsyncIterator[bytes]]:
        wanted = request.query.get("lines", "100")
        if not _is_number(wanted) or len(wanted) > 9:
            raise _Refused(400, "lines should be a number")
        return "text/plain; charset=utf-8", self._log_lines(int(wanted), request.query.get("follow") == "1")

    async def _log_lines(self, wanted: int, follow: bool) -> AsyncIterator[bytes]:
        last = list(self._agent.last_lines)[-wanted:] if wanted else []
        before = "".join(f"{line}\n" for line in last).encode()
        if not follow:
            yield before
            return
        async for data in self._tell(
            _Feed(states=False, lines=True), lambda item: f"{item['line']}\n".encode(), before
        ):
            yield data

    async def _tell(
        self, feed: _Feed, render: Callable[[dict[str, Any]], bytes], before: bytes = b""
    ) -> AsyncIterator[bytes]:
        """Give what a feed brings, and a line end now and then so that a listener that is gone is noticed."""
        self._agent.listen(feed)
        try:
            if before:
                yield before
            while True:
                try:
                    item = await _within(feed.get(), _HEARTBEAT)
                except TimeoutError:
                    yield b"\n"
                    continue
                if item is None:
                    return
                yield render(item)
        finally:
            self._agent.forget(feed)


def _head(status: int, kind: str, length: int | None) -> bytes:
    lines = [f"HTTP/1.1 {status} {_REASONS[status]}", f"content-type: {kind}", "connection: close"]
    if length is not None:
        lines.append(f"content-length: {length}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


async def _write(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(data)
    await _within(writer.drain(), _WRITE_WITHIN)


async def _stream(items: AsyncIterator[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Write until the items end or the listener is gone."""

    async def pump() -> None:
        async with contextlib.aclosing(items):  # type: ignore[type-var]
            async for data in items:
                await _write(writer, data)

    pumping, gone = asyncio.ensure_future(pump()), asyncio.ensure_future(reader.read(1))
    try:
        await asyncio.wait({pumping, gone}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (pumping, gone):
            task.cancel()
        await asyncio.gather(pumping, gone, return_exceptions=True)


# ---------------------------------------------------------------------------------------------------------------------
# 8. Commands
# ---------------------------------------------------------------------------------------------------------------------

TOKEN_VARIABLE = "FOREBAY_MINDER_TOKEN"  # noqa: S105 - the variable's name
"""Where the token of a control port may stand; the engine does not see it."""


class UsageError(Exception):
    """The agent cannot begin; the message says why and what to do."""


def supervised(command: Sequence[str], log_path: Path, owner: int) -> list[str]:
    """Return the command that runs ``command`` once, to its end or that of who holds the other end of ``owner``.

    Start it in a session of its own, or Ctrl-C reaches the command before its owner can stop it in order.
    """
    return [*this_program(), "once", "--owner", str(owner), "--log", str(log_path), "--", *command]


def this_program() -> list[str]:
    """Return how this file is run as a program."""
    # No site packages, no environment: nothing of the owner's installation can disturb it.
    return [sys.executable, "-I", "-S", "-c", _AS_MODULE, str(Path(__file__).resolve())]


# As a module it comes compiled from the cache; as a script it would be compiled anew, a fifth of the time to start.
_AS_MODULE = """\
import sys
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("minder", sys.argv[1])
sys.modules["minder"] = minder = module_from_spec(spec)
spec.loader.exec_module(minder)
sys.exit(minder.main(sys.argv[2:]))"""


def main(arguments: Sequence[str]) -> int:
    """Run a command line; exit as a shell would (128 + signal)."""
    options = _parser().parse_args(arguments)
    if sys.platform == "linux":
        _be_kept()
    try:
        run: Callable[[argparse.Namespace], Awaitable[int]] = options.run
        return asyncio.run(run(options))  # type: ignore[arg-type]
    except (UsageError, AddressError) as error:
        print(f"minder: {error}", file=sys.stderr)
        return 2


_EXAMPLE = """\
Example: FOREBAY_MINDER_TOKEN=... minder.py run --name vllm --control http://0.0.0.0:9000 --log /var/log/engine.log
--address http://127.0.0.1:8000 -- vllm serve MODEL. With upstreams[].minder a gateway follows it; by hand:
curl -H "Authorization: Bearer TOKEN" http://HOST:9000/state"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="minder.py", description="The agent beside an inference engine.")
    commands = parser.add_subparsers(required=True, metavar="run | once")
    once = commands.add_parser("once", help="run a command once; it ends with its owner")
    once.set_defaults(run=_once)
    run = commands.add_parser("run", help="mind an engine: start it, start it again, stop it in order", epilog=_EXAMPLE)
    run.set_defaults(run=_run)
    for one in (once, run):
        one.add_argument("--log", type=Path, required=True, help="file to which the command's output is appended")
        one.add_argument(
            "--settle", type=float, default=SETTLE, help="seconds for the other processes to end too (%(default)s)"
        )
        one.add_argument("--owner", type=int, help="descriptor of a socket; the command ends when its other end closes")
        one.add_argument("command", nargs="+", help="after --: the command and its arguments")
    run.add_argument("--name", required=True, help="what the engine is called in messages")
    run.add_argument("--control", required=True, help="unix:/path, http://host:port, or fd:N for a socket that listens")
    run.add_argument(
        "--token-file", type=Path, help=f"file with the token a control port on TCP asks for; or {TOKEN_VARIABLE}"
    )
    run.add_argument("--address", help="where the engine listens: unix:/path or http://host:port")
    run.add_argument("--ready-path", default="/health", help="answers 200 when the engine can work (%(default)s)")
    run.add_argument("--keep", action="store_true", help="go on when the owner dies, for a new one to come")
    run.add_argument("--gated", action="store_true", help="no traffic after a start before the owner says release")
    run.add_argument("--stay", action="store_true", help="remain when the engine is given up, to be asked and told")
    run.add_argument("--quiet", action="store_true", help="write the engine's output to the log alone")
    run.add_argument("--mark", default="", help="goes into the digest of the arguments")
    run.add_argument("--drain", type=float, default=30.0, help="seconds to drain on SIGTERM (%(default)s)")
    run.add_argument("--grace", type=float, default=30.0, help="seconds from SIGTERM to SIGKILL (%(default)s)")
    run.add_argument("--dead-after", type=float, default=30.0, help="seconds of bad health; 0: never (%(default)s)")
    run.add_argument("--restart", action="append", default=[], metavar="KEY=NUMBER", help=_policy_help())
    run.add_argument("--phase", action="append", default=[], metavar="TEXT=PATTERN", help="a stage of loading")
    return parser


def _policy_help() -> str:
    return "when to start again: " + ", ".join(f"{one.name}={one.default:g}" for one in fields(RestartPolicy))


def _policy(given: Sequence[str]) -> RestartPolicy:
    policy = RestartPolicy()
    for text in given:
        key, _, value = text.partition("=")
        if key not in {one.name for one in fields(RestartPolicy)}:
            raise UsageError(f"--restart {text}: unknown; {_policy_help()}")
        try:
            number = type(getattr(policy, key))(value)
        except ValueError:
            raise UsageError(f"--restart {text}: should be a number") from None
        policy = replace(policy, **{key: number})
    return policy


def _phases(given: Sequence[str]) -> tuple[Phase, ...]:
    pairs = (text.partition("=") for text in given)
    try:
        return tuple(Phase(re.compile(pattern), text) for text, _, pattern in pairs)
    except re.error as error:
        raise UsageError(f"--phase: {error}") from None


def _open_log(path: Path) -> _Log:
    try:
        return _Log(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be written ({_reason(error)}); make its directory or name another") from None


async def _once(options: argparse.Namespace) -> int:
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    log, forward, loop = _open_log(options.log), _Forward(sys.stdout.fileno()), asyncio.get_running_loop()

    def take(data: bytes) -> None:
        log.write(data)
        forward.add(data)

    tree: _Tree | None = None

    def stop() -> None:
        if tree is not None:
            tree.stop(ORPHAN_GRACE)

    def reap() -> None:
        if tree is not None:
            tree.reap()

    loop.add_signal_handler(signal.SIGCHLD, reap)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, stop)
    try:
        tree = _Tree(options.command, options.settle, take)
    except (OSError, subprocess.SubprocessError) as error:
        take(f"{options.command[0]} cannot be started: {getattr(error, 'strerror', None) or error}\n".encode())
        forward.finish()
        return _CANNOT_START
    if options.owner is not None:
        _watch_owner(options.owner, stop)
    code = await tree.ended
    forward.finish()
    log.close()
    return _shell_code(code)


async def _run(options: argparse.Namespace) -> int:
    token = _read_token(options.token_file)
    address = parse_address(options.address) if options.address else None
    plan = Plan(
        name=options.name,
        command=tuple(options.command),
        log=options.log,
        address=address,
        ready_path=options.ready_path,
        phases=_phases(options.phase),
        policy=_policy(options.restart),
        mark=options.mark,
        keep=options.keep,
        gated=options.gated,
        stay=options.stay,
        drain=options.drain,
        grace=options.grace,
        dead_after=options.dead_after,
        settle=options.settle,
    )
    listener, path = _listen(options.name, options.control, token)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    log = _open_log(options.log)
    forward = None if options.quiet else _Forward(sys.stdout.fileno())
    agent = Agent(plan, log, forward, owned=options.owner is not None)
    control = Control(agent, token)
    await control.serve(listener)
    _obey_signals(agent)
    if options.owner is not None:
        _watch_owner(options.owner, agent.lose_owner)
    code = await agent.live()
    if path is not None:
        path.unlink(missing_ok=True)
    await control.close()
    if forward is not None:
        forward.finish()
    log.close()
    return code


def _obey_signals(agent: Agent) -> None:
    loop = asyncio.get_running_loop()
    seen: list[None] = []

    def end() -> None:
        # The second one waits no longer than it must.
        seen.append(None)
        plan = agent.plan
        agent.leave(plan.grace if len(seen) == 1 else 0.0, plan.drain if len(seen) == 1 else 0.0)

    loop.add_signal_handler(signal.SIGCHLD, agent.reap)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def _read_token(path: Path | None) -> str | None:
    """Return the token, or None; it is taken out of the environment that the engine inherits."""
    token = os.environ.pop(TOKEN_VARIABLE, None)
    if path is not None:
        try:
            token = path.read_text().strip()
        except OSError as error:
            raise UsageError(f"--token-file {path} cannot be read ({_reason(error)})") from None
    if token is not None and len(token) < _MIN_TOKEN:
        raise UsageError(f"the token has fewer than {_MIN_TOKEN} characters; take a longer one")
    return token


def _listen(name: str, control: str, token: str | None) -> tuple[socket.socket, Path | None]:
    """Return the control port's socket, and the path of its file where it has one."""
    if control.startswith("fd:"):
        listener = socket.socket(fileno=int(control.removeprefix("fd:")))
        os.set_inheritable(listener.fileno(), False)
        own = listener.getsockname()
        return listener, Path(own) if listener.family == socket.AF_UNIX else None
    address = parse_address(control)
    if address.unix is not None:
        return listen_unix(f"the control port of {name}", address.unix), address.unix
    if token is None:
        raise UsageError(f"a control port on TCP lets in who has a token; give --token-file or {TOKEN_VARIABLE}")
    claim(f"the control port of {name}", address)
    return socket.create_server((address.host, address.port)), None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
