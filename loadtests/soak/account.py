"""What must hold after the soak, whatever was done meanwhile: figures beside each other, and everything that should not
have been. Pure, but for reading the ledger.

- No stream ends without its end mark or an error event, no answer is cut, nobody hangs: but for the clients of a
  gateway that was killed.
- Whatever a client was told stands in the ledger, once; what it was not told because a gateway was killed may lack.
- The ledger's sum is the engines' own count: exactly, for requests that are known exactly; for the others (cut off,
  counted, tried more than once) within what each can have used at most. A killed engine's counters are those of the
  last look at them.
- Nothing is held afterwards: no slot, no request in an engine, in a gateway or in a queue.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import sqlalchemy as sa

from gateway.serving.explain import Detail
from gateway.state.database import open_database, usage_table
from loadtests.soak.clients import Asked, End
from loadtests.soak.faults import Happened
from loadtests.soak.plan import DRAIN, most_tokens

UNWRITTEN = 0.5
"""Seconds before a gateway is killed of which its ledger's rows may be lost: it writes ten times a second, and waits
for a processor like all others."""
LAG = 3.0
"""Seconds by which an engine's counters may be behind its answers when it is killed."""
TROUBLED = 20.0
"""Seconds after an engine's death, or the loss of a store, in which requests may fail for it."""


@dataclass(frozen=True, slots=True)
class Row:
    """A request as the ledger has it; ``ended`` is Unix time."""

    client_id: str
    model: str
    endpoint: str
    ended: float
    status: int
    settlement: str
    prompt: int | None
    output: int | None
    attempts: int

    @property
    def tokens(self) -> int:
        """What is known of its tokens."""
        return (self.prompt or 0) + (self.output or 0)

    @property
    def exact(self) -> bool:
        """Whether one engine's word says what it used."""
        return self.settlement == "exact" and self.attempts == 1


def read_rows(url: str) -> list[Row]:
    """All rows of a state database."""
    engine = open_database(url)
    try:
        with engine.connect() as connection:
            return [_row(found) for found in connection.execute(sa.select(usage_table))]
    finally:
        engine.dispose()


def _row(found: sa.Row[tuple[object, ...]]) -> Row:
    told = found._mapping
    return Row(
        client_id=msgspec.json.decode(told["detail"], type=Detail).client_request_id,
        model=told["model"],
        endpoint=told["endpoint"],
        ended=told["at"].timestamp() + told["duration_ms"] / 1000,
        status=told["status"],
        settlement=told["settlement"],
        prompt=told["tokens_in"],
        output=told["tokens_out"],
        attempts=told["attempts"],
    )


@dataclass(frozen=True, slots=True)
class Look:
    """What an engine counted at a time: tokens since its start."""

    at: float
    tokens: int


def counted(looks: Sequence[Look]) -> tuple[int, list[float]]:
    """Return the tokens that an engine counted in all its lives, and when those lives were looked at for the last time
    that ended: a count that falls is another life's."""
    total, ends = 0, []
    for before, look in itertools.pairwise(looks):
        if look.tokens < before.tokens:
            total += before.tokens
            ends.append(before.at)
    return total + (looks[-1].tokens if looks else 0), ends


@dataclass(slots=True)
class Seen:
    """All that a soak left. ``killed`` and ``left``: replicas by number, and when (Unix time)."""

    asked: Sequence[Asked]
    rows: Sequence[Row]
    happened: Sequence[Happened]
    looks: Mapping[str, Sequence[Look]]
    """By upstream."""
    model_of: Mapping[str, str]
    killed: Mapping[int, float]
    left: Mapping[int, float]
    holds: Mapping[str, float]
    """What is held when nobody asks any more, by what it is."""


@dataclass(slots=True)
class Report:
    """Figures, and ``problems``: what should not be. None: everything holds."""

    said: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def demand(self, holds: bool, problem: str) -> None:
        """Note a problem unless something holds."""
        if not holds:
            self.problems.append(problem)


def report_of(seen: Seen) -> Report:
    """Hold everything against everything."""
    report = Report()
    _answers(report, seen)
    _ledger(report, seen)
    for model in sorted(set(seen.model_of.values())):
        _engines(report, seen, model)
    held = {name: value for name, value in seen.holds.items() if value}
    report.demand(not held, f"still held: {held}")
    return report


# --- what clients were told --------------------------------------------------------------------------------------


def _by_killed(seen: Seen, asked: Asked) -> bool:
    """Whether a request was under way at a gateway when it was killed, or came just after."""
    killed = seen.killed.get(asked.replica)
    return killed is not None and asked.ended >= killed - 0.1


def _never_taken(seen: Seen, asked: Asked) -> bool:
    """Whether a gateway that was told to end closed a connection before it read the request."""
    left = seen.left.get(asked.replica)
    return asked.end is End.NOTHING and left is not None and asked.ended >= left


def _in_trouble(seen: Seen, asked: Asked) -> bool:
    """Whether something was away while a request ran, or shortly before, or its gateway had to end before it did."""
    left = seen.left.get(asked.replica)
    if left is not None and asked.ended >= left + DRAIN:
        return True
    return any(
        one.began <= asked.ended and asked.began <= one.ended + TROUBLED
        for one in seen.happened
        if one.does != "stop_replica"
    )


