"""The picture of a run: what became of requests, first tokens over time, and how times are distributed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from loadtests.scenarios.answers import Outcome, Row
from loadtests.scenarios.goodput import missed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from loadtests.scenarios.report import Run

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442", "#000000")
"""Of classes; they stay apart for eyes that tell red from green badly (Okabe and Ito)."""
KINDS = {"served well": "#009e73", "too late": "#e69f00", "refused": "#999999", "broken, failed, cut": "#d55e00"}
_BINS, _POINTS = 60, 4000


def kind_of(row: Row, run: Run) -> str:
    """Which of ``KINDS`` a request is."""
    if row.outcome is Outcome.COMPLETE:
        return "served well" if missed(row, run.slos[row.klass]) is None else "too late"
    return "refused" if row.outcome is Outcome.REFUSED else "broken, failed, cut"


def draw(run: Run, file: Path) -> None:
    """Write it."""
    figure = Figure(figsize=(11, 7), dpi=80)
    FigureCanvasAgg(figure)
    (top, first), (spread, between) = figure.subplots(2, 2)
    figure.subplots_adjust(left=0.06, right=0.98, top=0.95, bottom=0.07, hspace=0.3, wspace=0.15)
    _rates(top, run)
    _over_time(first, run)
    classes = list(run.scenario.classes)
    ttft = {name: [row.ttft for row in run.rows if row.klass == name and row.ttft is not None] for name in classes}
    _distribution(spread, ttft, "time to the first token, s")
    gaps = {name: [gap / 1e6 for row in run.rows if row.klass == name for gap in row.gaps] for name in classes}
    _distribution(between, gaps, "time between two tokens, s")
    figure.savefig(file)


def _rates(axes: Axes, run: Run) -> None:
    width = max(0.5, run.seconds / _BINS)
    count = max(1, math.ceil(run.seconds / width))
    heights = {kind: [0.0] * count for kind in KINDS}
    for row in run.rows:
        heights[kind_of(row, run)][min(count - 1, int(row.at / width))] += 1 / width
    places = [(number + 0.5) * width for number in range(count)]
    axes.stackplot(places, *heights.values(), labels=list(KINDS), colors=list(KINDS.values()), step="mid")
    axes.set(title="what became of requests", xlabel="intended start, s", ylabel="requests a second", xlim=(0, None))
    axes.legend(fontsize=8, loc="upper left")


def _over_time(axes: Axes, run: Run) -> None:
    for colour, (name, klass) in zip(_colours(), run.scenario.classes.items(), strict=False):
        known = [(row.at, row.ttft) for row in run.rows if row.klass == name and row.ttft is not None]
        shown = known[:: max(1, len(known) // _POINTS)]
        axes.scatter([at for at, _ in shown], [ttft for _, ttft in shown], s=5, color=colour, label=name)
        axes.axhline(klass.slo.ttft, color=colour, linestyle="--", linewidth=0.8)
    axes.set(title="first tokens (dashed: SLO)", xlabel="intended start, s", ylabel="s", yscale="log", xlim=(0, None))
    axes.legend(fontsize=8)


def _distribution(axes: Axes, values: dict[str, list[float]], label: str) -> None:
    for colour, (name, unordered) in zip(_colours(), values.items(), strict=False):
        if unordered:
            ordered = _thinned(sorted(max(1e-5, value) for value in unordered))
            shares = [(number + 1) / len(ordered) for number in range(len(ordered))]
            axes.plot(ordered, shares, color=colour, label=name)
    axes.set(title="distribution", xlabel=label, ylabel="share not above", xscale="log", ylim=(0, 1))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize=8)


def _thinned(ordered: list[float]) -> Sequence[float]:
    if len(ordered) <= _POINTS:
        return ordered
    return [ordered[round(number * (len(ordered) - 1) / (_POINTS - 1))] for number in range(_POINTS)]


def _colours() -> list[str]:
    return list(COLOURS) * 8
