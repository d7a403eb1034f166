"""Takes out of an engine's message what is the server's own business: its file paths."""

from __future__ import annotations

import re

MAX_MESSAGE = 2000
"""Characters of an engine's message that a client gets."""

# Engines repeat what a client sent, so both must stay linear whatever the text: no two repetitions side by side that
# match the same characters.
_PATH = re.compile(r"(?<![\w/.:])/(?!v1/)(?:[\w.@+~-]+/)+[\w.@+~-]*")
_TRACE = re.compile(r"\n[ \t]*File \"")


def redact(message: str) -> str:
    """Return ``message`` without paths of the server and without a traceback, cut to a length a person reads."""
    message = message[: 8 * MAX_MESSAGE]
    if "/" in message:
        trace = _TRACE.search(message)
        if trace is not None:
            message = message[: trace.start()].rstrip()
        message = _PATH.sub("[path]", message)
    return message if len(message) <= MAX_MESSAGE else message[: MAX_MESSAGE - 1] + "…"
