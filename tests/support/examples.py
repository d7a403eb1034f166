"""How property tests draw: the same examples on every run, few in the suite and many where there is time."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

TIMES = int(os.environ.get("FOREBAY_EXAMPLES", "1"))
"""`make examples` sets it: so many times what the suite draws."""


def examples(few: int) -> int:
    """Return how many examples to draw where the suite draws a few."""
    return few * TIMES


def draw_the_same() -> None:
    """Have every property test, in whatever room, draw the same on every run. An example's time says how busy the
    machine is, so that nothing is concluded from it."""
    settings.register_profile(
        "forebay",
        deadline=None,
        database=None,
        derandomize=True,
        max_examples=examples(40),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )
    settings.load_profile("forebay")
