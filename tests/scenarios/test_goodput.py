from __future__ import annotations

from loadtests.scenarios.answers import Attempt, Outcome, Row
from loadtests.scenarios.goodput import missed, percentile, summed
from loadtests.scenarios.schema import Slo
from tests.support.table import each

SLOS = {"chat": Slo(ttft=2.0, itl=0.1), "code": Slo(ttft=0.5)}


def row(klass: str = "chat", outcome: Outcome = Outcome.COMPLETE, **more: object) -> Row:
    told = Row(klass, "shop", "", 0, 0, 0.0, outcome, 200, ttft=1.0, total=5.0, gaps=[50_000, 150_000])
    for name, value in more.items():
        setattr(told, name, value)
    return told


def test_what_counts_as_served_well() -> None:
    assert missed(row(), SLOS["chat"]) is None
    assert missed(row(ttft=2.0), SLOS["chat"]) is None
    assert missed(row(ttft=2.001), SLOS["chat"]) == "first token too late"
    assert missed(row(gaps=[50_000, 150_002]), SLOS["chat"]) == "tokens too slow"
    assert missed(row(gaps=[]), SLOS["chat"]) is None
    assert missed(row(ttft=0.4, gaps=[9_000_000]), SLOS["code"]) is None


def test_an_answer_that_is_no_stream_is_there_when_it_is_whole() -> None:
    assert missed(row(ttft=None, total=1.9, gaps=[]), SLOS["chat"]) is None
    assert missed(row(ttft=None, total=2.1, gaps=[]), SLOS["chat"]) == "first token too late"


@each("outcome", [one for one in Outcome if one is not Outcome.COMPLETE])
def test_whatever_is_not_complete_is_not_served_well(outcome: Outcome) -> None:
    assert missed(row(outcome=outcome), SLOS["chat"]) == outcome


def test_percentiles_are_values_that_were_there() -> None:
    values = [float(number) for number in range(1, 101)]
    assert [percentile(values, share) for share in (0.5, 0.95, 0.99, 1.0, 0.0)] == [50, 95, 99, 100, 1]
    assert percentile([7.0], 0.99) == 7.0
    assert percentile([], 0.5) is None


def test_sums() -> None:
    rows = [
        row(output_tokens=10, prompt_tokens=3),
        row(ttft=3.0, output_tokens=20, attempts=[Attempt(429, 1.0)]),
        row(outcome=Outcome.REFUSED, status=429, ttft=None, gaps=[], retry_after=2.5),
        row(outcome=Outcome.REFUSED, status=503, ttft=None, gaps=[]),
        row("code", outcome=Outcome.NOT_STARTED, status=0, ttft=None, gaps=[], late=40.0),
    ]
    found = summed(rows, SLOS, lambda one: one.klass)
    chat, code = found["chat"], found["code"]
    assert (chat.requests, chat.well, chat.goodput, code.goodput) == (4, 1, 0.25, 0.0)
    assert chat.outcomes == {"complete": 2, "refused": 2}
    assert chat.misses == {"first token too late": 1, "refused": 2}
    assert (chat.statuses, chat.untold, chat.waits, chat.returns) == ({429: 1, 503: 1}, 1, [2.5], 1)
    assert (chat.prompt_tokens, chat.output_tokens, chat.good_tokens) == (3, 30, 10)
    assert (chat.ttft, chat.itl, chat.total) == ([1.0, 3.0], [0.05, 0.05, 0.15, 0.15], [5.0, 5.0])
    assert code.late == [40.0]
