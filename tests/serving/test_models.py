"""Names that stand for other models, over sockets and on both faces: shares of several, and others to fall back on."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from pydantic import SecretStr

from gateway.limits import Limits
from gateway.metrics import Metrics
from gateway.models import PublicModel, published
from gateway.serving.explain import explanation, row_of
from gateway.serving.jobs import subject_of
from gateway.settings import Health, KeySettings, Queue, Routing, Timeouts
from tests.conftest import Connect
from tests.support.gateway import AUTH, CHAT, KEY, Gateway, StartGateway, chat, relayed, serving, until
from tests.support.journal import Journal
from tests.support.recordings import load
from tests.support.script import Do, Gate, Script, event_stream, json_answer
from tests.support.upstream import ScriptedUpstream

ANSWER = b'{"model":"own","choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}'
STREAM = event_stream(load("vllm", "chat_stream").events())
BOB = (("authorization", "Bearer fb-bob-secret"),)
KEYS = (
    KeySettings(name="alice", key=SecretStr(KEY)),
    KeySettings(name="bob", key=SecretStr("fb-bob-secret"), models=("large", "support")),
)
CANARY = PublicModel.model_validate({"routes": [{"model": "large", "weight": 3}, {"model": "next", "weight": 1}]})
FALLING = {"large": PublicModel(fallback=("small",))}


@pytest.fixture
async def second(journal: Journal) -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream(journal=journal) as scripted:
        yield scripted


async def two(
    start: StartGateway, first: ScriptedUpstream, second: ScriptedUpstream, other: str, **more: Any
) -> Gateway:
    """Start a gateway before an engine with `large` and one with another model; both answer well."""
    for one in (first, second):
        one.always(json_answer(ANSWER), path=CHAT)
    return await start(
        serving(first, models={"large": "own-large"}, name="one", max_running=1),
        serving(second, models={other: f"own-{other}"}, name="two"),
        keys=KEYS,
        **more,
    )


def counted(metrics: Metrics) -> dict[tuple[str, ...], int]:
    """What a scrape says of names that stand for several: model, served, via and outcome, and how many."""
    (family,) = [one for one in metrics.collect() if one.name == "forebay_served_requests"]
    return {tuple(sample.labels.values()): int(sample.value) for sample in family.samples}


# --- shares ----------------------------------------------------------------------------------------------------------


async def test_a_name_of_its_own_is_a_model_to_its_clients(
    start_gateway: StartGateway, upstream: ScriptedUpstream, second: ScriptedUpstream
) -> None:
    """It is listed, a right to it is enough, the answer says its name and a header what served; so do log, ledger and
    metrics."""
    models = {"support": PublicModel.model_validate({"routes": [{"model": "next"}]})}
    gateway = await two(start_gateway, upstream, second, "next", models=models)
    listed = (await gateway.get("/v1/models", BOB)).json()["data"]
    assert [model["id"] for model in listed] == ["large", "support"]
    answer = await gateway.ask(chat(model="support"), headers=BOB)
    assert (answer.status, answer.json()["model"], answer.header("x-forebay-model")) == (200, "support", "next")
    assert "x-forebay-model" in (answer.header("access-control-expose-headers") or "")
    assert [request.json()["model"] for request in relayed(second)] == ["own-next"]
    assert (await gateway.ask(chat(model="next"), headers=BOB)).status == 403
    plain = await gateway.ask(chat(model="large"))
    assert (plain.status, plain.header("x-forebay-model")) == (200, None)
    line = await gateway.line()
    assert (line["model"], line["served"], line["via"]) == ("support", "next", "route")
    ticket = gateway.replica.edge.recent[0]
    row = row_of(ticket, ticket.ended)
    assert (row.model, row.served) == ("support", "next")
    told = explanation(row, "memory")
    assert (told["asked"]["served"], told["asked"]["via"]) == ("next", "route")
    assert counted(gateway.replica.metrics) == {("support", "next", "route", "ok"): 1}


async def test_a_stream_has_the_name_that_was_asked_for(
    start_gateway: StartGateway, upstream: ScriptedUpstream, second: ScriptedUpstream
) -> None:
    models = {"support": PublicModel.model_validate({"routes": [{"model": "next"}]})}
    gateway = await two(start_gateway, upstream, second, "next", models=models)
    second.always(STREAM, path=CHAT)
    answer = await gateway.ask(chat(model="support", stream=True))
    assert answer.header("x-forebay-model") == "next"
    events = [json.loads(line[6:]) for line in answer.body.split(b"\n\n") if line.startswith(b"data: {")]
    assert {event["model"] for event in events} == {"support"}


@pytest.mark.parametrize("sticky", ["key", "session"])
async def test_whose_requests_stay_together(
    start_gateway: StartGateway, upstream: ScriptedUpstream, second: ScriptedUpstream, sticky: str
) -> None:
    """A key's, or a session's: each goes where the pure function says, time and again."""
    canary = CANARY.model_copy(update={"sticky": sticky})
    gateway = await two(start_gateway, upstream, second, "next", models={"support": canary})
    rule = published({"support": canary})["support"]
    (alice,) = [one.public_id for one in gateway.replica.authenticator.named("alice")]
    expected, went = [], []
    for body in [{"prompt_cache_key": f"s{number}"} for number in range(6)] + [{"user": "u1"}, {}] * 2:
        answer = await gateway.ask(chat(model="support", **body))
        went.append(answer.header("x-forebay-model"))
        raw: Any = {name: json.dumps(value).encode() for name, value in body.items()}
        expected.append(rule.pick(subject_of(raw, sticky == "session", alice)).model)
    assert went == expected
    assert len(set(went)) == (1 if sticky == "key" else 2)


async def test_what_is_said_of_a_name_holds_else_what_is_said_of_the_model(
    start_gateway: StartGateway, upstream: ScriptedUpstream, second: ScriptedUpstream
) -> None:
    """Limits and prices: nobody gets past a model's by another name for it."""
    route = PublicModel.model_validate({"routes": [{"model": "next"}]})
    limits = Limits.model_validate(
        {"models": {"next": {"keys": {"requests": "1/h"}}, "dear": {"price": {"input": 2000, "output": 0}}}}
    )
    gateway = await two(start_gateway, upstream, second, "next", models={"dear": route, "other": route}, limits=limits)
    assert [(await gateway.ask(chat(model="other"))).status for _ in range(2)] == [200, 429]
    assert (await gateway.ask(chat(model="next"))).status == 429
    assert (await gateway.ask(chat(model="dear"))).status == 200
    # Three tokens of a prompt at 2,000 dollars for a million.
    assert [ticket.cost for ticket in gateway.replica.edge.recent if ticket.model == "dear"] == [6_000_000]


