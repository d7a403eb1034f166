"""When requests come. Pure: randomness is an argument, times are seconds from the beginning of a run.

Arrivals are open: they depend on nothing that is answered. A Gamma process draws the time between two arrivals from a
Gamma distribution; its coefficient of variation ``cv`` says how bursty it is (1 is Poisson, 0 a clock).
"""

from __future__ import annotations

import csv
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request that comes ``at``. ``input`` and ``output``: tokens where a trace says them."""

    at: float
    phase: str = ""
    input: int | None = None
    output: int | None = None


def gaps(rate: float, cv: float, chance: random.Random) -> Iterator[float]:
    """Seconds between arrivals, without end."""
    shape = 1 / (cv * cv) if cv else 0.0
    while True:
        if not cv:
            yield 1 / rate
        elif cv == 1:
            yield chance.expovariate(rate)
        else:
            yield chance.gammavariate(shape, 1 / (shape * rate))


def process(rate: float, cv: float, begin: float, end: float, chance: random.Random, phase: str = "") -> list[Arrival]:
    """Arrivals at a rate (a second) from ``begin`` until ``end``. The first comes a part of a gap after the beginning,
    so that the processes of several classes do not begin together."""
    found: list[Arrival] = []
    between = gaps(rate, cv, chance)
    at = begin + next(between) * (chance.random() if cv != 1 else 1.0)
    while at < end:
        found.append(Arrival(at, phase))
        at += next(between)
    return found


@dataclass(frozen=True, slots=True)
class Step:
    """A part of a run: its length in seconds, and how many times the base rate comes in it."""

    times: float
    seconds: float


def steps(rate: float, cv: float, parts: Sequence[Step], chance: random.Random) -> list[Arrival]:
    """One process after the other; the phase of an arrival says how many times the rate it belongs to."""
    found: list[Arrival] = []
    begin = 0.0
    for part in parts:
        end = begin + part.seconds
        if part.times:
            found += process(rate * part.times, cv, begin, end, chance, f"{part.times:g} x")
        begin = end
    return found


class BadTraceError(Exception):
    """A trace cannot be read; the text says which line, and why."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Names of a trace's columns: its times, and tokens of prompt and answer where it has them."""

    time: str = "time"
    input: str | None = None
    output: str | None = None


def replay(file: Path, columns: Columns, speed: float, end: float) -> list[Arrival]:
    """The arrivals of a CSV file up to ``end`` (of the run): the first at 0, later ones ``speed`` times as fast as they
    came. Times are seconds, or dates and times of ISO 8601. BadTraceError, OSError."""
    with file.open(encoding="utf-8", newline="") as opened:
        rows = csv.DictReader(opened)
        wanted = [name for name in (columns.time, columns.input, columns.output) if name is not None]
        missing = [name for name in wanted if name not in (rows.fieldnames or ())]
        if missing:
            raise BadTraceError(
                f"{file}: there is no column {missing[0]!r}; there are {', '.join(rows.fieldnames or ())}"
            )
        found = []
        for row in rows:
            try:
                at = _seconds(row[columns.time])
                found.append(Arrival(at, "", _tokens(row, columns.input), _tokens(row, columns.output)))
            except (ValueError, TypeError) as error:
                raise BadTraceError(f"{file}, line {rows.line_num}: {error}") from None
    found.sort(key=lambda one: one.at)
    first = found[0].at if found else 0.0
    moved = (Arrival((one.at - first) / speed, one.phase, one.input, one.output) for one in found)
    return [one for one in moved if one.at < end]


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        when = datetime.fromisoformat(text)
        return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()


def _tokens(row: dict[str, str], name: str | None) -> int | None:
    return None if name is None else max(1, round(float(row[name])))
