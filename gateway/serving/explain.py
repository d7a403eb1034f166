"""A request explained afterwards: the row of the ledger it makes, and what that row tells.

Nothing here runs on the path of a request: rows are made in a thread, explanations when somebody asks. What a request
said, and what it was answered, is nowhere in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

from gateway.policy.limits import UNIT
from gateway.serving.meter import Usage
from gateway.serving.ticket import Attempt, Ticket, to_ms
from gateway.state.usage import UsageRow, dollars

SHOWN_ATTEMPTS = 16
"""Attempts that a row tells of one by one."""
MAX_TEXT = 500
"""Characters of an error or of a client's own id."""

_NO_BUCKETS = msgspec.Raw(b"[]")

NOTHING = Usage(0, 0, 0, 0)
"""What a request used that no engine has seen."""


class Weighed(msgspec.Struct, array_like=True, gc=False):
    """What was thought of one endpoint: cost and time to the first token in milliseconds, the share of its room that
    would be used, blocks of the prompt it holds, whether the session is at home there."""

    endpoint: str
    cost_ms: float
    ttft_ms: float
    used: float
    matched: int
    home: bool


class Tried(msgspec.Struct, omit_defaults=True, gc=False):
    """One attempt at an engine, as it is told. Times in milliseconds."""

    endpoint: str
    result: str
    ms: float
    load: int
    """What the endpoint had in flight when it was chosen."""
    connect_ms: float | None = None
    again: bool = False
    events: int = 0
    """That it brought before it broke off."""
    resumes: bool = False
    """Whether it went on with what an attempt before had begun."""
    among: tuple[Weighed, ...] = ()
    """Whoever was compared, none where there was no choice."""
    blocks: int = 0
    """Blocks that the beginning of the prompt is compared by."""


class TimeSplit(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """Milliseconds of each stage that was reached, in order; together they are the whole time."""

    headers: float | None = None
    body: float | None = None
    policy: float | None = None
    queue: float | None = None
    connect: float | None = None
    first_event: float | None = None
    rest: float | None = None


class Detail(msgspec.Struct, omit_defaults=True, gc=False):
    """What no column of the ledger holds; what says nothing is left out."""

    client: str = ""
    client_request_id: str = ""
    sdk_retry: int = 0
    stream: bool = False
    events: int = 0
    bytes_in: int = 0
    error: str = ""
    via: str = ""
    """How it came to the model that served it: `route`, `fallback` or `mirror`; empty: by its own name."""
    mirrors: str = ""
    """The request that this one is a copy of."""
    refused_by: str = ""
    buckets: msgspec.Raw = _NO_BUCKETS
    """Those of the limits: of each its name and what it counts. Made once for many rows, so amounts are beside it."""
    reserved: Sequence[int] = ()
    charged: Sequence[int] = ()
    """What was reserved of each bucket and what was charged, in 1/1000."""
    time: TimeSplit = TimeSplit()
    tried: list[Tried] = []
    limits: tuple[tuple[str, str, int, int], ...] = ()
    """All four of each bucket: only rows of former times have them so."""

    def charges(self) -> tuple[tuple[str, str, int, int], ...]:
        """Return of each limit its bucket, what it counts, what was reserved of it and what was charged."""
        told = zip(_decode_named(self.buckets), self.reserved, self.charged, strict=True)
        return self.limits or tuple((bucket, unit, held, kept) for (bucket, unit), held, kept in told)


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Detail).decode
_decode_named = msgspec.json.Decoder(tuple[tuple[str, str], ...]).decode


def ledger_row(ticket: Ticket) -> UsageRow:
    """The row of a request that has ended."""
    return row_of(ticket, ticket.ended)


def row_of(ticket: Ticket, now: float) -> UsageRow:
    """The row of a request as it stands; ``now`` is the clock's where it still runs."""
    usage = ticket.usage or (Usage() if ticket.attempts else NOTHING)
    outcome = ticket.outcome._value_ if ticket.outcome is not None else ""
    end = ticket.ended if outcome else now
    # In the order of the fields: beyond fifteen, names make every call go by a dict.
    return UsageRow(
        ticket.request_id,
        int(ticket.at * 1000 + 0.5) / 1000,
        ticket.key_id,
        ticket.key,
        ticket.tenant,
        ticket.organisation,
        ticket.model,
        ticket.version,
        ticket.path,
        ticket.endpoint,
        outcome,
        ticket.status,
        ticket.settlement,
        usage.prompt,
        usage.cached,
        usage.completion,
        usage.reasoning,
        ticket.cost,
        to_ms(ticket.first_at - ticket.started) if ticket.first_at else None,
        to_ms(end - ticket.started),
        ticket.attempts,
        _encode(_detail(ticket, outcome, end)).decode(),
        ticket.served,
    )


def _detail(ticket: Ticket, outcome: str, end: float) -> Detail:
    charges = ticket.charges
    return Detail(
        ticket.client,
        ticket.client_request_id[:MAX_TEXT],
        ticket.sdk_retry,
        ticket.stream,
        ticket.events,
        ticket.bytes_in,
        ticket.error[:MAX_TEXT],
        ticket.via,
        ticket.mirrors,
        ticket.refused_by,
        charges.plan.named if charges is not None else _NO_BUCKETS,
        charges.reserved if charges is not None else (),
        charges.charged if charges is not None else (),
        _time_split(ticket, end),
        [_tried(attempt, outcome, end) for attempt in ticket.tried[:SHOWN_ATTEMPTS]],
    )


