"""Requests that wait for an engine, without sockets: who is sent when, and that everybody's account ends at nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engines.registry import ENGINES
from gateway.policy.concurrency import ConcurrencyRules, Limit, Targets
from gateway.policy.queue import QueueRules
from gateway.policy.retry import BudgetRules
from gateway.serving.admission import USUAL, AdmissionRules, Terms
from gateway.serving.jobs import job_of
from gateway.serving.limiter import Hold, Settlement
from gateway.serving.meter import Usage
from gateway.serving.pool import Endpoint, EndpointSpec
from gateway.serving.relay import HEARTBEAT, Order, Relay, RelayLimits
from gateway.serving.ticket import Outcome, Ticket
from gateway.serving.upstream import Address, Connections, Loss
from tests.support.examples import examples
from tests.unit.ports import MODEL, OWN, FakeClient, FakeConnection, FakeConnections, Stage

ONE_AT_ONCE = AdmissionRules(capacity=ConcurrencyRules(most=1), patience=(30.0, 30.0, 300.0))
FIRST = b'data: {"model":"own-name","choices":[{"delta":{"content":"a"}}]}\n\n'
REST = b"data: [DONE]\n\n"


@dataclass
class Estimated:
    """What is held of no limit, of a request of a known size."""

    tokens: tuple[int, int]
    weight: float = 1.0
    headers: bytes = b""
    used: Usage | None = None

    def expected(self) -> tuple[int, int]:
        return self.tokens

    def settle(self, usage: Usage | None, events: int, **how: bool) -> tuple[Settlement, int, None]:
        return Settlement.VOID, 0, None


@dataclass
class Asked:
    """One request of several, and all that is known of it."""

    relay: Relay
    client: FakeClient
    ticket: Ticket
    settled: list[tuple[Outcome, int]] = field(default_factory=list)

    @property
    def waits(self) -> bool:
        return self.relay._queued


class Crowd(Stage):
    """Many requests before the same engines."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.deadlines.watch(self.admission)

    def fake_connections(self) -> None:
        """Let engines that are new answer as a test says too."""
        for endpoint in self.pool.endpoints:
            if type(endpoint.connections) is Connections:
                endpoint.connections = cast(Connections, FakeConnections(endpoint.name, self.attempts))

    def ask(
        self,
        tenant: str = "a",
        *,
        stream: bool = True,
        terms: Terms = USUAL,
        tokens: tuple[int, int] | None = None,
        model: str = MODEL,
    ) -> Asked:
        """Send one more request on its way; ``tokens`` are those that its prompt and its answer are estimated at."""
        settled: list[tuple[Outcome, int]] = []
        ticket = Ticket(
            self.metrics,
            lambda ticket, outcome, status, now: settled.append((outcome, status)),
            f"req_{tenant}",
            self.path,
            self.clock(),
        )
        ticket.tenant = tenant
        ticket.serve(model, stream)
        if tokens is not None:
            ticket.hold = cast(Hold, Estimated(tokens))
        client = FakeClient()
        order = Order(self.order.route, model, dict(self.fields), stream, stream, True, None, terms)
        relay = Relay(
            order, ticket, client, self.admission, self.deadlines, self.limits, self.metrics, self.done.append
        )
        relay.start(self.clock())
        return Asked(relay, client, ticket, settled)

    def turns(self) -> None:
        """Let the event loop's turn be over."""
        called, self.called[:] = list(self.called), []
        for callback in called:
            callback()

    def attempt_of(self, asked: Asked) -> FakeConnection | None:
        """The attempt that a request has under way."""
        return next((one for one in self.attempts if one.receiver is asked.relay and one.ended == ""), None)

    def begin(self, asked: Asked) -> str:
        """Have its engine answer with a first token; return the engine."""
        attempt = self.attempt_of(asked)
        assert attempt is not None
        attempt.connect()
        attempt.head()
        attempt.data(FIRST)
        return attempt.endpoint

    def finish(self, asked: Asked) -> None:
        """Have its engine answer to the end."""
        attempt = self.attempt_of(asked)
        assert attempt is not None
        if not attempt.connected:
            attempt.connect()
        if not attempt.headed:
            attempt.head()
        attempt.data(FIRST + REST)
        self.turns()


