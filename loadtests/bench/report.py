"""Turns the raw rows of a run into the tables of `docs/benchmarks.md`.

python -m loadtests.bench.report loadtests/bench/results.jsonl            prints them
python -m loadtests.bench.report loadtests/bench/results.jsonl --docs     writes them between the page's markers
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"
TIMES, NOTHING = "\u00d7", "\u2013"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"

CHECKS, REPLICAS = "checks", "replicas"
"""Rows with tables of their own: what they compare are ways to keep limits."""

Raw = Mapping[str, Any]
"""One line of the raw file: a `Sample`, or the header with `kind: machine`."""


def _cpu(sample: Raw) -> float:
    return float(sample["cpu_user"] + sample["cpu_system"])


def _per(counter: str, scale: float) -> Callable[[Raw], float | None]:
    def value(sample: Raw) -> float | None:
        counted = sample["generator"][counter]
        return _cpu(sample) / counted * scale if counted else None

    return value


def _said(*path: str) -> Callable[[Raw], float | None]:
    def value(sample: Raw) -> float | None:
        found: Any = sample["generator"]
        for step in path:
            found = found[step]
        return float(found)

    return value


def _rss_per_stream(sample: Raw) -> float | None:
    streams = sample["generator"]["mean_inflight"]
    return (sample["rss_peak"] - sample["rss_before"]) / 1024 / streams if streams else None


@dataclass(frozen=True, slots=True)
class Metric:
    """One line of the table: which row it is read from, and how."""

    title: str
    row: str
    value: Callable[[Raw], float | None]
    ratio: bool = True
    more_is_better: bool = False


METRICS = (
    Metric("CPU per request, 2 KB, ms", "requests-2k", _per("completed", 1e3)),
    Metric("CPU per request, 32 KB, ms", "requests-32k", _per("completed", 1e3)),
    Metric("requests/s, 32 connections", "requests-2k", _said("requests_per_second"), more_is_better=True),
    Metric("requests/s, 256 connections", "requests-2k-256", _said("requests_per_second"), more_is_better=True),
    Metric("CPU per 64-chunk stream at full speed, ms", "streams", _per("chunks", 64e3)),
    Metric("chunks/s, 32 connections", "streams", _said("chunks_per_second"), more_is_better=True),
    Metric("chunks/s, 256 connections", "streams-256", _said("chunks_per_second"), more_is_better=True),
    Metric("CPU per chunk, one every 5 ms, µs", "paced", _per("chunks", 1e6)),
    Metric("time to first event of a stream, alone, p50, ms", "first-event", _said("first_event", "p50")),
    Metric("512 streams, a chunk every 50 ms: CPU per chunk, µs", "slow", _per("chunks", 1e6)),
    Metric("… delay of a chunk, p50, ms", "slow", _said("delay", "p50")),
    Metric("… delay of a chunk, p99, ms", "slow", _said("delay", "p99")),
    Metric("… memory of the gateway, MB", "slow", lambda sample: sample["rss_peak"] / 1e6),
    Metric("2,000 idle streams: memory per stream, KB", "idle", _rss_per_stream),
    Metric("operator: streams one core carries", "operator", _said("mean_inflight"), more_is_better=True),
    Metric("… CPU of the core used, %", "operator", lambda sample: _cpu(sample) / sample["seconds"] * 100, ratio=False),
    Metric("… added between tokens, p99, ms", "operator", _said("added_gap", "p99")),
    Metric("… added between tokens, p99.9, ms", "operator", _said("added_gap", "p999")),
)


class Figures:
    """Medians of a raw file, by subject and metric."""

    def __init__(self, samples: Iterable[Raw]) -> None:
        self._samples = [sample for sample in samples if sample.get("kind") != "machine"]
        gateways = (str(sample["subject"]) for sample in self._samples if sample["row"] not in (CHECKS, REPLICAS))
        self.subjects = list(dict.fromkeys(gateways))

    def runs(self, subject: str, row: str) -> list[Raw]:
        """All runs of a row, oldest first."""
        return [sample for sample in self._samples if sample["subject"] == subject and sample["row"] == row]

    def value(self, subject: str, metric: Metric) -> float | None:
        """The median over the runs, or None when there was no such run."""
        values = [metric.value(sample) for sample in self.runs(subject, metric.row)]
        known = [value for value in values if value is not None]
        return median(known) if known else None

    def marked(self, subject: str, row: str) -> str:
        """Signs for what is wrong with a row's runs: † wrong answers, ‡ a pace not kept, § chunks too late."""
        runs = self.runs(subject, row)
        signs = "†" if any(sample["generator"]["faults"] for sample in runs) else ""
        signs += "‡" if any(_fell_behind(sample) for sample in runs) else ""
        return signs + ("§" if any(sample["notes"].get("in_time") is False for sample in runs) else "")

    def all(self) -> Sequence[Raw]:
        """Every run."""
        return self._samples


