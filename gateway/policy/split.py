"""Which of several models serves a name: by weight, and the same one for a subject each time.

Rule 1: who is served by what is a function of name, weights and subject alone: every process finds the same.
Rule 2: when the weight of one model changes, subjects move to it or away from it, and no other moves.
Rule 3: when several change at once, at most 2d/(1+d) of the subjects move, d being the share that has to; nothing that
        does not remember who was where can do with less.

Every subject draws a waiting time of each model, the shorter the more the model weighs, and goes to the one that would
come first: so each gets its part, and a model that weighs more comes earlier to everybody, by the same factor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from hashlib import blake2b

import msgspec

from gateway.policy.ring import mixed

_RANGE = 2.0**64


class Arm(msgspec.Struct, frozen=True, gc=False):
    """A model that may serve a name: by its own name, on a kind of device (empty: on any)."""

    model: str
    device: str = ""


class Split:
    """The models behind one name, by place in the sequence they were given in. Made once a configuration."""

    def __init__(self, name: str, arms: Sequence[tuple[Arm, float]]) -> None:
        """``arms``: each with its weight, 0 or more, of which at least one is above."""
        self._drawn = [
            (_seed(name, arm), 1.0 / weight, place) for place, (arm, weight) in enumerate(arms) if weight > 0
        ]

    def pick(self, subject: int) -> int:
        """Return the place of the model that serves a subject: any whole number but a hash that processes agree on."""
        if len(self._drawn) == 1:
            return self._drawn[0][2]
        best, least = 0, math.inf
        for seed, scale, place in self._drawn:
            wait = -math.log((mixed(subject ^ seed) + 0.5) / _RANGE) * scale
            if wait < least:
                best, least = place, wait
        return best


def _seed(name: str, arm: Arm) -> int:
    # Of the name too: who is among the few of one name should not be so of every other.
    told = "\0".join((name, arm.model, arm.device))
    return int.from_bytes(blake2b(told.encode(), digest_size=8).digest())
