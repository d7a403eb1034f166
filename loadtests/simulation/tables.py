"""What is run for which table, and how the rows read. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from loadtests.simulation.experiment import Plan
from loadtests.simulation.figures import median
from loadtests.simulation.policies import ADMISSIONS, OURS, ROUTERS, SYSTEMS
from loadtests.simulation.workloads import WORKLOADS

LOADS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
"""Of what the engines carry."""
SEEDS = (11, 12, 13, 14, 15)
"""Those that are reported. Settings were tried out on seeds 1 to 3 only."""

Row = Mapping[str, float | str | int]


@dataclass(frozen=True, slots=True)
class Size:
    """How much is simulated of each run. ``endpoints``; ``seconds`` of which ``warm`` are not counted."""

    endpoints: int = 4
    seconds: float = 45.0
    warm: float = 15.0

    def plan(self, workload: str, load: float, seed: int, router: str = OURS, admission: str = OURS) -> Plan:
        """Return a run of this size."""
        return Plan(WORKLOADS[workload], load, seed, router, admission, self.endpoints, self.seconds, self.warm)


def routers(size: Size, loads: Sequence[float], seeds: Sequence[int], workload: str = "chat") -> Iterator[Plan]:
    """Table A: every router with Forebay's admission."""
    yield from (size.plan(workload, load, seed, one) for seed in seeds for load in loads for one in ROUTERS)


def admissions(size: Size, loads: Sequence[float], seeds: Sequence[int], workload: str = "chat") -> Iterator[Plan]:
    """Table B: every admission with Forebay's router; and Forebay's own that knows how long answers will be."""
    for seed in seeds:
        for load in loads:
            for one in ADMISSIONS:
                yield size.plan(workload, load, seed, admission=one)
            yield replace(size.plan(workload, load, seed), oracle=True)


def systems(size: Size, loads: Sequence[float], seeds: Sequence[int], workload: str = "chat") -> Iterator[Plan]:
    """Table C: whole systems as they come."""
    for seed in seeds:
        for load in loads:
            yield from (size.plan(workload, load, seed, *pair) for pair in SYSTEMS.values())


_OTHERS = ("smg", "llm-d-flow-control-slo", OURS)
_ELSEWHERE = ("bursty", "plain", "burstgpt", "code", "adapters", "deaths", "slow")


def elsewhere(size: Size, loads: Sequence[float], seeds: Sequence[int]) -> Iterator[Plan]:
    """Table D: other workloads, at 1 and 1.5 times what engines carry."""
    for seed in seeds:
        for name in _ELSEWHERE:
            for load in sorted({1.0, 1.5} & set(loads)):
                yield from (size.plan(name, load, seed, *SYSTEMS[one]) for one in _OTHERS)


def fairness(size: Size, loads: Sequence[float], seeds: Sequence[int]) -> Iterator[Plan]:
    """Table E: victims alone and beside an abuser, and two tenants who always wait."""
    for seed in seeds:
        for one in _OTHERS:
            pair = SYSTEMS[one]
            yield size.plan("victims", VICTIMS, seed, *pair)
            yield size.plan("abuser", VICTIMS * (9 + 100) / 9, seed, *pair)
        for admission in ("fcfs", OURS):
            yield size.plan("backlog", 2.0, seed, admission=admission)


VICTIMS = 0.45
"""What nine tenants ask for, of what the engines carry: half of a tenth each. The abuser asks for a hundred times as
much as each, fifty times its tenth."""

TABLES = {
    "systems": systems,
    "admissions": admissions,
    "routers": routers,
    "elsewhere": elsewhere,
    "fairness": fairness,
}


def key_of(row: Row) -> tuple[object, ...]:
    """Return what a run is known by."""
    names = ("workload", "router", "admission", "load", "seed", "endpoints", "oracle", "seconds")
    return tuple(row[name] for name in names)


def named(plan: Plan) -> tuple[object, ...]:
    """Return the same of a plan."""
    return (
        plan.workload.name,
        plan.router,
        plan.admission,
        plan.load,
        plan.seed,
        plan.endpoints,
        int(plan.oracle),
        plan.seconds,
    )


