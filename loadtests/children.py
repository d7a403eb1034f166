"""Processes on this machine that load needs: started on free ports, waited for, and ended with whoever started them.

Whatever is started is known by its process id and killed by it, on every way out; the kernel does it where this process
itself is killed, or where the thread that started it ends.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from tests.support.leash import leash

_PATIENCE = 60.0
_ROOT = Path(__file__).parents[1]


class FleetError(Exception):
    """Something did not start, or did not do what it was told; the text says what."""


@dataclass(slots=True)
class Child:
    """A process of ours."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    port: int
    admin_port: int = 0
    killed_at: float | None = None
    """Unix time at which it was killed."""
    ready: bool = False
    """Whether it has answered."""

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    def alive(self) -> bool:
        """Whether it runs."""
        return self.process.poll() is None

    def kill(self) -> None:
        """SIGKILL, and wait for its end."""
        self.killed_at = time.time()
        self.process.kill()
        self.process.wait()

    def said(self) -> str:
        """The end of what it has written."""
        return self.log.read_text(errors="replace")[-1500:]


def start(
    name: str,
    command: Sequence[str],
    folder: Path,
    port: int,
    admin_port: int = 0,
    environment: Mapping[str, str] | None = None,
) -> Child:
    """Start a command in ``folder``, where its output goes to NAME.log; no configuration of ours reaches it by the
    environment but what is given here."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FOREBAY_")}
    kept["PYTHONPATH"] = str(_ROOT)
    if admin_port:
        kept |= {"FOREBAY_LISTEN__PORT": str(port), "FOREBAY_ADMIN__PORT": str(admin_port)}
    log = folder / f"{name}.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=leash(signal.SIGKILL),  # noqa: PLW1509 - one system call
            process_group=0,  # Ctrl-C is for whoever started it, who ends things in their order
            env={**kept, **(environment or {})},
        )
    return Child(name, process, log, port, admin_port)


def start_engine(name: str, folder: Path, port: int, *arguments: str) -> Child:
    """Start a simulated engine. ``arguments`` are its own."""
    return start(name, [sys.executable, "-m", "engines.simulation", "--port", str(port), *arguments], folder, port)


def start_gateway(
    name: str, folder: Path, port: int, admin_port: int, environment: Mapping[str, str] | None = None
) -> Child:
    """Start a gateway on ``folder``/forebay.yaml."""
    command = [sys.executable, "-m", "gateway.cli", "serve", "--config", str(folder / "forebay.yaml")]
    return start(name, command, folder, port, admin_port, environment)


def get(port: int, path: str) -> bytes:
    """The body of a GET on 127.0.0.1. OSError; FleetError where the answer is not 200."""
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read()
    except HTTPException as error:
        raise OSError(str(error)) from error
    finally:
        connection.close()
    if answer.status != 200:
        raise FleetError(f"{path} on port {port} answers {answer.status}")
    return body


def wait_ready(child: Child, path: str, patience: float = _PATIENCE) -> None:
    """Return when it answers. FleetError with the end of what it said when it does not."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline and child.alive():
        with contextlib.suppress(OSError, FleetError):
            get(child.port, path)
            child.ready = True
            return
        time.sleep(0.02)
    raise FleetError(f"{child.name} does not answer; it said:\n{child.said()}")


def wait_ended(child: Child, patience: float = 30.0) -> None:
    """Return when it has ended. FleetError when it does not, or not well."""
    try:
        code = child.process.wait(patience)
    except subprocess.TimeoutExpired:
        raise FleetError(f"{child.name} does not end:\n{child.said()}") from None
    if code:
        raise FleetError(f"{child.name} ended with {code}:\n{child.said()}")


def engine_figures(port: int) -> dict[str, int]:
    """What a simulated engine itself counts: `prompt` and `generation` tokens, `ended` requests (with their whole
    answer), requests `running` and `waiting`. OSError, FleetError."""
    text = get(port, "/metrics").decode()
    found = {}
    for short, name in _FIGURES.items():
        values = re.findall(rf"^vllm:{name}\S*\}} (\S+)$", text, re.MULTILINE)
        if not values:
            raise FleetError(f"the engine on port {port} does not count {name}")
        found[short] = sum(int(float(value)) for value in values)
    return found


_FIGURES = {
    "prompt": r"prompt_tokens_total\{",
    "generation": r"generation_tokens_total\{",
    "ended": r'request_success_total\{\S*finished_reason="(?:stop|length)"',
    "running": r"num_requests_running\{",
    "waiting": r"num_requests_waiting\{",
}


def kill_all(children: Iterable[Child]) -> None:
    """SIGKILL to each, and wait."""
    listed = list(children)
    for child in listed:
        with contextlib.suppress(ProcessLookupError):
            child.process.kill()
    for child in listed:
        child.process.wait()
