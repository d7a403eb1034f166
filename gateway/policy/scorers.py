"""How good an endpoint is for a request: each view of it one number from 0 (worst) to 1 (best).

``cost`` puts them together in one unit, seconds: those until the first token, and as seconds what else speaks against
an endpoint (``Weights``). So what is cached is worth the time it saves, to this request and to all that it would hold
up, and never more than the wait at an endpoint that everybody sends such prompts to.
"""

from __future__ import annotations

from collections.abc import Collection

import msgspec

ASSUMED_RATE = 8000.0
"""Tokens a second an engine reads a prompt with, as long as none is known: an 8B model on an older GPU."""
ASSUMED_MOST = 256
"""Sequences an engine serves at once, as long as its limit is not known."""


class Weights(msgspec.Struct, frozen=True, gc=False):
    """What the worst of each score costs beside the seconds until the first token; 0: it does not count.

    The defaults were found on a model of eight and of 64 H100: conversations, one system prompt for most, no reuse at
    all, each from idle to overload. ``reading`` decides how well it does under load, the others matter little.
    """

    load: float = 1.0
    """Seconds a full endpoint loses against an empty one."""
    reading: float = 16.0
    """Seconds all others at a full endpoint lose by each second it reads a prompt: what a cached one saves them."""
    session: float = 0.5
    """What part of the prompt's unknown rest a session's home is taken to hold: other gateways sent the session there.

    Between four gateways it keeps a third more of the prompts cached; one alone knows better, and does best with 0.
    """
    adapter: float = 2.0
    """Seconds until an adapter is there that has to wait for others to leave."""
    slots: float = 0.1
    """Seconds the last free adapter slot is dearer than the first, to requests that take one."""


class Slots(msgspec.Struct, frozen=True, gc=False):
    """An endpoint's places for adapters: which it serves, which wait to be loaded, how many there are."""

    loaded: Collection[str]
    waiting: Collection[str] = ()
    most: int = 1


def used(in_flight: int, most: int, tokens: int, most_tokens: int) -> float:
    """Return what part of an endpoint's limits is used, by sequences or tokens, whichever is more.

    A limit of 0 is not known: tokens do not count then, and sequences against a usual engine's.
    """
    part = in_flight / (most if most > 0 else ASSUMED_MOST)
    if most_tokens > 0:
        by_tokens = tokens / most_tokens
        if by_tokens > part:
            return by_tokens
    return part


def load(used: float) -> float:
    """Score what part of its limits is used, this request included: 1 when empty, 0 when full."""
    return 1.0 - used if used < 1.0 else 0.0


def prefix(matched: int, blocks: int) -> float:
    """Score how much of the prompt the endpoint has read before."""
    return matched / blocks if blocks else 0.0


def session(home: bool) -> float:
    """Score whether the request's session is at home there."""
    return 1.0 if home else 0.0


def adapter(name: str, slots: Slots) -> float:
    """Score how soon the endpoint can serve an adapter: 1 now, 0.8 a slot is free, 0.6 it waits for one, 0 full."""
    if name in slots.loaded:
        return 1.0
    if len(slots.loaded) + len(slots.waiting) < slots.most:
        return 0.8
    return 0.6 if name in slots.waiting else 0.0


def slots(of: Slots) -> float:
    """Score how many of its adapter slots are free."""
    taken = len(of.loaded) + len(of.waiting)
    return max(0.0, 1.0 - taken / of.most) if of.most > 0 else 0.0


def first_token(ahead: float, uncached: float, rate: float) -> float:
    """Return the seconds until the first token: ``ahead`` tokens of others' prompts, then ``uncached`` of this one.

    ``rate`` in tokens a second, above 0.
    """
    return (ahead + uncached) / rate


def ttft(seconds: float, best: float) -> float:
    """Score the seconds until the first token against the best of those compared."""
    return best / seconds if seconds > 0 else 1.0


def cost(weights: Weights, seconds: float, reading: float, used: float) -> float:
    """Return what it costs to send a request to an endpoint, in seconds, adapters aside.

    ``seconds`` until its first token, ``reading`` of them for what is not cached of its own prompt; ``used`` of 1 and
    more is overload.
    """
    return seconds + used * (weights.load + weights.reading * reading)
