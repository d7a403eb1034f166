"""What goes back to the store, or is owed to it.

Rule 1: it is noted here and leaves a little later, in batches; or at once, with the next question about its bucket.
Rule 2: one batch is on its way at a time, and known by its number: sent again it counts once.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import islice

from gateway.policy.token_bucket import Shape
from gateway.store.holdings import Holdings
from gateway.store.scripts import GIVE, Told, need_words
from gateway.store.session import Session
from gateway.store.timing import Timer

FLUSH = (0.02, 0.05)
"""Seconds between something given back and its way to the store."""
MOST_IN_BATCH = 500


class Outbox:
    """What is noted, by the bucket's name, and the ``batch`` on its way; it is as long as what is noted. ``watch`` is
    told when somebody waits for the server."""

    def __init__(
        self, session: Session, leases: Holdings, watch: Callable[[], None], first: int, chance: random.Random
    ) -> None:
        self._session = session
        self._leases = leases
        self._watch = watch
        self._chance = chance
        self._noted: dict[str, tuple[Shape, int]] = {}
        self.batch: dict[str, tuple[Shape, int]] = {}
        self._number = first
        self._timer = Timer(self.flush)

    def __len__(self) -> int:
        return len(self._noted)

    def __contains__(self, bucket: str) -> bool:
        return bucket in self._noted

    def post(self, bucket: str, shape: Shape, amount: int) -> None:
        """Note what goes back; below zero, what is owed."""
        noted = self._noted.get(bucket)
        self._noted[bucket] = (shape, amount if noted is None else noted[1] + amount)
        self._leases[bucket].given(amount)
        self.flush_soon()

    def owed(self, bucket: str) -> int:
        """Return what is noted of a bucket."""
        noted = self._noted.get(bucket)
        return 0 if noted is None else noted[1]

    def take_along(self, bucket: str) -> int:
        """Return what is noted of a bucket, which goes another way."""
        noted = self._noted.pop(bucket, None)
        return 0 if noted is None else noted[1]

    def forgo_slots(self) -> list[str]:
        """Forget the slots on their way back, because those in use are said anew; returns whose they were."""
        slots = [name for name, (shape, _) in self._noted.items() if shape.slots]
        for name in slots:
            del self._noted[name]
        return slots

    # --- batches ----------------------------------------------------------------------------------------------------

    def flush_soon(self) -> None:
        """Send a batch in a moment, if there is anything for one."""
        if self._noted and self._session.serving and not self.batch and not self._timer.is_set:
            self._timer.set(self._chance.uniform(*FLUSH))

    def flush(self) -> None:
        """Send a batch now, unless one is on its way."""
        if not self._session.serving or self.batch or not self._noted:
            return
        for bucket in list(islice(self._noted, MOST_IN_BATCH)):
            self.batch[bucket] = self._noted.pop(bucket)
        self._number += 1
        self._send()

    def send_again(self) -> None:
        """Send the batch whose answer was lost."""
        if self.batch:
            self._send()

    def stop(self) -> None:
        """Send nothing by itself any more."""
        self._timer.cancel()

    def _send(self) -> None:
        needs = [need_words(shape, back=amount) for shape, amount in self.batch.values()]
        self._watch()
        self._session.call(GIVE, list(self.batch), (str(self._number), *needs), self._given)

    def _given(self, told: Told | None) -> None:
        if told is None:
            return  # Sent again, with its number, when there is a connection.
        self._session.note(told)
        self.batch.clear()
        self.flush_soon()
