"""How much an endpoint is given at once: a limit that is learnt from how it answers.

No engine is asked: the time to the first token and between tokens, as the gateway itself sees them, against what they
are to be. A window of observations decides one step. Too slow: less, but only after the last step has taken effect.
Fast enough, and the limit was what kept it from more: more. The further from the target, the longer the step: a long
one near it lets in so many at once that they make each other slow, and then nobody until as many have ended. The limit
is a value, a step returns the next one; times in seconds.

What an engine says of itself (how full its KV cache is, how many wait in it) corrects the limit while it is fresh, and
is not missed when it is not there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf

LEAST_SPEED = 2000.0
"""Tokens of a prompt a second that an engine is taken to read by itself at least, however slow it was seen to be."""


@dataclass(frozen=True, slots=True)
class Targets:
    """What 95 of 100 are to keep to; None: not looked at."""

    ttft: float | None = None
    """To the first token, from when it is sent to the engine."""
    inter_token: float | None = None

    def __bool__(self) -> bool:
        return self.ttft is not None or self.inter_token is not None


@dataclass(frozen=True, slots=True)
class ConcurrencyRules:
    """The limit stays between ``least`` and ``most`` sequences and begins with ``start``; ``window``: seconds that a
    step looks at, and ``samples`` that it needs; ``back``: what is left of a limit under which it was twice as slow as
    wanted or worse; ``growth``: the part of it that is added where it was no time at all."""

    targets: Targets = Targets()
    start: int = 16
    least: int = 1
    most: int = 1024
    window: float = 1.0
    samples: int = 20
    back: float = 0.85
    growth: float = 0.1


@dataclass(frozen=True, slots=True)
class Told:
    """What an engine said of itself: how many wait in it, the share of its KV cache in use (None: it does not say), and
    the tokens that the gateway had outstanding there then."""

    waiting: int
    cache_used: float | None
    tokens: int
    at: float


@dataclass(frozen=True, slots=True)
class Limit:
    """What an endpoint may have at once. ``tokens``: of prompts and answers together, None while nothing is known."""

    sequences: float
    tokens: float | None = None
    until: float = 0.0
    """When the window is over that the next step looks at."""
    told: float = 0.0
    """When the engine said what bounds the tokens."""
    settled: float = inf
    """Sequences in flight at which the last step down has taken effect; more than the limit where it was stretched."""

    def room(self, in_flight: int, tokens: int, more: int) -> bool:
        """Tell whether one more of so many tokens may be sent. One alone always may."""
        if not in_flight:
            return True
        if in_flight + 1 > self.sequences:
            return False
        return self.tokens is None or tokens + more <= self.tokens


STRETCH = 0.25
"""By what part a learnt limit may be exceeded for whoever's beginning an engine holds."""


def stretched(limit: Limit, in_flight: int, rules: ConcurrencyRules) -> bool:
    """Tell whether a request may be sent beyond what was learnt, since what it needs most is there: it costs the engine
    little, and anywhere else all of it would be read. What the rules allow at most is never exceeded."""
    return in_flight + 1 <= min(float(rules.most), limit.sequences * (1.0 + STRETCH))


class Window:
    """What was seen of an endpoint since the last step: large state with one owner, the endpoint."""

    __slots__ = ("_every", "_passed", "gaps", "peak", "ttfts")

    MOST = 512
    """Observations of a kind that are kept: of more gaps every second, fourth, eighth ... so that they are spread over
    the whole window. A hundred streams have as many in a few steps, and one long prompt among those is no p95."""

    def __init__(self) -> None:
        self.ttfts: list[float] = []
        self.gaps: list[float] = []
        self.peak = 0
        """Most sequences it had at once."""
        self._every = 1
        self._passed = 0

    def first_token(self, seconds: float) -> None:
        """Note how long a first token took."""
        if len(self.ttfts) < self.MOST:
            self.ttfts.append(seconds)

    def gap(self, seconds: float) -> None:
        """Note a time between two tokens."""
        self._passed += 1
        if self._passed < self._every:
            return
        self._passed = 0
        self.gaps.append(seconds)
        if len(self.gaps) >= self.MOST:
            del self.gaps[::2]
            self._every *= 2

    def clear(self, in_flight: int) -> None:
        """Begin anew."""
        self.ttfts.clear()
        self.gaps.clear()
        self._every, self._passed = 1, 0
        self.peak = in_flight


