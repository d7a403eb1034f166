"""A scenario under locust against simulated engines and a gateway of its own: `make load`, under a minute.

It is the run of `python -m loadtests.scenarios.run abuser`, and what must hold of it whatever the machine is doing.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path

import pytest

from loadtests.scenarios import run
from loadtests.scenarios.answers import Outcome, from_json
from loadtests.scenarios.schedule import plan
from loadtests.scenarios.schema import find, load

SECONDS = 12.0

pytestmark = pytest.mark.load


def test_a_tenant_that_asks_for_too_much(tmp_path: Path) -> None:
    played = run.run(["abuser", "--seconds", str(SECONDS), "--out", str(tmp_path)], print)
    assert played is not None
    with (tmp_path / "rows.jsonl").open("rb") as lines:
        rows = [from_json(line) for line in lines]
    print((tmp_path / "report.md").read_text())

    planned = plan(load(find("abuser"), SECONDS))
    assert sorted(row.at for row in rows) == [one.at for one in planned]
    complete = [row for row in rows if row.outcome is Outcome.COMPLETE]
    refused = [row for row in rows if row.outcome is Outcome.REFUSED]
    assert complete
    came_back = [row for row in rows if row.attempts]
    assert came_back
    assert all(tried.status == 429 and tried.retry_after is not None for row in rows for tried in row.attempts)
    assert len(complete) + len(refused) == len(rows), Counter((row.outcome, row.status, row.error) for row in rows)
    assert all(row.retry_after is not None for row in refused)
    assert all(row.ttft is not None and row.ttft >= row.late and row.events for row in complete)
    assert {row.tenant for row in (*refused, *came_back)} == {"greedy"}

    engines = json.loads((tmp_path / "engines.json").read_text())["figures"]
    assert engines["ended"] == len(complete)
    assert engines["generation"] == sum(row.output_tokens or 0 for row in complete)
    assert engines["prompt"] == sum(row.prompt_tokens or 0 for row in complete)

    totals = json.loads((tmp_path / "totals.json").read_text())
    assert totals["all"]["all"]["requests"] == len(rows)
    for what in ("klass", "tenant"):
        counted = Counter(getattr(row, what) for row in rows)
        done = Counter(getattr(row, what) for row in complete)
        assert {name: one["requests"] for name, one in totals[what].items()} == counted
        assert {name: one["complete"] for name, one in totals[what].items()} == done
    assert totals["all"]["all"]["ttft"]["count"] == len(complete)
    assert (tmp_path / "report.png").stat().st_size > 10_000
    assert (tmp_path / "locust.html").stat().st_size > 10_000

    with (tmp_path / "locust_stats.csv").open(newline="") as file:
        locust = {(line["Type"], line["Name"]): line for line in csv.DictReader(file)}
    for klass, count in Counter(row.klass for row in rows).items():
        whole = sum(row.klass == klass for row in complete)
        assert int(locust["whole", klass]["Request Count"]) == count
        assert int(locust["whole", klass]["Failure Count"]) == count - whole
        assert int(locust["TTFT", klass]["Request Count"]) == whole
        assert int(locust["SLO", klass]["Failure Count"]) == count - totals["klass"][klass]["well"]
