"""The report of a run: `python -m loadtests.scenarios.report FOLDER...` reads the rows of one or several client
processes and writes report.md, report.png and totals.json into the first folder.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import yaml

from loadtests.scenarios.answers import Outcome, Row, from_json
from loadtests.scenarios.goodput import Totals, percentile, summed
from loadtests.scenarios.schema import Scenario

LATE = 0.05
"""Seconds. Where one start in a hundred is later, the client was a part of what was measured."""
TOLD = ("requests", "well", "complete", "refused", "error event", "broken", "failed", "timed out", "cut", "not started")


_GROUPS: Mapping[str, Callable[[Row], str]] = {
    "all": lambda _: "all",
    "klass": lambda row: row.klass,
    "tenant": lambda row: row.tenant,
    "phase": lambda row: f"{row.klass}, {row.phase}",
}


class NoRunError(Exception):
    """A folder holds no run; the text says what is missing."""


@dataclass(slots=True)
class Run:
    """All that is known of a run. ``engines``: what simulated engines themselves counted."""

    scenario: Scenario
    host: str
    began: str
    client_cpu: float
    rows: list[Row]
    seconds: float
    """In which requests came: less than the scenario's where somebody stopped it."""
    engines: dict[str, int] | None = None
    deaths: int = 0
    clients: int = 1
    slos: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.slos = {name: klass.slo for name, klass in self.scenario.classes.items()}

    def by(self, what: str) -> dict[str, Totals]:
        """Totals by ``klass``, ``tenant`` or ``phase`` (of those that have one); by ``all`` there is one."""
        rows = [row for row in self.rows if row.phase] if what == "phase" else self.rows
        return summed(rows, self.slos, _GROUPS[what])


def read(folders: Sequence[Path]) -> Run:
    """Read what client processes have left, as one run. NoRunError."""
    told: list[dict[str, Any]] = []
    rows: list[Row] = []
    for folder in folders:
        try:
            told.append(json.loads((folder / "run.json").read_text(encoding="utf-8")))
            with (folder / "rows.jsonl").open("rb") as lines:
                rows += map(from_json, lines)
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            raise NoRunError(f"{folder} holds no whole run: {error}") from None
    rows.sort(key=lambda row: row.at)
    first = told[0]
    run = Run(
        Scenario.model_validate(first["scenario"]),
        first["host"],
        first["began"],
        max(one["client_cpu"] for one in told),
        rows,
        min(float(first["scenario"]["seconds"]), max(1.0, min(one["wall"] for one in told))),
        clients=len(told),
    )
    beside = folders[0] / "engines.json"
    if beside.exists():
        found = json.loads(beside.read_text(encoding="utf-8"))
        run.engines, run.deaths = found["figures"], found["deaths"]
    return run


# --- totals ------------------------------------------------------------------------------------------------------


def numbers(totals: Totals) -> dict[str, Any]:
    """The sums of one group, for programs. Times in seconds."""
    counts: dict[str, Any] = {"requests": totals.requests, "well": totals.well, "goodput": totals.goodput}
    counts |= {str(outcome): totals.outcomes[str(outcome)] for outcome in Outcome}
    counts |= {"misses": dict(totals.misses), "statuses": {str(key): n for key, n in totals.statuses.items()}}
    counts |= {"refused without retry-after": totals.untold, "came back": totals.returns}
    counts |= {"prompt_tokens": totals.prompt_tokens, "output_tokens": totals.output_tokens}
    for name in ("ttft", "itl", "total", "late", "waits"):
        times = getattr(totals, name)
        counts[name] = {"count": len(times)} | {f"p{share}": percentile(times, share / 100) for share in (50, 95, 99)}
    return counts


def totals_of(run: Run) -> dict[str, Any]:
    """All sums of a run, for programs."""
    found: dict[str, Any] = {
        what: {name: numbers(totals) for name, totals in run.by(what).items()}
        for what in ("all", "klass", "tenant", "phase")
    }
    return {**found, "engines": run.engines, "deaths": run.deaths, "client_cpu": run.client_cpu}


# --- words -------------------------------------------------------------------------------------------------------


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds * 1000:,.0f}" if seconds >= 0.1 else f"{seconds * 1000:.1f}"


