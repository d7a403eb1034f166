"""On what terms a request waits: its class of service, and for how long its client has patience."""

from __future__ import annotations

import math

from gateway.api.peek import Asked
from gateway.api.request import Request
from gateway.errors import Kind, Refusal
from gateway.serving.admission import CLASSES, DEFAULT, USUAL, Terms

_RANKS = {b'"%b"' % name.encode(): rank for rank, name in enumerate(CLASSES)}


def terms_of(request: Request, asked: Asked) -> Terms:
    """Return the terms of a request: the class that it asks for, at most its key's best."""
    best = request.who.caps.tier
    rank = DEFAULT if best is None else CLASSES.index(best)
    raw = asked.fields.get("service_tier")
    if raw is not None:
        # "auto", and what only an engine knows, is as if nothing were asked for.
        rank = max(rank, _RANKS.get(bytes(raw), rank))
    patience = request.patience
    if request.silence is not None and not asked.stream:
        # Nothing can be sent to it before the whole answer; to a stream heartbeats can.
        patience = request.silence if patience is None else min(patience, request.silence)
    return USUAL if rank == DEFAULT and patience is None else Terms(rank, patience)


def read_patience(headers: dict[bytes, bytes], request: Request) -> Refusal | None:
    """Read how long a client waits: ``x-request-timeout`` for the answer, in seconds, and what an SDK says of its own
    time-out between two reads."""
    raw = headers.get(b"x-request-timeout")
    if raw is not None:
        request.patience = _seconds(raw)
        if request.patience is None:
            return Refusal(Kind.INVALID, "'x-request-timeout' must be a number of seconds above 0, such as 30 or 2.5.")
    raw = headers.get(b"x-stainless-read-timeout")
    if raw is not None:
        # The SDK's own: what is no number is none of its user's doing.
        request.silence = _seconds(raw)
    return None


def _seconds(raw: bytes) -> float | None:
    try:
        seconds = float(raw)
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) and seconds > 0 else None
