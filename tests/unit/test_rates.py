"""What clients are told of their limits."""

from __future__ import annotations

from gateway.errors import Kind
from gateway.headers import to_pairs
from gateway.policy.limits import Counts, Limit
from gateway.policy.token_bucket import NEVER, Bucket, Shape, rate_shape
from gateway.serving.rates import families, go_duration, rate_headers, refusal
from gateway.store.protocol import Known, Refused, Standing
from tests.support.table import each


@each(
    ("microseconds", "text"),
    [
        (0, "0s"),
        (1, "1ms"),
        (120_000, "120ms"),
        (1_000_000, "1s"),
        (59_675_000, "59.675s"),
        (2_640_000, "2.64s"),
        (360_000_000, "6m0s"),
        (5_400_000_000, "1h30m0s"),
        (100 * 3600 * 1_000_000 + 1000, "100h0m0.001s"),
    ],
)
def test_durations_as_go_writes_them(microseconds: int, text: str) -> None:
    assert go_duration(microseconds) == text


def limit(counts: Counts, shape: Shape, **more: bool) -> Limit:
    return Limit("bucket", counts, shape, "key", "alice", "tokens per min (TPM)", "limits.defaults.key.tokens", **more)


def test_headers_are_about_the_rate_with_the_least_left_and_never_about_budgets() -> None:
    minute, hour, budget = rate_shape(600, 60), rate_shape(9000, 3600), Shape(5000, starts=1, ends=2)
    limits = [
        limit(Counts.TOKENS, minute),
        limit(Counts.TOKENS, hour),
        limit(Counts.TOKENS, budget, budget=True),
        limit(Counts.CONCURRENT, Shape(1000, slots=True)),
    ]
    shapes = [one.shape for one in limits]
    buckets = [Bucket(500_000, 9), Bucket(400_999, 9), Bucket(0, 9), Bucket(-1000, 9)]
    headers = rate_headers(families(limits), Known(shapes, buckets), Standing.DEGRADED)
    assert sorted(to_pairs(headers)) == [
        (b"x-forebay-limits", b"degraded"),
        (b"x-ratelimit-limit-tokens", b"9000"),
        (b"x-ratelimit-remaining-tokens", b"400"),
        (b"x-ratelimit-reset-tokens", b"57m19.601s"),
    ]


def test_a_debt_is_shown_as_nothing_left() -> None:
    limits = [limit(Counts.TOKENS, rate_shape(60, 60))]
    headers = rate_headers(families(limits), Known([limits[0].shape], [Bucket(-5000, 9)]), Standing.STORE)
    assert dict(to_pairs(headers))[b"x-ratelimit-remaining-tokens"] == b"0"
    assert dict(to_pairs(headers))[b"x-ratelimit-reset-tokens"] == b"1m5s"


def test_slots_are_expected_when_others_usually_end() -> None:
    slots = limit(Counts.CONCURRENT, Shape(1000, slots=True))
    told = refusal(slots, Refused((Bucket(-1000, 9),), 0, NEVER), 1000, "m", 2.5, b"")
    assert (told.kind, told.retry_after, told.should_retry) == (Kind.TOO_MANY_REQUESTS, 2.5, True)


def test_a_store_that_is_lost_and_closed_is_nobody_s_limit() -> None:
    tokens = limit(Counts.TOKENS, rate_shape(60, 60))
    told = refusal(tokens, Refused((Bucket(0, 9),), 0, 0, standing=Standing.CLOSED), 1000, "m", 2.5, b"x: y\r\n")
    assert (told.kind, told.kind.value.status, told.limit) == (Kind.LIMITS_AWAY, 503, "")
    assert "fault of the gateway" in told.message
    assert to_pairs(told.header_lines()) == [
        (b"x-forebay-limits", b"closed"),
        (b"retry-after", b"1"),
        (b"retry-after-ms", b"1000"),
    ]


def test_who_is_refused_by_a_share_is_told_so_and_no_figure_that_is_not_the_limit_s() -> None:
    tokens = limit(Counts.TOKENS, rate_shape(60, 60))
    told = refusal(tokens, Refused((Bucket(0, 9),), 0, 2_000_000, standing=Standing.DEGRADED), 5000, "m", 1.0, b"")
    assert (told.kind, told.retry_after, told.should_retry) == (Kind.TOO_MANY_TOKENS, 2.0, True)
    assert told.message.startswith(
        "Rate limit reached for m in key 'alice' on tokens per min (TPM): Limit 60, Requested 5."
        " Please try again in 2s. The gateway cannot reach"
    )
    assert told.message.endswith("this one's share of this limit is used up.")
