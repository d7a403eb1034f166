"""Pictures of the rows: goodput, first tokens, and what is reused, over the load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from loadtests.scenarios.plots import COLOURS
from loadtests.simulation.figures import median
from loadtests.simulation.policies import ADMISSIONS, OURS, ROUTERS, SYSTEMS
from loadtests.simulation.tables import Row, whose

_FIGURES = {"goodput": "goodput", "ttft_p99": "TTFT p99, s", "prefix_hits": "prefix hits", "jain": "Jain's index"}
_STYLES = ("-", "--")


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write a picture for each table that there are rows of; return the files."""
    tables: dict[str, Mapping[str, tuple[str, str, int]]] = {
        "systems": {name: (*pair, 0) for name, pair in SYSTEMS.items()},
        "admissions": {name: (OURS, name, 0) for name in ADMISSIONS} | {"oracle": (OURS, OURS, 1)},
        "routers": {name: (name, OURS, 0) for name in ROUTERS},
    }
    chat = [row for row in rows if row["workload"] == "chat"]
    written = []
    for table, who in tables.items():
        if len({whom for whom in who.values() if any(whose(row) == whom for row in chat)}) > 1:
            file = folder / f"{table}.png"
            _draw(chat, who, file)
            written.append(file)
    return written


def _draw(rows: Sequence[Row], who: Mapping[str, tuple[str, str, int]], file: Path) -> None:
    figure = Figure(figsize=(11, 7), dpi=80)
    FigureCanvasAgg(figure)
    places = figure.subplots(2, 2).flatten()
    figure.subplots_adjust(left=0.06, right=0.98, top=0.95, bottom=0.07, hspace=0.25, wspace=0.15)
    for axes, (name, title) in zip(places, _FIGURES.items(), strict=True):
        for number, (label, whom) in enumerate(who.items()):
            loads = sorted({float(row["load"]) for row in rows if whose(row) == whom})
            values = [
                [float(row[name]) for row in rows if whose(row) == whom and row["load"] == load] for load in loads
            ]
            if not loads:
                continue
            colour = COLOURS[number % len(COLOURS)]
            width = 2.5 if label == OURS else 1.2
            style = _STYLES[number // len(COLOURS) % len(_STYLES)]
            axes.plot(loads, [median(one) for one in values], style, color=colour, linewidth=width, label=label)
            axes.fill_between(
                loads, [min(one) for one in values], [max(one) for one in values], color=colour, alpha=0.12
            )
        axes.set(title=title, xlabel="load, of what the engines carry")
        axes.grid(alpha=0.3)
    places[1].set_yscale("log")
    places[0].legend(fontsize=8)
    figure.savefig(file)
