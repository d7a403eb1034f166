"""The player, with a clock of its own and hands that do one thing after the other."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from loadtests.scenarios.answers import Attempt, Outcome, Row, Stream
from loadtests.scenarios.client import Answer
from loadtests.scenarios.play import Player
from loadtests.scenarios.schedule import Planned, plan
from loadtests.scenarios.schema import Scenario

CHUNK = b'data: {"choices":[{"delta":{"content":"word "}}]}\n\n'
END = b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":2}}\n\ndata: [DONE]\n\n'


class EndedError(BaseException):
    """What ends a greenlet."""


@dataclass
class Machine:
    """A clock, hands and a server in one: an answer's first token takes ``first`` seconds, and a second one as long."""

    first: float = 1.0
    answers: list[Answer] = field(default_factory=list)
    """Instead of a stream; the next one each time."""
    most: int = 1000
    now: float = 100.0
    asked: list[tuple[float, dict[str, str], dict[str, Any]]] = field(default_factory=list)
    begun: int = 0

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds

    def ask(self, path: str, headers: dict[str, str], body: bytes, stream: Stream | None, timeout: float) -> Answer:
        self.asked.append((self.now, headers, json.loads(body)))
        if self.answers:
            return self.answers.pop(0)
        assert stream is not None
        for piece in (CHUNK, CHUNK, END):
            self.now += self.first if piece is CHUNK else 0
            stream.feed(piece, self.now)
        return Answer(200, {"x-request-id": "req-1"}, whole=True)

    def wait_free(self, timeout: float) -> bool:
        return self.begun < self.most

    def spawn(self, work: Callable[[Planned], None], one: Planned) -> None:
        self.begun += 1
        with contextlib.suppress(EndedError):
            work(one)

    def join(self, timeout: float) -> None:
        pass

    def kill(self) -> None:
        pass


def scenario(**more: Any) -> Scenario:
    klass: dict[str, Any] = {
        "arrivals": {"kind": "gamma", "rate": 2, "cv": 0},
        "input": {"tokens": 20},
        "output": {"tokens": 2},
        "slo": {"ttft": 2},
        "tenants": {"shop": 1},
    }
    told = {"name": "n", "about": "a", "seconds": 2, "patience": 20, "tenants": {"shop": {}}}
    return Scenario.model_validate({**told, "classes": {"chat": {**klass, **more}}})


def play(told: Scenario, machine: Machine) -> list[Row]:
    rows: list[Row] = []
    player = Player(told, plan(told), machine, machine, lambda: machine.now, machine.sleep, rows.append)
    player.play()
    assert player.done
    return rows


def test_times_count_from_when_it_should_have_begun() -> None:
    """Each answer takes two seconds, and the next request was to begin half a second after the one before."""
    rows = play(scenario(), Machine())
    first = rows[0].at
    assert [round(row.at - first, 6) for row in rows] == [0, 0.5, 1.0, 1.5]
    assert [round(row.late, 6) for row in rows] == [0, 1.5, 3.0, 4.5]
    assert [round(row.ttft or 0, 6) for row in rows] == [1, 2.5, 4.0, 5.5]
    assert [round(row.total or 0, 6) for row in rows] == [2, 3.5, 5.0, 6.5]
    assert all(row.gaps == [1_000_000] and row.outcome is Outcome.COMPLETE for row in rows)
    assert (rows[0].id, rows[0].prompt_tokens, rows[0].output_tokens, rows[0].events) == ("req-1", 9, 2, 2)


def test_what_found_no_place_is_told() -> None:
    rows = play(scenario(), Machine(most=3))
    assert [row.outcome for row in rows] == [Outcome.COMPLETE] * 3 + [Outcome.NOT_STARTED]
    assert rows[3].late > 4


def test_it_asks_for_what_the_scenario_says() -> None:
    machine = Machine()
    play(scenario(shared=30, body={"service_tier": "priority"}), machine)
    (_, headers, body), *_ = machine.asked
    assert headers["authorization"].startswith("Bearer sk-load-")
    assert (body["max_tokens"], body["ignore_eos"], body["stream"], body["service_tier"]) == (2, True, True, "priority")
    system, user = body["messages"]
    assert [len(one["content"].split()) for one in (system, user)] == [30, 20]
    assert len({sent["messages"][0]["content"] for _, _, sent in machine.asked}) == 1
    assert len({sent["messages"][1]["content"] for _, _, sent in machine.asked}) == len(machine.asked)


