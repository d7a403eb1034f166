"""URLs inside messages. Engines fetch them themselves, so what they may fetch is decided before they see the body.

Remote URLs are off unless the operator names hosts; then only those hosts pass, exactly as written, and an engine the
gateway starts is given the same list with redirects off. Data URLs are bounded. Tensors and local files never pass.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import msgspec

from engines.protocol import Fields
from gateway.errors import Kind, Refusal
from gateway.serving.dialect import Route

_PARTS = (b'"image_url"', b'"input_image"', b'"input_audio"', b'"video_url"', b'"audio_url"', b'"source"')
_DATA_URL = re.compile(rb'data:[^"]*')
_SCHEME = re.compile(r"[\s\x00-\x20]*([A-Za-z][A-Za-z0-9+.\-]*):")
_TEXT_KEYS = frozenset(
    {
        "text",
        "refusal",
        "thinking",
        "reasoning",
        "reasoning_content",
        "title",
        "context",
        "role",
        "type",
        "name",
        "id",
        "tool_call_id",
    }
)
_TEXT_TREES = frozenset({"annotations", "citations", "arguments"})
_BASE64_KEYS = frozenset({"data", "file_data"})


@dataclass(frozen=True, slots=True)
class MediaRules:
    """``hosts`` are exact and lower case, empty: no remote URL; ``data_url`` and ``paths`` are in bytes."""

    hosts: frozenset[str] = frozenset()
    data_url: int = 8 * 1024 * 1024
    paths: dict[str, int] = field(default_factory=dict)

    def limit(self, path: str, of_key: int | None) -> int:
        """Return how large one data URL may be on a path for a key."""
        limit = self.paths.get(path, self.data_url)
        return limit if of_key is None else min(limit, of_key)


def may_hold_media(body: bytes, route: Route) -> bool:
    """Tell whether there may be anything in a body but text; no is certain."""
    if route.media_in_lists and body.find(b"[", body.find(b"[") + 1) < 0:
        # A media part stands in a list of parts inside the list of messages.
        return False
    return b"url" in body or b"data" in body or b"_embeds" in body or has_escapes(body)


def weigh_media(body: bytes) -> tuple[int, int]:
    """Return how many images and the like a body seems to hold, and how many of its bytes are theirs."""
    parts = sum(body.count(needle) for needle in _PARTS)
    if not parts or b"data:" not in body:
        return parts, 0
    return parts, sum(match.end() - match.start() for match in _DATA_URL.finditer(body))


def check_media(fields: Fields, route: Route, rules: MediaRules, of_key: int | None) -> Refusal | None:
    """Refuse a body that would make an engine fetch, open or unpickle something it must not."""
    limit = rules.limit(route.path, of_key)
    for name in route.media_fields:
        raw = fields.get(name)
        if raw is None:
            continue
        try:
            value = msgspec.json.decode(raw)
        except (msgspec.DecodeError, RecursionError):
            return Refusal(Kind.INVALID, f"The field {name!r} cannot be read.", name)
        for key, text in _suspects(value):
            refusal = _judge(key, text, rules, limit)
            if refusal is not None:
                return Refusal(refusal.kind, refusal.message, name)
    return None


def has_escapes(body: bytes) -> bool:
    """Tell whether a body holds ``\\u`` escapes, behind which any key or scheme can hide; mostly one memchr."""
    # "in" takes bytes for a number first and pays for finding that they are none: four times what this costs.
    return body.find(b"\\") >= 0 and body.find(b"\\u") >= 0


def _suspects(value: Any) -> Iterator[tuple[str, str]]:
    """Yield every string of a message that an engine may take for a place to fetch from, with its key."""
    todo: list[tuple[str, Any]] = [("", value)]
    while todo:
        key, item = todo.pop()
        if isinstance(item, list):
            todo.extend((key, inner) for inner in item)
        elif isinstance(item, dict):
            for name, inner in item.items():
                if name.endswith("_embeds"):
                    yield name, ""
                elif not _is_text(name, inner, item.get("type")):
                    todo.append((name, inner))
        elif isinstance(item, str) and key not in ("", "content", "input", "arguments", "output"):
            yield key, item


def _is_text(name: str, inner: Any, part: Any) -> bool:
    """Tell whether a value is only ever shown to the model: texts, what a tool was given, what an answer cited."""
    if name in _TEXT_TREES or (name == "input" and part == "tool_use"):
        return True
    return name in _TEXT_KEYS and isinstance(inner, str)


def _judge(key: str, text: str, rules: MediaRules, limit: int) -> Refusal | None:
    if key.endswith("_embeds"):
        return Refusal(Kind.MEDIA, f"{key!r} is not accepted: tensors of a client are never loaded.")
    if key in _BASE64_KEYS and len(text) > limit:
        return _too_large(len(text), limit)
    is_url = key.endswith("url")
    match = _SCHEME.match(text)
    if match is None:
        if not is_url:
            return None
        # Engines differ in what they make of it: one removes line breaks inside a scheme, one opens a path of its disk.
        return Refusal(Kind.MEDIA, f"{key!r} holds no URL. Send the content as a data URL (data:image/png;base64,…).")
    scheme = match[1].lower()
    if scheme == "data":
        return _too_large(len(text), limit)
    if scheme not in ("http", "https"):
        # "note: see below" under a key of a tool's result is text; what engines open is file://, ftp:// and their like.
        if not is_url and scheme != "file" and not text.startswith("//", match.end()):
            return None
        return Refusal(Kind.MEDIA, f"URLs with the scheme {scheme!r} are not accepted. Send a data URL.")
    return _remote(text, rules)


def _too_large(size: int, limit: int) -> Refusal | None:
    if size <= limit:
        return None
    return Refusal(Kind.TOO_LARGE, f"A data URL of {size} bytes is larger than the {limit} allowed here.")


def _remote(text: str, rules: MediaRules) -> Refusal | None:
    if not rules.hosts:
        told = "Remote URLs are not fetched here. Send the content as a data URL (data:image/png;base64,…)."
        return Refusal(Kind.MEDIA, told)
    # What an engine's URL parser and ours read differently is not judged but refused.
    odd = any(ord(char) <= 0x20 or ord(char) == 0x7F or char == "\\" for char in text)
    try:
        parts = urlsplit(text)
        host, port = (parts.hostname or "").lower(), parts.port
    except ValueError:
        odd, host, port = True, "", None
    if odd or "@" in _authority(text):
        return Refusal(Kind.MEDIA, "A URL in the body is malformed or holds credentials.")
    if host not in rules.hosts or port not in (None, 80, 443):
        return Refusal(Kind.MEDIA, f"Media may not be fetched from {host!r}. Send a data URL or ask for the host.")
    return None


def _authority(text: str) -> str:
    """Return the part of a URL between the slashes and the path."""
    return text.split("//", 1)[-1].split("/", 1)[0].split("?", 1)[0].split("#", 1)[0]