def serving(name: str, models: tuple[str, ...]) -> EndpointSpec:
    """An engine that serves some models."""
    engine, own = ENGINES["vllm"], tuple((model, OWN) for model in models)
    return EndpointSpec(name, "http://engine", engine, Address("engine", 80), models=own)


def test_what_an_engine_has_no_room_for_waits_and_is_sent_when_it_has() -> None:
    """Nothing is sent beyond the limit, and nobody is woken before his turn."""
    crowd = Crowd(rules=ONE_AT_ONCE)
    first, second, third = crowd.ask(), crowd.ask(), crowd.ask()
    assert len(crowd.attempts) == 1
    assert (second.waits, third.waits) == (True, True)
    crowd.clock.advance(3)
    crowd.finish(first)
    assert crowd.attempt_of(second) is not None
    assert third.waits
    assert second.ticket.waited == 3
    crowd.finish(second)
    crowd.finish(third)
    assert [one.settled for one in (first, second, third)] == [[(Outcome.OK, 200)]] * 3
    assert crowd.in_flight == 0


def test_a_client_that_leaves_leaves_the_queue() -> None:
    """Its turn is somebody else's."""
    crowd = Crowd(rules=ONE_AT_ONCE)
    first, second, third = crowd.ask(), crowd.ask(), crowd.ask()
    second.relay.client_gone()
    assert second.settled == [(Outcome.CLIENT_GONE, 499)]
    crowd.finish(first)
    assert crowd.attempt_of(third) is not None
    assert len(crowd.attempts) == 2
    assert crowd.admission.queue.count == 0


