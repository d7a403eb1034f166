"""What was let in, by the ledgers of all replicas, beside what was allowed, what the store says and what the engines
counted. Pure, but for reading the ledger.

**Reserved** at a time is what the ledgers' rows held of a bucket at their admissions until then, less what those that
had ended by then gave back. It is compared with ``burst + rate * (time - begin)`` at every admission, not at the last
alone. A ledger knows when a request's body was read and when the request went on to its engine; it was let in between
the two, so the window begins when the first body was read. A row's times are whole milliseconds, so each bound is that
of a window two milliseconds longer and what is given back counts a millisecond early; nothing else is rounded.
**Debts** (an answer longer than its estimate) are no reservations: they are added up by themselves.

**Used** is what was reserved at the last admission and owed by then, in percent of what was allowed then.

**Room** is what a bucket would have had at a refusal if nothing were leased, promised or on its way back: how far a
refusal may have been false.

**Balance**: of a bucket that is never refilled, and of one that was never full again, the store must know what the
ledgers know, to a thousandth of a token: capacity + refill - charged - level = 0.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from gateway.policy.limits import UNIT
from gateway.serving.explain import Detail

ROUNDING = 0.001
"""Seconds by which a row's time may be off."""
ON_ITS_WAY = 0.06
"""Seconds that what is given back travels to the store at the most."""


@dataclass(frozen=True, slots=True)
class Part:
    """What a request had of one bucket, in 1/1000."""

    bucket: str
    unit: str
    held: int
    kept: int


@dataclass(frozen=True, slots=True)
class Row:
    """A request as a ledger has it; times are Unix time, ``read`` when its body was there, ``admitted``
    when it went on to an engine (None: never)."""

    id: str
    client_id: str
    tenant: str
    model: str
    read: float
    admitted: float | None
    ended: float
    status: int
    outcome: str
    settlement: str
    prompt: int | None
    output: int | None
    parts: tuple[Part, ...]
    refused_by: str

    @property
    def tokens(self) -> int:
        """What is known of its tokens."""
        return (self.prompt or 0) + (self.output or 0)


_QUERY = """SELECT request_id, at, tenant, model, status, outcome, settlement, tokens_in, tokens_out, duration_ms,
            detail FROM usage ORDER BY at, request_id"""


def read_rows(database: Path) -> list[Row]:
    """All rows of a state database (SQLite), oldest first."""
    connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True)
    try:
        return [_row(*found) for found in connection.execute(_QUERY)]
    finally:
        connection.close()


def _row(
    id: str,
    at: str,
    tenant: str,
    model: str,
    status: int,
    outcome: str,
    settlement: str,
    prompt: int | None,
    output: int | None,
    duration_ms: float,
    detail: str,
) -> Row:
    told = msgspec.json.decode(detail, type=Detail)
    began = datetime.fromisoformat(at).replace(tzinfo=UTC).timestamp()
    parts = tuple(Part(*part) for part in told.charges())
    read = began + ((told.time.headers or 0.0) + (told.time.body or 0.0)) / 1000
    return Row(
        id=id,
        client_id=told.client_request_id,
        tenant=tenant,
        model=model,
        read=read,
        admitted=read + (told.time.policy or 0.0) / 1000 if parts else None,
        ended=began + duration_ms / 1000,
        status=status,
        outcome=outcome,
        settlement=settlement,
        prompt=prompt,
        output=output,
        parts=parts,
        refused_by=told.refused_by,
    )


# --- one bucket --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Taken:
    """What one request took of the bucket that is looked at."""

    read: float
    admitted: float
    ended: float
    held: int
    kept: int


def taken_of(rows: Iterable[Row], bucket: str) -> list[Taken]:
    """All that was taken of a bucket, by the time of admission."""
    found = [
        Taken(row.read, row.admitted, row.ended, part.held, part.kept)
        for row in rows
        if row.admitted is not None
        for part in row.parts
        if part.bucket == bucket
    ]
    return sorted(found, key=lambda one: one.admitted)


@dataclass(frozen=True, slots=True)
class Use:
    """A bucket over a run, in 1/1000 (``over`` more than ``excess`` is too much).

    ``over``: the most that was reserved beyond what was allowed since the begin, ``over_any``: in any window;
    both are below zero where it never came to that.
    """

    began: float
    window: float
    reserved: int
    allowed: int
    owed: int
    charged: int
    debts: int
    over: int
    over_any: int

    @property
    def used(self) -> float:
        """In percent of what was allowed."""
        return 100 * (self.reserved + self.owed) / self.allowed


