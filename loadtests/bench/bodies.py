"""Request bodies of the bench: chats of a given size, the same for the same arguments."""

from __future__ import annotations

import json
import random
from typing import Any

_TEXT = (
    "water river gauge level turbine basin gate flow measure night report pressure valve season engineer reads "
    "the a of and in to that is with for at from by on it as between before after every second steady slowly"
)
_WORDS = _TEXT.split()
_SAMPLING = {"temperature": 0.7, "top_p": 0.95, "max_tokens": 256}
_SYSTEM = "You are a careful assistant. Answer briefly."


def _prose(random_words: random.Random, length: int) -> str:
    words: list[str] = []
    size = 0
    while size < length:
        words.append(random_words.choice(_WORDS))
        size += len(words[-1]) + 1
    return " ".join(words)[:length].rstrip() or "…"


def chat_body(
    model: str,
    size: int,
    *,
    stream: bool = False,
    chunks: int = 64,
    interval_ms: int = 0,
    include_usage: bool = False,
    seed: int = 1,
) -> bytes:
    """A chat completion request of about `size` bytes, written as the official clients write it (no spaces).

    Long ones are a conversation of eight turns. `chunks` and `interval_ms` tell the mock engine what to answer; they
    ride in the last message, behind `@@`.
    """
    body: dict[str, Any] = {"model": model, "messages": [{"role": "system", "content": _SYSTEM}], **_SAMPLING}
    body["stream"] = stream
    if include_usage:
        body["stream_options"] = {"include_usage": True}
    plan = f"@@ n={chunks} d={interval_ms} @@ " if stream else ""
    turns = 8 if size > 8192 else 1
    left = size - len(json.dumps(body, separators=(",", ":"))) - turns * 36 - len(plan)
    random_words = random.Random(seed)
    for turn in range(turns):
        role = "user" if (turns - turn) % 2 else "assistant"
        text = _prose(random_words, max(left // turns, 16))
        body["messages"].append({"role": role, "content": plan + text if turn == turns - 1 else text})
    return json.dumps(body, separators=(",", ":")).encode()