def test_who_waited_as_long_as_he_may_is_told_to_slow_down() -> None:
    """The answer says why and when to come again; whoever waits on is not touched."""
    crowd = Crowd(rules=ONE_AT_ONCE)
    first = crowd.ask()
    crowd.attempt.connect()
    second = crowd.ask(stream=False, terms=Terms(patience=5.0))
    third = crowd.ask()
    crowd.advance(5)
    error = second.client.json["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "slow_down")
    assert "waited for 5.0 s" in error["message"]
    assert int(second.client.headers[b"retry-after"]) >= 1
    assert second.client.headers[b"x-should-retry"] == b"true"
    assert second.settled == [(Outcome.BUSY, 429)]
    assert third.waits
    crowd.finish(first)
    assert crowd.attempt_of(third) is not None


def test_a_waiting_stream_hears_that_it_is_alive() -> None:
    """Hops that cut silent connections see a comment; after it a refusal can only be an event."""
    crowd = Crowd(rules=ONE_AT_ONCE)
    crowd.ask()
    second = crowd.ask(terms=Terms(patience=20.0))
    crowd.advance(15)
    assert second.client.out == HEARTBEAT
    crowd.advance(5)
    assert second.settled == [(Outcome.BUSY, 200)]
    assert b'"code":"slow_down"' in second.client.events[-1]
    assert second.client.closed


def test_a_request_that_an_engine_broke_over_waits_for_another_and_not_for_the_same() -> None:
    """The survivor is not given more than its limit: no herd."""
    crowd = Crowd(endpoints=2, rules=ONE_AT_ONCE)
    first, second = crowd.ask(), crowd.ask()
    broken, well = crowd.attempt_of(first), crowd.attempt_of(second)
    assert broken is not None
    assert well is not None
    broken.connect()
    broken.lose(Loss.CLOSED)
    assert first.waits
    crowd.turns()
    assert first.waits, "it was sent to the engine that broke over it"
    third = crowd.ask()
    assert crowd.attempts[-1].endpoint == broken.endpoint, "an engine with room is not used"
    crowd.finish(second)
    again = crowd.attempt_of(first)
    assert again is not None
    assert again.endpoint == well.endpoint
    crowd.finish(first)
    crowd.finish(third)
    assert first.settled == [(Outcome.OK, 200)]
    assert first.ticket.attempts == 2
    assert crowd.in_flight == 0


def test_an_engine_that_comes_up_by_itself_is_noticed() -> None:
    """Nobody's end made room: those who wait are looked at from time to time."""
    crowd = Crowd(endpoints=2, rules=ONE_AT_ONCE)
    crowd.pool.endpoints[1].down("as the test says")
    crowd.ask()
    second = crowd.ask()
    assert second.waits
    crowd.pool.endpoints[1].up(crowd.clock())
    crowd.advance(0.2)
    assert crowd.attempt_of(second) is not None


def test_who_waits_is_queued_anew_when_other_engines_serve_his_model() -> None:
    """A new engine takes him; where none is left he is told so."""
    crowd = Crowd(rules=ONE_AT_ONCE)
    crowd.ask()
    second, third = crowd.ask(), crowd.ask()
    old = crowd.pool.endpoints[0].spec
    new = EndpointSpec("new", "http://new", ENGINES["vllm"], Address("new", 80), models=((MODEL, OWN),))
    crowd.pool.configure([old, new], 1)
    crowd.fake_connections()
    crowd.turns()
    assert second.relay._endpoint is crowd.pool.endpoints[1]
    assert third.waits
    crowd.pool.configure([], 1)
    assert third.settled == [(Outcome.NO_ENGINE, 503)]
    assert crowd.admission.queue.count == 0
    second.relay.client_gone()


def test_nobody_waits_for_engines_that_take_nothing() -> None:
    """Drained or gone, the answer is the same as without a queue, at once."""
    crowd = Crowd(rules=ONE_AT_ONCE)
    crowd.endpoint.holds.add("operator")
    assert crowd.ask().settled == [(Outcome.NO_ENGINE, 503)]


def test_a_shutdown_ends_waiting_too() -> None:
    """With the words of a shutdown."""
    crowd = Crowd(rules=ONE_AT_ONCE)
    crowd.ask()
    second = crowd.ask(stream=False)
    second.relay.shut_down()
    assert second.settled == [(Outcome.SHUTDOWN, 503)]
    assert crowd.admission.queue.count == 0


def test_a_flood_makes_room_for_others() -> None:
    """A tenant that fills the queue loses its latest request to one that has none waiting."""
    rules = AdmissionRules(QueueRules(requests=2), ConcurrencyRules(most=1))
    crowd = Crowd(rules=rules)
    crowd.ask("flood")
    second, third = crowd.ask("flood"), crowd.ask("flood")
    quiet = crowd.ask("quiet")
    assert third.settled == [(Outcome.BUSY, 429)]
    assert b"make room" in third.client.out
    assert (second.waits, quiet.waits) == (True, True)
    assert crowd.ask("flood").settled == [(Outcome.BUSY, 429)]


def test_a_better_class_goes_first() -> None:
    """Whoever came before it or not."""
    crowd = Crowd(rules=ONE_AT_ONCE)
    first = crowd.ask()
    usual, better = crowd.ask(), crowd.ask(terms=Terms(rank=0))
    crowd.finish(first)
    assert crowd.attempt_of(better) is not None
    assert usual.waits


def test_the_limit_is_learnt_from_how_fast_an_engine_answers() -> None:
    """Tokens that come too slowly lower what it is given; the next one waits."""
    capacity = ConcurrencyRules(Targets(inter_token=0.05), start=8, most=100)
    crowd = Crowd(rules=AdmissionRules(capacity=capacity))
    asked = [crowd.ask(str(number)) for number in range(8)]
    for _ in range(4):
        for one in asked:
            attempt = crowd.attempt_of(one)
            assert attempt is not None
            if not attempt.connected:
                attempt.connect()
                attempt.head()
            attempt.data(FIRST)
        crowd.clock.advance(0.2)
    crowd.admission.on_deadline(crowd.clock())
    assert crowd.endpoint.most == 6
    for one in asked[:3]:
        crowd.finish(one)
    assert not crowd.ask().waits
    assert crowd.ask().waits
    crowd.pool.share_among(3)
    assert crowd.endpoint.most == 6, "what was learnt is lost"
    crowd.endpoint.give_at_most(ConcurrencyRules())
    crowd.advance(0.2)
    assert crowd.in_flight == 7


def test_retries_have_a_budget() -> None:
    """When engines break over everything, they are not sent three times as much for it."""
    rules = AdmissionRules(retries=BudgetRules(share=0.5, per_second=0.1))
    crowd = Crowd(endpoints=2, rules=rules)
    attempts = []
    for _ in range(10):
        asked = crowd.ask(stream=False)
        while (attempt := crowd.attempt_of(asked)) is not None:
            attempt.connect()
            attempt.lose(Loss.CLOSED)
        attempts.append(asked.ticket.attempts)
        assert asked.settled == [(Outcome.ENGINE_FAILED, 502)]
    # One that was saved, and half of ten.
    assert sum(attempts) == 16
    assert crowd.metrics.retries_denied == 4


def test_a_retry_that_cannot_be_is_taken_out_of_no_budget() -> None:
    """A model whose only engine breaks leaves the others theirs."""
    crowd = two_models(AdmissionRules(retries=BudgetRules(share=0.0, per_second=0.2)))
    for model in ("other",) * 20 + (MODEL,):
        asked = crowd.ask(stream=False, model=model)
        crowd.attempt.connect()
        crowd.attempt.lose(Loss.CLOSED)
        if model == "other":
            assert asked.settled == [(Outcome.ENGINE_FAILED, 502)]
    assert crowd.attempt_of(asked) is not None
    assert crowd.metrics.retries_denied == 0


def test_a_conversation_stays_where_its_beginning_is_cached() -> None:
    """Though the other engine has less to do; a salt or another model shares nothing."""
    crowd = Crowd(endpoints=2)
    words = json.dumps([{"role": "user", "content": "x" * 4000}]).encode()
    crowd.fields["messages"] = msgspec.Raw(words)
    home = crowd.begin(crowd.ask(tokens=(1000, 10)))
    crowd.fields["messages"] = msgspec.Raw(words[:-1] + b',{"role":"assistant","content":"y"}]')
    assert {crowd.begin(crowd.ask(tokens=(1000, 10))) for _ in range(3)} == {home}
    choice = crowd.ask(tokens=(1000, 10)).ticket.tried[-1].choice
    assert choice is not None
    assert (choice.matched, choice.blocks) == (15, 15)
    crowd.fields["messages"] = msgspec.Raw(words.replace(b"x", b"z"))
    assert crowd.ask(tokens=(1000, 10)).ticket.endpoint != home


def test_a_session_stays_at_home_while_it_does_not_crowd_there() -> None:
    """``prompt_cache_key`` names it, whatever the prompts are; other sessions have other homes."""
    crowd = Crowd(endpoints=3, rules=AdmissionRules(capacity=ConcurrencyRules(most=256)))
    homes = []
    for session in range(8):
        crowd.fields["prompt_cache_key"] = msgspec.Raw(b'"team-%d"' % session)
        (home,) = {crowd.begin(crowd.ask(tokens=(1000, 10))) for _ in range(3)}
        homes.append(home)
    assert set(homes) == {"e0", "e1", "e2"}


class AnyCrowd(RuleBasedStateMachine):
    """Requests come, are answered, break, leave and wait too long in any order, before engines that come and go."""

    MOST = 2
    MODELS = (("e0", (MODEL, "other")), ("e1", (MODEL,)), ("e2", (MODEL, "other")))

    def __init__(self) -> None:
        super().__init__()
        rules = AdmissionRules(QueueRules(requests=6, aged=2.0), ConcurrencyRules(most=self.MOST), (9.0, 9.0, 60.0))
        self.crowd = Crowd(endpoints=3, rules=rules)
        self.all: list[Asked] = []
        self.ever: set[Endpoint] = set()
        self.serve(self.MODELS)

    def serve(self, models: Sequence[tuple[str, tuple[str, ...]]]) -> None:
        self.crowd.pool.configure([serving(*one) for one in models], created=1)
        self.crowd.fake_connections()
        self.ever.update(self.crowd.pool.endpoints)
        self.crowd.turns()

    @rule(left=st.integers(0, 3))
    def reload(self, left: int) -> None:
        """Take all but one away, or none."""
        self.serve([one for at, one in enumerate(self.MODELS) if at != left])

    @property
    def open(self) -> list[Asked]:
        return [one for one in self.all if not one.settled]

    @rule(
        tenant=st.sampled_from("abc"),
        rank=st.integers(0, 2),
        stream=st.booleans(),
        model=st.sampled_from([MODEL, MODEL, "other"]),
    )
    def ask(self, tenant: str, rank: int, stream: bool, model: str) -> None:
        self.all.append(self.crowd.ask(tenant, stream=stream, terms=Terms(rank), model=model))

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.open)).relay.client_gone()
        self.crowd.turns()

    @precondition(lambda self: any(self.crowd.attempt_of(one) for one in self.open))
    @rule(data=st.data(), how=st.sampled_from(["answer", "break", "refuse", "full", "begin"]))
    def engine(self, data: st.DataObject, how: str) -> None:
        under_way = [attempt for one in self.open if (attempt := self.crowd.attempt_of(one)) is not None]
        attempt = data.draw(st.sampled_from(under_way))
        if not attempt.connected:
            if how == "refuse":
                attempt.lose(Loss.CONNECT)
                self.crowd.turns()
                return
            attempt.connect()
        if how == "break":
            attempt.lose(Loss.CLOSED)
        elif how == "full" and not attempt.headed:
            attempt.head(503, b"application/json")
            attempt.data(b'{"error":{"message":"full","type":"x","code":503}}')
            attempt.complete()
        else:
            if not attempt.headed:
                attempt.head()
            attempt.data(FIRST if how == "begin" else FIRST + REST)
        self.crowd.turns()

    @rule(seconds=st.sampled_from([0.1, 1.0, 5.0]))
    def pass_time(self, seconds: float) -> None:
        self.crowd.advance(seconds)

    @rule(number=st.integers(0, 2), comes=st.booleans())
    def health(self, number: int, comes: bool) -> None:
        endpoint = self.crowd.pool.endpoints[number % len(self.crowd.pool.endpoints)]
        if comes:
            endpoint.up(self.crowd.clock())
        else:
            endpoint.down("as the test says")

    @invariant()
    def nobody_is_both_let_in_and_refused(self) -> None:
        for one in self.all:
            assert len(one.settled) <= 1
            assert not (one.waits and self.crowd.attempt_of(one)), "waits and is served"
            assert not (one.waits and one.settled), "waits and is answered"
            if not one.settled:
                assert one.waits or self.crowd.attempt_of(one), "is forgotten"
        assert self.crowd.admission.queue.count == sum(one.waits for one in self.all)

    @invariant()
    def no_engine_gets_more_than_its_limit(self) -> None:
        for endpoint in self.ever:
            mine = [one for one in self.open if one.relay._endpoint is endpoint]
            assert endpoint.in_flight == len(mine) <= self.MOST
            assert endpoint.tokens == endpoint.prefilling == 0

    @invariant()
    def no_engine_is_idle_while_somebody_waits_for_it(self) -> None:
        now = self.crowd.clock()
        self.crowd.turns()
        for one in self.all:
            if one.waits:
                able = self.crowd.pool.serving(one.ticket.model)
                left = [end for end in able if end not in one.relay._tried]
                idle = [end for end in left if end.room(0) and end.trusted(now) and end.ramp_until <= now]
                # One that came up by itself is seen at the next look.
                assert not idle or self.crowd.admission.deadline <= now + 0.1

    def teardown(self) -> None:
        for one in self.open:
            one.relay.client_gone()
        self.crowd.turns()
        assert all(len(one.settled) == 1 for one in self.all)
        assert sum(end.in_flight for end in self.ever) == self.crowd.admission.queue.count == 0
        assert all(group.kept for group in self.crowd.pool._groups.values())
        assert len(self.crowd.deadlines) == 1, "somebody keeps a deadline beside admission itself"


