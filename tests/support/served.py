"""`forebay serve` as a process of its own, started as ``make serve`` starts it, and what a person sees of it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, Self

import psutil

from tests.support.leash import leash

PROGRAM = str(Path(sys.executable).with_name("forebay"))
STOP_WITHIN = 60.0
"""Seconds after which a command that was told to stop is given up."""

_MARK = "TEST_RUN_OF_SERVE"
"""A variable that everything the command starts inherits, however it is started."""


class Served:
    """A running ``forebay serve``. ``out`` and ``err`` grow as it writes; ``tell`` gets each line of both.

    ``ports`` are those for clients and for operators.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        folder: Path,
        ports: tuple[int, int],
        tell: Callable[[str], None] | None = None,
        **environment: str,
    ) -> None:
        self.log_file = folder / "log.jsonl"
        self.mark = uuid.uuid4().hex
        self.out = self.err = ""
        self._silent: set[str] = set()
        self._news = threading.Condition()
        kept = {name: value for name, value in os.environ.items() if not name.startswith("FOREBAY_")}
        self.environment = {
            **kept,
            _MARK: self.mark,
            "FOREBAY_LISTEN__PORT": str(ports[0]),
            "FOREBAY_ADMIN__PORT": str(ports[1]),
            "FOREBAY_LOG__FILE": str(self.log_file),
            # Keys of test runs do not gather beside those of the person whose checkout this is.
            "FOREBAY_STATE__URL": f"sqlite:///{folder / 'state.db'}",
            **environment,
        }
        self.process = subprocess.Popen(
            [PROGRAM, "serve", *arguments],
            # A forebay.yaml of whoever works on this checkout is none of the test's.
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A foreground group of its own, as a shell gives it: Ctrl-C goes to all in it and to nobody else.
            start_new_session=True,
            preexec_fn=leash(signal.SIGTERM),
            env=self.environment,
        )
        self._readers = [
            threading.Thread(target=self._read, args=(self.process.stdout, "out", tell)),
            threading.Thread(target=self._read, args=(self.process.stderr, "err", tell)),
        ]
        for reader in self._readers:
            reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _read(self, stream: IO[str] | None, name: str, tell: Callable[[str], None] | None) -> None:
        assert stream is not None
        with stream:
            for line in stream:
                if tell is not None:
                    tell(line.rstrip("\n"))
                with self._news:
                    setattr(self, name, getattr(self, name) + line)
                    self._news.notify_all()
        with self._news:
            self._silent.add(name)
            self._news.notify_all()

    # What a person sees

    def wait_ready(self, seconds: float) -> None:
        """Wait for the whole greeting. Raises ``AssertionError`` with all that was said when it does not come."""
        with self._news:
            self._news.wait_for(lambda: self._greeted or self._silent >= {"out", "err"}, seconds)
        assert self._greeted, f"forebay serve is not ready; it said:\n{self.err}{self.out}"

    @property
    def _greeted(self) -> bool:
        return "\ncurl " in self.out and self.out.endswith("\n\n")

    @property
    def curl(self) -> str:
        """The command it tells to paste."""
        return self.out[self.out.index("\ncurl ") :].strip()

    @property
    def url(self) -> str:
        """Where it says that it is."""
        return self._found(r"Forebay is ready: (http://\S+)/v1\n")

    @property
    def key(self) -> str:
        """The key it made."""
        return self._found(r"API key, made for this start: (fb-\S+)\n")

    @property
    def start_seconds(self) -> float:
        """How long it says that the start took."""
        return float(self._found(r"Started in (\d+) s\."))

    def _found(self, pattern: str) -> str:
        match = re.search(pattern, self.out)
        assert match is not None, f"no {pattern!r} in:\n{self.out}"
        return match[1]

    # Its processes and its end

    def family(self) -> list[psutil.Process]:
        """Return every process on this machine that it, or one of those it started, has started; itself too."""
        return [process for process in psutil.process_iter() if _environment_of(process).get(_MARK) == self.mark]

    def interrupt(self) -> int:
        """Press Ctrl-C, unless it has ended already; return its exit code."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGINT)
        return self.process.wait(STOP_WITHIN)

    def stop(self) -> None:
        """End it, and whatever it should have ended itself."""
        try:
            self.interrupt()
        finally:
            for process in self.family():
                process.kill()
            self.process.wait()
            for reader in self._readers:
                reader.join()


def _environment_of(process: psutil.Process) -> dict[str, Any]:
    try:
        return process.environ()
    except psutil.Error:
        # Gone meanwhile, a zombie, or another user's.
        return {}
