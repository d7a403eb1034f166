"""What the soak is held to is able to fail: each rule on a hand-made run that keeps to it, and one that does not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from loadtests.limits.traffic import usage_of
from loadtests.soak.account import Look, Report, Row, Seen, counted, lines, report_of
from loadtests.soak.clients import Asked, End, ended
from loadtests.soak.faults import STEPS, Happened
from loadtests.soak.plan import DRAIN, SIMULATED, TENANTS, TIMELINE, most_tokens

MODEL = SIMULATED


def asked(number: int, tenant: str = "steady", **changes: object) -> Asked:
    whole = Asked(f"s{number}", tenant, MODEL, 0, True, False, 100.0, 101.0, 200, End.WHOLE, 20, 10)
    for name, value in changes.items():
        setattr(whole, name, value)
    return whole


def row(number: int, **changes: object) -> Row:
    return replace(Row(f"s{number}", MODEL, "a", 101.0, 200, "exact", 20, 10, 1), **changes)  # type: ignore[arg-type]


def seen(clients: list[Asked], rows: list[Row], tokens: int = 90, **changes: object) -> Seen:
    found = Seen(clients, rows, (), {"a": [Look(99.0, 0), Look(110.0, tokens)]}, {"a": MODEL}, {}, {}, {"slots": 0})
    for name, value in changes.items():
        setattr(found, name, value)
    return found


def three() -> tuple[list[Asked], list[Row]]:
    return [asked(number, tenant) for number, tenant in enumerate(TENANTS)], [row(number) for number in range(3)]


def only_problem(found: Report) -> str:
    [problem] = found.problems
    return problem


def test_a_run_in_which_all_is_well() -> None:
    found = report_of(seen(*three()))
    assert not found.problems
    assert not any(line.startswith("PROBLEM") for line in lines(found))


@pytest.mark.parametrize(
    ("end", "word"),
    [(End.CUT, "cut"), (End.NOTHING, "no answer"), (End.HUNG, "hung")],
)
def test_an_answer_may_only_end_without_a_word_where_its_gateway_was_killed(end: End, word: str) -> None:
    clients, rows = three()
    clients.append(asked(3, end=end, output=None, prompt=None))
    rows.append(row(3, settlement="kept", prompt=None, output=None))
    assert word in only_problem(report_of(seen(clients, rows)))
    assert not report_of(seen(clients, rows, killed={0: 100.9})).problems


def test_a_failure_needs_a_reason() -> None:
    clients, rows = three()
    clients.append(asked(3, status=502, output=None, prompt=None))
    rows.append(row(3, status=502, settlement="void", prompt=None, output=None))
    assert "while nothing was away" in only_problem(report_of(seen(clients, rows)))
    died = Happened("kill_simulated", 95.0, 96.0)
    assert not report_of(seen(clients, rows, happened=[died])).problems
    # To be told to end is no reason to fail anybody.
    stopped = Happened("stop_replica", 95.0, 96.0)
    assert report_of(seen(clients, rows, happened=[stopped])).problems
    # But whoever has not ended when the time is over that it gives them has to be told so.
    assert not report_of(seen(clients, rows, left={0: 101.0 - DRAIN})).problems
    assert report_of(seen(clients, rows, left={0: 101.1 - DRAIN})).problems


def test_a_row_lacks_only_where_a_killed_gateway_had_no_time_to_write_it() -> None:
    clients, rows = three()
    clients.append(asked(3))
    assert "in no ledger" in only_problem(report_of(seen(clients, rows, tokens=120)))
    assert not report_of(seen(clients, rows, tokens=120, killed={0: 101.2})).problems
    assert "in no ledger" in only_problem(report_of(seen(clients, rows, tokens=120, killed={0: 105.0})))


def test_a_row_says_what_the_client_was_told_and_is_there_once() -> None:
    clients, rows = three()
    assert "something else" in report_of(seen(clients, [*rows[:2], row(2, output=11)], tokens=91)).problems[0]
    assert "have one" in report_of(seen(clients, [*rows, rows[0]], tokens=120)).problems[0]
    assert "nobody sent" in report_of(seen(clients, [*rows, row(9)], tokens=120)).problems[0]


def test_the_engines_count_what_the_ledger_says() -> None:
    clients, rows = three()
    assert "not accounted for" in only_problem(report_of(seen(clients, rows, tokens=91)))
    assert "not accounted for" in only_problem(report_of(seen(clients, rows, tokens=89)))


def test_what_is_not_known_exactly_is_bounded() -> None:
    clients, rows = three()
    clients.append(asked(3, end=End.LEFT, output=None, prompt=None))
    rows.append(row(3, settlement="counted", prompt=20, output=4))
    most = most_tokens(MODEL)
    assert not report_of(seen(clients, rows, tokens=90 + most)).problems
    assert "not accounted for" in only_problem(report_of(seen(clients, rows, tokens=91 + most)))


def test_of_a_killed_engine_what_nobody_looked_at_may_lack() -> None:
    clients, rows = three()
    looks = {"a": [Look(99.0, 0), Look(100.5, 60), Look(130.0, 0)]}
    assert not report_of(seen(clients, rows, looks=looks)).problems
    early = {"a": [Look(90.0, 60), Look(130.0, 0)]}
    assert "not accounted for" in only_problem(report_of(seen(clients, rows, looks=early)))


def test_nothing_is_held_afterwards() -> None:
    assert "slots" in only_problem(report_of(seen(*three(), holds={"slots": 1})))


def test_all_lives_of_an_engine_count() -> None:
    looks = [Look(1, 0), Look(2, 50), Look(3, 70), Look(4, 5), Look(5, 20)]
    assert counted(looks) == (90, [3])
    assert counted([]) == (0, [])


def test_how_a_stream_ended_is_in_its_last_words() -> None:
    chunk = b'data: {"choices":[]}\n\n'
    assert ended(chunk + b"data: [DONE]\n\n\r\n0\r\n\r\n", stream=True) is End.WHOLE
    assert ended(chunk + b'data: {"error":{"message":"it died"}}\n\n\r\n0\r\n\r\n', stream=True) is End.ERROR_EVENT
    assert ended(chunk + b"\r\n0\r\n\r\n", stream=True) is End.CUT
    assert ended(b"{}", stream=False) is End.WHOLE


def test_usage_is_the_last_one_of_an_answer() -> None:
    assert usage_of(b'data: {"usage":null}\n\ndata: {"usage":{"prompt_tokens":3,"completion_tokens":4}}\n\n') == (3, 4)


def test_every_step_of_the_timeline_is_one() -> None:
    assert {event.does for event in TIMELINE} == set(STEPS)
    assert [event.at for event in TIMELINE] == sorted(event.at for event in TIMELINE)