def p95(values: list[float]) -> float:
    """Return what 95 of 100 do not exceed, of at least one."""
    return sorted(values)[(len(values) * 95 + 99) // 100 - 1]


def first_limit(rules: ConcurrencyRules) -> Limit:
    """Return what an endpoint begins with: without targets all it may ever have."""
    sequences = min(rules.most, max(rules.least, rules.start)) if rules.targets else rules.most
    return Limit(float(sequences))


def can_keep(prompt: int, speed: float, targets: Targets) -> bool:
    """Tell whether so many tokens can be read in time by an engine that has nothing else to do; ``speed``: the greatest
    that was seen of it. What cannot says nothing of how much it may have at once."""
    return targets.ttft is None or prompt <= targets.ttft * max(speed, LEAST_SPEED)


def pressure(seen: Window, rules: ConcurrencyRules) -> float | None:
    """Return how slow it was, 1 being what is wanted; None: too little was seen to say."""
    targets, worst = rules.targets, 0.0
    known = False
    for values, target in ((seen.ttfts, targets.ttft), (seen.gaps, targets.inter_token)):
        if target is not None and len(values) >= rules.samples:
            known = True
            worst = max(worst, p95(values) / target)
    return worst if known else None


def step(limit: Limit, seen: Window, in_flight: int, now: float, rules: ConcurrencyRules) -> Limit:
    """Return the limit after a window; the same one while it is not over, or nothing can be said of it.

    ``in_flight``: what the endpoint has now.
    """
    if now < limit.until:
        return limit
    slow = pressure(seen, rules)
    if slow is None:
        return limit
    sequences, settled = limit.sequences, limit.settled
    if slow > 1.0:
        # What was sent under the limit before is still there: it is waited for, or the limit would fall for one fault
        # as often as windows go by.
        # And with as few as it always may have it was not their number that made it slow.
        if in_flight <= max(sequences, settled) and seen.peak > rules.least:
            left = 1.0 - (1.0 - rules.back) * min(1.0, slow - 1.0)
            sequences = max(rules.least, min(sequences, seen.peak) * left)
            settled = in_flight * left
    else:
        settled = inf
        if seen.peak + 1 > sequences:
            sequences += max(1.0, sequences * rules.growth * (1.0 - slow))
    return bounded(replace(limit, sequences=sequences, settled=settled, until=now + rules.window), rules)


def bounded(limit: Limit, rules: ConcurrencyRules) -> Limit:
    """Return a limit within what the rules allow."""
    return replace(limit, sequences=min(float(rules.most), max(float(rules.least), limit.sequences)))


FULL = 0.95
"""Share of a KV cache that may be filled by what is sent: beyond it an engine takes away from one what it gives
another."""
TELLING = 0.2
"""A cache that is emptier than this says little of its size."""
TRUSTED = 0.5
"""Weight of the newest word of a cache's size."""


def hear(limit: Limit, told: Told, now: float, oldest: float) -> Limit:
    """Return the limit corrected by an engine's own word, unless that is older than ``oldest`` seconds.

    A cache that is nearly empty bounds nothing: by what it was bound before it might stay empty for ever.
    """
    if now - told.at > oldest or told.cache_used is None:
        return limit
    if told.cache_used < TELLING:
        return limit if limit.tokens is None else replace(limit, tokens=None)
    if told.tokens <= 0:
        return limit
    size = told.tokens / told.cache_used * FULL
    known = limit.tokens
    return replace(limit, tokens=size if known is None else known + (size - known) * TRUSTED, told=told.at)


def without_old_word(limit: Limit, now: float, oldest: float) -> Limit:
    """Return the limit without what its engine said longer ago than ``oldest`` seconds."""
    return limit if limit.tokens is None or now - limit.told <= oldest else replace(limit, tokens=None, told=0.0)
