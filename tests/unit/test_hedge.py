"""A second attempt at a silent request, driven without sockets: first scene by scene, then whatever comes."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.policy.hedge import HedgeRules
from gateway.serving.admission import AdmissionRules
from gateway.serving.relay import RelayLimits
from gateway.serving.ticket import Outcome
from gateway.serving.upstream import Loss
from tests.support.examples import examples
from tests.support.table import each
from tests.unit.ports import FakeConnection, Stage

CHUNK = b'data: {"model":"own-name","choices":[{"delta":{"content":"x"}}]}\n\n'
USAGE = b'data: {"model":"own-name","choices":[],"usage":{"prompt_tokens":5,"completion_tokens":2}}\n\n'
DONE = b"data: [DONE]\n\n"
ANSWER = b'{"model":"own-name","choices":[],"usage":{"prompt_tokens":5,"completion_tokens":2}}'
RULES = AdmissionRules(hedge=HedgeRules(after=1.0, share=1.0))


def staged(*, stream: bool = True, endpoints: int = 2, rules: AdmissionRules = RULES) -> Stage:
    return Stage(endpoints=endpoints, stream=stream, rules=rules)


def hedged(stage: Stage) -> tuple[FakeConnection, FakeConnection]:
    """A request whose engine has been silent for longer than is usual, and both of its attempts."""
    first = stage.start()
    first.connect()
    stage.advance(0.9)
    assert stage.attempts == [first]
    stage.advance(0.2)
    _, second = stage.attempts
    assert second.endpoint != first.endpoint
    assert second.body == first.body
    assert stage.in_flight == 2
    second.connect()
    return first, second


def causes(stage: Stage) -> list[tuple[str, str]]:
    return [(attempt.endpoint, attempt.cause) for attempt in stage.ticket.tried]


def test_the_second_serves_when_it_begins_first() -> None:
    """The first is cut off at once; the client sees one stream, and one attempt is accounted for after the other."""
    stage = staged()
    first, second = hedged(stage)
    second.head()
    second.data(b": keep-alive\n\n")
    assert first.ended == ""
    second.data(CHUNK)
    assert first.ended == "aborted"
    assert stage.in_flight == 1
    second.data(CHUNK + USAGE)
    second.data(DONE)
    assert stage.client.out.count(b'"content":"x"') == 2
    stage.check_over(Outcome.OK, 200)
    assert causes(stage) == [(first.endpoint, "outrun"), (second.endpoint, "")]
    assert (stage.ticket.endpoint, stage.ticket.attempts, stage.ticket.events) == (second.endpoint, 2, 2)
    assert stage.metrics._hedges == {"won": 1}
    assert stage.ticket.usage is not None
    assert stage.ticket.usage.completion == 2


def test_the_first_serves_when_it_begins_first() -> None:
    stage = staged()
    first, second = hedged(stage)
    first.head()
    first.data(CHUNK)
    assert second.ended == "aborted"
    first.data(DONE)
    stage.check_over(Outcome.OK, 200)
    assert causes(stage) == [(second.endpoint, "outrun"), (first.endpoint, "")]
    assert stage.metrics._hedges == {"lost": 1}


@pytest.mark.parametrize("winner", [0, 1])
def test_an_answer_that_comes_whole(winner: int) -> None:
    stage = staged(stream=False)
    attempts = hedged(stage)
    attempts[winner].answer(200, ANSWER)
    assert attempts[1 - winner].ended == "aborted"
    assert stage.client.out == ANSWER.replace(b"own-name", b"public/model")
    stage.check_over(Outcome.OK, 200)


@each("how", ["connect", "closed", "stale", "status", "event", "whole"])
def test_a_second_that_fails_leaves_the_first_alone(how: str) -> None:
    stage = staged()
    first, second = hedged(stage)
    match how:
        case "status":
            second.answer(503, b'{"error":{"message":"full"}}')
        case "event":
            second.head()
            second.data(b'data: {"error":{"message":"The request queue is full.","code":503}}\n\n' + DONE)
        case "whole":
            second.head()
            second.complete()
        case _:
            second.lose(Loss(how))
    assert stage.in_flight == 1
    assert stage.metrics._hedges == {"failed": 1}
    stage.advance(30)
    assert len(stage.attempts) == 2
    first.head()
    first.data(CHUNK + DONE)
    stage.check_over(Outcome.OK, 200)


@pytest.mark.parametrize("began", [False, True])
def test_a_first_that_fails_leaves_it_to_the_second(began: bool) -> None:
    """No third attempt, and no retry is asked for; the second's own time-outs hold from there on."""
    stage = staged(endpoints=3)
    first, second = hedged(stage)
    if began:
        second.head()
        second.data(CHUNK[:20])
    first.lose(Loss.CLOSED)
    assert len(stage.attempts) == 2
    assert stage.in_flight == 1
    second.head() if not began else None
    second.data(CHUNK[20 if began else 0 :] + DONE)
    assert stage.client.out.startswith(b'data: {"model":"public/model"')
    stage.check_over(Outcome.OK, 200)
    assert stage.metrics.retries_denied == 0


def test_what_is_the_requests_fault_is_told_at_once() -> None:
    stage = staged()
    first, second = hedged(stage)
    first.answer(400, b'{"error":{"message":"no"}}')
    assert second.ended == "aborted"
    stage.check_over(Outcome.REFUSED, 400)


