"""Child processes of one command: started in order, watched together, stopped in the opposite order, none left.

Each child leads a session of its own, so that Ctrl-C in a terminal reaches the parent alone and the order of the stop
is the parent's; on Linux the kernel ends a child whose parent is gone, even a killed one.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


class StopRequested(Exception):  # noqa: N818 - a request, not an error
    """SIGINT or SIGTERM came: leave whatever is being done and stop in order."""


@dataclass(frozen=True, slots=True)
class Child:
    """A process of the tree. `grace`: seconds it gets between SIGTERM and SIGKILL."""

    name: str
    process: subprocess.Popen[bytes]
    grace: float
    log: Path | None


class ProcessTree:
    """Owns the children. Use it from the main thread; `stop` ends them newest first."""

    def __init__(self) -> None:
        self.stopping = False
        """Set by the first reason to stop; a signal after that ends everything now."""
        self._children: list[Child] = []
        self._ended: queue.SimpleQueue[Child] = queue.SimpleQueue()

    def start(
        self,
        name: str,
        command: Sequence[str],
        *,
        grace: float,
        environment: Mapping[str, str] | None = None,
        log: Path | None = None,
    ) -> Child:
        """Start a child. Its output goes to the end of `log`, or where the parent's goes. OSError when it cannot."""
        with contextlib.ExitStack() as files:
            output = files.enter_context(log.open("ab")) if log else None
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=None if environment is None else {**os.environ, **environment},
                start_new_session=True,
                preexec_fn=_end_with_parent if _LIBC else None,  # noqa: PLW1509 - our other threads only wait
            )
        child = Child(name, process, grace, log)
        self._children.append(child)
        threading.Thread(target=self._watch, args=(child,), name=f"watch {name}", daemon=True).start()
        return child

    def _watch(self, child: Child) -> None:
        child.process.wait()
        self._ended.put(child)

    def next_ended(self, timeout: float | None = None) -> Child | None:
        """Wait until a child has ended and return it; None after `timeout` seconds."""
        try:
            return self._ended.get(timeout=timeout)
        except queue.Empty:
            return None

    def stop(self) -> list[str]:
        """End all children, newest first, each within its grace; return the names of those that had to be killed."""
        self.stopping = True
        killed = []
        for child in reversed(self._children):
            if child.process.poll() is not None:
                continue
            child.process.send_signal(signal.SIGTERM)
            try:
                child.process.wait(child.grace)
            except subprocess.TimeoutExpired:
                killed.append(child.name)
                _kill_group(child)
                child.process.wait()
        return killed

    def kill(self) -> None:
        """End all children now, without waiting for them."""
        self.stopping = True
        for child in reversed(self._children):
            if child.process.poll() is None:
                _kill_group(child)


def _kill_group(child: Child) -> None:
    """Kill a child that runs, and what it started in its own process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.process.pid, signal.SIGKILL)


def _end_with_parent() -> None:
    """Runs in the child before its program: SIGTERM when the parent ends, whatever ends it."""
    assert _LIBC is not None
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@contextlib.contextmanager
def stop_signals(tree: ProcessTree) -> Iterator[None]:
    """Inside, the first SIGINT or SIGTERM raises StopRequested in the main thread; the second ends everything now."""

    def on_signal(number: int, frame: FrameType | None) -> None:
        if not tree.stopping:
            tree.stopping = True
            raise StopRequested
        tree.kill()
        os._exit(128 + number)

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def last_lines(file: Path, count: int) -> list[str]:
    """The last lines of a log, to show why its process ended; empty when it cannot be read."""
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, file.stat().st_size - 16 * 1024))
            return stream.read().decode(errors="replace").splitlines()[-count:]
    except OSError:
        return []
