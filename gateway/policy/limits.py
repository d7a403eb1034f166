"""What a limit counts and what a request costs it.

Amounts are whole numbers of 1/1000: of a request, of a weighted token, of a micro-dollar (so money is counted in
nano-dollars), of a slot, of a token in flight.
"""

from __future__ import annotations

from enum import IntEnum

import msgspec

from gateway.policy.token_bucket import Shape

UNIT = 1000
"""Units in one request, token, micro-dollar or slot."""


class Counts(IntEnum):
    """What a limit counts; the position in a request's amounts."""

    REQUESTS = 0
    TOKENS = 1
    MONEY = 2
    CONCURRENT = 3
    IN_FLIGHT = 4


class Rates(msgspec.Struct, frozen=True, gc=False):
    """What one token of each kind costs, in 1/1000."""

    input: int = UNIT
    cached: int = UNIT
    output: int = UNIT
    reasoning: int = UNIT

    def cost(self, prompt: int, cached: int, output: int, reasoning: int) -> int:
        """Return the cost of a request: ``cached`` are among ``prompt``, ``reasoning`` among ``output``."""
        if cached > prompt:
            cached = prompt
        if reasoning > output:
            reasoning = output
        return (
            (prompt - cached) * self.input
            + cached * self.cached
            + (output - reasoning) * self.output
            + reasoning * self.reasoning
        )


FREE = Rates(0, 0, 0, 0)
PLAIN = Rates()
"""Every token counts for one; like ``FREE`` known by what it is, not by what is in it."""


class Limit(msgspec.Struct, frozen=True):
    """One limit that applies to a request.

    ``bucket`` is its name in the store; ``scope`` and ``subject`` say whose it is (``tenant``, ``search``), ``said``
    what it counts in a message (``tokens per min (TPM)``), ``source`` where it was declared. ``budget``: money or
    tokens to be spent, for which waiting is no use.
    """

    bucket: str
    counts: Counts
    shape: Shape
    scope: str
    subject: str
    said: str
    source: str
    budget: bool = False
    cut: bool = False
    """Whether an answer is cut where the budget ends, instead of refused where it might not last."""


class Size(msgspec.Struct, frozen=True, gc=False):
    """How large a request is, estimated or known: tokens."""

    prompt: int
    output: int
    cached: int = 0
    reasoning: int = 0


def amounts(size: Size, weights: Rates, prices: Rates) -> tuple[int, int, int, int, int]:
    """Return what a request takes from a limit of each kind (``Counts``)."""
    tokens = (size.prompt + size.output) * UNIT
    if weights is PLAIN and prices is FREE:
        return UNIT, tokens, 0, UNIT, tokens
    return (
        UNIT,
        weights.cost(size.prompt, size.cached, size.output, size.reasoning),
        prices.cost(size.prompt, size.cached, size.output, size.reasoning),
        UNIT,
        tokens,
    )