# --- falling back ----------------------------------------------------------------------------------------------------


def refuses(upstream: ScriptedUpstream) -> None:
    upstream.refuse()


def answers(status: int) -> Callable[[ScriptedUpstream], None]:
    error = json_answer(b'{"error":{"message":"no"}}', status=status)
    return lambda upstream: upstream.always(error, path=CHAT)


def breaks(upstream: ScriptedUpstream) -> None:
    upstream.always(Script(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n{").do(Do.RESET), path=CHAT)


@pytest.mark.parametrize("trouble", [refuses, answers(500), answers(503), answers(404), answers(401), breaks])
async def test_another_model_serves_while_nothing_has_reached_the_client(
    start_gateway: StartGateway,
    upstream: ScriptedUpstream,
    second: ScriptedUpstream,
    trouble: Callable[[ScriptedUpstream], None],
) -> None:
    """Whatever speaks against the engines of the first; the client sees its model, and a header which it was."""
    gateway = await two(start_gateway, upstream, second, "small", models=FALLING)
    trouble(upstream)
    answer = await gateway.ask(chat(model="large"))
    assert (answer.status, answer.json()["model"], answer.header("x-forebay-model")) == (200, "large", "small")
    line = await gateway.line()
    assert (line["served"], line["via"], line["attempts"]) == ("small", "fallback", 2)
    assert counted(gateway.replica.metrics) == {("large", "small", "fallback", "ok"): 1}


async def test_no_other_model_for_a_key_that_may_not_or_a_request_at_fault(
    start_gateway: StartGateway, upstream: ScriptedUpstream, second: ScriptedUpstream
) -> None:
    """Nor for a client whose time the first engine has used up, nor once an answer has begun."""
    timeouts = Timeouts(first_byte=5)
    gateway = await two(start_gateway, upstream, second, "small", models=FALLING, timeouts=timeouts)
    answers(400)(upstream)
    assert (await gateway.ask(chat(model="large"))).status == 400
    answers(503)(upstream)
    refused = await gateway.ask(chat(model="large"), headers=BOB)
    assert (refused.status, refused.header("x-forebay-model")) == (503, "large")
    events = load("vllm", "chat_stream").events()
    upstream.always(event_stream(events[:2]), path=CHAT)
    broken = await gateway.ask(chat(model="large", stream=True))
    assert (broken.status, broken.header("x-forebay-model")) == (200, "large")
    assert b'"code":"engine_failed"' in broken.body
    assert relayed(second) == []


async def test_a_model_without_an_engine_that_is_well_is_not_waited_for(
    start_gateway: StartGateway, upstream: ScriptedUpstream, second: ScriptedUpstream
) -> None:
    """Down or ejected: the other model serves at once, and no retry is counted. One request at a time tries an engine
    that was ejected, when its time is over; when it is well again all go back."""
    health = Health(failures=1, eject=2, ramp=0)
    gateway = await two(start_gateway, upstream, second, "small", models=FALLING, health=health)
    answers(500)(upstream)

    async def served() -> str:
        answer = await gateway.ask(chat(model="large"))
        assert answer.status == 200
        return answer.header("x-forebay-model") or ""

    assert [await served() for _ in range(3)] == ["small"] * 3
    assert len(relayed(upstream)) == 1
    gateway.clock.advance(2.1)
    upstream.always(json_answer(ANSWER), path=CHAT)
    assert [await served() for _ in range(2)] == ["large"] * 2
    gateway.replica.pool.endpoints[0].down("as the test says")
    assert await served() == "small"
    # A bad engine is better than none: both are in trouble.
    gateway.replica.pool.endpoints[1].down("as the test says")
    gateway.replica.pool.endpoints[0].up()
    assert await served() == "large"


async def test_a_full_queue_is_a_reason_too(
    start_gateway: StartGateway, upstream: ScriptedUpstream, second: ScriptedUpstream, connect: Connect
) -> None:
    """Whoever may wait waits; beyond that the other model serves, and keys that may not use it are refused."""
    gateway = await two(start_gateway, upstream, second, "small", models=FALLING, queue=Queue(requests=1))
    gate = Gate()
    upstream.always(json_answer(ANSWER).do(gate, 0), path=CHAT)
    clients = [await connect(gateway.url) for _ in range(2)]
    clients[0].post(CHAT, chat(model="large"), AUTH)
    await until(lambda: len(relayed(upstream)) == 1, "the engine was not asked")
    clients[1].post(CHAT, chat(model="large"), AUTH)
    await until(lambda: gateway.replica.admission.queue.count == 1, "nobody waits")
    assert (await gateway.ask(chat(model="large"))).header("x-forebay-model") == "small"
    assert (await gateway.ask(chat(model="support"), headers=BOB)).status == 404
    for client in clients:
        gate.open()
        assert (await client.response()).header("x-forebay-model") == "large"


async def test_the_budget_of_retries_holds(
    start_gateway: StartGateway, upstream: ScriptedUpstream, second: ScriptedUpstream
) -> None:
    """Falling back after an engine has failed is a retry, and comes out of the same budget."""
    gateway = await two(start_gateway, upstream, second, "small", models=FALLING, health=Health(failures=0))
    answers(500)(upstream)
    served = [(await gateway.ask(chat(model="large"))).header("x-forebay-model") for _ in range(45)]
    # Thirty to begin with, and a fifth of the requests.
    assert served.count("small") == len(relayed(second)) in range(36, 40)
    assert gateway.replica.metrics.retries_denied == 45 - len(relayed(second))


# --- changes ---------------------------------------------------------------------------------------------------------


async def test_names_change_while_requests_run(
    start_gateway: StartGateway, upstream: ScriptedUpstream, second: ScriptedUpstream, connect: Connect
) -> None:
    """A request under way ends where it was sent; the next goes by what is said now."""
    to_large = {"support": PublicModel.model_validate({"routes": [{"model": "large"}]})}
    to_next = {"support": PublicModel.model_validate({"routes": [{"model": "next"}]})}
    gateway = await two(start_gateway, upstream, second, "next", models=to_large)
    gate = Gate()
    upstream.always(json_answer(ANSWER).do(gate, 0), path=CHAT)
    client = await connect(gateway.url)
    client.post(CHAT, chat(model="support"), AUTH)
    await until(lambda: len(relayed(upstream)) == 1, "the engine was not asked")
    gateway.replica._apply(gateway.replica.settings.model_copy(update={"models": to_next}))
    assert (await gateway.ask(chat(model="support"))).header("x-forebay-model") == "next"
    gate.open()
    assert (await client.response()).header("x-forebay-model") == "large"
    gateway.replica._apply(gateway.replica.settings.model_copy(update={"models": {}}))
    assert (await gateway.ask(chat(model="support"))).status == 404


# --- told ------------------------------------------------------------------------------------------------------------

ROOT = (("authorization", "Bearer fb-root-secret"),)
ASK = (("x-forebay-debug", "route"),)


async def test_an_answer_tells_how_it_was_routed_to_whoever_may_ask(
    start_gateway: StartGateway, upstream: ScriptedUpstream, second: ScriptedUpstream
) -> None:
    """The engine, those it was compared with, and what failed before; errors tell it too. Nothing else is asked for."""
    root = KeySettings(name="root", key=SecretStr("fb-root-secret"), admin=True)
    for one in (upstream, second):
        one.always(json_answer(ANSWER), path=CHAT)
    gateway = await start_gateway(
        serving(upstream, models={"large": "x"}, name="one"),
        serving(second, models={"large": "x"}, name="two"),
        keys=(*KEYS, root),
    )
    answers(503)(upstream)
    told = [
        json.loads((await gateway.ask(chat(model="large"), headers=(*ROOT, *ASK))).header("x-forebay-route") or "")
        for _ in range(2)
    ]
    assert {one["endpoint"] for one in told} == {"two"}
    (retried,) = [one for one in told if one["attempts"] == 2]
    assert retried["failed"] == [["one", "overloaded"]]
    compared = [candidate for one in told for candidate in one["candidates"]]
    assert {one["endpoint"] for one in compared} == {"one", "two"}
    assert all({"cost_ms", "ttft_ms", "used", "cached", "home"} <= one.keys() for one in compared)
    second.always(json_answer(b'{"error":{"message":"no"}}', status=400), path=CHAT)
    gateway.replica.pool.endpoints[0].down("as the test says")
    wrong = await gateway.ask(chat(model="large"), headers=(*ROOT, *ASK))
    assert (wrong.status, json.loads(wrong.header("x-forebay-route") or "")["failed"]) == (400, [["two", "request"]])
    assert (await gateway.ask(chat(model="large"), headers=ROOT)).header("x-forebay-route") is None
    assert (await gateway.ask(chat(model="large"), headers=(*AUTH, *ASK))).status == 403
    assert (await gateway.ask(chat(), headers=(*ROOT, ("x-forebay-debug", "all")))).status == 400
    everybody = gateway.replica.settings.model_copy(update={"routing": Routing(debug="everybody")})
    gateway.replica._apply(everybody)
    allowed = await gateway.ask(chat(model="large"), headers=(*AUTH, *ASK))
    assert json.loads(allowed.header("x-forebay-route") or "")["endpoint"] == "two"


async def test_what_a_name_stands_for_is_explained_before_a_request_is_sent(
    start_gateway: StartGateway, upstream: ScriptedUpstream, second: ScriptedUpstream
) -> None:
    """For a key, by what its requests say; with the models it would fall back on, of those the key may use."""
    root = KeySettings(name="root", key=SecretStr("fb-root-secret"), admin=True)
    for one in (upstream, second):
        one.always(json_answer(ANSWER), path=CHAT)
    canary = CANARY.model_copy(update={"sticky": "session", "fallback": ("large", "next")})
    gateway = await start_gateway(
        serving(upstream, models={"large": "x"}, name="one"),
        serving(second, models={"next": "x"}, name="two"),
        keys=(*KEYS, root),
        models={"support": canary},
    )
    engines = {"large": "one", "next": "two"}
    for number in range(4):
        body = chat(model="support", prompt_cache_key=f"s{number}")
        served = (await gateway.ask(body)).header("x-forebay-model")
        told = (await gateway.admin("POST", "/admin/route?model=support", body, key="fb-root-secret")).json()
        assert (told["served"], told["endpoint"]) == (served, engines[told["served"]])
        assert told["fallback"] == [model for model in engines if model != served]
    told = (await gateway.admin("POST", "/admin/route?model=support&key=bob", body, key="fb-root-secret")).json()
    assert told["fallback"] == ([] if told["served"] == "large" else ["large"])
    assert (await gateway.admin("POST", "/admin/route?model=support&key=no", key="fb-root-secret")).status == 404
