"""What the router is told of a request: how large it is, how it begins, and whose session it is of."""

from __future__ import annotations

import zlib

import msgspec

from engines.protocol import Capability, Fields
from gateway.policy.prefix import BLOCK, MOST_BLOCKS, block_hashes
from gateway.policy.routing import Job

_READ = ("tools", "system", "instructions", "messages", "prompt", "input")
"""The fields that become a prompt, in the order in which templates put them there."""
_MOST = BLOCK * MOST_BLOCKS
_NULL = b"null"
_NO_TOOLS = frozenset({_NULL, b"[]"})
_NONE = frozenset({_NULL, b"false", b"0"})
_NEEDS = {
    "tools": (Capability.TOOLS, _NO_TOOLS),
    "tool_choice": (Capability.FORCED_TOOLS, frozenset({_NULL, b'"auto"', b'"none"'})),
    "logprobs": (Capability.LOGPROBS, _NONE),
    "top_logprobs": (Capability.LOGPROBS, _NONE),
    "n": (Capability.SEVERAL_ANSWERS, frozenset({_NULL, b"1"})),
    "stop": (Capability.STOP_WORDS, _NO_TOOLS),
}
"""Fields that need something of an engine, and what they say where they do not."""
_LONGEST_NAME = 1024
"""Bytes of a ``prompt_cache_key`` that tell sessions apart."""
NOTHING_TOLD = Job(0, 0)
"""Where there is no choice."""


def job_of(fields: Fields, model: str, salt: str | None, size: tuple[int, int], *, chosen: bool) -> Job:
    """Return a request's job: ``size`` are the tokens its prompt and its answers are estimated at, ``chosen`` tells
    whether endpoints are chosen among."""
    if not chosen:
        return Job(*size)
    key = fields.get("prompt_cache_key")
    session = 0
    if key is not None:
        # A name, and as short as one, or it is not worth the time.
        name = memoryview(key)[:_LONGEST_NAME]
        session = zlib.crc32(name) if name != _NULL else 0
    return Job(*size, _blocks(fields, model, salt), session)


def needs_of(fields: Fields) -> Capability:
    """Return what an engine must be able to do for a request beyond a plain answer."""
    needs = Capability(0)
    for name, (need, nothing) in _NEEDS.items():
        told = fields.get(name)
        if told is not None and bytes(told) not in nothing:
            needs |= need
    schema = fields.get("response_format")
    if schema is not None and b'"json_schema"' in bytes(schema):
        needs |= Capability.JSON_SCHEMA
    return needs


def subject_of(fields: Fields, by_session: bool, key: str) -> int:
    """Return whose request it is, where models share a name: its session's if asked for and told, else its key's."""
    if by_session:
        for name in ("prompt_cache_key", "user"):
            told = fields.get(name)
            if told is not None and bytes(told) != _NULL:
                return zlib.crc32(told)
    return zlib.crc32(key.encode())


def _blocks(fields: Fields, model: str, salt: str | None) -> tuple[int, ...]:
    """Return the blocks of what a body says, as bytes: equal beginnings of prompts begin equally there too."""
    parts: list[msgspec.Raw] = []
    length = 0
    for name in _READ:
        raw = fields.get(name)
        if raw is not None and length < _MOST:
            parts.append(raw)
            length += len(raw)
    text = b"".join(memoryview(raw)[:_MOST] for raw in parts)
    # What must be the same for a cache to be shared: the model or adapter, and the trust domain.
    return block_hashes(hash((model, salt)), text)
