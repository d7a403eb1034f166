"""What the tests of engines share: a stand-in for the installer."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from engines import environments, models
from engines.steps import Finished, run_step
from tests.engines import fake_uv as fake_uv_program
from tests.engines.standalone import start
from tests.support.real_engine import served, vllm_engine

__all__ = ["served", "start", "vllm_engine"]


@dataclass(frozen=True, slots=True)
class FakeUv:
    """A fake uv on disk, and how to tell it what to do. See ``fake_uv.py``."""

    path: Path
    calls_path: Path
    monkeypatch: pytest.MonkeyPatch

    def plan(self, **outcomes: list[str]) -> None:
        self.monkeypatch.setenv("FAKE_UV_PLAN", json.dumps(outcomes))

    def wait_at(self, gate: Path) -> None:
        self.monkeypatch.setenv("FAKE_UV_GATE", str(gate))

    def content(self, **files: str) -> None:
        self.monkeypatch.setenv("FAKE_UV_CONTENT", json.dumps(files))

    def calls(self) -> list[list[str]]:
        return [call["arguments"] for call in self._read()]

    def environments(self) -> list[dict[str, str]]:
        return [call["environment"] for call in self._read()]

    def run_unwatched(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        log_path: Path,
        on_line: Callable[[str], None],
        **_: object,
    ) -> Finished:
        """Do what ``run_step`` does, without a process for each call of uv and a supervisor for each process."""
        lines: list[str] = []

        def write(text: str) -> None:
            lines.extend(text.splitlines())
            for line in text.splitlines():
                on_line(line)

        if command[0] == str(self.path):
            code = fake_uv_program.main(command[1:], environment, write)
        else:
            done = subprocess.run(
                command, env=dict(environment), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
            )
            code = done.returncode
            write(done.stdout)
        with log_path.open("a") as log:
            log.writelines(f"{line}\n" for line in lines)
        return Finished(code, tuple(lines))

    def _read(self) -> list[dict[str, Any]]:
        lines = self.calls_path.read_text().splitlines() if self.calls_path.exists() else []
        return [json.loads(line) for line in lines]


@pytest.fixture
def fake_uv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeUv:
    """A fake uv that succeeds until told otherwise; it runs in the test's process unless that is ``watched``."""
    path, calls = tmp_path / "bin" / "uv", tmp_path / "uv-calls"
    path.parent.mkdir()
    script = Path(__file__).with_name("fake_uv.py")
    path.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -I -S {shlex.quote(str(script))} "$@"\n')
    path.chmod(0o755)
    monkeypatch.setenv("FAKE_UV_CALLS", str(calls))
    # Asking pip takes half a second; the test that is about its answer asks.
    monkeypatch.setattr(environments, "pip_configuration", dict[str, str])
    fake = FakeUv(path, calls, monkeypatch)
    for module in (environments, models):
        monkeypatch.setattr(module, "run_step", fake.run_unwatched)
    return fake


@pytest.fixture
def watched(fake_uv: FakeUv, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are run as they are for a user: processes, each under a supervisor."""
    for module in (environments, models):
        monkeypatch.setattr(module, "run_step", run_step)
