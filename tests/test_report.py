"""`forebay usage` and `forebay explain`: tables for people, CSV for spreadsheets, and one request on one screen."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import io
import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from gateway.cli import app
from gateway.report import explain_in_text
from gateway.serving.explain import explanation, ledger_row, row_of
from gateway.serving.limiter import Charges
from gateway.serving.ticket import Outcome, Ticket
from gateway.serving.upstream import Loss
from gateway.state.usage import UsageRow, UsageStore
from tests.api.test_admin_endpoints import ADMIN_KEY, KEYS
from tests.support.clock import ManualClock
from tests.support.command import CliRunner, Result
from tests.support.gateway import CHAT, chat, give_database, running, settings_for
from tests.support.recordings import load
from tests.support.script import play
from tests.support.upstream import ScriptedUpstream
from tests.unit.ports import Stage

NOW = datetime.now(UTC).replace(microsecond=0)


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A data directory with a ledger of four requests, and no settings of the person who runs the tests."""
    for name in [name for name in os.environ if name.startswith("FOREBAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("FOREBAY_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.chdir(tmp_path)
    give_database(tmp_path / "forebay.db")
    with contextlib.closing(UsageStore(f"sqlite:///{tmp_path}/forebay.db")) as store:
        store.insert(
            [
                row("req_1", key="alice", key_id="0f3a9c51b2de", tenant="search", tokens_in=1000, tokens_out=20),
                row("req_2", key="alice", key_id="0f3a9c51b2de", tenant="search", tokens_in=234, cost_nanos=1_500_000),
                row("req_3", key="=bob()", key_id="=bob()", tenant="chat", model="[red]m"),
                row("req_4", NOW - timedelta(days=9), key="alice", key_id="0f3a9c51b2de", tenant="search"),
            ]
        )
    return tmp_path


def row(request_id: str, at: datetime = NOW, **more: Any) -> UsageRow:
    values: dict[str, Any] = {"outcome": "ok", "status": 200, "model": "m"} | more
    return UsageRow(request_id=request_id, at=at.timestamp(), **values)


def forebay(*arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments], catch_exceptions=False)


def lines(*arguments: str) -> list[list[str]]:
    """Run a command that must succeed; return the words of each line it prints."""
    result = forebay(*arguments)
    assert result.exit_code == 0, result.output
    return [line.split() for line in result.stdout.splitlines()]


# --- usage -----------------------------------------------------------------------------------------------------------


def test_usage_as_a_table() -> None:
    heads, *groups = lines("usage", "--by", "key,model", "--since", "7d")
    assert heads == [*["key", "model", "requests", "in", "cached", "out", "reasoning", "unknown", "cost", "$"]]
    assert groups == [
        ["alice", "(0f3a9c51b2de)", "m", "2", "1,234", "0", "20", "0", "0", "0.0015"],
        ["=bob()", "[red]m", "1", "0", "0", "0", "0", "1", "0.00"],
    ]


def test_usage_of_a_team_by_day() -> None:
    _, *groups = lines("usage", "--by", "team,day", "--team", "search")
    assert [(group[0], group[1], group[2]) for group in groups] == [
        ("search", (NOW - timedelta(days=9)).date().isoformat(), "1"),
        ("search", NOW.date().isoformat(), "2"),
    ]


def test_usage_as_csv(home: Path) -> None:
    file = home / "usage.csv"
    assert forebay("usage", "--by", "key", "--csv", str(file)).exit_code == 0
    assert file.stat().st_mode & 0o777 == 0o600
    found = list(csv.DictReader(io.StringIO(file.read_text())))
    assert [(one["key"], one["requests"], one["cost_nanos"], one["cost"]) for one in found] == [
        ("alice", "3", "1500000", "0.0015"),
        ("'=bob()", "1", "0", "0.00"),
    ]
    result = forebay("usage", "--csv", str(home / "none" / "usage.csv"))
    assert (result.exit_code, result.stdout) == (1, "")
    assert "none/usage.csv: No such file or directory; name a file that can be written" in result.stderr


def test_every_request_as_csv() -> None:
    result = forebay("usage", "--rows", "--csv", "-", "--key", "alice", "--since", "1h")
    found = list(csv.DictReader(io.StringIO(result.stdout)))
    assert [(one["request_id"], one["tokens_in"], one["tokens_reasoning"]) for one in found] == [
        ("req_1", "1000", ""),
        ("req_2", "234", ""),
    ]
    result = forebay("usage", "--rows")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "add --csv FILE" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--by", "colour"], "by: there is no 'colour'; write some of key, tenant,"),
        (["--since", "yesterday"], "'yesterday' is no time; write 2026-11-01"),
    ],
)
def test_what_cannot_be_summed_says_why(arguments: list[str], told: str) -> None:
    result = forebay("usage", *arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert told in result.stderr


# --- explain ---------------------------------------------------------------------------------------------------------


def test_explained_out_of_the_ledger_where_no_gateway_runs() -> None:
    told = forebay("explain", "req_1").stdout
    assert told.splitlines()[:3] == [
        f"request    req_1 at {NOW.isoformat(timespec='milliseconds')} (from ledger)",
        "who        key alice (0f3a9c51b2de), tenant search",
        "asked      m",
    ]
    assert json.loads(forebay("explain", "req_1", "--json").stdout)["tokens"]["in"] == 1000


def test_an_unknown_request_says_where_was_looked() -> None:
    result = forebay("explain", "req_9")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        "forebay: there is no request 'req_9' in the ledger, whose rows are kept 400 days;"
        " no gateway runs here that could be asked\n"
    )


