"""What a process tree costs, read from /proc; and servers that are started on one core and always stopped."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path

from loadtests.bench.native import BenchError

_TICK = 1 / os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Cost:
    """What a process tree has used so far: CPU in seconds, memory resident now in bytes."""

    user: float = 0.0
    system: float = 0.0
    rss: int = 0

    def since(self, earlier: Cost) -> Cost:
        """CPU used since `earlier`; memory as it is now."""
        return Cost(self.user - earlier.user, self.system - earlier.system, self.rss)

    @property
    def cpu(self) -> float:
        """User and system time together."""
        return self.user + self.system


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat after the command's name, or None when the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def tree(root: int) -> Iterator[tuple[int, list[str]]]:
    """Process ids and stat fields of a process and of all its living descendants."""
    stats = {int(entry.name): _stat(int(entry.name)) for entry in Path("/proc").iterdir() if entry.name.isdigit()}
    wanted = [root]
    while wanted:
        pid = wanted.pop()
        fields = stats.get(pid)
        if fields is not None:
            yield pid, fields
            wanted += [child for child, other in stats.items() if other is not None and int(other[1]) == pid]


def cost_of(root: int) -> Cost:
    """What the tree under `root` has used, children that ended and were waited for included.

    The kernel counts user and system time in ticks, which a load that is itself in step with the clock can dodge or
    meet; what the scheduler keeps (nanoseconds on a processor, for living threads) is exact. So the sum is the
    scheduler's, shared out between user and system as the ticks say.
    """
    user = system = exact = 0.0
    rss = 0
    for pid, fields in tree(root):  # utime stime cutime cstime are fields 14 to 17 of proc(5), rss is 24; two are cut
        ended_user, ended_system = int(fields[13]) * _TICK, int(fields[14]) * _TICK
        user += int(fields[11]) * _TICK + ended_user
        system += int(fields[12]) * _TICK + ended_system
        exact += _on_processor(pid) + ended_user + ended_system
        rss += int(fields[21]) * _PAGE
    ticks = user + system
    if exact and ticks:
        user, system = user * exact / ticks, system * exact / ticks
    return Cost(user, system, rss)


def _on_processor(pid: int) -> float:
    """Seconds the living threads of a process have been on a processor, by the scheduler's own account."""
    seconds = 0.0
    for file in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            seconds += int(file.read_text().split()[0]) / 1e9
    return seconds


def core_busy(core: int) -> float:
    """Seconds a core has not been idle since the machine started, time stolen by the host included."""
    for line in Path("/proc/stat").read_text().splitlines():
        name, *ticks = line.split()
        if name == f"cpu{core}":
            user, nice, system, _idle, _iowait, irq, softirq, steal = (int(tick) for tick in ticks[:8])
            return (user + nice + system + irq + softirq + steal) * _TICK
    raise BenchError(f"this machine has no core {core}: see --cores")


def free_port(start: int | None = None) -> int:
    """A loopback port nobody listens on, below the range the kernel gives to outgoing connections.

    Looked for from `start`, else from a place drawn anew: two runs at once would else agree on the same port, and one
    would measure what the other has started.
    """
    for port in range(start or random.randrange(17100, 19000), 32768):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise BenchError("no free port below 32768 on 127.0.0.1")


def http_get(port: int, path: str, timeout: float = 10.0) -> tuple[int, bytes]:
    """Status and body of a GET on 127.0.0.1; OSError when nobody answers."""
    connection = HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


class Server:
    """A child process on one core, with its output in a file."""

    def __init__(
        self, name: str, command: Sequence[str], core: int, log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self.log = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                ["taskset", "--cpu-list", str(core), *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """The root of its process tree: taskset becomes the command."""
        return self._process.pid

    def wait_ready(self, port: int, path: str, timeout: float = 60.0) -> None:
        """Return once `path` answers 200; BenchError with the end of its output when it does not."""
        deadline = time.monotonic() + timeout
        said = "no answer"
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                status, body = http_get(port, path, timeout=2)
            except OSError:
                time.sleep(0.02)
                continue
            if status == 200:
                return
            said = f"{status} {body[:200].decode(errors='replace')}"
            time.sleep(0.02)
        code = self._process.poll()
        why = f"ended with exit code {code}" if code is not None else f"is not ready after {timeout:.0f} s ({said})"
        tail = self.log.read_text(errors="replace")[-1500:]
        raise BenchError(f"{self.name} {why}. The end of its output:\n{tail}")

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the server itself."""
        self._process.send_signal(number)

    def stop(self, patience: float = 5.0) -> None:
        """End it: politely, then by force with everything it started."""
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(patience)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
