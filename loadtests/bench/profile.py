"""Shows where the gateway's time goes while the bench loads it.

A row's load runs against one face of the gateway; meanwhile its process tree is looked at three ways, each where the
tool for it is there:

  perf      the kernel's view, C and interpreter alike; on Python 3.12 and later Python functions have names too
  cprofile  every Python function, from inside; it slows Python down by half, so read shares, not times
  syscalls  which system calls, and how many a request (strace)

The share of user and system time is printed in any case: what the kernel takes is not to be had in Python.
"""

from __future__ import annotations

import argparse
import os
import pstats
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

from loadtests.bench.native import BenchError, build
from loadtests.bench.processes import tree
from loadtests.bench.rows import ROWS, Bench, Sample
from loadtests.bench.run import Running, mock_engine, prepare_machine, two_cores
from loadtests.bench.subjects import SUBJECTS, Place

_HOOK = """\
import cProfile, os, signal

profile = cProfile.Profile()
running = False

def toggle(*_):
    global running
    running = not running
    if running:
        profile.enable()
    else:
        profile.disable()
        profile.dump_stats(os.path.join({directory!r}, f"{{os.getpid()}}.pstats"))

signal.signal(signal.SIGUSR2, toggle)
"""
"""Run by every Python process that finds it on its path, before anything else: a signal starts and ends the profile."""
_EXAMPLES = """\
examples:
  python -m loadtests.bench.profile --row requests-2k
  python -m loadtests.bench.profile --row paced --how cprofile --lines 60
  python -m loadtests.bench.profile --row streams --face asgi --how perf
  python -m loadtests.bench.profile --row requests-2k --how syscalls
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m loadtests.bench.profile",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--row", choices=list(ROWS), default="requests-2k")
    made.add_argument("--face", choices=["protocol", "asgi"], default="protocol")
    made.add_argument("--how", choices=["perf", "cprofile", "syscalls"], default="cprofile")
    made.add_argument("--seconds", type=float, default=4)
    made.add_argument("--lines", type=int, default=40, help="of the report (default 40)")
    made.add_argument("--keep", type=Path, help="directory for the raw profile")
    return made


class Profiler:
    """One way to look at a running gateway; `path` is where it must look for Python code first."""

    def __init__(self, how: str, directory: Path, lines: int) -> None:
        self.how = how
        self.directory = directory
        self.lines = lines
        self.path: list[str] = []
        if how == "cprofile":
            hook = directory / "hook"
            hook.mkdir(parents=True)
            (hook / "sitecustomize.py").write_text(_HOOK.format(directory=str(directory)), encoding="utf-8")
            self.path.append(str(hook))
        elif shutil.which(self.program) is None:
            raise BenchError(f"{self.program} is not installed; --how cprofile needs nothing")

    @property
    def program(self) -> str:
        """The tool that looks from outside."""
        return "perf" if self.how == "perf" else "strace"

    def watch(self, root: int, seconds: float) -> None:
        """Look at a process tree from outside for `seconds`."""
        processes = ",".join(str(pid) for pid, _ in tree(root))
        if self.how == "cprofile":
            self._toggle(root)
            time.sleep(seconds)
            self._toggle(root)
        elif self.how == "perf":
            record = [
                "perf",
                "record",
                "-q",
                "-g",
                "-F",
                "1999",
                "-o",
                str(self.directory / "perf.data"),
                "-p",
                processes,
            ]
            subprocess.run([*record, "--", "sleep", str(seconds)], check=False, capture_output=True)
        elif self.how == "syscalls":
            command = ["timeout", "-s", "INT", str(seconds), "strace", "-c", "-f"]
            command += [word for pid, _ in tree(root) for word in ("-p", str(pid))]
            with (self.directory / "syscalls.txt").open("w", encoding="utf-8") as out:
                subprocess.run(command, check=False, stderr=out)

    def _toggle(self, root: int) -> None:
        for pid, _ in tree(root):
            os.kill(pid, signal.SIGUSR2)

    def report(self) -> str:
        """What was seen; the gateway has ended by now."""
        if self.how == "perf":
            command = ["perf", "report", "-i", str(self.directory / "perf.data"), "--no-children", "-g", "none"]
            done = subprocess.run([*command, "--stdio"], capture_output=True, text=True, check=False)
            shown = [line for line in done.stdout.splitlines() if line.strip() and not line.startswith("#")]
            return "\n".join(shown[: self.lines]) or done.stderr
        if self.how == "syscalls":
            return (self.directory / "syscalls.txt").read_text(encoding="utf-8")
        profiles = sorted(self.directory.glob("*.pstats"), key=lambda path: path.stat().st_size)
        if not profiles:
            return "the gateway left no profile"
        # Of several processes the one with the most functions is the replica.
        statistics = pstats.Stats(str(profiles[-1]))
        statistics.strip_dirs().sort_stats("tottime").print_stats(self.lines)
        return ""


def measure(options: argparse.Namespace, directory: Path, cores: tuple[int, int]) -> tuple[Sample, str]:
    """One profiled run of a row, and its report."""
    profiler = Profiler(options.how, options.keep or directory / "profile", options.lines)
    profiler.directory.mkdir(parents=True, exist_ok=True)
    tools = build()
    row = ROWS[options.row]
    with mock_engine(tools, cores[1], directory) as (engine_port, _):
        place = Place(directory / "gateway", engine_port, ["sk-bench-profile"])
        bench = Bench(tools, 1, lambda text: print(f"wrong answers: {text}", file=sys.stderr))
        subject = SUBJECTS[f"forebay-{options.face}"]
        with Running(subject, place, cores, path=profiler.path) as running:
            bench.touch(running.target)
            actions = [(0.0, lambda: profiler.watch(running.target.pid, options.seconds - 1))]
            sample = bench.measure(row.name, running.target, row.load, options.seconds, actions=actions)
            deadline = time.monotonic() + 20
            while threading.active_count() > 1 and time.monotonic() < deadline:
                time.sleep(0.1)
    return sample, profiler.report()


def main() -> int:
    """Profile once and print; 1 when the gateway or the tool cannot be started."""
    options = parser().parse_args()
    try:
        cores = two_cores(None)
        prepare_machine(cores[1])
        with tempfile.TemporaryDirectory(prefix="bench-") as name, suppress(KeyboardInterrupt):
            sample, text = measure(options, Path(name), cores)
            generator = sample.generator
            print(text)
            print(
                f"{generator['completed']} answers, {generator['chunks']} chunks in {sample.seconds:g} s;"
                f" user {sample.cpu_user:.2f} s, system {sample.cpu_system:.2f} s"
            )
            return 0
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
