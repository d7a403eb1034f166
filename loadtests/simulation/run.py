"""Compares policies in simulation: the gateway's own and others', over loads and seeds; rows, tables, pictures."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from loadtests.simulation import experiment, plots, tables
from loadtests.simulation.experiment import Plan
from loadtests.simulation.policies import ADMISSIONS, OURS, ROUTERS
from loadtests.simulation.workloads import WORKLOADS

_OUT = Path(".cache") / "simulation"
_QUICK = "quick"
_EXAMPLES = """\
tables:
  quick       whole systems at 1 and 1.5 times what two engines carry, one seed: about a minute
  systems     whole systems as they come: production-stack, SMG, llm-d, Forebay
  admissions  every admission with Forebay's router, and Forebay's that knows how long answers will be
  routers     every router with Forebay's admission
  elsewhere   other workloads: bursts, no reuse, code, adapters, engines that die or are slow
  fairness    nine tenants beside one that floods; two tenants who always wait
  one         a single run: --workload, --router, --admission, --load

workloads:
{workloads}

routers: {routers}
admissions: {admissions}

examples:
  python -m loadtests.simulation.run                                    quick
  python -m loadtests.simulation.run systems --loads 1,1.5 --seeds 11   a part of a table
  python -m loadtests.simulation.run systems admissions routers elsewhere fairness --page docs/simulation.md
  python -m loadtests.simulation.run one --workload deaths --load 0.75
  python -m loadtests.simulation.run one --endpoints 1000 --tenants 10000 --seconds 50 --warm 10

What was run before into the same folder is not run again. docs/simulation.md says what the figures mean.
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    told = _EXAMPLES.format(
        workloads="\n".join(f"  {name:10} {one.about}" for name, one in WORKLOADS.items()),
        routers=", ".join(ROUTERS),
        admissions=", ".join(ADMISSIONS),
    )
    made = argparse.ArgumentParser(
        prog="python -m loadtests.simulation.run",
        description=__doc__,
        epilog=told,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    size = tables.Size()
    made.add_argument("tables", nargs="*", default=[_QUICK], help=f"of {', '.join(tables.TABLES)}, {_QUICK} and one")
    made.add_argument("--out", type=Path, default=_OUT, help=f"folder of rows, report and pictures (default {_OUT})")
    made.add_argument("--seeds", type=_numbers, default=list(tables.SEEDS), help="such as 11,12 (default 11 to 15)")
    made.add_argument("--loads", type=_numbers, default=list(tables.LOADS), help="of what the engines carry")
    made.add_argument("--endpoints", type=int, default=size.endpoints)
    made.add_argument("--seconds", type=float, default=size.seconds, help="that requests come")
    made.add_argument("--warm", type=float, default=size.warm, help="seconds at the beginning that do not count")
    made.add_argument("--page", type=Path, help="a page whose tables are written anew from the rows")
    one = made.add_argument_group("a single run")
    one.add_argument("--workload", choices=WORKLOADS, default="chat")
    one.add_argument("--router", choices=ROUTERS, default=OURS)
    one.add_argument("--admission", choices=ADMISSIONS, default=OURS)
    one.add_argument("--load", type=float, default=1.0)
    one.add_argument("--tenants", type=int, help="instead of the workload's")
    one.add_argument("--rate", type=float, help="requests a second, instead of a load")
    return made


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 1,1.5") from None


def plans(options: argparse.Namespace) -> list[Plan]:
    """Return what is to be run, nothing twice. SystemExit where there is no such table."""
    found: dict[tuple[object, ...], Plan] = {}
    size = tables.Size(options.endpoints, options.seconds, options.warm)
    seeds = [int(seed) for seed in options.seeds]
    for name in options.tables:
        some: Iterable[Plan]
        if name == _QUICK:
            some = tables.systems(tables.Size(2, 30.0, 10.0), (1.0, 1.5), seeds[:1])
        elif name in tables.TABLES:
            some = tables.TABLES[name](size, options.loads, seeds)
        else:
            sys.exit(f"simulation: there is no table {name!r}; there are {', '.join(tables.TABLES)}, {_QUICK} and one")
        found |= {tables.named(plan): plan for plan in some}
    return list(found.values())


def one(options: argparse.Namespace, console: Console) -> None:
    """Do a single run and print its row."""
    workload = WORKLOADS[options.workload]
    if options.tenants:
        workload = replace(workload, tenants=options.tenants)
    size = tables.Size(options.endpoints, options.seconds, options.warm)
    plan = size.plan(options.workload, options.load, int(options.seeds[0]), options.router, options.admission)
    with console.status("simulating") as status:

        def told(now: float, requests: int) -> None:
            status.update(f"second {now:.0f} of {plan.seconds:.0f}, {requests:,} requests have ended")

        row = experiment.run(replace(plan, workload=workload), rate=options.rate, told=told)
    for name, value in row.items():
        console.print(f"{name:20} {value}", highlight=False)


def read(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a file, none where there is no such file."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def simulate(wanted: Sequence[Plan], file: Path, console: Console) -> list[dict[str, Any]]:
    """Run what is not in the file yet; return the rows of what is wanted."""
    rows = read(file)
    known = {tables.key_of(row) for row in rows}
    missing = [plan for plan in wanted if tables.named(plan) not in known]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with file.open("a", encoding="utf-8") as out, Progress(*columns, console=console) as progress:
        task = progress.add_task("simulating", total=len(missing))
        for plan in missing:
            shown = f"{plan.workload.name} {plan.load:g} x: {plan.router} / {plan.admission}"
            progress.update(task, description=f"{shown:55}")
            row = experiment.run(plan)
            rows.append(row)
            out.write(json.dumps(row) + "\n")
            out.flush()
            progress.advance(task)
    names = {tables.named(plan) for plan in wanted}
    return [row for row in rows if tables.key_of(row) in names]


def filled(page: str, made: dict[str, str]) -> str:
    """Return a page with its tables written anew: what is between ``<!-- NAME -->`` and ``<!-- end -->``."""
    for name, table in made.items():
        begin, end = f"<!-- {name} -->\n", "<!-- end -->"
        before, mark, rest = page.partition(begin)
        if mark:
            page = before + begin + table + "\n" + end + rest.partition(end)[2]
    return page


def main(argv: Sequence[str] | None = None) -> int:
    """Run."""
    options = parser().parse_args(argv)
    console = Console()
    if options.tables == ["one"]:
        one(options, console)
        return 0
    wanted = plans(options)
    options.out.mkdir(parents=True, exist_ok=True)
    rows = simulate(wanted, options.out / "rows.jsonl", console)
    made = tables.page(rows)
    shown = {name: table for name, table in made.items() if table.count("\n") > 1}
    text = "\n\n".join(chain.from_iterable((f"## {name}", table) for name, table in shown.items()))
    (options.out / "report.md").write_text(text + "\n", encoding="utf-8")
    plots.draw(rows, options.out)
    if options.page is not None:
        options.page.write_text(filled(options.page.read_text(encoding="utf-8"), made), encoding="utf-8")
    console.print(text, markup=False, highlight=False)
    console.print(f"\nthe same and pictures are in {options.out}", highlight=False)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("simulation: stopped; what was run is kept and not run again", file=sys.stderr)
        sys.exit(1)
