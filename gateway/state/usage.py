"""The usage table: rows written once each, summed, listed, found and forgotten. Everything here blocks.

Money is an integer of billionths of a dollar, here and in every export: a float would not add up.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from itertools import chain
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.dialects import sqlite
from sqlalchemy.engine import Dialect

from gateway.state.database import StateError, exists, open_database, reading, translated, upgrade, usage_table
from gateway.values import parse_duration

NANOS = 1_000_000_000
"""Of what costs are counted in, in one dollar."""
PAGE = 1000
"""Rows that a listing holds at once."""
STATEMENT_ROWS = 100
"""Rows that SQLite takes in one statement: it works on them without holding the interpreter, which it would have to win
back from the event loop after each of them."""

_c = usage_table.c

DIMENSIONS: dict[str, tuple[str, ...]] = {
    "key": ("key_id", "key"),
    "tenant": ("tenant",),
    "organisation": ("organisation",),
    "model": ("model",),
    "version": ("version",),
    "served": ("served",),
    "day": ("day",),
    "path": ("path",),
    "endpoint": ("endpoint",),
    "outcome": ("outcome",),
    "settlement": ("settlement",),
}
"""What can be summed by, and the columns that show it."""
ALIASES = {"team": "tenant"}

TOKENS = ("tokens_in", "tokens_cached", "tokens_out", "tokens_reasoning")
SUMS = ("requests", *TOKENS, "tokens_unknown", "cost_nanos")


class UsageRow(msgspec.Struct, frozen=True, gc=False):
    """One request. ``at`` is Unix time; tokens are None where nobody knows; ``detail`` is JSON for ``explain``.

    Its JSON is what waits in the spool: fields may be added with a default, and are never taken away.
    """

    request_id: str
    at: float
    key_id: str = ""
    key: str = ""
    tenant: str = ""
    organisation: str = ""
    model: str = ""
    version: str = ""
    path: str = ""
    endpoint: str = ""
    outcome: str = ""
    status: int = 0
    settlement: str = ""
    tokens_in: int | None = None
    tokens_cached: int | None = None
    tokens_out: int | None = None
    tokens_reasoning: int | None = None
    cost_nanos: int = 0
    ttft_ms: float | None = None
    duration_ms: float = 0.0
    attempts: int = 0
    detail: str = "{}"
    served: str = ""
    """The model that served it, where the name it asked for stands for several."""


FIELDS = UsageRow.__struct_fields__
COLUMNS = tuple(column.name for column in usage_table.columns)
_MOST_TOKENS, _MOST_NANOS = 2**31 - 1, 2**62
_NAME_LENGTHS = (200, 200, 200, 200, 400, 200, 200, 400)
"""Of the columns from ``key_id`` to ``endpoint``."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which rows: from ``since`` to before ``until``, of a key (its id or name), a tenant, a model."""

    since: datetime | None = None
    until: datetime | None = None
    key: str | None = None
    tenant: str | None = None
    model: str | None = None

    def conditions(self) -> Iterator[sa.ColumnElement[bool]]:
        """What a row must meet."""
        if self.since is not None:
            yield _c.at >= self.since
        if self.until is not None:
            yield _c.at < self.until
        if self.key is not None:
            yield sa.or_(_c.key_id == self.key, _c.key == self.key)
        if self.tenant is not None:
            yield _c.tenant == self.tenant
        if self.model is not None:
            yield _c.model == self.model


