"""The whole bench once, in small: two gateways, one row, a table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from loadtests.bench import subjects
from loadtests.bench.native import BenchError
from tests.bench.conftest import compiler_is_there


def _nginx_is_there() -> bool:
    try:
        subjects.SUBJECTS["nginx"].version()
    except BenchError:
        return False
    return True


@pytest.mark.load
@pytest.mark.skipif(not compiler_is_there(), reason="there is no C compiler")
@pytest.mark.skipif(not _nginx_is_there(), reason="nginx is not installed")
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="the bench needs two cores")
def test_two_gateways_are_measured_side_by_side(tmp_path: Path) -> None:
    """Right answers through nginx and this gateway, and figures of both in one table."""
    out = tmp_path / "raw.jsonl"
    command = [sys.executable, "-m", "loadtests.bench.run", "--rows", "requests-2k", "--only", "nginx,forebay-protocol"]
    options = ["--runs", "1", "--seconds", "0.5", "--retries", "0", "--out", str(out)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| | nginx | forebay-protocol |" in done.stdout
    machine, *samples = [json.loads(line) for line in out.read_text().splitlines()]
    assert machine["kind"] == "machine"
    assert [sample["subject"] for sample in samples] == ["nginx", "forebay-protocol"]
    for sample in samples:
        assert sample["generator"]["faults"] == {}
        assert sample["generator"]["completed"] > 0
        assert sample["engine_accepts"] <= 40
