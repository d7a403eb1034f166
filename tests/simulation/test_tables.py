"""What is run for the tables, how rows read, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loadtests.simulation import experiment, run, tables
from loadtests.simulation.experiment import Plan
from loadtests.simulation.policies import ADMISSIONS, OURS, ROUTERS, SYSTEMS
from loadtests.simulation.tables import Row, Size

SIZE = Size(2, 4.0, 1.0)


def row(load: float, seed: int, goodput: float, *, system: str = OURS, oracle: int = 0, **more: object) -> Row:
    router, admission = SYSTEMS[system]
    made: dict[str, object] = {"workload": "chat", "router": router, "admission": admission, "load": load, "seed": seed}
    made |= {"goodput": goodput, "oracle": oracle, "endpoints": 2, "seconds": 4.0}
    return made | more  # type: ignore[return-value]


def test_each_table_holds_one_thing_fast() -> None:
    plans = list(tables.routers(SIZE, (1.0,), (7,)))
    assert {plan.admission for plan in plans} == {OURS} and [plan.router for plan in plans] == list(ROUTERS)
    plans = list(tables.admissions(SIZE, (1.0,), (7,)))
    assert {plan.router for plan in plans} == {OURS}
    assert [plan.admission for plan in plans] == [*ADMISSIONS, OURS] and [plan.oracle for plan in plans][-2:] == [0, 1]
    assert {(plan.router, plan.admission) for plan in tables.systems(SIZE, (1.0,), (7,))} == set(SYSTEMS.values())
    assert not {1, 2, 3} & set(tables.SEEDS) and len(tables.SEEDS) >= 5, "tried out on some, reported of others"


def test_a_cell_is_the_median_over_the_seeds_and_its_spread() -> None:
    rows = [
        row(1.5, 11, 0.5),
        row(1.5, 12, 0.75),
        row(1.5, 13, 0.25),
        row(1.0, 11, 1.0),
        row(1.5, 11, 0.1, system="smg"),
    ]
    who = {"forebay": (OURS, OURS, 0), "smg": ("smg", "none", 0), "p2c": ("p2c", OURS, 0)}
    assert tables.by_load(rows, who, "goodput").splitlines() == [
        "| | 1 x | 1.5 x |",
        "|---|---|---|",
        "| forebay | 1.000 | 0.500 (0.250-0.750) |",
        "| smg | - | 0.100 |",
    ]


def test_the_aims_are_reckoned_from_medians() -> None:
    rows = [row(1.5, 11, 0.6), row(1.5, 11, 0.5, system="llm-d"), row(1.5, 11, 0.8, oracle=1)]
    rows += [row(0.5, 11, 0.98), row(0.5, 11, 1.0, system="smg"), row(0.5, 11, 0.9, system="llm-d")]
    rows += [row(0.45, 11, 1.0, workload="victims", victims_ttft_p95=0.1)]
    rows += [row(5.45, 11, 0.1, workload="abuser", victims_ttft_p95=0.14)]
    rows += [row(2.0, 11, 0.1, workload="backlog", gap=50.0, gap_bound=1000.0)]
    told = tables.aims(rows)
    for part in ("1.20 times", "| -2.0 % |", "| 75 % |", "1.4 times (0.14 s after 0.10 s)", "5.0 % of it"):
        assert part in told, part


def test_tables_of_a_page_are_written_anew_between_their_marks() -> None:
    page = "# A\n<!-- one -->\nold\n<!-- end -->\ntext\n<!-- two -->\nold\n<!-- end -->\n"
    empty = page.replace("old\n", "")
    assert run.filled(empty, {"one": "old", "two": "old"}) == page
    assert run.filled(page, {"one": "| 1 |", "three": "| 3 |"}) == page.replace("old", "| 1 |", 1)


def test_the_command_runs_what_is_missing_and_writes_what_it_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def instead(plan: Plan) -> Row:
        asked.append(plan)
        figures = ("ttft_p50", "ttft_p99", "itl_p50", "itl_p99", "prefix_hits", "jain", "wasted")
        own: Row = {"router": plan.router, "admission": plan.admission, "share_refused": 0.0, "share_lost": 0.0}
        return {**row(plan.load, plan.seed, 0.5), **dict.fromkeys(figures, 0.5), **own}

    monkeypatch.setattr(experiment, "run", instead)
    page = tmp_path / "page.md"
    page.write_text("<!-- systems -->\n<!-- end -->\n")
    arguments = ["systems", "--out", str(tmp_path), "--seeds", "3", "--loads", "1,1.5", "--page", str(page)]
    arguments += ["--endpoints", "2", "--seconds", "4"]
    assert run.main(arguments) == 0
    assert len(asked) == 2 * len(SYSTEMS)
    assert run.main(arguments) == 0
    assert len(asked) == 2 * len(SYSTEMS), "what is known is not run again"
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == len(asked)
    assert "| forebay | 0.500 | 0.500 |" in page.read_text()
    assert (tmp_path / "systems.png").stat().st_size > 10_000
    assert "| forebay | 0.500 | 0.500 |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="there is no table 'nothing'"):
        run.main(["nothing", "--out", str(tmp_path)])


def test_the_page_says_what_its_rows_say() -> None:
    """docs/simulation.md is of the rows beside it."""
    docs = Path(__file__).parents[2] / "docs"
    rows = [json.loads(line) for line in (docs / "simulation" / "rows.jsonl").read_text().splitlines()]
    page = (docs / "simulation.md").read_text()
    assert run.filled(page, tables.page(rows)) == page
    assert page.count("<!-- end -->") == len(tables.page(rows))
