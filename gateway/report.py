"""What the command line shows of the ledger: sums as a table or CSV, and one request explained on one screen."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from gateway.operate import KEY_VARIABLE, URL_VARIABLE, OperateError, Operator, find_gateway
from gateway.serving.explain import explanation
from gateway.settings import Settings
from gateway.state.database import StateError, exists, upgrade
from gateway.state.usage import (
    DIMENSIONS,
    ROW_COLUMNS,
    TOKENS,
    UsageRow,
    UsageStore,
    Wanted,
    csv_lines,
    dollars,
    sum_columns,
)

_SHOWN = {"tokens_in": "in", "tokens_cached": "cached", "tokens_out": "out", "tokens_reasoning": "reasoning"}


class ReportError(Exception):
    """What was asked for is not there, or cannot be written; the text says why."""


# --- sums ------------------------------------------------------------------------------------------------------------


def sums_as_table(store: UsageStore, by: Sequence[str], wanted: Wanted) -> Table:
    """Sums, one line a group."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in by:
        table.add_column(name, overflow="fold")
    for title in ("requests", *_SHOWN.values(), "unknown", "cost $"):
        table.add_column(title, justify="right", overflow="fold")
    for row in store.sums(by, wanted):
        groups = [_group(row, name) for name in by]
        counts = [row["requests"], *(row[kind] for kind in TOKENS), row["tokens_unknown"]]
        table.add_row(*groups, *(f"{count:,}" for count in counts), dollars(row["cost_nanos"]))
    return table


def _group(row: dict[str, Any], name: str) -> str:
    shown = row[DIMENSIONS[name][-1]]
    if name == "key" and row["key_id"] not in ("", shown):
        shown = f"{shown} ({row['key_id']})"
    # A model's name is its engine's choice, and is no markup.
    return escape(shown) or "-"


def sums_as_csv(store: UsageStore, by: Sequence[str], wanted: Wanted) -> Iterator[str]:
    """Sums, as lines of CSV."""
    return csv_lines(sum_columns(by), store.sums(by, wanted))


def rows_as_csv(store: UsageStore, wanted: Wanted) -> Iterator[str]:
    """Every request, oldest first, as lines of CSV."""
    return csv_lines(ROW_COLUMNS, store.rows(wanted))


