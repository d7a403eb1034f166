"""A request explained afterwards: the row of the ledger it makes, and what that row tells.

Nothing here runs on the path of a request: rows are made in a thread, explanations when somebody asks. What a request
said, and what it was answered, is nowhere in them.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec

from gateway.policy.limits import UNIT
from gateway.serving.meter import Usage
from gateway.serving.ticket import Attempt, Ticket
from gateway.state.usage import UsageRow, dollars

SHOWN_ATTEMPTS = 16
"""Attempts that a row tells of one by one."""
MAX_TEXT = 500
"""Characters of an error or of a client's own id."""

NOTHING = Usage(0, 0, 0, 0)
"""What a request used that no engine has seen."""


def ledger_row(ticket: Ticket) -> UsageRow:
    """The row of a request that has ended."""
    return row_of(ticket, ticket.ended)


def row_of(ticket: Ticket, now: float) -> UsageRow:
    """The row of a request as it stands; ``now`` is the clock's where it still runs."""
    usage = ticket.usage or (Usage() if ticket.attempts else NOTHING)
    end = ticket.ended if ticket.outcome is not None else now
    return UsageRow(
        request_id=ticket.request_id,
        at=round(ticket.at, 3),
        key_id=ticket.key_id,
        key=ticket.key,
        tenant=ticket.tenant,
        organisation=ticket.organisation,
        model=ticket.model,
        version=ticket.version,
        path=ticket.path,
        endpoint=ticket.endpoint,
        outcome=ticket.outcome.value if ticket.outcome is not None else "",
        status=ticket.status,
        settlement=ticket.settlement,
        tokens_in=usage.prompt,
        tokens_cached=usage.cached,
        tokens_out=usage.completion,
        tokens_reasoning=usage.reasoning,
        cost_nanos=ticket.cost,
        ttft_ms=_ms(ticket.first_at, ticket.started),
        duration_ms=_ms(end, ticket.started) or 0.0,
        attempts=ticket.attempts,
        detail=msgspec.json.encode(_detail(ticket, end)).decode(),
    )


def _detail(ticket: Ticket, end: float) -> dict[str, Any]:
    """What no column holds; what says nothing is left out."""
    detail = {
        "client": ticket.client,
        "client_request_id": ticket.client_request_id[:MAX_TEXT],
        "sdk_retry": ticket.sdk_retry,
        "stream": ticket.stream,
        "events": ticket.events,
        "bytes_in": ticket.bytes_in,
        "error": ticket.error[:MAX_TEXT],
        "refused_by": ticket.refused_by,
        "limits": [list(limit) for limit in ticket.limits],
        "time": _time_split(ticket, end),
        "tried": [_attempt(attempt, ticket, end) for attempt in ticket.tried[:SHOWN_ATTEMPTS]],
    }
    return {name: value for name, value in detail.items() if value}


def _time_split(ticket: Ticket, end: float) -> dict[str, float]:
    """Milliseconds of each stage that was reached, in order; together they are the whole time."""
    last = ticket.tried[-1] if ticket.tried else None
    connected = (last.connected or last.began) if last is not None else 0.0
    marks = (
        ("headers", ticket.let_in_at),
        ("body", ticket.read_at),
        ("policy", ticket.sent_at),
        ("connect", connected),
        ("first_event", ticket.first_at),
    )
    split, before = {}, ticket.started
    for stage, at in marks:
        if at:
            split[stage] = round((at - before) * 1000, 3)
            before = at
    split["rest"] = round((end - before) * 1000, 3)
    return split


def _attempt(attempt: Attempt, ticket: Ticket, end: float) -> dict[str, Any]:
    result = attempt.cause or (ticket.outcome.value if ticket.outcome is not None else "running")
    told: dict[str, Any] = {
        "endpoint": attempt.endpoint,
        "result": result,
        "ms": _ms(attempt.ended or end, attempt.began),
        "connect_ms": _ms(attempt.connected, attempt.began),
        "load": attempt.load,
        "again": attempt.again,
    }
    if attempt.loads is not None:
        told["among"] = [[one.name, load] for one, load in zip(attempt.others, attempt.loads, strict=False)]
        told["more"] = len(attempt.others) - len(attempt.loads)
    return {name: value for name, value in told.items() if value or name in ("ms", "load")}


def _ms(later: float, earlier: float) -> float | None:
    return round((later - earlier) * 1000, 3) if later else None


# --- explained -------------------------------------------------------------------------------------------------------


def explanation(row: UsageRow, source: str) -> dict[str, Any]:
    """Everything that is known of a request, for people; ``source``: where from, memory or ledger."""
    detail = msgspec.json.decode(row.detail)
    tried = detail.get("tried", [])
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
            "client": detail.get("client", ""),
            "client_request_id": detail.get("client_request_id", ""),
            "sdk_retry": detail.get("sdk_retry", 0),
        },
        "asked": {
            "path": row.path,
            "model": row.model,
            "version": row.version,
            "stream": detail.get("stream", False),
            "bytes_in": detail.get("bytes_in", 0),
        },
        "outcome": row.outcome,
        "status": row.status,
        "error": detail.get("error", ""),
        "limits": {
            "refused_by": detail.get("refused_by", ""),
            "charged": [
                {"bucket": bucket, "unit": unit, "reserved": _amount(unit, held), "settled": _amount(unit, kept)}
                for bucket, unit, held, kept in detail.get("limits", [])
            ],
            "settlement": row.settlement,
        },
        "engine": {
            "endpoint": row.endpoint,
            "why": why_chosen(tried[-1], tried[:-1]) if tried else "",
            "attempts": row.attempts,
            "retries": max(0, row.attempts - 1),
            "tried": tried,
        },
        "tokens": {
            "in": row.tokens_in,
            "cached": row.tokens_cached,
            "out": row.tokens_out,
            "reasoning": row.tokens_reasoning,
            "events": detail.get("events", 0),
        },
        "cost": dollars(row.cost_nanos),
        "time": {"total_ms": row.duration_ms, "ttft_ms": row.ttft_ms, "split_ms": detail.get("time", {})},
    }


def _amount(unit: str, amount: int) -> int | str:
    """What a bucket was charged, in whole requests or tokens, or in dollars: buckets count in thousandths."""
    return f"${dollars(amount)}" if unit == "money" else -(-amount // UNIT)


def why_chosen(attempt: dict[str, Any], before: list[dict[str, Any]]) -> str:
    """Why this endpoint, in words."""
    if attempt.get("again"):
        return "the same once more: it had closed the connection that was kept open"
    among = attempt.get("among")
    if among is None:
        return "the only one that serves this model"
    failed = {one["endpoint"] for one in before}
    loads = []
    for name, load in among:
        state = "tried before" if name in failed else "cannot be given work" if load < 0 else f"{load} in flight"
        loads.append(f"{name}: {state}")
    more = f" and {attempt['more']} more" if attempt.get("more") else ""
    return f"the least loaded ({attempt['load']} in flight) of {', '.join(loads)}{more}"