@pytest.mark.parametrize("how", ["client", "shutdown", "silence"])
def test_whoever_ends_it_ends_both(how: str) -> None:
    stage = staged()
    first, second = hedged(stage)
    match how:
        case "client":
            stage.relay.client_gone()
        case "shutdown":
            stage.relay.shut_down()
        case _:
            stage.advance(700)
    assert (first.ended, second.ended) == ("aborted", "aborted")
    outcomes = {"client": Outcome.CLIENT_GONE, "shutdown": Outcome.SHUTDOWN, "silence": Outcome.ENGINE_SLOW}
    stage.check_over(outcomes[how], {"client": 499, "shutdown": 503, "silence": 504}[how])


def test_a_pause_of_the_client_holds_for_the_second_too() -> None:
    stage = Stage(endpoints=2, rules=RULES, limits=RelayLimits(heartbeat_after=0.5))
    first, second = hedged(stage)
    stage.relay.pause()
    assert first.paused
    second.head()
    second.data(CHUNK)
    assert second.paused
    stage.relay.resume()
    assert [attempt.paused for attempt in stage.attempts] == [True, False]
    second.data(DONE)
    stage.check_over(Outcome.OK, 200)


def never(stage: Stage) -> None:
    stage.start().connect()
    stage.advance(30)
    assert len(stage.attempts) == 1
    stage.relay.client_gone()


def test_when_no_second_is_asked() -> None:
    """Where there is no other engine, none that is idle and well, nothing left of the share, or several answers."""
    never(staged(endpoints=1))
    never(staged(rules=replace(RULES, hedge=None)))
    never(staged(rules=replace(RULES, hedge=HedgeRules(after=1.0, share=0.5))))
    never(staged(rules=replace(RULES, hedge=HedgeRules(after=None, share=1.0))))
    stage = staged()
    stage.fields["n"] = msgspec.Raw(b"2")
    never(stage)
    stage = staged()
    stage.connections[1].full = True
    stage.connections[0].kept = True
    never(stage)
    stage = staged()
    stage.start().connect()
    (other,) = [endpoint for endpoint in stage.pool.endpoints if not endpoint.in_flight]
    other.down("as the test says")
    stage.advance(30)
    assert len(stage.attempts) == 1
    stage.relay.client_gone()


def test_an_engine_that_is_usually_slow_is_not_outrun() -> None:
    """What is usual is learnt of each kind of answers; those that were outrun count for as long as they were waited
    for."""
    stage = staged(rules=replace(RULES, hedge=HedgeRules(after=None, share=1.0)))
    hedging = stage.admission.hedging
    assert hedging is not None
    for _ in range(100):
        hedging.took(("public/model", True), 8.0)
        hedging.took(("public/model", False), 0.5)
    first = stage.start()
    first.connect()
    stage.advance(7.9)
    assert len(stage.attempts) == 1
    stage.advance(2.2)
    assert len(stage.attempts) == 2
    stage.relay.client_gone()


ACTIONS = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.sampled_from(
            ["connect", "head", "half", "data", "end", "complete", "lose", "busy", "wait", "beat", "pause", "resume"]
        ),
    ),
    max_size=14,
)


@settings(max_examples=examples(50))
@given(actions=ACTIONS, stream=st.booleans(), leaves=st.booleans())
def test_whatever_comes_the_client_has_one_answer_and_everything_is_given_back(
    actions: list[tuple[int, str]], stream: bool, leaves: bool
) -> None:
    limits = RelayLimits(heartbeat_after=5.0)
    stage = Stage(endpoints=3, stream=stream, rules=RULES, limits=limits)
    first = stage.start()
    first.connect()
    stage.advance(1.1)
    for which, action in actions:
        if stage.relay.done:
            break
        match action:
            case "wait":
                stage.advance(1.5)
            case "beat":
                stage.advance(6.0)
            case "pause":
                stage.relay.pause()
            case "resume":
                stage.relay.resume()
            case _ if which < len(stage.attempts) and not stage.attempts[which].ended:
                act(stage.attempts[which], action, stream)
        alive = [attempt for attempt in stage.attempts if not attempt.ended]
        assert stage.in_flight == len(alive) <= 2
    if not stage.relay.done:
        stage.relay.client_gone() if leaves else stage.relay.shut_down()
    ((outcome, status),) = stage.settled
    stage.check_over(outcome, status)
    assert sum(stage.metrics._hedges.values()) <= 1
    # What the client has is of one engine, in its order.
    assert stage.client.out.count(b'"model":"own-name"') == 0
    if outcome is Outcome.OK:
        assert stage.client.finished
        assert stage.ticket.tried[-1].cause == ""


def act(attempt: FakeConnection, action: str, stream: bool) -> None:
    """Have an engine do the next thing that HTTP allows it."""
    if not attempt.connected:
        attempt.lose(Loss.CONNECT) if action == "lose" else attempt.connect()
    elif action == "lose":
        attempt.lose(Loss.CLOSED)
    elif not attempt.headed and action == "busy":
        attempt.answer(503, b'{"error":{"message":"full"}}')
    elif not attempt.headed:
        attempt.head() if stream else attempt.head(200, b"application/json")
    elif stream:
        match action:
            case "complete":
                attempt.complete()
            case "end":
                attempt.data(b"\n\n" + CHUNK + DONE)
            case "half":
                attempt.data(b": x")
            case _:
                attempt.data(b"\n\n" + CHUNK)
    elif action in ("complete", "end"):
        attempt.data(ANSWER)
        attempt.complete()