def _times(times: Sequence[float]) -> list[str]:
    return [_ms(percentile(times, share)) for share in (0.5, 0.95, 0.99)]


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is words, the others are numbers."""
    told = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    return "\n".join([*told, *(f"| {' | '.join(line)} |" for line in lines)]) + "\n"


def _outcomes(what: str, groups: dict[str, Totals], seconds: float) -> str:
    head = [what, *TOLD[:1], "goodput", *TOLD[1:], "came back", "good tokens/s"]
    lines = []
    for name, totals in groups.items():
        counts = [totals.requests, totals.well, *(totals.outcomes[one] for one in TOLD[2:])]
        cells = [f"{count:,}" if count else "0" for count in counts]
        rate = f"{totals.good_tokens / seconds:,.0f}"
        lines.append([name or "-", cells[0], f"{totals.goodput:.1%}", *cells[1:], f"{totals.returns:,}", rate])
    return table(head, lines)


def _latencies(what: str, groups: dict[str, Totals]) -> str:
    head = [what, *(f"{name} p{share}" for name in ("TTFT", "ITL", "total") for share in (50, 95, 99))]
    return table(
        head, [[name or "-", *_times(one.ttft), *_times(one.itl), *_times(one.total)] for name, one in groups.items()]
    )


def _misses(groups: dict[str, Totals]) -> str:
    lines = [
        [f"{name or '-'}: {why}", f"{count:,}", f"{count / one.requests:.1%}"]
        for name, one in groups.items()
        for why, count in one.misses.most_common()
    ]
    return table(["class and why", "requests", "share"], lines) if lines else "None: every request was served well.\n"


def _client(run: Run, everything: Totals) -> str:
    worst = percentile(everything.late, 0.99) or 0.0
    most = everything.late[-1] if everything.late else 0.0
    said = (
        f"Starts were late by {_ms(percentile(everything.late, 0.5))} ms in the median, {_ms(worst)} ms at p99 and"
        f" {_ms(most)} ms at most. The busiest client process used {run.client_cpu:.0%} of a processor.\n"
    )
    if worst > LATE:
        said += (
            f"\n**One start in a hundred was more than {_ms(LATE)} ms late: the client itself, or the machine it"
            " shares, is a part of these times.** Start fewer requests at once, or several clients (`--share`).\n"
        )
    return said


def _refusals(everything: Totals) -> str:
    if not everything.statuses:
        return ""
    statuses = ", ".join(
        f"{count:,} with {status or 'no answer'}" for status, count in sorted(everything.statuses.items())
    )
    said = f"Refusals and failures by status: {statuses}."
    if everything.waits:
        p50, _, p99 = _times(everything.waits)
        said += f" Refused requests were told to come back after {p50} ms in the median, {p99} ms at p99"
        said += f"; {everything.untold:,} were told nothing." if everything.untold else "; all were told when."
    return said + "\n"


def _engines(run: Run, everything: Totals) -> str:
    if run.engines is None:
        return ""
    complete = everything.outcomes[str(Outcome.COMPLETE)]
    lines = [
        ["requests", f"{run.engines['ended']:,}", f"{complete:,}"],
        ["prompt tokens", f"{run.engines['prompt']:,}", f"{everything.prompt_tokens:,}"],
        ["answer tokens", f"{run.engines['generation']:,}", f"{everything.output_tokens:,}"],
    ]
    told = table(["", "engines counted", "clients saw"], lines)
    if run.deaths:
        told += f"\n{run.deaths} engines were killed in the run; what a killed one had counted is lost.\n"
    return "\n## Engines and clients\n\n" + told


def markdown(run: Run) -> str:
    """The report as Markdown."""
    scenario = run.scenario
    (everything,) = run.by("all").values() if run.rows else [Totals()]
    classes, tenants, phases = run.by("klass"), run.by("tenant"), run.by("phase")
    told = scenario.model_dump(mode="json", exclude_defaults=True, exclude={"name", "about"})
    slos = "; ".join(f"{name}: first token {_slo(klass.slo)}" for name, klass in scenario.classes.items())
    parts = [
        f"# {scenario.name}\n\n{scenario.about.strip()}\n",
        f"{run.began}, {run.host}, {run.seconds:.3g} s of requests, seed {scenario.seed},"
        f" {run.clients} client process{'es' if run.clients > 1 else ''}, {os.cpu_count()} processors beside it.\n",
        "![Requests and their times](report.png)\n",
        "## What became of requests\n",
        f"Served well is what had its end mark and kept the SLO of its class ({slos}); goodput is its share of all"
        " requests that were to be made.\n",
        _outcomes("class", {**classes, "all": everything}, run.seconds),
        _outcomes("tenant", tenants, run.seconds),
        _outcomes("class and step", phases, run.seconds) if phases else "",
        _refusals(everything),
        "## Times\n",
        "In ms. TTFT and total count from the moment a request should have begun; ITL is between two events with"
        " tokens, over all of them.\n",
        _latencies("class", {**classes, "all": everything}),
        _latencies("tenant", tenants),
        _latencies("class and step", phases) if phases else "",
        "## Why not served well\n",
        _misses(classes),
        "## The client\n",
        _client(run, everything) + _engines(run, everything),
        "## The scenario\n",
        f"```yaml\n{yaml.safe_dump(told, sort_keys=False)}```\n",
    ]
    return "\n".join(part for part in parts if part)


def _slo(slo: Any) -> str:
    between = "" if slo.itl is None else f", {_ms(slo.itl)} ms between tokens in the mean"
    return f"within {_ms(slo.ttft)} ms{between}"


def write(folders: Sequence[Path]) -> Run:
    """Write the report of a run into its first folder. NoRunError."""
    from loadtests.scenarios import plots  # matplotlib takes most of a second

    run = read(folders)
    out = folders[0]
    (out / "totals.json").write_text(json.dumps(totals_of(run), indent=1) + "\n", encoding="utf-8")
    plots.draw(run, out / "report.png")
    (out / "report.md").write_text(markdown(run), encoding="utf-8")
    return run


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report; 1 where there is no run."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.scenarios.report", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="the --out of a client process")
    options = parser.parse_args(argv)
    try:
        write(options.folders)
    except NoRunError as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    print(f"the report is {options.folders[0] / 'report.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
