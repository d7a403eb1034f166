"""Takes out of an engine's message what is the server's own business: its file paths."""

from __future__ import annotations

import re

MAX_MESSAGE = 2000
"""Characters of an engine's message that a client gets."""

_PATH = re.compile(r"(?<![\w/.:])/(?!v1/)(?:[\w.@+~-]+/)+[\w.@+~-]*|[A-Za-z]:\\\\?(?:[\w .@+~-]+\\\\?)+")
_TRACE = re.compile(r"\n+\s*File \".*", re.DOTALL)


def redact(message: str) -> str:
    """Return ``message`` without paths of the server and without a traceback, cut to a length a person reads."""
    if "/" in message or "\\" in message:
        message = _PATH.sub("[path]", _TRACE.sub("", message))
    return message if len(message) <= MAX_MESSAGE else message[: MAX_MESSAGE - 1] + "…"