def read_by(text: str) -> tuple[str, ...]:
    """What to sum by, out of ``key,day``; nothing: one sum of all. ValueError says what there is."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    by = tuple(dict.fromkeys(ALIASES.get(name, name) for name in names))
    unknown = [name for name in by if name not in DIMENSIONS]
    if unknown:
        raise ValueError(f"by: there is no {unknown[0]!r}; write some of {', '.join([*DIMENSIONS, *ALIASES])}")
    return by


def read_moment(text: str, now: datetime, *, end: bool = False) -> datetime:
    """A time such as 2026-11-01 or 2026-11-01T12:00 (UTC), or so long ago: 7d, 12h. ValueError when it is neither.

    A day as an ``end`` is its last moment: until 2026-11-30 holds the 30th.
    """
    try:
        return now - timedelta(seconds=parse_duration(text))
    except ValueError:
        pass
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(
            f"{text!r} is no time; write 2026-11-01 or 2026-11-01T12:00 (UTC), or how long ago: 7d, 12h"
        ) from None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return moment + timedelta(days=1) if end and len(text) == len("2026-11-01") else moment


def dollars(nanos: int) -> str:
    """Billionths of a dollar as dollars, exactly."""
    sign, nanos = ("-", -nanos) if nanos < 0 else ("", nanos)
    whole, rest = divmod(nanos, NANOS)
    cents, fraction = divmod(rest, NANOS // 100)
    return f"{sign}{whole}.{cents:02d}" + (f"{fraction:07d}".rstrip("0") if fraction else "")


_inserts: dict[tuple[str, str], tuple[str, bool]] = {}


def _insert_into(dialect: Dialect) -> Any:
    if dialect.name == "sqlite":
        return sqlite.insert
    # Loads every driver there is for it: not for those to wait for who have a file.
    from sqlalchemy.dialects import postgresql

    return postgresql.insert


def _insert_for(dialect: Dialect) -> tuple[str, bool]:
    """Return the statement that writes a row, and whether its values go by position; made once for each driver."""
    driver = dialect.name, dialect.driver
    if driver not in _inserts:
        # A replay of what was written already changes nothing.
        statement = _insert_into(dialect)(usage_table).on_conflict_do_nothing(index_elements=["request_id"])
        compiled = statement.compile(dialect=dialect, column_keys=[column.name for column in usage_table.columns])
        # Handed to the driver as text: SQLAlchemy's look at each value would cost more than storing it.
        _inserts[driver] = str(compiled), compiled.positional
    return _inserts[driver]


class UsageStore:
    """The usage table of one state database, which is made when the first row comes and there is none."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._engine = open_database(url)
        self._is_sqlite = self._engine.dialect.name == "sqlite"
        self._insert, self._is_positional = _insert_for(self._engine.dialect)
        self._insert_many = _for_many_rows(self._insert) if self._is_sqlite else ""
        self._second, self._day, self._prefix = -1, "", ""
        self._upgraded = False

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()

    # --- writing ----------------------------------------------------------------------------------------------------

    def insert(self, rows: Sequence[UsageRow]) -> int:
        """Write rows in one transaction; one that is there already counts once. Returns how many the database refuses.

        StateError when it is away; then nothing is written.
        """
        values, refused = [], 0
        for row in rows:
            try:
                values.append(self._parameters(row))
            except (ValueError, OverflowError, OSError):
                # A time that is none: only a file that somebody has changed holds one.
                refused += 1
        if not values:
            return refused
        try:
            self._write(values)
        except StateError as error:
            if _is_the_rows_fault(error):
                return refused + self._insert_singly(values)
            if self._upgraded:
                raise
            # It may be that nobody has made the table yet.
            upgrade(self._url)
            self._upgraded = True
            self._write(values)
        return refused

    def _parameters(self, row: UsageRow) -> Any:
        whole = int(row.at)
        if whole != self._second:
            # Rows come in order: the calendar is asked once a second.
            moment = datetime.fromtimestamp(whole, UTC)
            self._second, self._day = whole, moment.date().isoformat()
            self._prefix = moment.strftime("%Y-%m-%d %H:%M:%S")
        if self._is_sqlite:
            # The one type that SQLite does not know; this is how SQLAlchemy reads it.
            return _values(row, f"{self._prefix}.{min(int((row.at - whole) * 1e6 + 0.5), 999_999):06d}", self._day)
        values = _values(row, datetime.fromtimestamp(row.at, UTC), self._day)
        return values if self._is_positional else dict(zip(COLUMNS, values, strict=True))

    def _write(self, values: list[Any]) -> None:
        if not self._upgraded and not exists(self._url):
            upgrade(self._url)
            self._upgraded = True
        with translated(self._engine), self._engine.begin() as connection:
            at_once = len(values) // STATEMENT_ROWS * STATEMENT_ROWS if self._is_sqlite else 0
            for start in range(0, at_once, STATEMENT_ROWS):
                connection.exec_driver_sql(self._insert_many, tuple(chain(*values[start : start + STATEMENT_ROWS])))
            if at_once < len(values):
                connection.exec_driver_sql(self._insert, values[at_once:])

    def _insert_singly(self, values: list[Any]) -> int:
        """One row that cannot be stored must not keep the others out for ever."""
        refused = 0
        for value in values:
            try:
                self._write([value])
            except StateError as error:
                if not _is_the_rows_fault(error):
                    raise
                refused += 1
        return refused

    def prune(self, before: datetime, most: int) -> int:
        """Delete at most so many of the rows from before a time; returns how many."""
        old = sa.select(_c.request_id).where(_c.at < before).limit(most)
        # Of several replicas that prune, each takes its own; where one file is all there is, one waits.
        old = old.with_for_update(skip_locked=True)
        with translated(self._engine), self._engine.begin() as connection:
            return connection.execute(sa.delete(usage_table).where(_c.request_id.in_(old))).rowcount

    # --- reading ----------------------------------------------------------------------------------------------------

    def sums(self, by: Sequence[str], wanted: Wanted, most: int | None = None) -> list[dict[str, Any]]:
        """Requests, tokens by kind and cost of every group, in the order of the groups; at most ``most`` of them.

        ``tokens_unknown`` counts the requests of which nobody knows what they used.
        """
        columns = [_c[column] for name in by for column in DIMENSIONS[name]]
        sums = [sa.func.count().label("requests")]
        sums += [sa.func.coalesce(sa.func.sum(_c[kind]), 0).label(kind) for kind in TOKENS]
        sums.append((sa.func.count() - sa.func.count(_c.tokens_in)).label("tokens_unknown"))
        sums.append(sa.func.coalesce(sa.func.sum(_c.cost_nanos), 0).label("cost_nanos"))
        query = sa.select(*columns, *sums).where(*wanted.conditions()).group_by(*columns).order_by(*columns)
        with self._reading() as connection:
            found = connection.execute(query.limit(most)).mappings().all()
        # PostgreSQL sums integers to its own kind of exact number.
        return [{name: int(value) if name in SUMS else value for name, value in row.items()} for row in found]

    def rows(self, wanted: Wanted) -> Iterator[dict[str, Any]]:
        """Every row, oldest first, a page at a time: ``detail`` left out, ``at`` as text."""
        shown = [column for column in usage_table.columns if column.name != "detail"]
        query = sa.select(*shown).where(*wanted.conditions()).order_by(_c.at, _c.request_id)
        with self._reading() as connection:
            for row in connection.execution_options(yield_per=PAGE).execute(query).mappings():
                yield {**row, "at": _utc(row["at"]).isoformat(timespec="milliseconds")}

    def find(self, request_id: str) -> UsageRow | None:
        """The row of one request."""
        with self._reading() as connection:
            row = connection.execute(sa.select(usage_table).where(_c.request_id == request_id)).mappings().first()
        if row is None:
            return None
        values: dict[str, Any] = {name: row[name] for name in FIELDS}
        return UsageRow(**{**values, "at": _utc(row["at"]).timestamp()})

    @contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        if not exists(self._url):
            raise StateError("there is no state database yet: no request was accounted for")
        with reading(self._engine, long=True) as connection:
            yield connection