async def test_a_gateway_that_runs_is_asked_first(
    upstream: ScriptedUpstream, clock: ManualClock, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It knows what the ledger does not have yet; what only the ledger has is found too."""
    upstream.always(play(load("vllm", "chat_basic")), path=CHAT)
    async with running(settings_for("protocol", home, [upstream], keys=KEYS), clock) as gateway:
        monkeypatch.setenv("FOREBAY_ADMIN_URL", gateway.admin_url)
        monkeypatch.setenv("FOREBAY_ADMIN_KEY", ADMIN_KEY)
        request_id = str((await gateway.ask(chat())).header("x-request-id"))
        told = await asyncio.to_thread(forebay, "explain", request_id)
        assert f"request    {request_id} at " in told.stdout
        assert "(from memory)" in told.stdout
        assert "(from ledger)" in (await asyncio.to_thread(forebay, "explain", "req_1")).stdout
        unknown = await asyncio.to_thread(forebay, "explain", "req_9")
        assert "There is no request 'req_9'. Looked at: the latest 1 requests of this replica" in unknown.stderr


class Told:
    """What a ticket's limits were charged."""

    plan = SimpleNamespace(named=msgspec.Raw(b'[["key alice: tokens per minute","tokens"]]'))
    reserved = (900_000,)
    charged = (7_500,)


def a_ticket(stage: Stage) -> Ticket:
    """A request that a second engine has served, with everything about it known."""
    ticket = stage.ticket
    ticket.at = NOW.timestamp()
    ticket.key, ticket.key_id, ticket.tenant, ticket.organisation = "alice", "0f3a9c51b2de", "search", "acme"
    ticket.client, ticket.sdk_retry, ticket.version = "10.0.0.1", 2, "3"
    ticket.charges = cast("Charges", Told())
    ticket.settlement, ticket.cost = "exact", 1_500_000
    return ticket


def test_everything_on_one_screen() -> None:
    stage = Stage(endpoints=2)
    ticket = a_ticket(stage)
    stage.start().lose(Loss.CONNECT)
    stage.clock.advance(0.25)
    attempt = stage.attempt
    attempt.connect()
    attempt.head()
    attempt.data(b'data: {"model":"own-name","choices":[{"delta":{"content":"x"}}]}\n\n')
    stage.clock.advance(1)
    attempt.data(
        b'data: {"model":"own-name","choices":[],"usage":{"prompt_tokens":5,"completion_tokens":3,'
        b'"prompt_tokens_details":{"cached_tokens":4},"completion_tokens_details":{"reasoning_tokens":2}}}\n\n'
        b"data: [DONE]\n\n"
    )
    first, second = (one.endpoint for one in stage.attempts)
    why = f"the only one that had room, {second}: first token in 0 ms, 0% of its room used; tried before: {first}"
    told = [line.split(None, 1) for line in explain_in_text(explanation(ledger_row(ticket), "memory")).splitlines()]
    assert told == [
        ["request", f"req_1 at {NOW.isoformat(timespec='milliseconds')} (from memory)"],
        ["who", "key alice (0f3a9c51b2de), tenant search, organisation acme, from 10.0.0.1, the SDK's retry number 2"],
        ["asked", "/v1/chat/completions, public/model, version 3, streamed"],
        ["ended", "ok, 200"],
        ["limits", "key alice: tokens per minute: 900 tokens reserved, 8 settled, settled exact"],
        ["engine", f"{second}, {why}"],
        ["retries", "1"],
        ["attempt", f"{first}: ended (connect) after 0.0 ms"],
        ["attempt", f"{second}: ok after 1250.0 ms, connected after 250.0 ms"],
        ["tokens", "in 5, out 3, cached 4, reasoning 2, 1 events"],
        ["cost", "$0.0015"],
        ["time", "1250.0 ms = connect 250.0 + first_event 0.0 + rest 1000.0, first event after 250.0 ms"],
    ]


def test_what_runs_and_what_was_refused() -> None:
    stage = Stage()
    ticket = a_ticket(stage)
    ticket.charges = None
    ticket.refused_by = "team search: requests per minute"
    ticket.error = "slow\x1b[2Jdown"
    running_still = explain_in_text(explanation(row_of(ticket, stage.clock()), "memory"))
    assert "ended      still running" in running_still
    ticket.settle(Outcome.REFUSED, 429, stage.clock())
    text = explain_in_text(explanation(ledger_row(ticket), "memory"))
    assert "limits     refused by team search: requests per minute" in text
    assert "engine     none was asked" in text
    assert r"ended      refused, 429, slow\x1b[2Jdown" in text
