"""The usage table: a row counts once, sums are what adding up gives, and exports are exact and harmless."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.state.database import StateError, usage_table
from gateway.state.usage import (
    DIMENSIONS,
    ROW_COLUMNS,
    STATEMENT_ROWS,
    SUMS,
    TOKENS,
    UsageRow,
    UsageStore,
    Wanted,
    csv_lines,
    dollars,
    read_by,
    read_moment,
    sum_columns,
)
from tests.support.databases import Database, Sqlite, connected
from tests.support.examples import examples
from tests.support.table import each

NOON = datetime(2026, 11, 24, 12, tzinfo=UTC)


def row(number: int, at: datetime = NOON, **more: Any) -> UsageRow:
    values: dict[str, Any] = {"outcome": "ok", "status": 200, "key": "alice"} | more
    return UsageRow(request_id=f"req_{number}", at=at.timestamp(), **values)


@pytest.fixture
def store(database: Database) -> Iterator[UsageStore]:
    with_table = UsageStore(database.url)
    yield with_table
    with_table.close()


def empty(store: UsageStore) -> None:
    with store._engine.begin() as connection:
        connection.execute(sa.delete(usage_table))


# --- rows ----------------------------------------------------------------------------------------------------------


def test_a_row_comes_back_as_it_went_in(store: UsageStore) -> None:
    whole = row(
        1,
        NOON + timedelta(milliseconds=123),
        key_id="0f3a9c51b2de",
        tenant="t",
        organisation="o",
        model="m",
        version="v",
        path="/v1/chat/completions",
        endpoint="e",
        settlement="exact",
        tokens_in=1,
        tokens_cached=0,
        tokens_out=None,
        tokens_reasoning=3,
        cost_nanos=123_456_789_012_345,
        ttft_ms=1.5,
        duration_ms=2.25,
        attempts=2,
        detail='{"client": "1.2.3.4"}',
    )
    assert store.insert([whole]) == 0
    assert store.find("req_1") == whole
    assert store.find("req_2") is None
    listed = list(store.rows(Wanted()))
    assert [one["at"] for one in listed] == ["2026-11-24T12:00:00.123+00:00"]
    assert listed[0]["day"] == "2026-11-24"
    assert set(listed[0]) == set(ROW_COLUMNS)


def test_a_row_written_again_counts_once(store: UsageStore) -> None:
    """And the first one stays: what is replayed is the same row."""
    store.insert([row(1, tokens_in=5), row(2, tokens_in=7)])
    store.insert([row(2, tokens_in=7), row(3, tokens_in=1), row(3, tokens_in=1)])
    assert store.sums((), Wanted())[0]["requests"] == 3
    assert store.sums((), Wanted())[0]["tokens_in"] == 13


@pytest.mark.parametrize("count", [STATEMENT_ROWS - 1, STATEMENT_ROWS, 2 * STATEMENT_ROWS + 7])
def test_many_rows_are_stored_each_once_and_in_its_own_columns(store: UsageStore, count: int) -> None:
    rows = [row(number, NOON + timedelta(milliseconds=number), tokens_in=number) for number in range(count)]
    assert store.insert([rows[3]]) == 0
    assert store.insert(rows) == 0
    found = {str(one["request_id"]): one["tokens_in"] for one in store.rows(Wanted())}
    assert found == {one.request_id: one.tokens_in for one in rows}
    assert [store.find(one.request_id) for one in rows[::40]] == rows[::40]
    assert store.sums((), Wanted())[0]["requests"] == count


def test_one_bad_row_among_hundreds_keeps_no_other_out(store: UsageStore) -> None:
    rows = [row(number) for number in range(STATEMENT_ROWS + 1)]
    rows[STATEMENT_ROWS // 2] = row(10**6, status=None)
    assert store.insert(rows) == 1
    assert store.sums((), Wanted())[0]["requests"] == STATEMENT_ROWS


def test_whatever_an_engine_claims_fits(store: UsageStore) -> None:
    """A figure beyond any column, or a name beyond any length, must not keep other rows out."""
    wild = row(1, tokens_in=2**63, tokens_out=-5, cost_nanos=2**70, model="m" * 10_000, endpoint="a\0b")
    assert store.insert([wild, row(2)]) == 0
    found = store.find("req_1")
    assert found is not None
    assert (found.tokens_in, found.tokens_out, found.endpoint, len(found.model)) == (2**31 - 1, 0, "ab", 400)
    assert store.find("req_2") is not None


def test_every_text_fits_its_column(store: UsageStore) -> None:
    """SQLite takes any length, PostgreSQL does not: what is cut is what the table says."""
    texts = {c.name: length for c in usage_table.columns if (length := getattr(c.type, "length", None))}
    texts.pop("day")
    long = msgspec.structs.replace(row(1), **dict.fromkeys(texts, "x" * 1000))
    store.insert([long])
    (found,) = store.rows(Wanted())
    assert {name: len(found[name]) for name in texts} == texts


def test_a_row_the_database_refuses_keeps_no_other_out(store: UsageStore) -> None:
    broken = msgspec.structs.replace(row(2), status=None)
    no_time = msgspec.structs.replace(row(4), at=1e30)
    assert store.insert([row(1), broken, row(3), no_time]) == 2
    assert store.sums((), Wanted())[0]["requests"] == 2


def test_the_table_is_made_when_nobody_has(tmp_path: Path) -> None:
    """`auth: none` needs no keys, but whoever runs it may ask what was used."""
    file = tmp_path / "new" / "forebay.db"
    store = UsageStore(f"sqlite:///{file}")
    with pytest.raises(StateError, match="no state database yet"):
        store.sums((), Wanted())
    assert not file.exists()
    store.insert([row(1)])
    assert store.find("req_1") == row(1)
    store.close()
    assert file.stat().st_mode & 0o777 == 0o600


def test_old_rows_go_in_batches_and_only_they(store: UsageStore) -> None:
    store.insert([row(number, NOON - timedelta(days=number)) for number in range(10)])
    before = NOON - timedelta(days=3, hours=1)
    assert store.prune(before, 4) == 4
    assert store.prune(before, 4) == 2
    assert store.prune(before, 4) == 0
    assert {one["request_id"] for one in store.rows(Wanted())} == {"req_0", "req_1", "req_2", "req_3"}


def test_two_replicas_prune_without_waiting_for_each_other(store: UsageStore, database: Database) -> None:
    """Each takes the rows that the other has not begun with, or waits where the file has one writer."""
    store.insert([row(number, NOON - timedelta(days=1)) for number in range(3)])
    other = UsageStore(database.url)
    with connected(database) as first:
        first.execute(sa.text("DELETE FROM usage WHERE request_id = 'req_0'"))
        if isinstance(database, Sqlite):
            first.commit()
        assert other.prune(NOON, 100) == 2
    other.close()


@pytest.mark.parametrize("text", ["a\0b", "\udcff", "x" * 5000])
def test_what_no_database_holds_was_not_asked_for(store: UsageStore, text: str) -> None:
    store.insert([row(1)])
    assert store.find(text) is None
    assert store.sums(("key",), Wanted(key=text, tenant=text, model=text)) == []
    assert list(store.rows(Wanted(tenant=text))) == []


# --- sums ----------------------------------------------------------------------------------------------------------

names = st.sampled_from(["", "a", "b"])
counts = st.none() | st.integers(0, 2**31 - 1)
moments = st.integers(0, 72).map(lambda hours: NOON + timedelta(hours=hours))
rows: st.SearchStrategy[dict[str, Any]] = st.builds(
    dict,
    at=moments,
    key_id=names,
    key=names,
    tenant=names,
    organisation=names,
    model=names,
    outcome=st.sampled_from(["ok", "refused"]),
    settlement=st.sampled_from(["", "exact", "void"]),
    tokens_in=counts,
    tokens_cached=counts,
    tokens_out=counts,
    tokens_reasoning=counts,
    cost_nanos=st.integers(0, 10**15),
)
wishes = st.builds(
    Wanted, since=st.none() | moments, until=st.none() | moments, key=st.none() | names, model=st.none() | names
)


def naive(written: list[UsageRow], by: tuple[str, ...], wanted: Wanted) -> dict[tuple[str, ...], dict[str, int]]:
    """Add up in a loop."""
    groups: dict[tuple[str, ...], dict[str, int]] = {}
    for one in written:
        at = datetime.fromtimestamp(one.at, UTC)
        if wanted.since is not None and at < wanted.since:
            continue
        if wanted.until is not None and at >= wanted.until:
            continue
        if wanted.key is not None and wanted.key not in (one.key_id, one.key):
            continue
        if wanted.model is not None and one.model != wanted.model:
            continue
        shown = {**msgspec.structs.asdict(one), "day": at.strftime("%Y-%m-%d")}
        group = groups.setdefault(tuple(shown[c] for name in by for c in DIMENSIONS[name]), dict.fromkeys(SUMS, 0))
        group["requests"] += 1
        group["tokens_unknown"] += one.tokens_in is None
        for name in (*TOKENS, "cost_nanos"):
            group[name] += shown[name] or 0
    return groups


@given(
    st.lists(rows, max_size=30),
    st.lists(st.sampled_from(["key", "tenant", "organisation", "model", "day", "outcome", "settlement"]), unique=True),
    wishes,
)
@settings(max_examples=examples(20))
def test_sums_are_what_adding_up_gives(
    store: UsageStore, drawn: list[dict[str, Any]], by: list[str], wanted: Wanted
) -> None:
    empty(store)
    written = [row(number, **values) for number, values in enumerate(drawn)]
    store.insert(written)
    found = store.sums(by, wanted)
    columns = [column for name in by for column in DIMENSIONS[name]]
    assert {tuple(one[c] for c in columns): {name: one[name] for name in SUMS} for one in found} == (
        naive(written, tuple(by), wanted) or ({} if by else {(): dict.fromkeys(SUMS, 0)})
    )
    assert all(type(one[name]) is int for one in found for name in SUMS)


def test_what_to_sum_by_is_read() -> None:
    assert read_by("key, team,day,tenant") == ("key", "tenant", "day")
    assert read_by("") == ()
    with pytest.raises(ValueError, match=r"no 'colour'; write some of key, tenant, .* team"):
        read_by("key,colour")


@pytest.mark.parametrize(
    ("text", "start", "end"),
    [
        ("2026-11-01", datetime(2026, 11, 1, tzinfo=UTC), datetime(2026, 11, 2, tzinfo=UTC)),
        ("2026-11-01T12:00", datetime(2026, 11, 1, 12, tzinfo=UTC), datetime(2026, 11, 1, 12, tzinfo=UTC)),
        ("2026-11-01T12:00+02:00", datetime(2026, 11, 1, 10, tzinfo=UTC), datetime(2026, 11, 1, 10, tzinfo=UTC)),
        ("7d", NOON - timedelta(days=7), NOON - timedelta(days=7)),
    ],
)
def test_times_are_read(text: str, start: datetime, end: datetime) -> None:
    """A day as an end is counted in, as people mean it."""
    assert read_moment(text, NOON) == start
    assert read_moment(text, NOON, end=True) == end


def test_what_is_no_time_is_refused() -> None:
    with pytest.raises(ValueError, match="'yesterday' is no time; write 2026-11-01"):
        read_moment("yesterday", NOON)


# --- exports -------------------------------------------------------------------------------------------------------


@each(
    ("nanos", "text"),
    [
        (0, "0.00"),
        (1, "0.000000001"),
        (10_000_000, "0.01"),
        (1_230_000_000, "1.23"),
        (123_456_789_012_345_678, "123456789.012345678"),
        (-1_500_000_000, "-1.50"),
    ],
)
def test_money_is_exact(nanos: int, text: str) -> None:
    assert dollars(nanos) == text


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r")), min_size=1))
def test_no_name_is_a_formula_in_a_spreadsheet(drawn: list[str]) -> None:
    """And what is none comes back unchanged, whatever it holds."""
    listed = [{**dict.fromkeys(SUMS, 3), "model": name} for name in drawn]
    text = "".join(csv_lines(sum_columns(["model"]), listed))
    back = list(csv.DictReader(io.StringIO(text)))
    assert len(back) == len(drawn)
    for one, name in zip(back, drawn, strict=True):
        harmless = not name.startswith(("=", "+", "-", "@", "\t"))
        assert one["model"] == (name if harmless else f"'{name}")
        assert (one["requests"], one["cost_nanos"], one["cost"]) == ("3", "3", "0.000000003")


def test_rows_are_listed_a_page_at_a_time_in_order(store: UsageStore) -> None:
    store.insert([row(number, NOON + timedelta(seconds=-number), tenant="=1+1") for number in range(2500)])
    lines = list(csv_lines(ROW_COLUMNS, store.rows(Wanted(tenant="=1+1"))))
    assert len(lines) == 2501
    assert lines[0].startswith("request_id,at,day,key_id,key,")
    assert lines[1].startswith("req_2499,")
    assert ",'=1+1," in lines[1]
    assert "detail" not in lines[0]