TestAnyCrowd = AnyCrowd.TestCase
TestAnyCrowd.settings = settings(max_examples=examples(25), stateful_step_count=30)


def test_an_engine_that_refuses_everything_is_not_sent_everything() -> None:
    """It has the least to do of all: it would be asked first each time, and the budget of retries be used up."""
    crowd = Crowd(endpoints=2)
    refused = 0
    for number in range(100):
        asked = crowd.ask(stream=False)
        attempt = crowd.attempt_of(asked)
        assert attempt is not None
        if attempt.endpoint == "e0":
            refused += 1
            attempt.answer(503, b'{"error":{"message":"full","type":"x","code":503}}')
        # Whoever works has always more to do than whoever refuses.
        assert not asked.settled, f"after {number}: the client is told of it"
        crowd.advance(0.01)
    assert refused <= 6


def test_prompts_too_long_for_the_target_do_not_take_an_engine_from_all_others() -> None:
    """One of ten cannot have its first token in time, and fewer at once would not help it."""
    capacity = ConcurrencyRules(Targets(ttft=0.8), start=8, most=100)
    crowd = Crowd(rules=AdmissionRules(capacity=capacity))
    for number in range(100):
        long = number % 10 == 0
        several = [crowd.ask(str(number), tokens=(20_000 if long else 100, 10)) for _ in range(2)]
        crowd.clock.advance(2.5 if long else 0.1)
        for one in several:
            crowd.begin(one)
            crowd.finish(one)
        crowd.admission.on_deadline(crowd.clock())
    assert crowd.endpoint.most == 8


