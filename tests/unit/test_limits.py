"""Declarations: what is read, what is refused, who inherits what, when a calendar turns its page."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from gateway.api.auth import ANONYMOUS
from gateway.api.routes import RELAYED
from gateway.limits import (
    Asker,
    Limits,
    LimitSet,
    applying,
    calendar,
    declared,
    model_limits,
    parse_rate,
    prices_of,
    weights_of,
)
from gateway.metrics import Metrics
from gateway.policy.limits import Counts, Rates, Size, amounts
from gateway.policy.token_bucket import SECOND
from gateway.serving.limiter import Hold, Limiter, Settlement, read_facts
from gateway.store.memory import MemoryStore
from tests.support.table import each

NOW = int(datetime(2026, 11, 24, 15, 30, tzinfo=UTC).timestamp()) * SECOND


def limits(**tree: Any) -> Limits:
    return Limits.model_validate(tree)


def found(tree: Limits, **asker: Any) -> dict[str, str]:
    who = Asker(**({"key": "k1", "tenant": "search", "model": "qwen3-8b", "pool": ""} | asker))
    return {limit.bucket: limit.source for limit in applying(who, declared(tree), NOW)}


@each(
    ("text", "rate"),
    [
        ("10/s", (10, 1)),
        ("60/m", (60, 60)),
        ("150k/min", (150_000, 60)),
        ("1M / hour", (10**6, 3600)),
        ("5_000/day", (5000, 86_400)),
    ],
)
def test_rates_as_people_write_them(text: str, rate: tuple[int, int]) -> None:
    assert parse_rate(text) == rate


@each("text", ["60", "0/m", "-1/m", "1.5/m", "60/month", "60/", "/m", "9999999999G/s", "1/m\n/s"])
def test_what_is_no_rate_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValidationError, match="should be"):
        LimitSet.model_validate({"requests": text})


@each(
    ("budget", "said"),
    [
        ({"per": "day"}, "exactly one of tokens and usd"),
        ({"tokens": 1, "usd": 1}, "exactly one of tokens and usd"),
        ({"tokens": 1, "per": "10s"}, "at least a minute"),
        ({"tokens": 1, "timezone": "Mars/Base"}, "there is no 'Mars/Base'"),
        ({"tokens": 1, "timezone": "../../etc/passwd"}, "there is no"),
        ({"usd": 0}, "greater than 0"),
    ],
)
def test_a_budget_that_is_none(budget: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        LimitSet.model_validate({"budgets": budget})


def test_one_rate_or_several_and_none_at_all() -> None:
    several = LimitSet.model_validate({"tokens": ["1/s", {"rate": "60/m", "burst": 5}]})
    assert [(one.rate, one.burst) for one in several.tokens] == [("1/s", None), ("60/m", 5)]
    nothing = LimitSet.model_validate({"tokens": "none", "concurrent": "none"})
    assert (nothing.tokens, nothing.concurrent, nothing.model_fields_set) == ((), None, {"tokens", "concurrent"})


def test_each_field_is_inherited_by_itself_from_the_nearest_that_says_something() -> None:
    tree = limits(
        defaults={"key": {"requests": "1/m", "tokens": "1/m", "concurrent": 1, "tokens_in_flight": 1}},
        organisations={"acme": {"keys": {"tokens": "2/m", "concurrent": 2, "tokens_in_flight": 2}}},
        tenants={"search": {"organisation": "acme", "keys": {"concurrent": 3, "tokens_in_flight": "none"}}},
    )
    assert found(tree) == {
        "key:k1:requests/60": "limits.defaults.key.requests",
        "key:k1:tokens/60": "limits.organisations.acme.keys.tokens",
        "key:k1:concurrent": "limits.tenants.search.keys.concurrent",
    }
    own = LimitSet.model_validate({"requests": "9/m"})
    assert found(tree, own=own, own_source="keys.k1.limits")["key:k1:requests/60"] == "keys.k1.limits.requests"
    assert found(tree, tenant="other")["key:k1:tokens/60"] == "limits.defaults.key.tokens"


def test_every_subject_has_a_bucket_of_its_own() -> None:
    one = {"requests": "1/m"}
    tree = limits(
        defaults={"key": one, "tenant": one, "organisation": one, "model": one, "pool": one, "client": one},
        tenants={"search": {"organisation": "acme"}},
        models={"qwen3-*": {"keys": one}},
    )
    assert list(found(tree, pool="rack")) == [
        "key:k1:requests/60",
        "key-on-model:k1 qwen3-8b:requests/60",
        "tenant:search:requests/60",
        "organisation:acme:requests/60",
        "model:qwen3-8b:requests/60",
        "pool:rack:requests/60",
    ]
    assert list(found(tree, key="", address="1.2.3.4", model="other", tenant="anonymous")) == [
        "client:1.2.3.4:requests/60",
        "model:other:requests/60",
    ]


def test_the_longest_beginning_of_a_model_s_name_counts() -> None:
    tree = limits(models={"*": {}, "qwen3-*": {"price": {"input": 1}}, "qwen3-8b": {}, "qwen3-8*": {}})
    assert [model_limits(tree, name)[0] for name in ("qwen3-8b", "qwen3-80b", "qwen3-4b", "llama")] == [
        "qwen3-8b",
        "qwen3-8*",
        "qwen3-*",
        "*",
    ]


def test_what_each_kind_of_token_costs() -> None:
    tree = limits(
        models={
            "m": {
                "price": {"input": "0.30", "cached": "0.03", "output": "1.20"},
                "weights": {"cached": 0.1, "output": 4},
            }
        }
    )
    assert prices_of(tree, "m") == Rates(300, 30, 1200, 1200)
    assert weights_of(tree, "m") == Rates(1000, 100, 4000, 4000)
    size = Size(prompt=100, output=50, cached=40, reasoning=20)
    by_kind = amounts(size, weights_of(tree, "m"), prices_of(tree, "m"))
    assert by_kind[Counts.TOKENS] == 60 * 1000 + 40 * 100 + 50 * 4000
    # A million tokens at $0.30 are $0.30: a token is 300 nano-dollars.
    assert by_kind[Counts.MONEY] == 60 * 300 + 40 * 30 + 50 * 1200
    assert by_kind[Counts.IN_FLIGHT] == 150_000


@each(
    ("period", "begins", "ends"),
    [
        ("day", (2026, 11, 24), (2026, 11, 25)),
        ("week", (2026, 11, 23), (2026, 11, 30)),
        ("month", (2026, 11, 1), (2026, 12, 1)),
    ],
)
@each("zone", ["UTC", "Europe/Berlin", "Pacific/Auckland"])
def test_the_calendar_s_periods(period: str, begins: tuple[int, ...], ends: tuple[int, ...], zone: str) -> None:
    # Half past three in the afternoon there.
    now = datetime(2026, 11, 24, 15, 30, tzinfo=ZoneInfo(zone)).timestamp()
    told = calendar(period, ZoneInfo(zone), int(now) * SECOND)
    assert told == tuple(
        int(datetime(*day, tzinfo=ZoneInfo(zone)).timestamp()) * SECOND  # type: ignore[misc, arg-type]
        for day in (begins, ends)
    )


@given(st.integers(0, 4 * 10**9), st.sampled_from(["day", "week", "month"]), st.sampled_from(["UTC", "Europe/Berlin"]))
def test_a_moment_lies_in_its_period_and_periods_follow_each_other(second: int, period: str, zone: str) -> None:
    now = second * SECOND
    starts, ends = calendar(period, ZoneInfo(zone), now)
    assert starts <= now < ends
    assert calendar(period, ZoneInfo(zone), ends)[0] == ends
    assert calendar(period, ZoneInfo(zone), ends - SECOND)[0] == starts


async def test_what_is_kept_is_what_was_reserved_though_more_was_estimated() -> None:
    """A request estimated at more than a bucket holds takes all of it, and nobody ever learns what it used."""
    record = replace(ANONYMOUS, name="alice", tenant="search", public_id="alice")
    limits = Limits.model_validate({"defaults": {"key": {"tokens": {"rate": "100/m", "burst": 200}, "concurrent": 3}}})
    store = MemoryStore(lambda: NOW)
    limiter = Limiter(store, declared(limits), Metrics(10), lambda: NOW)
    plan = limiter.plan(record, "m", "pool", "")
    facts = read_facts(RELAYED["/v1/chat/completions"], "m", {}, None, 2000, (0, 0), True)
    hold = limiter.admit(plan, facts, lambda: 1)
    assert isinstance(hold, Hold)
    kind, _, charges = hold.settle(None, 0, whole=False, accepted=True)
    assert kind is Settlement.KEPT and charges is not None
    assert list(zip(plan.said, charges.reserved, charges.charged, strict=True)) == [
        ("tokens", 200_000, 200_000),
        ("concurrent", 1000, 0),
    ]
    assert [bucket.level for bucket in await store.look(plan.buckets)] == [0, 0]
