"""What docs/load.md tells to type is there: every command, its options and scenarios; every link."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest

from loadtests.scenarios import options, run
from loadtests.scenarios.schema import find
from loadtests.soak import run as soak

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = (DOCS / "load.md").read_text()
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SPANS = [span for span in re.findall(r"`([^`\n]+)`", _FENCE.sub("", PAGE)) if span.startswith("python ")]


def commands() -> list[list[str]]:
    assert {language for language, _ in _FENCE.findall(PAGE)} == {"sh"}
    lines = [line for _, text in _FENCE.findall(PAGE) for line in text.splitlines()]
    return [words for line in [*lines, *_SPANS] if (words := shlex.split(line, comments=True))]


def locust() -> argparse.ArgumentParser:
    """What locust takes of what the page uses, and all that the locustfile adds."""
    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    for name in ("-f", "--host", "--web-host", "--csv"):
        parser.add_argument(name)
    parser.add_argument("--headless", action="store_true")
    options.add(parser)
    return parser


@pytest.mark.parametrize("words", commands(), ids=shlex.join)
def test_a_command_is_one(words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    match words:
        case ["python", "-m", "loadtests.scenarios.run", "--help"]:
            with pytest.raises(SystemExit, match="0"):
                run.main(["--help"])
            assert "overload" in capsys.readouterr().out
        case ["python", "-m", "loadtests.scenarios.run", *rest] if "--print-config" in rest:
            assert run.main(rest) == 0
            assert "sha256" in capsys.readouterr().out
        case ["python", "-m", "loadtests.scenarios.run", *rest]:
            assert find(run.parser().parse_args(rest).scenario)
        case ["python", "-m", "loadtests.scenarios.report", *folders]:
            assert len(folders) == 2
        case ["python", "-m", "loadtests.soak.run", *rest]:
            with pytest.raises(SystemExit, match="0"):
                soak.main(rest)
            assert "--without-real" in capsys.readouterr().out
        case ["locust", *rest]:
            told = locust().parse_args(rest)
            assert (DOCS.parent / told.f).is_file()
            assert find(told.scenario)
        case _:
            assert words[0] in (".", "export"), words


def test_what_locust_would_not_take_is_noticed() -> None:
    for wrong in (["--scenarios", "chat"], ["--share", "3/2"]):
        with pytest.raises((argparse.ArgumentError, SystemExit)):
            locust().parse_args(wrong)


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+)", PAGE)
    assert targets
    assert [target for target in targets if "://" not in target and not (DOCS / target).exists()] == []
