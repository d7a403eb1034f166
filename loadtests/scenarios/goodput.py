"""Who was served well: rows held against the SLO of their class, and summed. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from loadtests.scenarios.answers import Outcome, Row
from loadtests.scenarios.schema import Slo


def missed(row: Row, slo: Slo) -> str | None:
    """Why a request does not count as served well; None when it does. An answer that is no stream has its first token
    when it has all."""
    if row.outcome is not Outcome.COMPLETE:
        return str(row.outcome)
    first = row.total if row.ttft is None else row.ttft
    if first is None or first > slo.ttft:
        return "first token too late"
    if slo.itl is not None and row.gaps and sum(row.gaps) / len(row.gaps) > slo.itl * 1e6:
        return "tokens too slow"
    return None


def percentile(ordered: Sequence[float], share: float) -> float | None:
    """The least value that ``share`` of them do not exceed; None of nothing."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None


@dataclass(slots=True)
class Totals:
    """Sums over rows. Times in seconds, ``itl`` of all gaps of its streams."""

    requests: int = 0
    well: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    misses: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    untold: int = 0
    """Refusals that did not say when to come back."""
    returns: int = 0
    """Tries after the first."""
    prompt_tokens: int = 0
    output_tokens: int = 0
    good_tokens: int = 0
    """Tokens of answers that count as served well."""
    late: list[float] = field(default_factory=list)
    ttft: list[float] = field(default_factory=list)
    itl: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    """What refused requests were told to wait."""

    def add(self, row: Row, slo: Slo) -> None:
        """Count a row."""
        self.requests += 1
        self.outcomes[str(row.outcome)] += 1
        why = missed(row, slo)
        if why is None:
            self.well += 1
            self.good_tokens += row.output_tokens or 0
        else:
            self.misses[why] += 1
        self.returns += len(row.attempts)
        self.late.append(row.late)
        self.prompt_tokens += row.prompt_tokens or 0
        self.output_tokens += row.output_tokens or 0
        if row.outcome in (Outcome.REFUSED, Outcome.FAILED):
            self.statuses[row.status] += 1
        if row.outcome is Outcome.REFUSED:
            if row.retry_after is None:
                self.untold += 1
            else:
                self.waits.append(row.retry_after)
        if row.outcome is Outcome.COMPLETE and row.total is not None:
            self.total.append(row.total)
        if row.ttft is not None:
            self.ttft.append(row.ttft)
        self.itl += (gap / 1e6 for gap in row.gaps)

    def order(self) -> None:
        """Put all times in order, for percentiles."""
        for times in (self.late, self.ttft, self.itl, self.total, self.waits):
            times.sort()

    @property
    def goodput(self) -> float:
        """Share of all requests that were served well: what was refused, broke or never began counts against it."""
        return self.well / self.requests if self.requests else 0.0


def summed(rows: Iterable[Row], slos: Mapping[str, Slo], by: Callable[[Row], str]) -> dict[str, Totals]:
    """Totals of groups of rows, in the order of their first row; ``slos`` by class."""
    found: dict[str, Totals] = {}
    for row in rows:
        found.setdefault(by(row), Totals()).add(row, slos[row.klass])
    for totals in found.values():
        totals.order()
    return found
