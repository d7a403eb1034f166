"""Headers of answers, as whole lines: what is always the same is made once, and the fast face writes them as they are.

Lines are bytes with their line ends; the ASGI face takes them apart again.
"""

from __future__ import annotations

from functools import lru_cache
from urllib.parse import quote

Header = tuple[bytes, bytes]

EXPOSE = (
    b"access-control-expose-headers:"
    b" x-request-id, openai-processing-ms, retry-after, retry-after-ms, x-should-retry, x-forebay-limits,"
    b" x-forebay-model,"
    b" x-ratelimit-limit-requests, x-ratelimit-limit-tokens, x-ratelimit-remaining-requests,"
    b" x-ratelimit-remaining-tokens, x-ratelimit-reset-requests, x-ratelimit-reset-tokens\r\n"
)
"""What a browser's client may read of an answer."""
JSON = b"content-type: application/json\r\n"
_PLAIN = "".join(chr(code) for code in range(0x21, 0x7F) if chr(code) != "%")


@lru_cache(1024)
def model_line(model: str) -> bytes:
    """Return the line that says which model served; what no header can hold is percent-encoded, as in a URL."""
    return b"x-forebay-model: %b\r\n" % quote(model, safe=_PLAIN).encode("ascii")


def to_pairs(lines: bytes) -> list[Header]:
    """Return the names and values of header lines."""
    pairs = []
    for line in lines.split(b"\r\n")[:-1]:
        name, _, value = line.partition(b": ")
        pairs.append((name, value))
    return pairs
