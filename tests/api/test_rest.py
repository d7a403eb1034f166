"""What is not relayed: the list of models, health, metrics, the documentation, and a failure of the gateway's own."""

from __future__ import annotations

import json
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr

from gateway.api.routes import RELAYED
from gateway.settings import AdminListen, KeySettings, Timeouts
from tests.conftest import Connect
from tests.support.gateway import (
    AUTH,
    CHAT,
    ENGINE_MODEL,
    MODEL,
    Gateway,
    StartGateway,
    asking,
    chat,
    relayed,
    serving,
)
from tests.support.recordings import load
from tests.support.script import Do, Gate, Script, json_answer, play
from tests.support.upstream import ScriptedUpstream

GOOD = play(load("vllm", "chat_basic"))
NAMES = {model["id"] for model in load("vllm", "get_models").json()["data"]}
WELL = json_answer(b"")
ILL = Script(b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n")


# --- models ----------------------------------------------------------------------------------------------------------


async def test_models_are_listed_as_the_sdks_expect(start_gateway: StartGateway, upstream: ScriptedUpstream) -> None:
    """By their public names only; the engine's own names and paths are its business."""
    names = {"b/second": ENGINE_MODEL, "a-first": "/models/secret"}
    gateway = await start_gateway(serving(upstream, models=names))
    answer = await gateway.get("/v1/models", AUTH)
    assert (answer.status, answer.header("content-type")) == (200, "application/json")
    listed = answer.json()
    assert listed["object"] == "list"
    assert sorted(model["id"] for model in listed["data"]) == ["a-first", "b/second"]
    for model in listed["data"]:
        assert (model["object"], model["owned_by"]) == ("model", "forebay")
        assert isinstance(model["created"], int)
        assert (await gateway.get(f"/v1/models/{model['id']}", AUTH)).json() == model
    assert b"secret" not in answer.body
    assert relayed(upstream) == []


@pytest.mark.parametrize("target", ["public/model", "public%2Fmodel", "public/model?x=1"])
async def test_a_name_with_a_slash_is_found(gateway: Gateway, target: str) -> None:
    """Encoded as the SDKs do, or not."""
    answer = await gateway.get(f"/v1/models/{target}", AUTH)
    assert (answer.status, answer.json()["id"]) == (200, MODEL)


async def test_what_is_no_model_is_a_404(gateway: Gateway) -> None:
    for target in ("nothing", "public", "public/model/", "smollm2", "", "../v1/models", "%00"):
        answer = await gateway.get(f"/v1/models/{target}", AUTH)
        assert (answer.status, answer.json()["error"]["code"]) == (404, "model_not_found"), target


async def test_models_are_found_by_asking(start_gateway: StartGateway, upstream: ScriptedUpstream) -> None:
    """With the context length the engine tells; its names are the public ones, adapters included."""
    gateway = await start_gateway(asking(upstream, "models_with_lora"))
    recorded = load("vllm", "models_with_lora").json()["data"]
    listed = (await gateway.get("/v1/models", AUTH)).json()["data"]
    assert {model["id"]: model.get("max_model_len") for model in listed} == {
        model["id"]: model["max_model_len"] for model in recorded
    }
    upstream.always(GOOD, path=CHAT)
    answer = await gateway.ask(chat(model=ENGINE_MODEL))
    assert (answer.status, answer.json()["model"]) == (200, ENGINE_MODEL)


async def test_an_engine_that_is_away_makes_no_model_unknown(
    start_gateway: StartGateway, upstream: ScriptedUpstream
) -> None:
    """Its clients are told to come back, not that the name is wrong; and it is let in again when it is there."""
    gateway = await start_gateway(asking(upstream))
    (endpoint,) = gateway.replica.pool.endpoints
    upstream.always(ILL, path="/health")
    await gateway.replica.watcher.look(endpoint)
    assert {model["id"] for model in (await gateway.get("/v1/models", AUTH)).json()["data"]} == NAMES
    answer = await gateway.ask(chat(model=ENGINE_MODEL))
    assert (answer.status, answer.json()["error"]["code"]) == (503, "server_is_overloaded")
    upstream.always(WELL, path="/health")
    await gateway.replica.watcher.look(endpoint)
    upstream.always(GOOD, path=CHAT)
    assert (await gateway.ask(chat(model=ENGINE_MODEL))).status == 200


# --- health ----------------------------------------------------------------------------------------------------------


async def test_readiness_follows_the_engines(start_gateway: StartGateway, upstream: ScriptedUpstream) -> None:
    """Alive always, ready while any engine is; no key is needed, and both listeners tell it."""
    gateway = await start_gateway(asking(upstream, name="rack-1"))
    (endpoint,) = gateway.replica.pool.endpoints
    for script, status, told in ((WELL, 200, "ok"), (ILL, 503, "no healthy engine"), (WELL, 200, "ok")):
        upstream.always(script, path="/health")
        await gateway.replica.watcher.look(endpoint)
        for admin in (False, True):
            ready = await gateway.get("/health/ready", admin=admin)
            assert (ready.status, ready.json()["status"]) == (status, told)
            assert ready.json()["endpoints"] == [{"name": "rack-1", "healthy": status == 200, "models": sorted(NAMES)}]
            live = await gateway.get("/health/live", admin=admin)
            assert (live.status, live.json()) == (200, {"status": "ok"})


async def test_without_any_engine_it_is_alive_and_not_ready(start_gateway: StartGateway) -> None:
    gateway = await start_gateway()
    assert (await gateway.get("/health/live")).status == 200
    assert (await gateway.get("/health/ready")).json() == {
        "status": "no healthy engine",
        "limits": "store",
        "endpoints": [],
    }
    assert (await gateway.ask(chat())).status == 404


async def test_an_engine_found_unreachable_by_a_request_is_not_ready(
    gateway: Gateway, upstream: ScriptedUpstream
) -> None:
    """Nobody waits for the next look to notice."""
    upstream.refuse()
    for connection in upstream.connections:
        connection.finish(Do.CLOSE)
    assert (await gateway.ask(chat())).status == 503
    assert (await gateway.get("/health/ready")).status == 503


# --- metrics ---------------------------------------------------------------------------------------------------------

Samples = dict[str, dict[frozenset[tuple[str, str]], float]]


async def scrape(gateway: Gateway) -> Samples:
    """Read the metrics as Prometheus does; return name → labels → value."""
    answer = await gateway.get("/metrics", admin=True)
    assert answer.status == 200
    assert (answer.header("content-type") or "").startswith("text/plain; version=")
    found: Samples = {}
    for family in text_string_to_metric_families(answer.body.decode()):
        assert family.documentation
        for sample in family.samples:
            found.setdefault(sample.name, {})[frozenset(sample.labels.items())] = sample.value
    return found


def at(samples: Samples, name: str, **labels: str) -> float:
    return samples[name].get(frozenset(labels.items()), 0.0)


async def test_requests_are_counted_by_outcome(
    start_gateway: StartGateway, upstream: ScriptedUpstream, connect: Connect
) -> None:
    """Each exactly once, under the public name and the tenant; nobody's under an empty one."""
    keys = (KeySettings(name="alice", key=SecretStr("fb-alice-secret"), tenant="research"),)
    engine = serving(upstream, name="rack-1")
    gateway = await start_gateway(engine, keys=keys, timeouts=Timeouts(first_byte=5))
    upstream.queue(
        GOOD,
        play(load("vllm", "chat_stream_usage")),
        play(load("vllm", "err_temperature_neg")),
        play(load("vllm", "s2_over_4")),
        Script(b"HTTP/1.1 200 OK\r\n").do(Do.CLOSE),
        play(load("vllm", "auth_wrong")),
        GOOD.do(Gate(), 0),
        GOOD.do(Gate(), 0),
        path=CHAT,
    )
    for number in range(6):
        await gateway.ask(chat(stream=number == 1))
    leaving, waiting = await connect(gateway.url), await connect(gateway.url)
    leaving.post(CHAT, chat(), AUTH)
    await upstream.saw("gate")
    assert at(await scrape(gateway), "forebay_in_flight", model=MODEL) == 1
    await leaving.close()
    await gateway.idle()
    waiting.post(CHAT, chat(), AUTH)
    await upstream.saw("gate", times=2)
    gateway.advance(5)
    assert (await waiting.response()).status == 504
    await gateway.ask(b"{")
    await gateway.ask(chat(), headers=())
    samples = await scrape(gateway)
    outcomes = {"ok": 2, "refused": 1, "busy": 1, "engine_failed": 2, "client_gone": 1, "engine_slow": 1}
    for outcome, count in outcomes.items():
        counted = at(samples, "forebay_requests_total", model=MODEL, tenant="research", outcome=outcome)
        assert counted == count, outcome
    assert at(samples, "forebay_requests_total", model="", tenant="research", outcome="refused") == 1
    assert at(samples, "forebay_requests_total", model="", tenant="", outcome="refused") == 1
    assert sum(samples["forebay_requests_total"].values()) == 10
    assert at(samples, "forebay_in_flight", model=MODEL) == 0
    assert len(gateway.lines("request")) == 10


async def test_what_is_measured_of_a_request(gateway: Gateway, upstream: ScriptedUpstream, connect: Connect) -> None:
    """Tokens by kind, the time to the first event, between events and in all, and the gateway's own share."""
    recording = load("vllm", "chat_stream_usage")
    script = play(recording, pieces=recording.events())
    first, second = Gate("first"), Gate("second")
    upstream.always(script.do(first, 0).do(second, script.after_frame(0)), path=CHAT)
    client = await connect(gateway.url)
    client.post(CHAT, chat(stream=True), AUTH)
    await upstream.saw("gate")
    gateway.advance(0.3)
    first.open()
    await client.head()
    await client.event()
    await upstream.saw("gate", times=2)
    gateway.advance(0.02)
    second.open()
    events = 1 + len(await client.events())
    samples = await scrape(gateway)
    for kind, count in (("in", 37), ("out", 8), ("cached", 0)):
        assert at(samples, "forebay_tokens_total", model=MODEL, tenant="alice", kind=kind) == count
    assert at(samples, "forebay_ttft_seconds_count", model=MODEL) == 1
    assert at(samples, "forebay_ttft_seconds_sum", model=MODEL) == pytest.approx(0.3)
    assert at(samples, "forebay_request_seconds_sum", model=MODEL) == pytest.approx(0.32)
    # The end mark is no token, and neither is the hidden usage chunk a client never saw.
    assert at(samples, "forebay_inter_token_seconds_sum", model=MODEL) == pytest.approx(0.02)
    assert at(samples, "forebay_inter_token_seconds_count", model=MODEL) == events - 2
    for stage in ("auth", "policy", "connect"):
        assert at(samples, "forebay_overhead_seconds_count", stage=stage) == 1
        assert at(samples, "forebay_overhead_seconds_bucket", stage=stage, le="+Inf") == 1


async def test_engines_are_seen_in_the_metrics(start_gateway: StartGateway, upstream: ScriptedUpstream) -> None:
    """Up or not, how much is on them, and how they failed."""
    gateway = await start_gateway(serving(upstream, name="rack-1"))
    (endpoint,) = gateway.replica.pool.endpoints
    upstream.always(play(load("vllm", "s2_over_4")), path=CHAT)
    await gateway.ask(chat())
    samples = await scrape(gateway)
    assert at(samples, "forebay_endpoint_up", endpoint="rack-1") == 1
    assert at(samples, "forebay_endpoint_in_flight", endpoint="rack-1") == 0
    assert at(samples, "forebay_upstream_errors_total", endpoint="rack-1", reason="overloaded") == 1
    upstream.always(ILL, path="/health")
    await gateway.replica.watcher.look(endpoint)
    assert at(await scrape(gateway), "forebay_endpoint_up", endpoint="rack-1") == 0


# --- documentation ---------------------------------------------------------------------------------------------------


async def test_the_documentation_is_the_operators(gateway: Gateway) -> None:
    """It lists every path clients may use, the relayed ones from their table."""
    assert b"swagger" in (await gateway.get("/docs", admin=True)).body
    document = (await gateway.get("/openapi.json", admin=True)).json()
    assert document["openapi"].startswith("3.")
    for path, route in RELAYED.items():
        assert document["paths"][path]["post"]["summary"] == route.summary
    for path in ("/v1/models", "/v1/models/{model}", "/health/live", "/health/ready", "/metrics"):
        assert "get" in document["paths"][path]
    for path in ("/docs", "/redoc", "/openapi.json", "/metrics"):
        assert (await gateway.get(path, AUTH)).status == 404


async def test_the_operators_listener_relays_nothing(gateway: Gateway, upstream: ScriptedUpstream) -> None:
    """A request that reaches it by mistake is told so, and needs no key to be told."""
    for path in RELAYED:
        answer = await gateway.get(path, AUTH, method="POST", admin=True)
        assert answer.status in (404, 405)
    assert (await gateway.get("/v1/models", AUTH, admin=True)).status == 404
    assert relayed(upstream) == []


async def test_the_operators_listener_can_be_left_out(start_gateway: StartGateway, upstream: ScriptedUpstream) -> None:
    gateway = await start_gateway(upstream, admin=AdminListen(enabled=False))
    assert len(gateway.replica.listeners) == 1
    assert (await gateway.get("/health/ready")).status == 200


# --- a failure of our own --------------------------------------------------------------------------------------------


class Broken:
    """A catalogue with a fault in it."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("a fault of ours: /opt/secret/path")


@pytest.mark.parametrize("stream", [False, True])
async def test_our_own_fault_is_a_500_with_an_id(gateway: Gateway, upstream: ScriptedUpstream, stream: bool) -> None:
    """The client gets nothing of the traceback, the log all of it, under the same id; the place is given back."""
    catalogue = gateway.replica.pool.catalogue
    gateway.replica.pool.catalogue = Broken()  # type: ignore[assignment]
    answer = await gateway.ask(chat(stream=stream))
    gateway.replica.pool.catalogue = catalogue
    error = answer.json()["error"]
    request_id = answer.header("x-request-id") or ""
    assert (answer.status, error["type"], error["code"]) == (500, "server_error", "internal_error")
    assert request_id in error["message"]
    assert b"secret" not in answer.body
    (line,) = gateway.lines("internal_error")
    assert line["request_id"] == request_id
    assert "a fault of ours" in line["trace"]
    assert (await gateway.line())["outcome"] == "internal_error"
    await gateway.idle()
    assert relayed(upstream) == []


async def test_our_own_fault_behind_fastapi_is_a_500_with_an_id(gateway: Gateway) -> None:
    catalogue = gateway.replica.pool.catalogue
    gateway.replica.pool.catalogue = Broken()  # type: ignore[assignment]
    answer = await gateway.get("/v1/models", AUTH)
    gateway.replica.pool.catalogue = catalogue
    assert (answer.status, answer.json()["error"]["code"]) == (500, "internal_error")
    assert (answer.header("x-request-id") or "").startswith("req_")
    assert b"secret" not in answer.body
    (line,) = gateway.lines("internal_error")
    assert "a fault of ours" in line["trace"]
    assert json.loads(answer.body)["error"]["message"]
