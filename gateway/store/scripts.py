"""The scripts a Redis server runs for us, what they are told and what they answer.

Each is ``bucket.lua``, the arithmetic, with one step after it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import msgspec

from gateway.policy.token_bucket import Bucket, Promise, Shape

_HERE = Path(__file__).parent


class Script(msgspec.Struct, frozen=True):
    """One step, by the digest the server knows it by."""

    name: str
    source: bytes
    sha: bytes


def _script(name: str) -> Script:
    source = b"\n".join((_HERE / f"{part}.lua").read_bytes() for part in ("bucket", name))
    return Script(name, source, hashlib.sha1(source, usedforsecurity=False).hexdigest().encode())


TAKE, GIVE, UNDO, BEAT, LOOK, EXCHANGE = map(_script, ("take", "give", "undo", "beat", "look", "exchange"))
ALL = (TAKE, GIVE, UNDO, BEAT, LOOK, EXCHANGE)


class Told(msgspec.Struct, frozen=True, gc=False):
    """An answer: what became of it, the server's time, the generation of its buckets, how many replicas live; of a
    refusal which draw, how long, and whether that was promised; the amounts taken and the buckets afterwards."""

    status: str
    now: int
    generation: str
    live: int
    index: int = 0
    wait: int = 0
    promised: bool = False
    amounts: tuple[int, ...] = ()
    buckets: tuple[Bucket, ...] = ()
    lines: tuple[bytes, ...] = ()
    """What else was answered."""


VOID = Told("void", 0, "", 0)


@lru_cache(4096)
def shape_words(shape: Shape) -> str:
    """Return a shape as the scripts read it."""
    return f"{shape.capacity} {shape.rate} {shape.per} {shape.starts} {shape.ends} {int(shape.slots)}"


def need_words(shape: Shape, amount: int = 0, more: int = 0, back: int = 0) -> str:
    """Return what is asked of one bucket: ``back`` is given first, then ``amount`` taken and ``more`` beside it."""
    return f"{shape_words(shape)} {amount} {more} {back}"


def pack(words: Sequence[str | bytes]) -> bytes:
    """Return one command in the server's protocol."""
    parts: list[bytes] = [b"*%d\r\n" % len(words)]
    for word in words:
        # A name that is no text has its own bytes, too.
        raw = word.encode(errors="surrogatepass") if isinstance(word, str) else word
        parts.append(b"$%d\r\n%b\r\n" % (len(raw), raw))
    return b"".join(parts)


def parse(answer: bytes) -> Told:
    """Return what a script answered."""
    if answer == b"void":
        return VOID
    answer, *lines = answer.split(b"\n")
    head, *rest = answer.decode().split("|")
    status, now, generation, live, index, wait, promised = head.split()
    amounts, buckets = [], []
    for words in rest:
        amount, level, at, part, epoch, *promises = words.split()
        amounts.append(int(amount))
        kept = tuple(_promises(promises)) if promises else ()
        buckets.append(Bucket(int(level), int(at), int(part), int(epoch), kept))
    return Told(
        status,
        int(now),
        generation,
        int(live),
        int(index),
        int(wait),
        promised == "1",
        tuple(amounts),
        tuple(buckets),
        tuple(lines),
    )


def _promises(words: Sequence[str]) -> Iterable[Promise]:
    for at in range(0, len(words), 4):
        due, until, amount, who = words[at : at + 4]
        yield Promise(int(due), int(until), int(amount), int(who))
