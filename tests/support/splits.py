"""Where to cut a byte string, so that a reader of streams is tried at every place where it could go wrong.

A *plan* is a sorted tuple of cut positions; ``pieces(data, plan)`` applies it. Everything is deterministic: random
plans take a seed.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterable, Iterator

Plan = tuple[int, ...]

# Up to this many bytes every single cut is tried; above it only those where something can go wrong, and random ones.
# Each dialect has recordings as short as that.
SHORT = 1200

# Of what a long stream repeats in each of its events, the first and the last so many are cut: those between are alike.
EACH = 6

# Cuts in one plan lie so many bytes apart, more than nearly every event has: before the next one a reader has done with
# what it carried over, so that each is tried as if it were alone.
APART = 200

# What the relay looks for in an event; a cut inside any of them must change nothing. Both spellings: LMDeploy writes
# a space.
NEEDLES = (
    b'"usage"',
    b'"model"',
    b"[DONE]",
    b'"finish_reason"',
    b'"usage":null',
    b'"usage": null',
    b"data: ",
    b"event: ",
    b"\r\n",
)


def pieces(data: bytes, plan: Iterable[int]) -> list[bytes]:
    """Cut ``data`` at the plan's positions. No piece is empty as long as the positions lie inside and differ."""
    cuts = [0, *plan, len(data)]
    return [data[start:end] for start, end in itertools.pairwise(cuts)]


def byte_by_byte(data: bytes) -> Plan:
    """Every byte on its own."""
    return tuple(range(1, len(data)))


def every_cut(data: bytes) -> Iterator[Plan]:
    """Each position once: two pieces per plan."""
    yield from ((position,) for position in range(1, len(data)))


def cut_at(positions: Iterable[int], apart: int = APART) -> Iterator[Plan]:
    """Each position once; as many in one plan as lie ``apart`` bytes or more from each other."""
    left = sorted(positions)
    while left:
        plan, rest = left[:1], left[:0]
        for position in left[1:]:
            (plan if position - plan[-1] >= apart else rest).append(position)
        yield tuple(plan)
        left = rest


def around_events(data: bytes, *, reach: int = 3) -> set[int]:
    """Positions up to ``reach`` bytes before and after the ends of events (their blank lines)."""
    ends = [match.end() for match in _ends_of(re.finditer(rb"\n\n", data))]
    return _inside(data, (end + offset for end in ends for offset in range(-reach, reach + 1)))


def inside_needles(data: bytes, needles: Iterable[bytes] = NEEDLES) -> set[int]:
    """Positions inside, right before and right after occurrences of each needle."""
    found: set[int] = set()
    for needle in needles:
        for match in _ends_of(re.finditer(re.escape(needle), data)):
            found.update(range(match.start(), match.end() + 1))
    return _inside(data, found)


def inside_characters(data: bytes) -> set[int]:
    """Positions inside UTF-8 characters of more than one byte."""
    return _inside(data, (index for index, byte in enumerate(data) if byte & 0xC0 == 0x80))


def delicate_cuts(data: bytes) -> list[int]:
    """Every position where a cut can hurt: around events, inside needles, inside characters; sorted."""
    return sorted(around_events(data) | inside_needles(data) | inside_characters(data))


def random_plans(data: bytes, *, seed: int, count: int) -> Iterator[Plan]:
    """``count`` plans with up to 40 cuts each, the same for the same seed."""
    # Not for secrets: a seeded generator is the point.
    chance = random.Random(seed)
    for _ in range(count if len(data) > 1 else 0):
        cuts = chance.randint(1, min(40, len(data) - 1))
        yield tuple(sorted(chance.sample(range(1, len(data)), cuts)))


def plans(data: bytes, *, seed: int = 0, count: int = 20, short: int = SHORT) -> Iterator[Plan]:
    """Yield every plan a recording is replayed with: whole, byte by byte, cut far apart, then ``count`` random ones.

    Far apart it is cut at every position up to ``short`` bytes, at the delicate ones beyond that.
    """
    yield ()
    if len(data) > 1:
        yield byte_by_byte(data)
    yield from cut_at(range(1, len(data)) if len(data) <= short else delicate_cuts(data))
    yield from random_plans(data, seed=seed, count=count)


def _ends_of(matches: Iterator[re.Match[bytes]]) -> list[re.Match[bytes]]:
    found = list(matches)
    return found if len(found) <= 2 * EACH else [*found[:EACH], *found[-EACH:]]


def _inside(data: bytes, positions: Iterable[int]) -> set[int]:
    return {position for position in positions if 0 < position < len(data)}