def test_an_engine_is_learnt_from_answers_that_are_not_streamed_too() -> None:
    """By the time between tokens on the average; by their whole time where there is but one token, or none."""
    capacity = ConcurrencyRules(Targets(ttft=1.0, inter_token=0.05), start=2, most=100)
    crowd = Crowd(rules=AdmissionRules(capacity=capacity))

    def answer(seconds: float, completion: int) -> int:
        """Have one answer after the other take so long; return what it is given then."""
        for _ in range(20):
            asked = [crowd.ask(stream=False) for _ in range(crowd.endpoint.most)]
            crowd.clock.advance(seconds)
            for one in asked:
                attempt = crowd.attempt_of(one)
                assert attempt is not None
                attempt.answer(200, b'{"model":"own-name","usage":{"completion_tokens":%d}}' % completion)
        crowd.admission.on_deadline(crowd.clock())
        return crowd.endpoint.most

    assert answer(2.0, 100) == 3
    assert answer(9.0, 20) == 3, "too few tokens to tell"
    assert answer(0.1, 0) == 4
    assert answer(9.0, 100) == 3
    assert answer(9.0, 0) == 2


def test_a_stream_that_comes_in_one_read_has_a_first_token_too() -> None:
    """It is the first token that the target is of, however many follow."""
    crowd = Crowd(rules=AdmissionRules(capacity=ConcurrencyRules(Targets(ttft=1.0))))
    crowd.finish(crowd.ask())
    assert len(crowd.endpoint.window.ttfts) == 1