def write_csv(lines: Iterable[str], to: Path) -> None:
    """Write lines to a file, which only its owner can read, or to standard output where that is ``-``."""
    if str(to) == "-":
        sys.stdout.writelines(lines)
        return
    try:
        file = os.open(to, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    except OSError as error:
        raise ReportError(f"{to}: {error.strerror}; name a file that can be written") from None
    with open(file, "w", encoding="utf-8", newline="") as stream:  # noqa: PTH123 - it is open already
        stream.writelines(lines)


# --- one request -----------------------------------------------------------------------------------------------------


def find_request(settings: Settings, request_id: str) -> dict[str, Any]:
    """Explain a request: by the gateway that runs, which also knows what runs now, else out of the ledger itself."""
    try:
        url, key = find_gateway(settings)
    except OperateError:
        if os.environ.get(URL_VARIABLE) or os.environ.get(KEY_VARIABLE):
            raise
        asked, refused = "no gateway runs here that could be asked", None
    else:
        with contextlib.closing(Operator(url, key)) as operator:
            try:
                return operator.explain(request_id)
            except OperateError as error:
                asked, refused = str(error), error
    row = _in_ledger(settings, request_id)
    if row is not None:
        return explanation(row, "ledger")
    if refused is not None:
        raise refused
    kept = f"{settings.state.usage_days} days" if settings.state.usage_days else "for ever"
    raise ReportError(f"there is no request {request_id!r} in the ledger, whose rows are kept {kept}; {asked}")


def _in_ledger(settings: Settings, request_id: str) -> UsageRow | None:
    if not exists(settings.state_url):
        return None
    with contextlib.suppress(StateError):
        upgrade(settings.state_url)
        with contextlib.closing(UsageStore(settings.state_url)) as store:
            return store.find(request_id)
    return None


def explain_in_text(told: dict[str, Any]) -> str:
    """One request on one screen."""
    who, asked, engine, limits = told["who"], told["asked"], told["engine"], told["limits"]
    lines = [
        ("request", f"{told['request_id']} at {told['at']} (from {told['source']})"),
        ("who", _who(who)),
        ("asked", _asked(asked)),
        ("ended", _sentence(told["outcome"] or "still running", told["status"] or "", told["error"])),
        ("limits", _limits(limits)),
        ("engine", _sentence(engine["endpoint"], engine["why"]) or "none was asked"),
        ("retries", str(engine["retries"]) if engine["attempts"] else ""),
    ]
    lines += [("  attempt", _attempt(one)) for one in engine["tried"]]
    lines += [
        ("tokens", _tokens(told["tokens"])),
        ("cost", f"${told['cost']}"),
        ("time", _time(told["time"])),
    ]
    return "\n".join(f"{title:<10} {_printable(text)}" for title, text in lines if text)


def _sentence(*parts: object) -> str:
    return ", ".join(str(part) for part in parts if part)


def _asked(asked: dict[str, Any]) -> str:
    version = asked["version"] and f"version {asked['version']}"
    # A gateway of an older release tells of neither.
    served, via = asked.get("served", ""), asked.get("via", "")
    by = served and f"served by {served}{f' ({via})' if via else ''}"
    copy = asked.get("mirrors") and f"a copy of {asked['mirrors']}"
    return _sentence(asked["path"], asked["model"], version, by, copy, asked["stream"] and "streamed")


def _who(who: dict[str, Any]) -> str:
    key = who["key"] or "nobody known"
    if who["key_id"] not in ("", key):
        key += f" ({who['key_id']})"
    return _sentence(
        f"key {key}" if who["key"] else key,
        who["tenant"] and f"tenant {who['tenant']}",
        who["organisation"] and f"organisation {who['organisation']}",
        who["client"] and f"from {who['client']}",
        who["client_request_id"] and f"its own id {who['client_request_id']}",
        who["sdk_retry"] and f"the SDK's retry number {who['sdk_retry']}",
    )


def _limits(limits: dict[str, Any]) -> str:
    if limits["refused_by"]:
        return f"refused by {limits['refused_by']}"
    charged = [
        f"{one['bucket']}: {one['reserved']} {one['unit']} reserved, {one['settled']} settled"
        for one in limits["charged"]
    ]
    return _sentence(*charged, limits["settlement"] and f"settled {limits['settlement']}") or "none"


def _attempt(one: dict[str, Any]) -> str:
    connected = f", connected after {one['connect_ms']:.1f} ms" if "connect_ms" in one else ""
    result = one["result"] if one["result"] in ("ok", "running") else f"ended ({one['result']})"
    events = one.get("events", 0)
    brought = f", {events} event{'s' if events > 1 else ''} until then" if events else ""
    how = "went on with the stream, " if one.get("resumes") else ""
    return f"{one['endpoint']}: {how}{result} after {one['ms']:.1f} ms{connected}{brought}"


def _tokens(tokens: dict[str, Any]) -> str:
    counts = [f"{name} {'unknown' if tokens[name] is None else tokens[name]}" for name in ("in", "out")]
    more = [f"{name} {tokens[name]}" for name in ("cached", "reasoning") if tokens[name] is not None]
    return _sentence(*counts, *more, f"{tokens['events']} events")


def _time(time: dict[str, Any]) -> str:
    split = " + ".join(f"{stage} {ms:.1f}" for stage, ms in time["split_ms"].items())
    first = f", first event after {time['ttft_ms']:.1f} ms" if time["ttft_ms"] is not None else ""
    return f"{time['total_ms']:.1f} ms = {split}{first}"


def _printable(text: str) -> str:
    """What clients and engines say must not move a terminal's cursor."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)