def _time_split(ticket: Ticket, end: float) -> TimeSplit:
    # Who goes on with a stream has no part in how long its first event took.
    last = next((one for one in reversed(ticket.tried) if not one.resumes), None)
    connected = (last.connected or last.began) if last is not None else 0.0
    marks = (ticket.let_in_at, ticket.read_at, ticket.sent_at, connected, ticket.first_at)
    split: list[float | None] = [None] * len(marks)
    before = ticket.started
    for stage, at in enumerate(marks):
        if at:
            # to_ms, written out: this is five times a request.
            split[stage] = int((at - before) * 1e6 + 0.5) / 1000
            before = at
    headers, body, policy, connect, first_event = split
    rest = to_ms(end - before)
    queue = to_ms(ticket.waited) if ticket.waited else None
    if queue is not None and connect is not None:
        connect = round(connect - queue, 3)
    elif queue is not None:
        # No engine was reached: it waited for the rest of its time.
        rest = round(rest - queue, 3)
    return TimeSplit(headers, body, policy, queue, connect, first_event, rest)


def _tried(attempt: Attempt, outcome: str, end: float) -> Tried:
    choice = attempt.choice
    among: tuple[Weighed, ...] = ()
    if choice is not None and choice.scored:
        among = tuple(
            Weighed(one.endpoint.name, to_ms(one.cost), to_ms(one.seconds), round(one.used, 4), one.matched, one.home)
            for one in choice.scored
        )
    return Tried(
        attempt.endpoint,
        attempt.cause or outcome or "running",
        to_ms((attempt.ended or end) - attempt.began),
        attempt.load,
        to_ms(attempt.connected - attempt.began) if attempt.connected else None,
        attempt.again,
        attempt.events,
        attempt.resumes,
        among,
        choice.blocks if choice is not None else 0,
    )


# --- explained -------------------------------------------------------------------------------------------------------


def explanation(row: UsageRow, source: str) -> dict[str, Any]:
    """Everything that is known of a request, for people; ``source``: where from, memory or ledger."""
    detail = _decode(row.detail)
    tried = detail.tried
    return {
        "request_id": row.request_id,
        "source": source,
        "state": "ended" if row.outcome else "running",
        "at": datetime.fromtimestamp(row.at, UTC).isoformat(timespec="milliseconds"),
        "who": {
            "key": row.key,
            "key_id": row.key_id,
            "tenant": row.tenant,
            "organisation": row.organisation,
            "client": detail.client,
            "client_request_id": detail.client_request_id,
            "sdk_retry": detail.sdk_retry,
        },
        "asked": {
            "path": row.path,
            "model": row.model,
            "version": row.version,
            "served": row.served,
            "via": detail.via,
            "mirrors": detail.mirrors,
            "stream": detail.stream,
            "bytes_in": detail.bytes_in,
        },
        "outcome": row.outcome,
        "status": row.status,
        "error": detail.error,
        "limits": {
            "refused_by": detail.refused_by,
            "charged": [
                {"bucket": bucket, "unit": unit, "reserved": _amount(unit, held), "settled": _amount(unit, kept)}
                for bucket, unit, held, kept in detail.charges()
            ],
            "settlement": row.settlement,
        },
        "engine": {
            "endpoint": row.endpoint,
            "why": why_chosen(tried[-1], tried[:-1]) if tried else "",
            "attempts": row.attempts,
            "retries": max(0, row.attempts - 1),
            "tried": msgspec.to_builtins(tried),
        },
        "tokens": {
            "in": row.tokens_in,
            "cached": row.tokens_cached,
            "out": row.tokens_out,
            "reasoning": row.tokens_reasoning,
            "events": detail.events,
        },
        "cost": dollars(row.cost_nanos),
        "time": {"total_ms": row.duration_ms, "ttft_ms": row.ttft_ms, "split_ms": msgspec.to_builtins(detail.time)},
    }


def _amount(unit: str, amount: int) -> int | str:
    """What a bucket was charged, in whole requests or tokens, or in dollars: buckets count in thousandths."""
    return f"${dollars(amount)}" if unit == "money" else -(-amount // UNIT)


def why_chosen(attempt: Tried, before: list[Tried]) -> str:
    """Why this endpoint, in words."""
    if attempt.again:
        return "the same once more: it had closed the connection that was kept open"
    if not attempt.among:
        return "the only one that serves this model" if not before else "the only one that was left"
    failed = {one.endpoint for one in before}
    compared = []
    for one in sorted(attempt.among, key=lambda one: one.cost_ms):
        words = [f"first token in {one.ttft_ms:g} ms", f"{one.used:.0%} of its room used"]
        if one.matched:
            words.append(f"{one.matched} of {attempt.blocks} blocks of the prompt there")
        if one.home:
            words.append("the session's home")
        compared.append(f"{one.endpoint}: {', '.join(words)}")
    tried = f"; tried before: {', '.join(sorted(failed))}" if failed else ""
    best = "the best by prediction of" if len(compared) > 1 else "the only one that had room,"
    return f"{best} {'; '.join(compared)}{tried}"
