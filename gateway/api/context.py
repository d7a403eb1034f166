"""A key's cap on context: prompt and output tokens together.

There is no tokenizer here, but a token is never shorter than a byte of its text: a body small enough fits for certain.
For the rest an engine counts, exactly, with the model's own tokenizer.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import msgspec

from gateway.api.peek import Asked
from gateway.api.request import Pending
from gateway.errors import Kind, Refusal
from gateway.serving.dialect import Route
from gateway.serving.pool import Pool
from gateway.serving.tokens import count_tokens


def fit_context(
    asked: Asked, route: Route, cap: int, pool: Pool, body_bytes: int
) -> Generator[Pending, Any, Refusal | None]:
    """Refuse a request that needs more context than its key may use; where no output limit is stated, set one."""
    output = asked.max_tokens or 0
    if output > cap:
        return _too_long(cap, f"its output limit alone is {output}")
    prompt = body_bytes
    if body_bytes + output > cap:
        counted = yield Pending(count_tokens(pool, asked.model, route.path, asked.fields))
        if counted is None:
            told = "The prompt cannot be counted now, and this key's context is capped. Try again shortly."
            return Refusal(Kind.NO_ENGINE, told, retry_after=1.0)
        prompt = counted
    if prompt + max(output, 1 if route.token_fields else 0) > cap:
        return _too_long(cap, f"the prompt has {prompt} and the output limit is {output}")
    if route.token_fields and asked.max_tokens is None:
        left = cap - prompt
        asked.max_tokens = left if route.implied_tokens is None else min(left, route.implied_tokens)
        asked.fields[route.token_fields[-1]] = msgspec.Raw(b"%d" % asked.max_tokens)
    return None


def _too_long(cap: int, why: str) -> Refusal:
    return Refusal(Kind.TOO_LONG, f"This key may use at most {cap} tokens of context; {why}. Send less.")
