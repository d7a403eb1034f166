"""The `forebay` command inside the test's process, in a directory and with a data directory of its own."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import pytest
import typer.testing
from typer.testing import CliRunner, Result

from gateway.cli import app

__all__ = ["CliRunner", "Result", "done", "forebay", "home", "refused"]

# The command is put together once, as in a process of its own: that takes longer than most of what it is asked here.
typer.testing._get_command = cache(typer.testing._get_command)  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty data directory and an empty working directory, and no settings of the person who runs the tests."""
    for name in [name for name in os.environ if name.startswith("FOREBAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("FOREBAY_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


def forebay(*arguments: str, stdin: str | None = None) -> Result:
    """Run a command; anything unexpected is raised here."""
    return CliRunner().invoke(app, [*arguments], input=stdin, catch_exceptions=False)


def done(*arguments: str, stdin: str | None = None) -> str:
    """Run a command that must work; return what it printed, without the line's end."""
    result = forebay(*arguments, stdin=stdin)
    assert result.exit_code == 0, result.stderr
    return result.stdout.removesuffix("\n")


def refused(*arguments: str, stdin: str | None = None) -> str:
    """Run a command that must fail as expected; return the one thing it says."""
    result = forebay(*arguments, stdin=stdin)
    assert result.exit_code == 1
    assert result.stdout == ""
    return result.stderr.removeprefix("forebay: ").removesuffix("\n")
