"""Limits as a client meets them, on both faces."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import SecretStr

from gateway.limits import Limits
from gateway.settings import KeySettings
from gateway.store.memory import MemoryStore
from tests.conftest import Connect
from tests.support.client import Response
from tests.support.gateway import (
    AUTH,
    CHAT,
    KEY,
    MODEL,
    Gateway,
    StartGateway,
    chat,
    post_bytes,
    relayed,
    until,
)
from tests.support.recordings import load
from tests.support.script import Do, Gate, json_answer, play
from tests.support.upstream import ScriptedUpstream

STREAM = play(load("vllm", "chat_stream_usage"))
PROMPT, OUTPUT = 37, 8
BOB = (("authorization", "Bearer fb-bob-secret"),)


def answer(prompt: int = 100, output: int = 50, **more: Any) -> Any:
    """Return what an engine answers that used so many tokens."""
    usage = {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output, **more}
    body = {"id": "x", "object": "chat.completion", "model": "smollm2", "choices": [], "usage": usage}
    return json_answer(json.dumps(body).encode())


def limited(**key: Any) -> Limits:
    return Limits.model_validate({"defaults": {"key": key}})


def told(response: Response, name: str) -> str:
    (value,) = response.header_values(name)
    return value


def level(gateway: Gateway, bucket: str) -> int:
    store = gateway.replica.edge.limiter.store
    assert isinstance(store, MemoryStore)
    return store._cells[bucket].bucket(store._latest).level


def held(gateway: Gateway, bucket: str) -> int:
    store = gateway.replica.edge.limiter.store
    assert isinstance(store, MemoryStore)
    return -store._cells[bucket].bucket(0).level if bucket in store._cells else 0


async def test_rate_headers_are_on_answers_streams_and_refusals(
    start_gateway: StartGateway, upstream: ScriptedUpstream
) -> None:
    gateway = await start_gateway(upstream, limits=limited(requests="2/m", tokens="10k/m"))
    upstream.queue(answer())
    first = await gateway.ask(chat(max_tokens=50))
    assert first.status == 200
    assert told(first, "x-ratelimit-limit-requests") == "2"
    assert told(first, "x-ratelimit-remaining-requests") == "1"
    assert told(first, "x-ratelimit-reset-requests") == "30s"
    assert told(first, "x-ratelimit-limit-tokens") == "10000"
    assert 0 < int(told(first, "x-ratelimit-remaining-tokens")) < 10_000
    upstream.queue(STREAM)
    streamed = await gateway.ask(chat(stream=True))
    assert streamed.status == 200
    assert told(streamed, "x-ratelimit-remaining-requests") == "0"
    refused = await gateway.ask(chat())
    assert refused.status == 429
    assert told(refused, "x-ratelimit-remaining-requests") == "0"
    assert told(refused, "x-ratelimit-reset-requests") == "1m0s"
    assert (told(refused, "retry-after"), told(refused, "retry-after-ms")) == ("31", "30001")
    assert told(refused, "x-should-retry") == "true"
    error = refused.json()["error"]
    assert (error["type"], error["code"]) == ("requests", "rate_limit_exceeded")
    assert error["message"] == (
        f"Rate limit reached for {MODEL} in key 'alice' on requests per min (RPM): Limit 2, Used 2, Requested 1."
        " Please try again in 30.001s."
    )
    assert len(relayed(upstream)) == 2


async def test_a_refused_request_is_served_at_the_time_it_was_told_and_others_are_not(
    start_gateway: StartGateway, upstream: ScriptedUpstream
) -> None:
    gateway = await start_gateway(upstream, limits=limited(requests="2/m"))
    upstream.always(answer(), path=CHAT)
    for _ in range(2):
        assert (await gateway.ask(chat())).status == 200
    mine = chat(user="mine")
    wait = int(told(await gateway.ask(mine), "retry-after-ms")) / 1000
    gateway.advance(wait / 2)
    early = await gateway.ask(mine)
    assert early.status == 429
    assert abs(int(told(early, "retry-after-ms")) - wait * 500) <= 2
    gateway.advance(wait / 2)
    assert (await gateway.ask(chat(user="somebody else"))).status == 429
    assert (await gateway.ask(mine)).status == 200
    metrics = (await gateway.get("/metrics", admin=True)).body
    assert b"forebay_early_retries_total 1.0" in metrics
    assert b'forebay_limit_refusals_total{counts="requests",scope="key"} 3.0' in metrics


async def test_what_was_reserved_and_not_used_comes_back(
    start_gateway: StartGateway, upstream: ScriptedUpstream
) -> None:
    gateway = await start_gateway(upstream, limits=limited(tokens="10k/m"))
    bucket = "key:alice:tokens/60"
    upstream.queue(answer(100, 50))
    await gateway.ask(chat(max_tokens=4000))
    await gateway.idle()
    assert level(gateway, bucket) == 9_850_000
    upstream.queue(STREAM)
    await gateway.ask(chat(stream=True))
    await gateway.idle()
    assert level(gateway, bucket) == 9_850_000 - (PROMPT + OUTPUT) * 1000
    assert [line["settlement"] for line in gateway.lines("request")] == ["exact", "exact"]


async def test_debt_is_paid_back_by_the_refill(start_gateway: StartGateway, upstream: ScriptedUpstream) -> None:
    gateway = await start_gateway(upstream, limits=limited(tokens="600/m"))
    upstream.always(answer(100, 1500), path=CHAT)
    assert (await gateway.ask(chat(max_tokens=300))).status == 200
    assert level(gateway, "key:alice:tokens/60") == -1_000_000
    refused = await gateway.ask(chat(max_tokens=300))
    assert (refused.status, refused.json()["error"]["type"]) == (429, "tokens")
    assert int(told(refused, "x-ratelimit-remaining-tokens")) == 0
    # More than a minute: no SDK waits so long, so it is told not to try.
    assert int(told(refused, "retry-after")) > 100
    assert told(refused, "x-should-retry") == "false"


@pytest.mark.parametrize("stage", ["silent prefill", "mid-stream", "engine refuses", "engine gone"])
async def test_whatever_happens_slots_come_back_and_tokens_settle_once(
    start_gateway: StartGateway, upstream: ScriptedUpstream, connect: Connect, stage: str
) -> None:
    gateway = await start_gateway(
        upstream, limits=limited(concurrent=1, tokens_in_flight=5000, tokens="10k/m", requests="10/m")
    )
    place = {"silent prefill": 0, "mid-stream": STREAM.after_frame(2)}
    if stage in place:
        upstream.queue(STREAM.do(Gate(), place[stage]))
        client = await connect(gateway.url)
        client.send(post_bytes(chat(stream=True, max_tokens=100)))
        await until(lambda: held(gateway, "key:alice:concurrent") == 1000, "no slot was taken")
        if stage == "mid-stream":
            await client.head()
            await client.event()
        else:
            await until(lambda: len(relayed(upstream)) == 1, "nothing was sent")
        await client.close()
    elif stage == "engine refuses":
        upstream.queue(json_answer(b'{"message": "no"}', status=400))
        assert (await gateway.ask(chat(max_tokens=100))).status == 400
    else:
        upstream.always(STREAM.do(Do.CLOSE, 0), path=CHAT)
        assert (await gateway.ask(chat(stream=True, max_tokens=100))).status == 502
    await gateway.idle()
    assert level(gateway, "key:alice:concurrent") == level(gateway, "key:alice:tokens_in_flight") == 0
    settlement = gateway.lines("request")[-1]["settlement"]
    tokens, requests = level(gateway, "key:alice:tokens/60"), level(gateway, "key:alice:requests/60")
    if stage == "engine refuses":
        assert (settlement, tokens, requests) == ("void", 10_000_000, 10_000)
    elif stage == "mid-stream":
        assert (settlement, requests) == ("counted", 9000)
        assert 10_000_000 - 200_000 < tokens < 10_000_000 - 100_000
    else:
        assert (settlement, requests) == ("kept", 9000)
        assert tokens <= 10_000_000 - 100_000


async def test_concurrent_requests_are_limited_and_told_so(
    start_gateway: StartGateway, upstream: ScriptedUpstream, connect: Connect
) -> None:
    gateway = await start_gateway(upstream, limits=limited(concurrent=1))
    upstream.queue(STREAM.do(Gate(), 0))
    client = await connect(gateway.url)
    client.send(post_bytes(chat(stream=True)))
    await until(lambda: len(relayed(upstream)) == 1, "nothing was sent")
    refused = await gateway.ask(chat())
    assert refused.status == 429
    assert "on requests at once: Limit 1, Used 1, Requested 1." in refused.json()["error"]["message"]
    await client.close()
    await gateway.idle()
    upstream.queue(answer())
    assert (await gateway.ask(chat())).status == 200


async def test_what_can_never_fit_says_so(start_gateway: StartGateway, upstream: ScriptedUpstream) -> None:
    gateway = await start_gateway(upstream, limits=limited(tokens="1000/m"))
    refused = await gateway.ask(chat(max_tokens=2000))
    assert (refused.status, refused.json()["error"]["code"]) == (400, "request_exceeds_limit")
    assert told(refused, "x-should-retry") == "false"
    assert "Limit 1000, Requested 2000" in refused.json()["error"]["message"]
    assert refused.header("retry-after") is None
    assert relayed(upstream) == []


async def test_a_budget_in_money_counts_what_each_kind_of_token_costs(
    start_gateway: StartGateway, upstream: ScriptedUpstream
) -> None:
    limits = Limits.model_validate(
        {
            "defaults": {"tenant": {"budgets": {"usd": 1, "per": "month"}}},
            "models": {"public/*": {"price": {"input": 1000, "cached": 100, "output": 4000}}},
        }
    )
    gateway = await start_gateway(upstream, limits=limits)
    upstream.queue(answer(100, 50, prompt_tokens_details={"cached_tokens": 40}))
    assert (await gateway.ask(chat(max_tokens=60))).status == 200
    left = level(gateway, "tenant:alice:dollars-budget/month")
    assert left == 1_000_000_000 - (60 * 1_000_000 + 40 * 100_000 + 50 * 4_000_000)
    upstream.queue(answer(100, 200))
    assert (await gateway.ask(chat(max_tokens=100))).status == 200
    refused = await gateway.ask(chat(max_tokens=100))
    assert (refused.status, refused.json()["error"]["code"]) == (429, "insufficient_quota")
    assert "Limit $1, Used $1.164" in refused.json()["error"]["message"]
    assert told(refused, "x-should-retry") == "false"


async def test_an_answer_is_cut_where_the_budget_ends(start_gateway: StartGateway, upstream: ScriptedUpstream) -> None:
    budget = {"tokens": 1000, "per": "day", "cut": True}
    gateway = await start_gateway(upstream, limits=limited(budgets=budget))
    upstream.always(answer(100, 50), path=CHAT)
    assert (await gateway.ask(chat(max_tokens=5000))).status == 200
    sent = relayed(upstream)[0].json()["max_tokens"]
    assert 16 <= sent <= 1000
    assert (await gateway.ask(chat())).status == 200
    assert relayed(upstream)[1].json()["max_tokens"] <= 850


async def test_every_limit_that_applies_holds_and_the_nearest_declaration_counts(
    start_gateway: StartGateway, upstream: ScriptedUpstream
) -> None:
    limits = Limits.model_validate(
        {
            "defaults": {"key": {"requests": "100/m"}, "tenant": {"requests": "50/m"}},
            "tenants": {"search": {"organisation": "acme", "keys": {"requests": "3/m"}}},
            "organisations": {"acme": {"limits": {"requests": "4/m"}}},
        }
    )
    keys = (
        KeySettings(name="alice", key=SecretStr(KEY), tenant="search"),
        KeySettings.model_validate(
            {"name": "bob", "key": "fb-bob-secret", "tenant": "search", "limits": {"requests": "none"}}
        ),
    )
    gateway = await start_gateway(upstream, limits=limits, keys=keys)
    upstream.always(answer(), path=CHAT)
    for _ in range(3):
        assert (await gateway.ask(chat())).status == 200
    assert "in key 'alice' on" in (await gateway.ask(chat())).json()["error"]["message"]
    assert (await gateway.ask(chat(), headers=BOB)).status == 200
    assert "in organisation 'acme' on" in (await gateway.ask(chat(), headers=BOB)).json()["error"]["message"]


async def test_without_keys_each_address_has_its_own(start_gateway: StartGateway, upstream: ScriptedUpstream) -> None:
    limits = Limits.model_validate({"defaults": {"client": {"requests": "1/m"}, "key": {"requests": "9/m"}}})
    gateway = await start_gateway(upstream, limits=limits, auth="none", trusted_proxies=("127.0.0.0/8",))
    upstream.always(answer(), path=CHAT)
    for address, status in (
        ("1.2.3.4", 200),
        ("1.2.3.4", 429),
        ("1.2.3.5", 200),
        ("2001:db8::1", 200),
        ("2001:db8::2", 429),
    ):
        headers = (("x-forwarded-for", address),)
        assert (await gateway.ask(chat(), headers=headers)).status == status, address


async def test_other_limits_after_a_reload_find_the_buckets_as_they_were(
    start_gateway: StartGateway, upstream: ScriptedUpstream
) -> None:
    gateway = await start_gateway(upstream, limits=limited(requests="3/m"))
    upstream.always(answer(), path=CHAT)
    assert (await gateway.ask(chat())).status == 200
    replica = gateway.replica
    await replica.keyring.reconfigure(replica.settings.model_copy(update={"limits": limited(requests="2/m")}))
    assert told(await gateway.ask(chat()), "x-ratelimit-remaining-requests") == "1"


async def test_counting_tokens_costs_a_request_and_no_tokens(
    start_gateway: StartGateway, upstream: ScriptedUpstream
) -> None:
    gateway = await start_gateway(upstream, limits=limited(requests="3/m", tokens="100/m"))
    upstream.queue(json_answer(b'{"count": 3, "tokens": [1, 2, 3], "max_model_len": 8}'))
    found = await gateway.ask({"model": MODEL, "prompt": "x" * 5000}, "/tokenize", AUTH)
    assert (found.status, told(found, "x-ratelimit-remaining-tokens")) == (200, "100")
    await gateway.idle()
    assert level(gateway, "key:alice:requests/60") == 2000


async def test_limits_are_explained_to_operators(start_gateway: StartGateway, upstream: ScriptedUpstream) -> None:
    keys = (
        KeySettings(name="alice", key=SecretStr(KEY), tenant="search"),
        KeySettings(name="root", key=SecretStr("fb-root-secret"), admin=True),
    )
    limits = Limits.model_validate(
        {
            "defaults": {"key": {"requests": "60/m", "concurrent": 2}},
            "tenants": {"search": {"organisation": "acme", "limits": {"budgets": {"usd": 5, "per": "day"}}}},
            "models": {"public/*": {"price": {"output": 2}}},
        }
    )
    gateway = await start_gateway(upstream, limits=limits, keys=keys)
    upstream.always(answer(), path=CHAT)
    assert (await gateway.ask(chat())).status == 200
    admin = (("authorization", "Bearer fb-root-secret"),)
    asked = f"/admin/limits?key=alice&model={MODEL}"
    told_ = (await gateway.get(asked, admin, admin=True)).json()
    assert (told_["organisation"], told_["tenant"], told_["standing"]) == ("acme", "search", "store")
    rows = {row["bucket"]: row for row in told_["data"]}
    assert list(rows) == ["key:alice:requests/60", "key:alice:concurrent", "tenant:search:dollars-budget/day"]
    assert [row["left"] for row in rows.values()] == [59.0, 2.0, 4.9999]
    assert rows["key:alice:requests/60"]["declared_in"] == "limits.defaults.key.requests"
    assert rows["tenant:search:dollars-budget/day"]["declared_in"] == "limits.tenants.search.limits.budgets"
    assert rows["key:alice:requests/60"]["full_again_in"] == 1.000001
    assert (await gateway.get(asked, admin=True)).status == 401
    assert (await gateway.get(asked.replace("alice", "eve"), admin, admin=True)).status == 404