def two_models(rules: AdmissionRules = ONE_AT_ONCE) -> Crowd:
    """Two engines of which only the first serves another model too, usually one request at once each."""
    crowd = Crowd(rules=rules)
    crowd.pool.configure([serving("e0", (MODEL, "other")), serving("e1", (MODEL,))], created=1)
    crowd.fake_connections()
    for endpoint in crowd.pool.endpoints:
        endpoint.up(-100.0)
    return crowd


def test_nobody_overtakes_who_waits_for_an_engine_that_serves_his_model_too() -> None:
    """Requests for one model do not keep an engine from those for another for as long as they come."""
    crowd = two_models()
    under_way = [crowd.ask(), crowd.ask()]
    waits = crowd.ask(model="other")
    assert waits.waits
    first = next(one for one in under_way if one.ticket.endpoint == "e0")
    attempt = crowd.attempt_of(first)
    assert attempt is not None
    attempt.connect()
    attempt.head()
    # Its end has made room, and before the event loop's turn is over somebody else comes.
    attempt.data(FIRST + REST)
    late = crowd.ask()
    crowd.turns()
    assert crowd.attempt_of(waits) is not None
    assert late.waits


def test_one_too_large_is_waited_for_by_those_for_another_model_too() -> None:
    """The engine empties until it fits."""
    crowd = two_models()
    for endpoint in crowd.pool.endpoints:
        endpoint.limit = Limit(8.0, tokens=1000)
        endpoint.watched = True
    crowd.pool.index()
    small = [crowd.ask(tokens=(100, 100)) for _ in range(6)]
    large = crowd.ask(tokens=(2000, 100), model="other")
    assert not any(one.waits for one in small)
    rounds = 0
    while crowd.attempt_of(large) is None:
        rounds += 1
        assert rounds < 10
        first = next(one for one in small if not one.settled and one.ticket.endpoint == "e0")
        crowd.begin(first)
        crowd.finish(first)
        small.append(crowd.ask(tokens=(100, 100)))
    assert rounds == 3


