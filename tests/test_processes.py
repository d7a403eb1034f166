"""Children start in order, stop in the opposite order, and none is left behind whatever ends the parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from gateway.processes import Child, ProcessTree, StopRequested, last_lines, stop_signals

# A child that says "up" in its log when it can be stopped, and "NAME down" in a file they all share when it is.
POLITE = """
import signal, sys
def down(*_):
    open(sys.argv[2], "a").write(sys.argv[1] + " down\\n")
    sys.exit(0)
signal.signal(signal.SIGTERM, down)
print("up", flush=True)
signal.pause()
"""
STUBBORN = """
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("up", flush=True)
signal.pause()
"""


@pytest.fixture
def tree() -> Iterator[ProcessTree]:
    made = ProcessTree()
    yield made
    made.kill()


def start(tree: ProcessTree, name: str, program: str, directory: Path, grace: float = 20.0) -> Child:
    """Start a program and wait until it says that it is up."""
    fifo = directory / f"{name}.log"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    command = [sys.executable, "-S", "-c", program, name, str(directory / "order")]
    child = tree.start(name, command, grace=grace, log=fifo)
    os.set_blocking(reader, True)
    assert os.read(reader, 3) == b"up\n"
    os.close(reader)
    return child


def test_children_stop_newest_first_and_each_is_waited_for(tree: ProcessTree, tmp_path: Path) -> None:
    children = [start(tree, name, POLITE, tmp_path) for name in ("engine", "replica")]
    assert tree.stop() == []
    assert (tmp_path / "order").read_text().split("\n") == ["replica down", "engine down", ""]
    assert [child.process.returncode for child in children] == [0, 0]
    tree.stop()  # nothing is left to do


def test_one_that_does_not_stop_in_its_grace_is_killed_and_the_rest_is_stopped(
    tree: ProcessTree, tmp_path: Path
) -> None:
    start(tree, "engine", POLITE, tmp_path)
    stubborn = start(tree, "replica", STUBBORN, tmp_path, grace=0.05)
    assert tree.stop() == ["replica"]
    assert stubborn.process.returncode == -signal.SIGKILL
    assert (tmp_path / "order").read_text() == "engine down\n"


def test_the_one_that_ended_is_named(tree: ProcessTree, tmp_path: Path) -> None:
    start(tree, "engine", POLITE, tmp_path)
    tree.start("replica", [sys.executable, "-S", "-c", "raise SystemExit(3)"], grace=1)
    ended = tree.next_ended(timeout=60)
    assert ended is not None
    assert (ended.name, ended.process.returncode) == ("replica", 3)
    assert tree.next_ended(timeout=0) is None


def test_what_it_says_goes_to_the_end_of_its_log(tree: ProcessTree, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("earlier\n")
    program = "import sys, os; print(os.environ['MOOD']); sys.stdout.flush(); print('bad', file=sys.stderr)"
    tree.start("a", [sys.executable, "-S", "-c", program], grace=1, environment={"MOOD": "good"}, log=log)
    assert tree.next_ended(timeout=60) is not None
    assert last_lines(log, 2) == ["good", "bad"]
    assert last_lines(log, 9) == ["earlier", "good", "bad"]
    assert last_lines(tmp_path / "none", 2) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_to_stop(tree: ProcessTree, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(StopRequested), stop_signals(tree):
        os.kill(os.getpid(), number)
        signal.pause()
    assert tree.stopping
    assert signal.getsignal(number) == before


# --- a parent of its own, seen from outside ----------------------------------------------------------------------

PARENT = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    from gateway.processes import ProcessTree, StopRequested, stop_signals
    tree = ProcessTree()
    with stop_signals(tree):
        try:
            for name, program in zip(("engine", "replica"), sys.argv[2:]):
                tree.start(name, [sys.executable, "-S", "-u", "-c", program, name, sys.argv[1]], grace=30)
            tree.next_ended()
        except StopRequested:
            print("stopping", flush=True)
        tree.stop()
    print("stopped", flush=True)
    """
)


@pytest.fixture
def parent(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A parent with two children that are up, and their process ids."""
    command = [sys.executable, "-c", PARENT, str(tmp_path / "order"), *request.param]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    assert process.stdout is not None
    assert [process.stdout.readline(), process.stdout.readline()] == ["up\n", "up\n"]
    children = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    assert len(children) == 2
    yield process, children
    process.stdout.close()
    process.kill()
    process.wait()


def gone(pids: list[int]) -> bool:
    """Whether all of them have ended within a minute; a zombie of nobody counts as ended."""
    processes = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    _, alive = psutil.wait_procs(processes, timeout=60)
    return all(process.status() == psutil.STATUS_ZOMBIE for process in alive)


@pytest.mark.parametrize("parent", [[POLITE, POLITE]], indirect=True)
def test_ctrl_c_stops_in_order(parent: tuple[subprocess.Popen[str], list[int]], tmp_path: Path) -> None:
    process, children = parent
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[0] == "stopping\nstopped\n"
    assert process.returncode == 0
    assert (tmp_path / "order").read_text() == "replica down\nengine down\n"
    assert gone(children)


@pytest.mark.parametrize("parent", [[POLITE, STUBBORN]], indirect=True)
def test_the_second_signal_ends_everything_now(parent: tuple[subprocess.Popen[str], list[int]]) -> None:
    process, children = parent
    assert process.stdout is not None
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "stopping\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert gone(children)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parent")
@pytest.mark.parametrize("parent", [[POLITE, POLITE]], indirect=True)
def test_a_killed_parent_takes_its_children_along(parent: tuple[subprocess.Popen[str], list[int]]) -> None:
    process, children = parent
    process.kill()
    assert gone(children)
