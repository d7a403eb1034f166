"""`forebay engines check` on the session's real vLLM; tests/engines/test_conformance.py runs the checks themselves."""

from __future__ import annotations

import subprocess

import pytest

from tests.support.real_engine import ANSWER_WITHIN, RealEngine
from tests.support.served import PROGRAM, Served

pytestmark = pytest.mark.real_engine


def test_the_command_checks_an_engine_of_one_s_own(served: Served, vllm_engine: RealEngine) -> None:
    """A gateway of its own in front of it; what cannot be tried is said and is no failure."""
    chosen = [word for name in ("models", "length", "left_client", "adapter") for word in ("--only", name)]
    command = [PROGRAM, "engines", "check", vllm_engine.url, *chosen]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=ANSWER_WITHIN)
    assert (done.returncode, done.stderr) == (0, "")
    verdicts = [line[:11].strip() for line in done.stdout.splitlines()]
    assert verdicts == ["passed", "passed", "passed", "not tried"]