def test_one_engine_empties_for_a_large_request_and_not_all() -> None:
    """The others are given what came after it."""
    crowd = Crowd(endpoints=3)
    for endpoint in crowd.pool.endpoints:
        endpoint.limit = Limit(8.0, tokens=1000)
        endpoint.watched = True
    crowd.pool.index()
    under_way = [crowd.ask(str(at), tokens=(150, 100)) for at in range(12)]
    large = crowd.ask(tokens=(800, 100))
    later = [crowd.ask(str(at), tokens=(150, 100)) for at in range(12)]
    assert large.waits
    assert all(one.waits for one in later)
    rounds = 0
    while crowd.attempt_of(large) is None:
        rounds += 1
        for endpoint in crowd.pool.endpoints:
            one = next(one for one in (*under_way, *later) if one.relay._endpoint is endpoint)
            crowd.begin(one)
            crowd.finish(one)
        assert sorted(endpoint.in_flight for endpoint in crowd.pool.endpoints)[1:] == [4, 4], "others empty for it too"
    assert rounds == 4
    assert crowd.admission.queue.count == 12 - 8


def test_no_engine_is_held_that_is_away() -> None:
    """Nobody has his turn of it, and who comes later does not overtake him at another."""
    crowd = Crowd(endpoints=2, rules=ONE_AT_ONCE)
    first, second = crowd.ask(), crowd.ask()
    gone = next(end for end in crowd.pool.endpoints if end.name == second.ticket.endpoint)
    waits = crowd.ask()
    attempt = crowd.attempt_of(second)
    assert attempt is not None
    attempt.lose(Loss.CONNECT)
    crowd.advance(0.2)
    assert not gone.healthy
    assert waits.waits
    assert not crowd.admission.queue.holds(gone)
    crowd.finish(first)
    assert crowd.attempt_of(waits) is not None


def test_an_engine_that_is_set_aside_serves_those_who_have_no_other() -> None:
    """However many of a better class wait for the engine that is well."""
    crowd = two_models()
    ejected = crowd.pool.endpoints[0]
    for _ in range(5):
        ejected.went_wrong(crowd.clock())
    crowd.ask()
    better = [crowd.ask(terms=Terms(rank=0)) for _ in range(3)]
    assert all(one.waits for one in better)
    first, second = crowd.ask(model="other"), crowd.ask(model="other")
    crowd.advance(0.1)
    attempt = crowd.attempt_of(first)
    assert attempt is not None
    attempt.connect()
    attempt.lose(Loss.CLOSED)
    crowd.turns()
    assert second.ticket.endpoint == "e0"
    assert all(one.waits for one in better)


