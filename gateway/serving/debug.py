"""How a request was routed, as a header of its answer, for whoever may ask (`x-forebay-debug: route`)."""

from __future__ import annotations

import json
from typing import Any

from gateway.serving.ticket import Attempt, Ticket, to_ms

MOST = 2048
"""Bytes of the header's value: what does not fit is left out, the worst candidates first, which are counted."""
LONGEST_NAME = 60
"""Characters of a name; each may take twelve bytes."""
SHOWN_ATTEMPTS = 4


def route_line(ticket: Ticket, model: str) -> bytes:
    """Return the line: which engine was chosen for a model, out of whom, and what failed before. JSON, in ASCII."""
    last = ticket.tried[-1] if ticket.tried else None
    told: dict[str, Any] = {"model": model[:LONGEST_NAME], "endpoint": _name(last), "attempts": ticket.attempts}
    if ticket.waited:
        told["queued_ms"] = to_ms(ticket.waited)
    failed = [one for one in ticket.tried if one.cause]
    if failed:
        told["failed"] = [[_name(one), one.cause] for one in failed[-SHOWN_ATTEMPTS:]]
    choice = last.choice if last is not None else None
    if choice is not None and choice.scored:
        told["blocks"] = choice.blocks
        told["candidates"] = candidates = [
            {
                "endpoint": one.endpoint.name[:LONGEST_NAME],
                "cost_ms": to_ms(one.cost),
                "ttft_ms": to_ms(one.seconds),
                "used": round(one.used, 4),
                "cached": one.matched,
                "home": one.home,
            }
            for one in sorted(choice.scored, key=lambda one: one.cost)
        ]
        while len(_encoded(told)) > MOST and candidates:
            candidates.pop()
            told["left_out"] = len(choice.scored) - len(candidates)
    if len(_encoded(told)) > MOST:
        told.pop("failed", None)
    return b"x-forebay-route: %b\r\n" % _encoded(told)


def _name(attempt: Attempt | None) -> str | None:
    return attempt.endpoint[:LONGEST_NAME] if attempt is not None else None


def _encoded(told: dict[str, Any]) -> bytes:
    # Escapes whatever no header can hold.
    return json.dumps(told, separators=(",", ":")).encode("ascii")
