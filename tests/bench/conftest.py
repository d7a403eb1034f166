"""The bench's C programs, built once, and ways to run them."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from loadtests.bench.bodies import chat_body
from loadtests.bench.native import Tools, build
from loadtests.bench.processes import free_port, http_get


def compiler_is_there() -> bool:
    """Whether the bench can be built on this machine."""
    return bool(os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc"))


@pytest.fixture(scope="session")
def tools() -> Tools:
    if not compiler_is_there():
        pytest.skip("there is no C compiler")
    return build()


@pytest.fixture
def engine(tools: Tools) -> Iterator[int]:
    """The port of a running mock engine."""
    port = free_port()
    with subprocess.Popen([tools.mock, str(port)]) as process:
        try:
            _wait_listening(port)
            yield port
        finally:
            process.kill()


def _wait_listening(port: int) -> None:
    for _ in range(10_000):
        try:
            http_get(port, "/health")
        except ConnectionRefusedError:
            continue
        return
    raise AssertionError("the mock engine does not listen")


class Generator:
    """Runs the load generator with a body and gives back its result."""

    def __init__(self, program: Path, directory: Path) -> None:
        self._program = program
        self._directory = directory
        self._bodies = 0

    def body(
        self, plan: str = "", *, stream: bool = True, include_usage: bool = False, model: str = "mock-model"
    ) -> str:
        """The path of a body whose prompt carries `plan`."""
        body = json.loads(chat_body(model, 600, stream=stream, include_usage=include_usage))
        if plan:
            body["messages"][-1]["content"] = f"@@ {plan} @@ hello"
        self._bodies += 1
        path = self._directory / f"body-{self._bodies}.json"
        path.write_text(json.dumps(body, separators=(",", ":")))
        return str(path)

    async def __call__(self, port: int, *arguments: str, expect: str | None = "mock-model") -> dict[str, Any]:
        """The result line of one run."""
        command = ["--port", str(port), *(("--expect-model", expect) if expect else ()), *arguments]
        process = await asyncio.create_subprocess_exec(self._program, *command, stdout=asyncio.subprocess.PIPE)
        output, _ = await asyncio.wait_for(process.communicate(), 30)
        assert process.returncode == 0
        events = [json.loads(line) for line in output.splitlines()]
        assert [event["event"] for event in events] == ["start", "end", "result"]
        result: dict[str, Any] = events[-1]
        return result


@pytest.fixture
def generator(tools: Tools, tmp_path: Path) -> Generator:
    return Generator(tools.gen, tmp_path)
