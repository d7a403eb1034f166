"""What this gateway and the others that share a store tell each other of those who wait: whom they served, so that
tenants share fairly over all of them.

Rule 1: never on a request's way; without others nothing is noted.
Rule 2: what cannot be read is somebody else's version: it is counted, and all goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec

from gateway.metrics import Metrics
from gateway.policy.fairness import Charge, Deltas
from gateway.policy.queue import Charges, Queue

MOST_TENANTS = 256
"""Of a message. Those beyond it are told the next time."""

_Lines = list[tuple[str, int, dict[str, Charge]]]
"""A message: name of a line, class, and what each tenant was charged, by its weight."""
_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(_Lines)


class Sharing:
    """The gateway as a member of those who share a store."""

    def __init__(self, queue: Queue, metrics: Metrics, clock: Callable[[], float]) -> None:
        self._queue = queue
        self._metrics = metrics
        self._clock = clock
        queue.deltas = Deltas()

    def tell(self) -> bytes:
        """Return what tenants were charged here and the others have not been told, and who waits."""
        queue, metrics = self._queue, self._metrics
        charges = queue.tell(MOST_TENANTS)
        if queue.deltas is not None and queue.deltas.lost:
            metrics.shares_lost["untold"] += queue.deltas.lost
            queue.deltas.lost = 0
        return _encoder.encode([(line, rank, tenants) for (line, rank), tenants in charges.items()]) if charges else b""

    def told(self, messages: Iterable[bytes]) -> None:
        """Charge tenants for what they were given elsewhere."""
        charges: Charges = {}
        for message in messages:
            try:
                lines = _decoder.decode(message)
            except msgspec.MsgspecError:
                self._metrics.shares_lost["unread"] += 1
                continue
            for line, rank, tenants in lines:
                known = charges.setdefault((line, rank), {})
                for tenant, charge in tenants.items():
                    known[tenant] = known[tenant].with_more(charge) if tenant in known else charge
        if charges:
            self._queue.told(charges, self._clock())

    def missed(self) -> None:
        """Take that this gateway was away for longer than messages are kept."""
        self._metrics.shares_lost["missed"] += 1