# --- how they read ----------------------------------------------------------------------------------------------------


def spread(rows: Sequence[Row], name: str, digits: int = 3) -> str:
    """Return the median over the seeds and, where there are several, the least and the greatest."""
    values = [float(row[name]) for row in rows]
    if not values:
        return "-"
    middle = f"{median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def by_load(rows: Iterable[Row], who: Mapping[str, tuple[str, str, int]], name: str, workload: str = "chat") -> str:
    """Return a table of one figure: a line for each of ``who`` (router, admission, oracle), a column for each load that
    at least half of them were run at."""
    kept = [row for row in rows if row["workload"] == workload and whose(row) in who.values()]
    at: dict[float, set[tuple[str, str, int]]] = {}
    for row in kept:
        at.setdefault(float(row["load"]), set()).add(whose(row))
    present = {whose(row) for row in kept}
    loads = sorted(load for load, some in at.items() if 2 * len(some) >= len(present))
    lines = ["| | " + " | ".join(f"{load:g} x" for load in loads) + " |", "|---|" + "---|" * len(loads)]
    for label, whom in who.items():
        cells = []
        for load in loads:
            found = [row for row in kept if row["load"] == load and whose(row) == whom]
            cells.append(spread(found, name))
        if any(cell != "-" for cell in cells):
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def whose(row: Row) -> tuple[str, str, int]:
    """Return the policies of a row."""
    return str(row["router"]), str(row["admission"]), int(row["oracle"])


_COLUMNS = {
    "goodput": ("goodput", 3),
    "ttft_p50": ("TTFT p50 s", 2),
    "ttft_p99": ("p99 s", 2),
    "itl_p50": ("ITL p50 s", 3),
    "itl_p99": ("p99 s", 3),
    "prefix_hits": ("prefix hits", 2),
    "jain": ("Jain", 3),
    "wasted": ("wasted", 3),
    "share_refused": ("refused", 3),
    "share_lost": ("lost", 3),
}


