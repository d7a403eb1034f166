"""The server as one replica knows it: its time, its buckets' generation, who else lives, and how it is called.

Rule 1: time is the server's as it last told it, carried on by a clock that nobody sets.
Rule 2: each call says whose it is, of which connection (the fence) and of which generation: what is late is void, and
        that something was forgotten is noticed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from gateway.store.link import Done, Link
from gateway.store.protocol import Turn
from gateway.store.scripts import Script, Told


def steady() -> int:
    """Return microseconds by a clock that nobody sets."""
    return time.monotonic_ns() // 1000


class Session:
    """What a replica of this ``name`` knows of the server behind ``link``. ``now`` is the time until that has told its
    own; ``server_clock`` stands in for it in tests. ``heard`` is told when it has forgotten everything."""

    def __init__(
        self,
        link: Link,
        name: str,
        namespace: str,
        now: int,
        live: int,
        heard: Callable[[Turn], None],
        server_clock: Callable[[], int] | None,
    ) -> None:
        self._link = link
        self.name = name
        # One hash tag: on a Cluster all of it is in one slot.
        self.prefix = f"{{{namespace}}}:b:"
        """Of the keys of buckets."""
        self._space = f"{{{namespace}}}:"
        self._head = tuple(self._space + what for what in ("generation", "replicas", f"r:{name}"))
        self._heard = heard
        self._server_clock = server_clock
        self.ahead = now - steady()
        """Of the steady clock, the server's is."""
        self.fence = now
        self.generation = ""
        self.live = live
        """Replicas, this one included."""
        self.alive_until = 0
        """When the others take this one for dead."""
        self.serving = False
        """Whether what former connections left open is settled."""

    def now(self) -> int:
        """Return the server's time, as far as it is known here."""
        return steady() + self.ahead if self._server_clock is None else self._server_clock()

    def call(self, script: Script, buckets: Sequence[str], words: Sequence[str], done: Done) -> None:
        """Have a script run on buckets; only while the link is up."""
        self._call(script, [self.prefix + bucket for bucket in buckets], words, done)

    def speak(self, script: Script, keys: Sequence[str], words: Sequence[str | bytes], done: Done) -> None:
        """Have a script run on keys that are no buckets; only while the link is up."""
        self._call(script, [self._space + key for key in keys], words, done)

    def _call(self, script: Script, keys: Sequence[str], words: Sequence[str | bytes], done: Done) -> None:
        now = "" if self._server_clock is None else str(self._server_clock())
        head = (now, self.generation, self.name, str(self.fence))
        self._link.call(script, (*self._head, *keys), (*head, *words), done)

    def note(self, told: Told) -> None:
        """Learn the time, the replicas, and whether the store has forgotten everything."""
        self._learn(told)
        if self.serving and told.generation != self.generation:
            self._heard(Turn.EMPTIED)
            self.generation = told.generation
            self._link.drop()

    def begin(self, told: Told, lifetime: int) -> None:
        """Learn all of it, and that this replica lives."""
        self._learn(told)
        self.generation = told.generation
        self.alive_until = told.now + lifetime

    def _learn(self, told: Told) -> None:
        self.ahead = told.now - steady()
        self.live = told.live
