"""What the load on replicas is judged by, on ledgers made by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gateway.policy.limits import UNIT
from gateway.state.database import upgrade
from gateway.state.usage import UsageRow, UsageStore
from loadtests.limits.account import Kind, Part, Row, Taken, by_kind, read_rows, rooms, slots_of, taken_of, use_of
from loadtests.limits.faults import FAULTS, Happened
from loadtests.limits.fleet import BUDGET, LEAVES, STAYS, Plan
from loadtests.limits.report import Seen, report_of
from loadtests.limits.traffic import Asked, Manner

ROW = Row("r", "c1-0", "asks", STAYS, 0.0, 0.0, 1.0, 200, "ok", "exact", 40, 24, (), "")


def one(at: float, held: int = 1000, kept: int = 1000, lasts: float = 0.5) -> Taken:
    return Taken(at, at, at + lasts, held, kept)


def test_what_is_reserved_beyond_the_bound_is_found_to_the_thousandth() -> None:
    """Burst 2 and 10 a second: two at once, then one each 100 ms and not a millisecond earlier."""
    fair = [one(0), one(0), one(0.1), one(0.2)]
    assert use_of(fair, 2, 10).over <= 0
    assert use_of([*fair, one(0.25)], 2, 10).over == 480
    assert use_of(fair, 2, 10).reserved == 4000
    late = [one(0), one(5), one(5), one(5)]
    assert use_of(late, 2, 10).over < 0
    assert use_of(late, 2, 10).over_any == 980, "three at once, though much was allowed since the begin"


def test_what_comes_back_may_be_reserved_again_and_a_debt_is_no_reservation() -> None:
    back = [one(0, 2000, 500, 0.05), one(0.06, 1500, 1500)]
    assert use_of(back, 2, 1).over <= 0
    assert use_of([one(0, 2000, 2000, 0.05), one(0.06, 1500, 1500)], 2, 1).over > 1000
    debt = use_of([one(0, 1000, 4000), one(1)], 2, 10)
    assert (debt.debts, debt.owed, debt.charged, debt.reserved) == (3000, 3000, 5000, 2000)


def test_room_is_what_was_there_at_a_refusal_at_the_least() -> None:
    assert rooms([one(0), one(0.0)], [0.001, 0.15, 9.0], 2, 10) == [10, 1500, 2000]


def test_slots_are_counted_at_one_time_and_over_time() -> None:
    use = slots_of([one(0, lasts=1), one(0, lasts=1), one(1.5, lasts=1)], until=2.0)
    assert use.most == 2
    assert 1.2 < use.average < 1.26


def test_a_ledger_is_read_with_what_each_limit_was_charged(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'state.db'}"
    upgrade(url)
    detail = (
        '{"client_request_id":"c7-0","limits":[["tenant:asks:requests/60","requests",1000,1000]],'
        '"time":{"headers":1.5,"body":0.5,"policy":3.0}}'
    )
    store = UsageStore(url)
    store.insert(
        [
            UsageRow(
                request_id="r", at=100.0, outcome="ok", status=200, settlement="exact", tokens_in=3, detail=detail
            ),
            UsageRow(request_id="s", at=101.0, outcome="refused", status=429),
        ]
    )
    store.close()
    let_in, refused = read_rows(tmp_path / "state.db")
    assert (let_in.client_id, let_in.read, let_in.admitted) == ("c7-0", 100.002, 100.005)
    assert taken_of([let_in, refused], "tenant:asks:requests/60") == [Taken(100.002, 100.005, 100.0, 1000, 1000)]
    assert refused.admitted is None
    assert by_kind([let_in, refused]) == {"exact": Kind(1, 3, 0)}


def seen(rows: list[Row], asked: list[Asked], engine: int) -> Seen:
    figures = {"prompt": engine, "generation": 0, "running": 0, "waiting": 0}
    return Seen(
        plan=Plan(1, budgets=False),
        fault=FAULTS["none"],
        happened=Happened(0.0),
        began=0.0,
        until=1.0,
        asked=asked,
        rows=rows,
        killed={},
        engines={STAYS: figures, LEAVES: {**figures, "prompt": 0}},
        slots_left={},
        foreign=0.0,
        levels={},
    )


def problems(rows: list[Row], asked: list[Asked], engine: int = 64) -> str:
    return "\n".join(report_of(seen(rows, asked, engine)).problems)


def test_a_ledger_that_does_not_say_what_engine_and_client_say_is_found_out() -> None:
    slot = (Part("tenant:holds:concurrent", "concurrent", 1000, 0),)
    row = replace(ROW, parts=slot)
    told = Asked("c1-0", "asks", 0, STAYS, Manner.WHOLE, 0.0, 1.0, 200, prompt=40, output=24)
    whole = problems([row], [told])
    assert "engine counted" not in whole
    assert "ledger" not in whole
    assert "the engine counted 65 tokens" in problems([row], [told], 65)
    assert "1 requests are in no ledger" in problems([replace(row, client_id="other")], [told])
    assert "1 rows are of requests nobody sent" in problems([row, replace(row, client_id="other")], [told])
    assert "1 rows are of requests that have one" in problems([row, row], [told])
    assert "1 rows say something else" in problems([replace(row, output=25)], [told])
    hung = Asked("c2-0", "asks", 0, STAYS, Manner.WHOLE, 0.0, 9.0, error="hung")
    assert "failed: {'hung': 1}" in problems([row], [told, hung])


@pytest.mark.parametrize(("fault", "keeps"), [("none", 0), ("failover", 5000)])
def test_a_budget_keeps_only_what_a_new_primary_never_saw(fault: str, keeps: int) -> None:
    bucket = "tenant:asks:tokens-budget/month"
    slot = Part("tenant:holds:concurrent", "concurrent", 1000, 0)
    row = replace(ROW, parts=(slot, Part(bucket, "tokens", 5000, 5000)))
    told = Asked("c1-0", "asks", 0, STAYS, Manner.WHOLE, 0.0, 1.0, 200, prompt=40, output=24)
    whole = replace(
        seen([row], [told], 64), fault=FAULTS[fault], plan=Plan(1, budgets=True), levels={bucket: BUDGET * UNIT - 5000}
    )
    assert "store lacks" not in "\n".join(report_of(whole).problems)
    forgotten = replace(whole, levels={bucket: BUDGET * UNIT - 5000 + keeps})
    assert "store lacks" not in "\n".join(report_of(forgotten).problems)
    more = replace(whole, levels={bucket: BUDGET * UNIT - 5000 + keeps + 1})
    assert "the store lacks -" in "\n".join(report_of(more).problems)
