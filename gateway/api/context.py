"""A key's cap on context: prompt and output tokens together.

There is no tokenizer here, but a token is never shorter than a byte of its text: a body small enough fits for certain.
For the rest an engine counts, exactly, with the model's own tokenizer.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import msgspec

from gateway.api.peek import Asked
from gateway.errors import Kind, Refusal
from gateway.serving.dialect import Route
from gateway.serving.pending import Pending
from gateway.serving.pool import Pool
from gateway.serving.tokens import TEMPLATE_TOKENS, Uncounted, count_tokens
from gateway.settings import Caps

_MEDIA = (b"url", b"data", b"\\u")


def fit_context(
    asked: Asked, model: str, route: Route, caps: Caps, pool: Pool, body_bytes: int
) -> Generator[Pending, Any, Refusal | None]:
    """Refuse a request that needs more context than its key may use; where no output limit is stated, set one.
    ``model``: the one that will serve it."""
    cap = caps.context
    if cap is None:
        return None
    stated, writes = asked.max_tokens, bool(route.token_fields)
    output = stated if stated is not None else int(writes)
    if output > cap:
        return _too_long(cap, f"its output limit alone is {output}")
    prompt = body_bytes + TEMPLATE_TOKENS
    # Where no limit is stated the answer gets what is left: a bound that leaves little of it is not good enough.
    bound = cap // 4 if stated is None and writes else cap - output
    if prompt > bound or _holds_media(asked, route):
        counted = yield Pending(count_tokens(pool, model, route.path, asked.fields, bound))
        if counted is Uncounted.NOT_NOW:
            told = "The prompt cannot be counted now, and this key's context is capped. Try again shortly."
            return Refusal(Kind.NO_ENGINE, told, retry_after=1.0)
        if counted is Uncounted.NEVER:
            return _too_long(cap, f"its {body_bytes} bytes may be more than that and cannot be counted on this path")
        prompt = counted
    if prompt + output > cap:
        return _too_long(cap, f"the prompt has {prompt} and the output limit is {output}")
    if stated is None and writes:
        limits = (cap - prompt, caps.max_tokens, route.implied_tokens)
        asked.max_tokens = min(limit for limit in limits if limit is not None)
        asked.fields[route.token_fields[-1]] = msgspec.Raw(b"%d" % asked.max_tokens)
    return None


def _holds_media(asked: Asked, route: Route) -> bool:
    """Tell whether there may be an image or the like, whose tokens have nothing to do with the bytes that name it."""
    fields = (bytes(asked.fields[name]) for name in route.media_fields if name in asked.fields)
    return any(needle in raw for raw in fields for needle in _MEDIA)


def _too_long(cap: int, why: str) -> Refusal:
    return Refusal(Kind.TOO_LONG, f"This key may use at most {cap} tokens of context; {why}. Send less.")
