"""A report of rows that are known: its tables say what they say."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from loadtests.scenarios import report
from loadtests.scenarios.answers import Attempt, Outcome, Row, as_json
from loadtests.scenarios.schema import find, load

SCENARIO = load(find("overload"))


def rows() -> list[Row]:
    made = []
    for number, outcome in enumerate([*Outcome] * 3):
        klass, tenant = (("urgent", "shop"), ("chat", "desk"))[number % 2]
        row = Row(klass, tenant, f"{number % 3 or 0.5} x", number, 0, number / 2.0, outcome, late=0.001 * number)
        if outcome is Outcome.COMPLETE:
            row.ttft, row.total, row.gaps, row.output_tokens = 0.2 + number / 10, 3.0, [20_000, 30_000], 40
        if outcome is Outcome.REFUSED:
            row.status, row.retry_after, row.attempts = 429, 1.5, [Attempt(429, 1.0)]
        made.append(row)
    return made


def written(folder: Path, made: list[Row]) -> Path:
    folder.mkdir()
    (folder / "rows.jsonl").write_bytes(b"".join(map(as_json, made)))
    scenario = SCENARIO.model_dump(mode="json", exclude_defaults=True)
    told = {
        "host": "http://x",
        "began": "2026-01-01T00:00:00+00:00",
        "client_cpu": 0.25,
        "wall": 95.0,
        "scenario": scenario,
    }
    (folder / "run.json").write_text(json.dumps(told))
    return folder


def table_of(text: str, title: str) -> dict[str, dict[str, str]]:
    """The first table whose first column has that title."""
    (lines,) = re.findall(rf"^(\| {title} \| requests.*\n(?:\|.*\n)+)", text, re.MULTILINE)
    head, _, *rest = ([cell.strip() for cell in line.strip("|").split(" |")] for line in lines.splitlines())
    return {cells[0]: dict(zip(head, cells, strict=True)) for cells in rest}


def test_the_report_of_two_clients_is_whole(tmp_path: Path) -> None:
    made = rows()
    folders = [written(tmp_path / "one", made[::2]), written(tmp_path / "two", made[1::2])]
    (folders[0] / "engines.json").write_text(
        json.dumps({"figures": {"ended": 3, "prompt": 0, "generation": 120}, "deaths": 2})
    )
    assert report.main([str(folder) for folder in folders]) == 0
    text = (folders[0] / "report.md").read_text()
    totals = json.loads((folders[0] / "totals.json").read_text())
    assert (folders[0] / "report.png").read_bytes().startswith(b"\x89PNG")
    outcomes = Counter(row.outcome for row in made)
    everything = table_of(text, "class")["all"]
    assert everything["requests"] == str(len(made))
    for outcome in Outcome:
        assert everything[outcome] == str(outcomes[outcome])
        assert totals["all"]["all"][outcome] == outcomes[outcome]
    for what, title, attribute in (("klass", "class", "klass"), ("tenant", "tenant", "tenant")):
        counts = Counter(getattr(row, attribute) for row in made)
        shown = {name: int(cells["requests"]) for name, cells in table_of(text, title).items() if name != "all"}
        assert shown == counts == {name: one["requests"] for name, one in totals[what].items()}
    assert everything["came back"] == "3"
    assert "| answer tokens | 120 | 120 |" in text
    assert "2 engines were killed" in text
    assert "3 with 429" in text
    assert "2 client processes" in text


def test_a_client_that_was_late_says_so(tmp_path: Path) -> None:
    made = rows()
    assert "the client itself" not in report.markdown(report.read([written(tmp_path / "one", made)]))
    made[0].late = 0.2
    assert "the client itself" in report.markdown(report.read([written(tmp_path / "two", made)]))


def test_a_run_without_rows_has_a_report(tmp_path: Path) -> None:
    assert table_of(report.markdown(report.read([written(tmp_path / "none", [])])), "class")["all"]["requests"] == "0"


def test_what_is_no_run_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(tmp_path / "nothing")]) == 1
    assert "nothing holds no whole run" in capsys.readouterr().err
    folder = written(tmp_path / "torn", rows())
    with (folder / "rows.jsonl").open("ab") as file:
        file.write(b'{"klass": "ch')
    assert report.main([str(folder)]) == 1
