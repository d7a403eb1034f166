"""What a person sees of `forebay serve`: how the start goes, and how to send the first request.

Answers (address, key, command to paste) go to standard output, signs of life to standard error.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from engines.steps import Step
from gateway.settings import Settings


class Display:
    """Signs of life. On a terminal one living line with a clock; elsewhere a line for each new thing.

    `clock` returns monotonic seconds.
    """

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = Console(file=stream or sys.stderr, highlight=False, soft_wrap=True)
        self._clock = clock
        self._phase = ""
        self._phase_began = 0.0
        self._last_text = ""
        self._live: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop_live()

    def report(self, step: Step) -> None:
        """Show what is being done now."""
        if step.phase != self._phase:
            self.done()
            self._phase, self._phase_began = step.phase, self._clock()
            self._start_live()
        if self._live is not None and self._task is not None:
            text = f"{step.phase}: {step.text}"
            self._live.update(self._task, description=text, completed=step.done or 0, total=step.total)
        elif step.text != self._last_text:
            count = f" ({step.done} of {step.total})" if step.done is not None and step.total is not None else ""
            self._print(f"{step.phase}: {step.text}{count}")
        self._last_text = step.text

    def done(self) -> None:
        """What was reported last has come to its end: leave one line about it, with its duration."""
        self._stop_live()
        if self._phase:
            self._print(f"{self._phase}: done in {self._clock() - self._phase_began:.0f} s")
        self._phase = self._last_text = ""

    def say(self, text: str) -> None:
        """Say one thing, whatever becomes of what was reported last."""
        self._stop_live()
        self._phase = self._last_text = ""
        self._print(f"forebay: {text}")

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False)

    def _start_live(self) -> None:
        if not self._console.is_terminal:
            return
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(20), TimeElapsedColumn())
        self._live = Progress(*columns, console=self._console, transient=True)
        self._task = self._live.add_task(self._phase, total=None)
        self._live.start()

    def _stop_live(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def base_url(settings: Settings) -> str:
    """The URL under which a program of this machine reaches the gateway."""
    listen = settings.listen
    scheme = "https" if listen.tls else "http"
    if listen.unix_socket is not None:
        return f"{scheme}://localhost"
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(listen.host, listen.host)  # noqa: S104 - nothing is bound here
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{listen.port}"


@dataclass(frozen=True, slots=True)
class Greeting:
    """How to reach a gateway that is ready. `key` None: none was made; `notes` are said before the command."""

    settings: Settings
    key: str | None
    models: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        """Address, key and a command that works as pasted."""
        lines = [f"Forebay is ready: {base_url(self.settings)}/v1"]
        admin = self.settings.admin
        if admin.enabled:
            lines.append(f"Metrics and documentation: http://{admin.host}:{admin.port}/metrics and /docs")
        lines.append(f"Models: {', '.join(self.models) or 'none yet'}")
        if self.key is not None:
            lines.append(f"API key, made for this start: {self.key}")
        return "\n".join([*lines, *self.notes, "", self.command(), ""])

    def command(self) -> str:
        """A first request for curl."""
        listen = self.settings.listen
        options = [f"--unix-socket {shlex.quote(str(listen.unix_socket))}"] if listen.unix_socket else []
        options += ["--insecure"] if listen.tls else []
        if self.key is not None:
            options.append(f"-H 'Authorization: Bearer {self.key}'")
        elif self.settings.auth == "keys":
            options.append('-H "Authorization: Bearer $OPENAI_API_KEY"')
        body = {
            "model": self.models[0] if self.models else "MODEL",
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "max_tokens": 64,
        }
        options.append("-H 'Content-Type: application/json'")
        options.append(f"-d {shlex.quote(json.dumps(body))}")
        return " \\\n  ".join([f"curl {base_url(self.settings)}/v1/chat/completions", *options])
