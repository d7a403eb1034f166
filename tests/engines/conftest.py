"""What the tests of engines share: a stand-in for the installer."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from engines import environments
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

    def _read(self) -> list[dict[str, Any]]:
        lines = self.calls_path.read_text().splitlines() if self.calls_path.exists() else []
        return [json.loads(line) for line in lines]


@pytest.fixture
def fake_uv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeUv:
    """A fake uv that succeeds until told otherwise."""
    path, calls = tmp_path / "bin" / "uv", tmp_path / "uv-calls"
    path.parent.mkdir()
    script = Path(__file__).with_name("fake_uv.py")
    path.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(script))} "$@"\n')
    path.chmod(0o755)
    monkeypatch.setenv("FAKE_UV_CALLS", str(calls))
    # Asking pip takes half a second; the test that is about its answer asks.
    monkeypatch.setattr(environments, "pip_configuration", dict[str, str])
    return FakeUv(path, calls, monkeypatch)
