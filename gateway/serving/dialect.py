"""How a family of paths speaks: its errors, its stream's end, and where its usage stands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import msgspec

from gateway.errors import Refusal, anthropic_body, openai_body


@dataclass(frozen=True, slots=True)
class Dialect:
    """One way of speaking HTTP and SSE.

    ``end_types`` are the event types that end a stream cleanly; empty means that ``data: [DONE]`` does.
    ``opening_types`` are those that only announce an answer: SGLang announces one before it refuses the request.
    """

    name: str
    typed_events: bool
    end_types: frozenset[str]
    error_body: Callable[[Refusal, str], bytes]
    error_event: Callable[[Refusal, str, int], bytes]
    anthropic: bool = False
    opening_types: frozenset[bytes] = frozenset()

    def status(self, refusal: Refusal) -> int:
        """Return the HTTP status of a refusal."""
        row = refusal.kind.value
        return row.anthropic_status if self.anthropic else row.status


def _openai_event(refusal: Refusal, request_id: str, events: int) -> bytes:
    return b"data: " + openai_body(refusal, request_id) + b"\n\n"


def _responses_event(refusal: Refusal, request_id: str, events: int) -> bytes:
    error = refusal.openai_error()
    event = {
        "type": "error",
        "code": error["code"],
        "message": error["message"],
        "param": error["param"],
        "sequence_number": events,
    }
    return b"event: error\ndata: " + msgspec.json.encode(event) + b"\n\n"


def _anthropic_event(refusal: Refusal, request_id: str, events: int) -> bytes:
    return b"event: error\ndata: " + anthropic_body(refusal, request_id) + b"\n\n"


OPENAI = Dialect("openai", False, frozenset(), openai_body, _openai_event)
RESPONSES = Dialect(
    "responses",
    True,
    frozenset({"response.completed", "response.failed", "response.incomplete"}),
    openai_body,
    _responses_event,
    opening_types=frozenset({b"response.created", b"response.in_progress"}),
)
ANTHROPIC = Dialect(
    "anthropic",
    True,
    frozenset({"message_stop"}),
    anthropic_body,
    _anthropic_event,
    anthropic=True,
    opening_types=frozenset({b"message_start"}),
)


@dataclass(frozen=True, slots=True)
class Route:
    """One relayed path: how its body is read.

    ``token_fields`` name the output limit, the first found counts; the last is the one written where a key's cap must
    hold and the client named none (empty: the path has no output). ``media_fields`` may hold media parts,
    which on a path with ``media_in_lists`` only ever stand in a list inside a list.
    """

    path: str
    dialect: Dialect
    summary: str
    token_fields: tuple[str, ...] = ()
    implied_tokens: int | None = None
    """The output limit that holds where a client states none; None: what the model's context leaves."""
    n_fields: tuple[str, ...] = ()
    streams: bool = False
    asks_usage: bool = False
    charged: bool = True
    """Whether it costs tokens: counting them does not."""
    media_fields: tuple[str, ...] = ()
    media_in_lists: bool = False
    resumed: Literal["", "content", "text"] = ""
    """Under which name a chunk of its streams has its text, where a stream that breaks off goes on at another engine;
    empty: it ends with an error event."""
    refused_fields: tuple[tuple[str, str], ...] = ()
    """Fields whose meaning needs state in one engine, each with the reason that the client is told."""
