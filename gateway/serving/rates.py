"""What a client is told of its limits: headers on every answer, and why and until when it is refused."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import msgspec

from gateway.errors import Kind, Refusal
from gateway.policy.limits import UNIT, Counts, Limit
from gateway.policy.token_bucket import NEVER, SECOND, spare
from gateway.store.protocol import Levels, Refused, Standing

LONGEST_RETRY = 60.0
"""Seconds: beyond this an SDK would come back sooner than it was told, so it is told not to."""
_FAMILIES = ((Counts.REQUESTS, b"requests"), (Counts.TOKENS, b"tokens"))
_STORE = Standing.STORE
_MILLISECONDS = tuple(b"%dms" % number if number else b"0s" for number in range(1000))
_KINDS = {
    Counts.REQUESTS: Kind.TOO_MANY_REQUESTS,
    Counts.CONCURRENT: Kind.TOO_MANY_REQUESTS,
    Counts.TOKENS: Kind.TOO_MANY_TOKENS,
    Counts.IN_FLIGHT: Kind.TOO_MANY_TOKENS,
    Counts.MONEY: Kind.OVER_BUDGET,
}


def go_duration(microseconds: int) -> str:
    """Return a duration as Go writes it, which OpenAI's headers do: `120ms`, `59.675s`, `6m0s`, `1h30m0s`."""
    milliseconds = -(-microseconds // 1000)
    if milliseconds < 1000:
        return f"{milliseconds}ms" if milliseconds else "0s"
    seconds, milliseconds = divmod(milliseconds, 1000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    fraction = f".{milliseconds:03d}".rstrip("0") if milliseconds else ""
    text = f"{seconds}{fraction}s"
    if hours:
        return f"{hours}h{minutes}m{text}"
    return f"{minutes}m{text}" if minutes else text


class Family(msgspec.Struct, frozen=True):
    """One family of headers: which of the limits they are about, and for each of these its lines, as a format for what
    is left and when all of it is back."""

    which: tuple[int, ...]
    lines: dict[int, bytes]


def families(limits: Sequence[Limit]) -> tuple[Family, ...]:
    """Return the families of headers that limits have: rates on requests and on tokens, not budgets."""
    return _families(tuple((None if limit.budget else limit.counts, limit.shape.capacity) for limit in limits))


@lru_cache(4096)
def _families(limits: tuple[tuple[Counts | None, int], ...]) -> tuple[Family, ...]:
    # The same for all that are alike: they stay near the processor.
    found = []
    for counts, name in _FAMILIES:
        which = tuple(at for at, limit in enumerate(limits) if limit[0] is counts)
        if which:
            found.append(Family(which, {at: _lines(name, limits[at][1] // UNIT) for at in which}))
    return tuple(found)


def _lines(name: bytes, limit: int) -> bytes:
    shown = (b"limit", b"%d" % limit), (b"remaining", b"%d"), (b"reset", b"%b")
    return b"".join(b"x-ratelimit-%b-%b: %b\r\n" % (kind, name, value) for kind, value in shown)


def rate_headers(about: Sequence[Family], levels: Levels, standing: Standing) -> bytes:
    """Return the lines `x-ratelimit-…` of the buckets with the least left, as OpenAI has them."""
    lines = b"" if standing is _STORE else b"x-forebay-limits: %b\r\n" % standing.value.encode("ascii")
    for family in about:
        at, left, full = levels.least(family.which)
        milliseconds = (full + 999) // 1000
        reset = _MILLISECONDS[milliseconds] if milliseconds < 1000 else go_duration(full).encode("ascii")
        lines += family.lines[at] % (left // UNIT if left > 0 else 0, reset)
    return lines


_AWAY = Refusal(
    Kind.LIMITS_AWAY,
    "The gateway cannot reach the store in which it keeps limits, and lets nobody in unchecked. This is a fault of the"
    " gateway, none of the request's and no limit of yours. Send it again in a moment; if that does not help, tell"
    " whoever runs the gateway.",
    retry_after=1.0,
    headers=b"x-forebay-limits: %b\r\n" % Standing.CLOSED.value.encode("ascii"),
)
"""What everybody is told whose limits cannot be checked: no figures, for none are known."""


def refusal(limit: Limit, refused: Refused, asked: int, model: str, hold_time: float, headers: bytes) -> Refusal:
    """Return what a refused request is told; ``asked`` is what it wanted of the limit, ``hold_time`` the seconds after
    which a slot may be expected to come free."""
    if refused.standing is Standing.CLOSED:
        return _AWAY
    bucket, shape = refused.buckets[refused.index], limit.shape
    seconds = hold_time if refused.wait >= NEVER else refused.wait / SECOND
    kind = Kind.OVER_BUDGET if limit.budget else _KINDS[limit.counts]
    # What is used of a share would be no figure of the limit.
    used = (
        f" Used {_shown(limit, shape.capacity - spare(shape, bucket))}," if refused.standing is Standing.STORE else ""
    )
    told = (
        f"{'Budget used up' if limit.budget else 'Rate limit reached'} for {model} in {limit.scope} {limit.subject!r}"
        f" on {limit.said}: Limit {_shown(limit, shape.capacity)},{used} Requested {_shown(limit, asked)}."
        f" Please try again in {go_duration(int(seconds * SECOND))}."
    )
    if refused.standing is Standing.DEGRADED:
        told += (
            " The gateway cannot reach the store that its replicas share limits by: until it can, each replica gives"
            " out its share of every limit, and this one's share of this limit is used up."
        )
    retry = seconds <= LONGEST_RETRY and not limit.budget
    return Refusal(kind, told, retry_after=seconds, headers=headers, should_retry=retry, limit=_name(limit))


def never_fits(limit: Limit, asked: int, model: str) -> Refusal:
    """Return what is told of a request that no waiting helps."""
    told = (
        f"Request too large for {model} in {limit.scope} {limit.subject!r} on {limit.said}:"
        f" Limit {_shown(limit, limit.shape.capacity)}, Requested {_shown(limit, asked)}."
        " The input or output tokens must be reduced."
    )
    return Refusal(Kind.TOO_LARGE_FOR_LIMIT, told, should_retry=False, limit=_name(limit))


def _name(limit: Limit) -> str:
    return f"{limit.scope} {limit.subject}: {limit.said}"


def _shown(limit: Limit, amount: int) -> str:
    if limit.counts is Counts.MONEY:
        return f"${amount / UNIT / 1_000_000:.6g}"
    return str(-(-amount // UNIT))
