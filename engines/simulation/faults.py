"""What may go wrong with a request, on demand. Pure, but for the random generator it is given.

A fault is JSON: ``{"kind": "reset", "after_tokens": 5, "count": 1}``. It is met by the next ``count`` requests, or by
each with probability ``rate``; with ``match`` only by those whose model or prompt contains that text. Kinds:

    exit         the process ends at once (after so many tokens), as if it were killed
    reset        the connection is reset
    close        the connection is closed in the middle of the answer
    hang         nothing more comes; the connection stays open
    error_event  a stream gets vLLM's error event and ``[DONE]``, another request a 500
    delay        nothing comes for ``seconds``, then all as usual
    refuse       answered with ``status`` and ``message``
    impostor     answered as if ``adapter`` had been asked for (``null``: the base model)

``after_tokens`` 0 is before the first byte of the answer.
"""

from __future__ import annotations

import random
from typing import Literal

import msgspec

MAX_FAULTS = 100

Kind = Literal["exit", "reset", "close", "hang", "error_event", "delay", "refuse", "impostor"]


class Fault(msgspec.Struct, forbid_unknown_fields=True):
    """One fault, see above. ``hits`` counts the requests that met it."""

    kind: Kind
    count: int | None = None
    rate: float | None = None
    match: str | None = None
    after_tokens: int = 0
    seconds: float = 1.0
    status: int = 500
    message: str = "EngineCore encountered an issue. See stack trace (above) for the root cause."
    adapter: str | None = None
    hits: int = 0

    def __post_init__(self) -> None:
        if (self.count is None) == (self.rate is None):
            raise ValueError("give either count or rate")


class Faults:
    """The faults that are in force."""

    def __init__(self, chance: random.Random) -> None:
        self.known: list[Fault] = []
        self._chance = chance

    def add(self, fault: Fault) -> None:
        """Put a fault in force. ValueError when there are too many."""
        if len(self.known) >= MAX_FAULTS:
            raise ValueError(f"at most {MAX_FAULTS} faults")
        self.known.append(fault)

    def clear(self) -> None:
        """Let nothing go wrong from now on; requests that met a fault keep it."""
        self.known.clear()

    def meet(self, model: str, prompt: str) -> Fault | None:
        """Return the fault that a request meets."""
        for fault in self.known:
            if fault.match is not None and fault.match not in model and fault.match not in prompt:
                continue
            if fault.rate is not None:
                met = self._chance.random() < fault.rate
            else:
                met = fault.count is not None and fault.hits < fault.count
            if met:
                fault.hits += 1
                return fault
        return None