def _answers(report: Report, seen: Seen) -> None:
    ends = Counter(asked.end.value for asked in seen.asked)
    statuses = Counter(asked.status for asked in seen.asked if asked.status)
    report.said.append(f"{len(seen.asked):,} requests ended {dict(sorted(ends.items()))}")
    report.said.append(f"by status {dict(sorted(statuses.items()))}")
    cut = [one for one in seen.asked if one.end is End.CUT and not _by_killed(seen, one)]
    report.demand(not cut, f"{len(cut)} answers were cut without a word, though their gateway lived: {_some(cut)}")
    nothing = [
        one
        for one in seen.asked
        if one.end is End.NOTHING and not _by_killed(seen, one) and not _never_taken(seen, one)
    ]
    report.demand(not nothing, f"{len(nothing)} requests had no answer: {_some(nothing)}")
    hung = [one for one in seen.asked if one.end is End.HUNG and not _by_killed(seen, one)]
    report.demand(not hung, f"{len(hung)} requests hung: {_some(hung)}")
    failed = [one for one in seen.asked if one.status >= 500 or one.end is End.ERROR_EVENT]
    report.said.append(f"{len(failed)} failed with a word")
    for_nothing = [one for one in failed if not _in_trouble(seen, one)]
    report.demand(not for_nothing, f"{len(for_nothing)} failed while nothing was away: {_some(for_nothing)}")
    odd = [one for one in seen.asked if one.status not in (0, 200, 429) and one.status < 500]
    report.demand(not odd, f"{len(odd)} other answers: {_some(odd)}")
    steady = [one for one in seen.asked if one.tenant == "steady" and one.status == 429 and "slow_down" not in one.said]
    report.demand(not steady, f"{len(steady)} limits met by who has none: {_some(steady)}")
    for tenant in ("steady", "limited", "narrow"):
        served = sum(one.tenant == tenant and one.status == 200 for one in seen.asked)
        report.demand(bool(served), f"nobody of {tenant} was served")


def _some(asked: Sequence[Asked]) -> str:
    return "; ".join(
        f"{one.id} of {one.tenant} for {one.model} at replica {one.replica}: {one.status} {one.said[-200:]!r}"
        for one in asked[:3]
    )


# --- the ledger --------------------------------------------------------------------------------------------------


def _ledger(report: Report, seen: Seen) -> None:
    """Each request has one row, which says what its client was told; those of a killed gateway may lack it."""
    rows = {row.client_id: row for row in seen.rows}
    report.demand(len(rows) == len(seen.rows), f"{len(seen.rows) - len(rows)} rows are of requests that have one")
    missing, wrong = [], []
    for asked in seen.asked:
        row = rows.pop(asked.id, None)
        if row is None:
            killed = seen.killed.get(asked.replica)
            unwritten = killed is not None and asked.ended > killed - UNWRITTEN
            if not unwritten and not _never_taken(seen, asked):
                missing.append(asked)
        elif asked.output is not None and (row.prompt, row.output) != (asked.prompt, asked.output):
            wrong.append(asked)
    report.demand(not missing, f"{len(missing)} requests are in no ledger: {_some(missing)}")
    report.demand(not wrong, f"{len(wrong)} rows say something else than the client was told: {_some(wrong)}")
    report.demand(not rows, f"{len(rows)} rows are of requests nobody sent")


# --- the engines -------------------------------------------------------------------------------------------------


def _engines(report: Report, seen: Seen, model: str) -> None:
    """Hold the ledger of a model against what its engines counted."""
    upstreams = [name for name, serves in seen.model_of.items() if serves == model]
    total, unseen = 0, 0
    for name in upstreams:
        tokens, ends = counted(seen.looks[name])
        total += tokens
        unseen += sum(
            row.tokens
            for row in seen.rows
            if row.endpoint == name and row.exact and any(-LAG <= row.ended - end <= LAG for end in ends)
        )
    mine = [row for row in seen.rows if row.model == model]
    exact = sum(row.tokens for row in mine if row.exact)
    vague = [row for row in mine if not row.exact and row.settlement != "void"]
    rows = {row.client_id for row in seen.rows}
    lost = [asked for asked in seen.asked if asked.model == model and asked.id not in rows]
    known = sum((one.prompt or 0) + (one.output or 0) for one in lost)
    # A request that was tried more than once may have cost as often.
    attempts = sum(max(1, row.attempts) for row in vague) + sum(one.output is None for one in lost)
    rest = total - exact - known
    most = attempts * most_tokens(model)
    kinds = Counter(row.settlement or "refused" for row in mine)
    report.said.append(
        f"{model}: the engines counted {total:,} tokens, the ledger's exact rows {exact:,}, answers without a row"
        f" {known:,}; the rest, {rest:,}, is of {len(vague)} requests not known exactly (their rows say"
        f" {sum(row.tokens for row in vague):,}) and {len(lost)} without a row; may be {-unseen:,} to {most:,};"
        f" rows by settlement {dict(sorted(kinds.items()))}"
    )
    report.demand(-unseen <= rest <= most, f"{model}: {rest:,} tokens are not accounted for")


def lines(report: Report) -> Iterator[str]:
    """The report as text."""
    yield from report.said
    for problem in report.problems:
        yield f"PROBLEM {problem}"