def test_a_refused_request_comes_back_when_it_was_told() -> None:
    refused = Answer(429, {"retry-after-ms": "250"}, b'{"error":{}}', whole=True)
    told = scenario(retries=2, arrivals={"kind": "gamma", "rate": 0.5, "cv": 0})
    machine = Machine(answers=[refused])
    (row,) = play(told, machine)
    assert (row.outcome, row.attempts, row.retry_after) == (Outcome.COMPLETE, [Attempt(429, 0.25)], None)
    assert machine.asked[1][1]["x-stainless-retry-count"] == "1"
    assert round(row.ttft or 0, 6) == 1.25
    (row,) = play(told, Machine(answers=[refused] * 3))
    assert (row.outcome, row.status, len(row.attempts), row.retry_after) == (Outcome.REFUSED, 429, 2, 0.25)


def test_other_ends() -> None:
    told = scenario(arrivals={"kind": "gamma", "rate": 0.5, "cv": 0})
    for answer, outcome in (
        (Answer(503, whole=True), Outcome.REFUSED),
        (Answer(500, whole=True), Outcome.FAILED),
        (Answer(error="no connection"), Outcome.FAILED),
        (Answer(timed_out=True), Outcome.TIMED_OUT),
        (Answer(200), Outcome.BROKEN),
        (Answer(200, timed_out=True), Outcome.TIMED_OUT),
    ):
        (row,) = play(told, Machine(answers=[answer]))
        assert (row.outcome, row.ttft) == (outcome, None)


def test_an_answer_that_is_no_stream() -> None:
    told = scenario(stream=False, arrivals={"kind": "gamma", "rate": 0.5, "cv": 0})
    body = b'{"choices":[{"message":{"content":"yes"}}],"usage":{"prompt_tokens":3,"completion_tokens":1}}'
    (row,) = play(told, Machine(answers=[Answer(200, {}, body, whole=True)]))
    assert (row.outcome, row.ttft, row.output_tokens) == (Outcome.COMPLETE, None, 1)
    (row,) = play(told, Machine(answers=[Answer(200, {}, body[:20])]))
    assert row.outcome is Outcome.BROKEN


def test_a_session_grows_and_ends_with_the_run() -> None:
    session = {"turns": 50, "most": 4, "pause": "0s", "adds": {"tokens": 7}}
    arrivals = {"kind": "gamma", "rate": 0.5, "cv": 0}
    machine = Machine(first=0.1)
    rows = play(scenario(session=session, arrivals=arrivals), machine)
    assert [row.turn for row in rows] == list(range(len(rows)))
    bodies = [body["messages"] for _, _, body in machine.asked]
    for before, after in pairwise(bodies):
        assert after[:-2] == before
        assert (after[-2]["content"], len(after[-1]["content"].split())) == ("word word ", 7)
    slow = play(scenario(session=session, arrivals=arrivals), Machine(first=5))
    assert len(slow) == 1


def test_a_session_ends_with_what_was_refused() -> None:
    session = {"turns": 50, "pause": "0s", "adds": {"tokens": 7}}
    told = scenario(session=session, arrivals={"kind": "gamma", "rate": 0.5, "cv": 0})
    rows = play(told, Machine(answers=[Answer(429, whole=True)]))
    assert [row.outcome for row in rows] == [Outcome.REFUSED]


def test_who_is_ended_in_the_middle_is_cut() -> None:
    class Ends(Machine):
        def ask(self, path: str, headers: dict[str, str], body: bytes, stream: Stream | None, timeout: float) -> Answer:
            self.now += 3
            raise EndedError

    rows = play(scenario(), Ends())
    assert {row.outcome for row in rows} == {Outcome.CUT}
    assert round(rows[0].total or 0, 6) == 3


def test_nothing_but_the_locustfile_knows_gevent() -> None:
    """Importing it patches sockets, threads and time: that must stay in locust's own process."""
    import loadtests.scenarios.run  # noqa: F401 - imports all the others

    assert not {"gevent", "locust"} & set(sys.modules)