def _for_many_rows(insert: str) -> str:
    """The statement for one row as one for ``STATEMENT_ROWS`` of them."""
    row = f"({', '.join('?' * len(COLUMNS))})"
    before, found, after = insert.partition(row)
    assert found, insert
    return f"{before}{', '.join([row] * STATEMENT_ROWS)}{after}"


def _values(row: UsageRow, at: object, day: str) -> tuple[object, ...]:
    """A row as the table has it, made to fit: an engine may claim any number, and a name may have any length."""
    cost = row.cost_nanos
    return (
        _fit(row.request_id, 64),
        at,
        day,
        *_names(row.key_id, row.key, row.tenant, row.organisation, row.model, row.version, row.path, row.endpoint),
        _fit(row.outcome, 32),
        row.status,
        _fit(row.settlement, 16),
        _count(row.tokens_in),
        _count(row.tokens_cached),
        _count(row.tokens_out),
        _count(row.tokens_reasoning),
        cost if -_MOST_NANOS < cost < _MOST_NANOS else _MOST_NANOS,
        row.ttft_ms,
        row.duration_ms,
        row.attempts,
        row.detail,
        _fit(row.served, 400),
    )


@lru_cache(4096)
def _names(*names: str) -> tuple[str, ...]:
    # The same for many rows, in the order of the columns.
    return tuple(map(_fit, names, _NAME_LENGTHS))


def _fit(text: str, longest: int) -> str:
    # PostgreSQL's text holds no NUL.
    return text if len(text) <= longest and "\0" not in text else text.replace("\0", "")[:longest]


def _count(tokens: int | None) -> int | None:
    return tokens if tokens is None or 0 <= tokens <= _MOST_TOKENS else max(0, min(tokens, _MOST_TOKENS))


def _is_the_rows_fault(error: StateError) -> bool:
    return isinstance(error.__cause__, sa.exc.DataError | sa.exc.IntegrityError)


def _utc(value: datetime) -> datetime:
    """SQLite gives times back without their zone; all of ours are UTC."""
    return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


# --- CSV ---------------------------------------------------------------------------------------------------------


def sum_columns(by: Sequence[str]) -> list[str]:
    """The columns of a row of sums."""
    return [*(column for name in by for column in DIMENSIONS[name]), *SUMS]


ROW_COLUMNS = [name for name in COLUMNS if name != "detail"]


def csv_lines(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """CSV, a line at a time, with the cost in dollars beside it in billionths.

    A name that a spreadsheet would take for a formula is quoted with an apostrophe.
    """
    shown = [*columns, "cost"]
    line = io.StringIO()
    writer = csv.writer(line, lineterminator="\n")
    for cells in chain([shown], (_cells(row, columns) for row in rows)):
        writer.writerow(cells)
        yield line.getvalue()
        line.seek(0)
        line.truncate()


def _cells(row: Mapping[str, Any], columns: Sequence[str]) -> list[Any]:
    cells = [row[name] for name in columns]
    harmless = ["'" + cell if isinstance(cell, str) and cell.startswith(_FORMULA) else cell for cell in cells]
    return [*harmless, dollars(row["cost_nanos"])]


_FORMULA = ("=", "+", "-", "@", "\t", "\r")