def test_lines_of_those_who_have_tried_others_do_not_stay() -> None:
    """There are as many as there are pairs of engines."""
    crowd = Crowd(endpoints=4, rules=ONE_AT_ONCE)
    for _ in range(6):
        asked = [crowd.ask() for _ in range(4)]
        attempt = crowd.attempt_of(asked[0])
        assert attempt is not None
        attempt.connect()
        attempt.lose(Loss.CLOSED)
        assert asked[0].waits
        crowd.advance(0.5)
        for one in (*asked[1:], asked[0]):
            crowd.finish(one)
    assert len(crowd.admission.queue._lines) <= 1
    assert len(crowd.pool._groups) == 1
    assert sum(map(len, crowd.admission._lines.values())) <= 4
    asked = [crowd.ask() for _ in range(4)]
    attempt = crowd.attempt_of(asked[0])
    assert attempt is not None
    attempt.connect()
    attempt.lose(Loss.CLOSED)
    asked[0].relay.client_gone()
    assert len(crowd.pool._groups) == 1


def test_who_is_displaced_by_what_his_own_coming_set_off() -> None:
    """A client that is told to make room may have sent its next request already, and it begins within that answer."""
    crowd = Crowd(rules=AdmissionRules(QueueRules(requests=1), ConcurrencyRules(most=1)))
    crowd.ask()
    low = crowd.ask(terms=Terms(rank=2))
    told, later = low.client.respond, []

    def respond(status: int, headers: bytes, body: bytes) -> None:
        told(status, headers, body)
        later.append(crowd.ask(terms=Terms(rank=0)))

    low.client.respond = respond  # type: ignore[method-assign]
    usual = crowd.ask()
    assert low.settled == usual.settled == [(Outcome.BUSY, 429)]
    assert later[0].waits
    assert crowd.admission.queue.count == 1


def test_nobody_waits_longer_than_a_request_may_take() -> None:
    """Its turn would come for nothing: it would be cut off as soon as an engine had begun."""
    crowd = Crowd(rules=ONE_AT_ONCE, limits=RelayLimits(total=20.0, heartbeat_after=0))
    first = crowd.ask(stream=False)
    crowd.attempt.connect()
    second = crowd.ask(stream=False, terms=Terms(rank=2))
    crowd.advance(19.9)
    assert second.waits
    crowd.advance(0.1)
    assert second.settled == [(Outcome.BUSY, 429)]
    assert "waited for 20 s" in second.client.json["error"]["message"]
    assert first.settled == [(Outcome.ENGINE_SLOW, 504)]


def test_one_whose_turn_fails_holds_up_nobody() -> None:
    """He is answered, what he holds is given back, the next one has his turn; and the fault is heard of."""
    crowd = Crowd(rules=ONE_AT_ONCE)
    first, second, third = crowd.ask(), crowd.ask(stream=False), crowd.ask()
    sends = crowd.endpoint.connections.send

    def send(*what: Any, **how: Any) -> Any:
        crowd.endpoint.connections.send = sends  # type: ignore[method-assign]
        raise ZeroDivisionError

    crowd.endpoint.connections.send = send  # type: ignore[method-assign]
    crowd.finish(first)
    assert second.settled == [(Outcome.INTERNAL, 500)]
    with pytest.raises(ZeroDivisionError):
        crowd.turns()
    crowd.turns()
    assert crowd.attempt_of(third) is not None
    crowd.finish(third)
    assert crowd.in_flight == crowd.admission.queue.count == 0
    crowd.advance(60)


def test_a_sessions_name_is_read_no_further_than_names_are_long() -> None:
    """It may be as long as a body: ten megabytes would hold up the event loop for milliseconds."""
    long = [b'"%b%b"' % (b"x" * 2000, end) for end in (b"a", b"b")]
    names = [b'"a"', b'"b"', *long, b"null"]
    sessions = [
        job_of({"prompt_cache_key": msgspec.Raw(name)}, MODEL, None, (1, 1), chosen=True).session for name in names
    ]
    assert sessions[2] == sessions[3]
    assert len(set(sessions)) == 4
    assert sessions[4] == 0
