"""The log: one line a request, JSON or for a console, and a few lines about the gateway itself.

Lines are gathered and written ten times a second and at the end, so that a request costs no system call for its line.
"""

from __future__ import annotations

import io
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Literal

import msgspec

FLUSH_BYTES = 256 * 1024
"""Bytes after which lines are written without waiting for the next turn."""

_MILLISECONDS = tuple(f".{number:03d}Z" for number in range(1000))
"""The ends of times: each is written thousands of times a second."""

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}


class Log:
    """Where lines go. ``wall`` returns Unix seconds."""

    def __init__(
        self,
        form: Literal["json", "console"],
        file: Path | None,
        level: str = "info",
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._form = form
        self._level = LEVELS[level]
        self.wall = wall
        self._path = file
        self._stream: BinaryIO = sys.stderr.buffer if file is None else file.open("ab", buffering=0)
        self._lines: list[bytes] = []
        self._held = 0
        self._encode = msgspec.json.Encoder().encode
        self._second = -1
        self._prefix = ""

    def now(self) -> str:
        """Return the wall clock as ISO 8601 with milliseconds, UTC."""
        wall = self.wall()
        second = int(wall)
        if second != self._second:
            self._second = second
            self._prefix = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        return self._prefix + _MILLISECONDS[int((wall - second) * 1000)]

    def write(self, line: msgspec.Struct | dict[str, Any], level: str = "info") -> None:
        """Take a line; ``line`` holds plain values."""
        if LEVELS[level] < self._level:
            return
        text = self._encode(line) if self._form == "json" else _for_console(msgspec.to_builtins(line)).encode()
        self._lines.append(text)
        self._held += len(text)
        if self._held > FLUSH_BYTES:
            self.flush()

    def say(self, level: str, event: str, **values: object) -> None:
        """Log something about the gateway itself."""
        self.write({"time": self.now(), "level": level, "event": event, **values}, level)

    def failed(self, event: str, error: BaseException, **values: object) -> None:
        """Log a fault of ours with its traceback."""
        trace = io.StringIO()
        traceback.print_exception(error, file=trace)
        self.say("error", event, error=repr(error), trace=trace.getvalue(), **values)

    def flush(self) -> None:
        """Write what was gathered. A full disk costs lines, never requests."""
        if not self._lines:
            return
        text = b"\n".join(self._lines) + b"\n"
        self._lines = []
        self._held = 0
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError as error:
            print(f"forebay: the log cannot be written: {error}", file=sys.__stderr__)

    def reopen(self) -> None:
        """Open the file again, after it was rotated. OSError when that fails; lines then go on to the old one."""
        if self._path is not None:
            self.flush()
            stream = self._path.open("ab", buffering=0)
            self._stream.close()
            self._stream = stream

    def configure(self, form: Literal["json", "console"], level: str) -> None:
        """Write what comes from here on in another form, or more or less of it."""
        self._form = form
        self._level = LEVELS[level]

    def close(self) -> None:
        """Write the rest and close the file."""
        self.flush()
        if self._path is not None:
            self._stream.close()


def _for_console(line: dict[str, Any]) -> str:
    rest = dict(line)
    time_, level, event = rest.pop("time", ""), rest.pop("level", "info"), rest.pop("event", "")
    rest.pop("trace", None)
    values = " ".join(f"{name}={_in_one_line(value)}" for name, value in rest.items())
    text = f"{time_[11:23]} {level:<7} {event}  {values}"
    return f"{text}\n{line['trace']}" if "trace" in line else text


def _in_one_line(value: object) -> str:
    """Return a value as text that can neither begin a line of its own nor move a terminal's cursor."""
    text = str(value)
    return text if text.isprintable() else repr(text)