_DUE = {"paced": 1 / 0.005, "slow": 1 / 0.05, "idle": 1 / 4}
"""Rows whose pace the engine sets: chunks a second and stream."""


def _fell_behind(sample: Raw) -> bool:
    due = _DUE.get(sample["row"])
    if due is None:
        return False
    streams = sample["generator"]["mean_inflight"]
    return bool(sample["generator"]["chunks_per_second"] < 0.95 * due * streams)


def _short(value: float) -> str:
    if value >= 1000:
        return f"{value:,.0f}"
    return (
        f"{value:.0f}"
        if value >= 100
        else f"{value:.1f}"
        if value >= 10
        else f"{value:.2f}"
        if value >= 1
        else f"{value:.3f}"
    )


def table(figures: Figures) -> str:
    """The main table: a line a metric, a column a subject, ratios to nginx in brackets."""
    subjects = [subject for subject in figures.subjects if subject != "direct"]
    if not subjects:
        return ""
    lines = ["| | " + " | ".join(subjects) + " |", "|---|" + "---|" * len(subjects)]
    for metric in METRICS:
        base = figures.value("nginx", metric)
        cells = []
        for subject in subjects:
            value = figures.value(subject, metric)
            if value is None:
                cells.append(NOTHING)
                continue
            ratio = f" ({value / base:.2f}{TIMES})" if metric.ratio and base and subject != "nginx" else ""
            cells.append(_short(value) + ratio + figures.marked(subject, metric.row))
        if any(cell != NOTHING for cell in cells):
            lines.append(f"| {metric.title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# --- aims --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Aim:
    """What the project wants of a figure; `measured` is None when the run did not hold it."""

    text: str
    measured: Callable[[Figures, str], float | None]
    most: float | None = None
    least: float | None = None

    def met(self, value: float) -> bool:
        """Whether a measured value is within it."""
        return (self.most is None or value <= self.most) and (self.least is None or value >= self.least)


def _metric(title_start: str, row: str) -> Metric:
    return next(metric for metric in METRICS if metric.row == row and metric.title.startswith(title_start))


def _value(title: str, row: str) -> Callable[[Figures, str], float | None]:
    metric = _metric(title, row)
    return lambda figures, subject: figures.value(subject, metric)


def _ratio(title: str, row: str, base: str = "nginx", invert: bool = False) -> Callable[[Figures, str], float | None]:
    metric = _metric(title, row)

    def measured(figures: Figures, subject: str) -> float | None:
        value, other = figures.value(subject, metric), figures.value(base, metric)
        if not value or not other:
            return None
        return other / value if invert else value / other

    return measured


def _added_first_event(figures: Figures, subject: str) -> float | None:
    metric = _metric("time to first", "first-event")
    value, direct = figures.value(subject, metric), figures.value("direct", metric)
    return None if value is None or direct is None else value - direct


AIMS = (
    Aim("CPU per request, times nginx: ≤ 4", _ratio("CPU per request", "requests-2k"), most=4),
    Aim("CPU per paced chunk, times nginx: ≤ 1.3", _ratio("CPU per chunk", "paced"), most=1.3),
    Aim("added time to a stream's first event, ms: ≤ 0.3", _added_first_event, most=0.3),
    Aim("512 streams, delay p99, times nginx: ≤ 2", _ratio("… delay of a chunk, p99", "slow"), most=2),
    Aim(
        "CPU per request, times less than the naive gateway: ≥ 30",
        _ratio("CPU", "requests-2k", "naive", True),
        least=30,
    ),
    Aim("memory per idle stream, KB: ≤ 40", _value("2,000 idle streams", "idle"), most=40),
    Aim("operator: added between tokens, p99, ms: ≤ 10", _value("… added between tokens, p99, ", "operator"), most=10),
    Aim(
        "operator: added between tokens, p99.9, ms: ≤ 50", _value("… added between tokens, p99.9", "operator"), most=50
    ),
)


def aims(figures: Figures) -> str:
    """The second table: each aim, what was measured on either face, whether it is met."""
    faces = [subject for subject in figures.subjects if subject.startswith("forebay")]
    if not faces:
        return ""
    lines = ["| aim | " + " | ".join(faces) + " |", "|---|" + "---|" * len(faces)]
    for aim in AIMS:
        cells = []
        for face in faces:
            value = aim.measured(figures, face)
            cells.append(NOTHING if value is None else f"{_short(value)} {'met' if aim.met(value) else '**missed**'}")
        if any(cell != NOTHING for cell in cells):
            lines.append(f"| {aim.text} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def losses(figures: Figures) -> str:
    """Every line of the table in which another gateway does better than the fast face, and by how much."""
    mine = "forebay-protocol"
    lines = []
    for metric in METRICS:
        own = figures.value(mine, metric)
        if not metric.ratio or not own:
            continue
        better = []
        for subject in figures.subjects:
            value = figures.value(subject, metric)
            # The floor is no gateway: it is there to be compared with, not to be chosen.
            if (
                subject in ("direct", "floor")
                or subject.startswith("forebay")
                or not value
                or figures.marked(subject, metric.row)
            ):
                continue
            factor = value / own if metric.more_is_better else own / value
            if factor > 1.05:
                better.append(f"{subject} by {factor:.2f}{TIMES}")
        if better:
            lines.append(f"- {_whole_title(metric)}: " + ", ".join(better))
    return (
        "Where another gateway does better than Forebay's fast face, by more than 5 %:\n\n" + "\n".join(lines)
        if lines
        else ""
    )


def _whole_title(metric: Metric) -> str:
    """A title that can stand alone: lines that begin with … continue the one above."""
    if not metric.title.startswith("… "):
        return metric.title
    first = next(other for other in METRICS if other.row == metric.row).title
    return f"{first.partition(':')[0]}: {metric.title[2:]}"


# --- limits ------------------------------------------------------------------------------------------------------


def limits_line(sample: Raw) -> str:
    """One run of these rows, for whoever watches."""
    told, done = sample["generator"], sample["generator"]["completed"] / 1e6
    about = "".join(f"{name} {value}, " for name, value in sample["notes"].items() if name != "server_cpu")
    cost = f"CPU {_cpu(sample) / done:.4g} µs + {sample['notes']['server_cpu'] / done:.4g} of the server"
    return f"{about}{cost}, {told['requests_per_second']:,.0f}/s"


def checks(figures: Figures) -> str:
    """What a check of limits costs, by where its buckets are and how many there are."""
    cells: dict[tuple[str, int], dict[int, list[tuple[float, float]]]] = {}
    for sample in figures.all():
        if sample["row"] == CHECKS:
            notes, done = sample["notes"], sample["generator"]["completed"] / 1e6
            column = cells.setdefault((sample["subject"], notes["at_once"]), {})
            column.setdefault(notes["buckets"], []).append((_cpu(sample) / done, notes["server_cpu"] / done))
    if not cells:
        return ""
    titles = [f"{subject}{f', {at_once} at once' if subject == 'exact' else ''}" for subject, at_once in cells]
    lines = ["| CPU per check, µs (+ the server's) | " + " | ".join(titles) + " |", "|---|" + "---|" * len(titles)]
    for buckets in sorted({buckets for column in cells.values() for buckets in column}):
        line = []
        for (subject, _), column in cells.items():
            own = median(each for each, _ in column[buckets])
            other = median(each for _, each in column[buckets])
            line.append(_short(own) + (f" (+ {_short(other)})" if subject != "memory" else ""))
        lines.append(f"| {buckets} bucket{'s' if buckets > 1 else ''} | " + " | ".join(line) + " |")
    return "\n".join(lines)


def replicas(figures: Figures) -> str:
    """What three replicas on one core serve, by where their limits are kept."""
    modes = list(dict.fromkeys(sample["subject"] for sample in figures.all() if sample["row"] == REPLICAS))
    if not modes:
        return ""
    lines = ["| three replicas on one core, five limits | " + " | ".join(modes) + " |", "|---|" + "---|" * len(modes)]
    for title, value in (
        ("requests/s", _said("requests_per_second")),
        ("CPU per request, ms", _per("completed", 1e3)),
        (
            "CPU of the server per request, ms",
            lambda one: one["notes"]["server_cpu"] / one["generator"]["completed"] * 1e3,
        ),
    ):
        cells = []
        for mode in modes:
            found = median(value(sample) or 0.0 for sample in figures.runs(mode, REPLICAS))
            cells.append(_short(found) + figures.marked(mode, REPLICAS) if found else NOTHING)
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# --- the soak, the machine, the page -----------------------------------------------------------------------------


def soak(figures: Figures) -> str:
    """Memory over a long run, in tenths."""
    lines = []
    for subject in figures.subjects:
        for sample in figures.runs(subject, "soak"):
            readings = [rss for _, rss in sample["notes"]["rss"]]
            if len(readings) < 11:
                continue
            tenths = [readings[(len(readings) - 1) * tenth // 10] / 1e6 for tenth in range(11)]
            shown = " ".join(f"{value:.1f}" for value in tenths)
            lines.append(f"- {subject}, {sample['generator']['completed']:,} requests: {shown} MB")
    return "Memory from start to end, in tenths of the run:\n\n" + "\n".join(lines) if lines else ""


def conditions(machines: list[Raw], figures: Figures) -> str:
    """The machine, the versions, the command or commands, and how quiet the machine was."""
    machine = machines[0]
    commands = " and ".join(f"`{one['command']}`" for one in machines)
    versions = {name: version for one in machines for name, version in one["versions"].items()}
    foreign = sorted(sample["foreign"] for sample in figures.all())
    quiet = f"{median(foreign) * 100:.1f} % (median), {foreign[-1] * 100:.1f} % (worst run)" if foreign else NOTHING
    lines = [
        f"Measured {machine['date']} with {commands} (seed {machine['seed']}, {machine['runs']} runs of"
        f" {machine['seconds']:g} s a row, medians).",
        f"Machine: {machine['cpu']}, {machine['cores']} cores, Linux {machine['kernel']}, Python {machine['python']}.",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".",
        f"Share of the gateway's core taken by anything else during the windows: {quiet}.",
    ]
    return "\n".join(lines)


def _footnotes(text: str) -> str:
    notes = []
    if "†" in text:
        notes.append("† some answers were wrong or failed; the raw file says which.")
    if "‡" in text:
        notes.append("‡ the gateway did not keep up: the chunks came at less than 95 % of their pace.")
    if "§" in text:
        notes.append("§ in some run chunks came later than the aim at every load that was tried; the last is shown.")
    return "\n".join(notes)


def render(lines: Iterable[Raw]) -> str:
    """The whole generated part of the page."""
    lines = list(lines)
    figures = Figures(lines)
    main = table(figures)
    machines = [line for line in lines if line.get("kind") == "machine"]
    parts = [
        main,
        _footnotes(main),
        aims(figures),
        losses(figures),
        checks(figures),
        replicas(figures),
        soak(figures),
        conditions(machines, figures) if machines else "",
    ]
    return "\n\n".join(part for part in parts if part)


def read_raw(path: Path) -> list[Raw]:
    """The lines of a raw file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def write_page(text: str, page: Path = PAGE) -> None:
    """Put the generated part between the markers of the page; ValueError when it has none."""
    old = page.read_text(encoding="utf-8")
    head, begin, rest = old.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page.name} has no markers {BEGIN} … {END} to write between")
    page.write_text(f"{head}{BEGIN}\n\n{text}\n\n{END}{tail}", encoding="utf-8")


def main() -> None:
    """Print or write the tables of a raw file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raw", type=Path, help="JSON lines written by python -m loadtests.bench.run")
    parser.add_argument("--docs", action="store_true", help=f"write them into {PAGE.parent.name}/{PAGE.name}")
    options = parser.parse_args()
    text = render(read_raw(options.raw))
    if options.docs:
        write_page(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