def use_of(taken: Sequence[Taken], burst: int, rate: int) -> Use:
    """What was reserved of a bucket of ``burst`` and ``rate`` a second, both whole (requests, tokens)."""
    began = min(one.read for one in taken)
    events = [(one.admitted, one.held) for one in taken]
    events += [(one.ended - ROUNDING, -max(0, one.held - one.kept)) for one in taken if one.held > one.kept]
    # What comes back at the moment somebody is let in was there for them.
    events.sort()
    capacity, each = burst * UNIT, rate * UNIT
    reserved, lowest = 0, float("inf")
    last, over, over_any = began, -capacity, float("-inf")
    at_last = allowed_last = 0
    for time, amount in events:
        grown = each * (time - began)
        if amount > 0:
            lowest = min(lowest, reserved - grown)
        reserved += amount
        if amount > 0:
            slack = capacity + each * 2 * ROUNDING
            over = max(over, int(reserved - grown - slack))
            over_any = max(over_any, reserved - grown - lowest - slack)
            last, at_last, allowed_last = time, reserved, int(grown + slack)
    return Use(
        began=began,
        window=last - began,
        reserved=at_last,
        allowed=allowed_last,
        owed=sum(max(0, one.kept - one.held) for one in taken if one.ended <= last),
        charged=sum(one.kept for one in taken),
        debts=sum(max(0, one.kept - one.held) for one in taken),
        over=over,
        over_any=int(over_any),
    )


def rooms(taken: Sequence[Taken], refusals: Sequence[float], burst: int, rate: int) -> list[int]:
    """What a bucket had at each refusal, in 1/1000, at the least: whoever may have been let in by then was, and what
    comes back comes after the longest time that takes."""
    capacity, each = burst * UNIT, rate * UNIT
    events = [(one.read, -one.held) for one in taken] + [(one.ended + ON_ITS_WAY, one.held - one.kept) for one in taken]
    marks = sorted([(time, amount, False) for time, amount in events] + [(time, 0, True) for time in refusals])
    level, before, found = float(capacity), marks[0][0], []
    for time, amount, is_refusal in marks:
        level = min(capacity, level + each * (time - before)) + amount
        before = time
        if is_refusal:
            found.append(int(level))
    return found


@dataclass(frozen=True, slots=True)
class SlotUse:
    """Slots over a run: the most at one time, and how many on the average from ``began`` for ``window`` seconds."""

    began: float
    window: float
    most: int
    average: float


def slots_of(taken: Sequence[Taken], until: float) -> SlotUse:
    """What was in use of a limit on requests at once, up to a time."""
    began = taken[0].admitted
    events = [(one.admitted + ROUNDING, 1) for one in taken] + [(one.ended - ROUNDING, -1) for one in taken]
    events.sort()
    busy, most, summed, before = 0, 0, 0.0, began
    for time, change in events:
        summed += busy * max(0.0, min(time, until) - min(before, until))
        before, busy = time, busy + change
        most = max(most, busy)
    return SlotUse(began, until - began, most, summed / (until - began))


# --- the ledger beside the engines -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Kind:
    """The requests of one settlement: how many, their tokens by the ledger, and what their limits were charged."""

    requests: int
    tokens: int
    charged: int


def by_kind(rows: Iterable[Row]) -> dict[str, Kind]:
    """Sums by settlement, of the requests that were let in."""
    requests: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    charged: Counter[str] = Counter()
    for row in rows:
        if row.settlement:
            requests[row.settlement] += 1
            tokens[row.settlement] += row.tokens
            charged[row.settlement] += max((part.kept for part in row.parts if part.unit == "tokens"), default=0)
    return {kind: Kind(requests[kind], tokens[kind], charged[kind] // UNIT) for kind in sorted(requests)}


def balance(charged: int, level: int, capacity: int) -> int:
    """What the store took of a bucket that is not refilled beyond what the ledgers say, in 1/1000."""
    return capacity - level - charged


def charged_of(rows: Iterable[Row]) -> Mapping[str, int]:
    """What each bucket was charged by the ledgers, in 1/1000."""
    sums: Counter[str] = Counter()
    for row in rows:
        for part in row.parts:
            sums[part.bucket] += part.kept
    return sums
