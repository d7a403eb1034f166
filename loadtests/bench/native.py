"""Builds the two C programs of the bench, the mock engine and the load generator, when their sources have changed."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
BUILD = HERE / "build"
ENGINE_MODEL = "mock-model"
"""The only model the mock serves; it answers 404 for any other name."""


class BenchError(Exception):
    """The bench cannot run; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class Tools:
    """Paths of the built programs."""

    mock: Path
    gen: Path


def build(directory: Path = BUILD) -> Tools:
    """Compile what is older than its sources; BenchError when there is no compiler or it refuses."""
    return Tools(mock=_compile("mock", directory), gen=_compile("gen", directory))


def _compile(name: str, directory: Path) -> Path:
    source, shared, program = HERE / f"{name}.c", HERE / "bench.h", directory / name
    newest = max(source.stat().st_mtime, shared.stat().st_mtime)
    if program.exists() and program.stat().st_mtime >= newest:
        return program
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise BenchError("no C compiler: install gcc (Debian: apt-get install gcc libc6-dev) or set CC")
    directory.mkdir(parents=True, exist_ok=True)
    # Under another name first: tests that run side by side must never start a half-written program.
    fresh = directory / f"{name}.{os.getpid()}"
    flags = ["-O2", "-std=gnu11", "-Wall", "-Wextra"]
    done = subprocess.run([compiler, *flags, "-o", fresh, source, "-lm"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"{compiler} cannot compile {source.name}:\n{done.stderr}")
    fresh.replace(program)
    return program