def all_figures(rows: Iterable[Row], who: Mapping[str, tuple[str, str, int]], load: float, workload: str) -> str:
    """Return a table of every figure at one load: medians."""
    kept = [row for row in rows if row["workload"] == workload and row["load"] == load]
    heads = [head for head, _ in _COLUMNS.values()]
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    for label, whom in who.items():
        found = [row for row in kept if whose(row) == whom]
        if found:
            cells = [
                f"{median([float(row[name]) for row in found]):.{digits}f}" for name, (_, digits) in _COLUMNS.items()
            ]
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def elsewhere_table(rows: Iterable[Row]) -> str:
    """Return goodput on the other workloads."""
    who = {name: (*SYSTEMS[name], 0) for name in _OTHERS}
    kept = list(rows)
    lines = ["| workload | load | " + " | ".join(who) + " |", "|---|---|" + "---|" * len(who)]
    for name in _ELSEWHERE:
        for load in (1.0, 1.5):
            cells = [
                spread(
                    [row for row in kept if (row["workload"], row["load"], whose(row)) == (name, load, whom)], "goodput"
                )
                for whom in who.values()
            ]
            if any(cell != "-" for cell in cells):
                lines.append(f"| {name} | {load:g} x | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def fairness_table(rows: Iterable[Row]) -> str:
    """Return victims' first tokens alone and beside an abuser."""
    kept = list(rows)
    lines = ["| | victims alone, p95 TTFT s | beside the abuser | goodput of all | Jain |", "|---|---|---|---|---|"]
    for name in _OTHERS:
        whom = (*SYSTEMS[name], 0)
        alone = [row for row in kept if row["workload"] == "victims" and whose(row) == whom]
        beside = [row for row in kept if row["workload"] == "abuser" and whose(row) == whom]
        if alone and beside:
            cells = [spread(alone, "victims_ttft_p95"), spread(beside, "victims_ttft_p95")]
            cells += [spread(beside, "goodput"), spread(beside, "jain")]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def gap_table(rows: Iterable[Row]) -> str:
    """Return how far two tenants drift apart who both wait."""
    kept = [row for row in rows if row["workload"] == "backlog"]
    lines = ["| admission | widest gap, tokens | VTC's bound | goodput |", "|---|---|---|---|"]
    for name in ADMISSIONS:
        found = [row for row in kept if row["admission"] == name]
        if found:
            lines.append(
                f"| {name} | {spread(found, 'gap', 0)} | {spread(found, 'gap_bound', 0)} | {spread(found, 'goodput')} |"
            )
    return "\n".join(lines)


def page(rows: Sequence[Row]) -> dict[str, str]:
    """Return every table by its name."""
    of_systems = {name: (*pair, 0) for name, pair in SYSTEMS.items()}
    of_admissions = {name: (OURS, name, 0) for name in ADMISSIONS} | {"forebay, oracle": (OURS, OURS, 1)}
    of_routers = {name: (name, OURS, 0) for name in ROUTERS}
    return {
        "systems": by_load(rows, of_systems, "goodput"),
        "systems-1": all_figures(rows, of_systems, 1.0, "chat"),
        "systems-1.5": all_figures(rows, of_systems, 1.5, "chat"),
        "admissions": by_load(rows, of_admissions, "goodput"),
        "admissions-1.5": all_figures(rows, of_admissions, 1.5, "chat"),
        "routers": by_load(rows, of_routers, "goodput"),
        "routers-1.5": all_figures(rows, of_routers, 1.5, "chat"),
        "elsewhere": elsewhere_table(rows),
        "fairness": fairness_table(rows),
        "gap": gap_table(rows),
        "aims": aims(rows),
    }


def aims(rows: Sequence[Row]) -> str:
    """Return what was aimed at beside what was reached, of the medians."""
    others = {name: (*pair, 0) for name, pair in SYSTEMS.items() if name != OURS}
    ours = (OURS, OURS, 0)

    def goodput(whom: tuple[str, str, int], load: float) -> float | None:
        return _median(rows, "goodput", workload="chat", load=load, whose=whom)

    lines = ["| aim | reached |", "|---|---|"]
    own, best = goodput(ours, 1.5), max((goodput(one, 1.5) or 0.0 for one in others.values()), default=0.0)
    if own is not None and best:
        lines.append(f"| at 1.5 x at least 1.2 times the goodput of the best of the others | {own / best:.2f} times |")
    lags = []
    for load in (0.5, 0.75, 1.0):
        own, best = goodput(ours, load), max((goodput(one, load) or 0.0 for one in others.values()), default=0.0)
        if own is not None and best:
            lags.append(f"{100 * (own / best - 1):+.1f} %")
    if lags:
        told = ", ".join(lags)
        lines.append(f"| at 0.5, 0.75 and 1 x never more than 2 % below the best of the others | {told} |")
    own, oracle = goodput(ours, 1.5), goodput((OURS, OURS, 1), 1.5)
    if own is not None and oracle:
        lines.append(f"| at least 90 % of the oracle at 1.5 x | {100 * own / oracle:.0f} % |")
    alone = _median(rows, "victims_ttft_p95", workload="victims", whose=ours)
    beside = _median(rows, "victims_ttft_p95", workload="abuser", whose=ours)
    if alone and beside:
        lines.append(
            "| victims' p95 TTFT beside an abuser at 50 times its share at most 1.5 times that without him |"
            f" {beside / alone:.1f} times ({beside:.2f} s after {alone:.2f} s) |"
        )
    gap = _median(rows, "gap", workload="backlog", whose=ours)
    bound = _median(rows, "gap_bound", workload="backlog", whose=ours)
    if gap is not None and bound:
        lines.append(f"| the gap between two who wait within VTC's bound | {100 * gap / bound:.1f} % of it |")
    return "\n".join(lines)


def _median(
    rows: Sequence[Row], name: str, *, workload: str, whose: tuple[str, str, int], load: float | None = None
) -> float | None:
    found = [
        float(row[name])
        for row in rows
        if row["workload"] == workload
        and (row["router"], row["admission"], row["oracle"]) == whose
        and (load is None or row["load"] == load)
    ]
    return median(found) if found else None
