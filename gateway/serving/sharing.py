"""What this gateway has in common with the others that share a store: tenants share fairly over all of them, and no
endpoint gets more of them together than it may have at once.

Rule 1: never on a request's way; without others nothing is noted.
Rule 2: what cannot be read is somebody else's version: it is counted, and all goes on.
Rule 3: when it has too little of an endpoint it asks at once, unless it was just told that there is no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice

import msgspec

from gateway.metrics import Metrics
from gateway.policy.fairness import Charge, Deltas
from gateway.policy.queue import Charges
from gateway.policy.token_bucket import SECOND
from gateway.serving.admission import Admission
from gateway.serving.pool import Endpoint, Group
from gateway.store.protocol import Claim, Grant, Place

MOST_TENANTS = 256
"""Of a message. Those beyond it are told the next time."""
MOST_CLAIMS = 64
"""Of a call. Those beyond it are asked for with the next."""

_Lines = list[tuple[str, int, dict[str, Charge]]]
"""A message: name of a line, class, and what each tenant was charged, by its weight."""
_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(_Lines)


class Sharing:
    """The gateway as a member of those who share a store. ``hurry`` has the store ask soon."""

    def __init__(
        self, admission: Admission, metrics: Metrics, clock: Callable[[], float], hurry: Callable[[], None]
    ) -> None:
        self._admission = admission
        self._pool = admission.pool
        self._queue = admission.queue
        self._metrics = metrics
        self._clock = clock
        self._hurry = hurry
        self._short: dict[Endpoint, None] = {}
        """Of these it wants more at once."""
        self._known: dict[Endpoint, None] = {}
        """Of which something may be recorded."""
        self._claimed: list[Endpoint] = []
        self._next = 0
        self._place = Place("", 1, 0)
        self._queue.deltas = Deltas()
        admission.on_wait.append(self._on_wait)

    # --- who was served ---------------------------------------------------------------------------------------------

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

    # --- endpoints --------------------------------------------------------------------------------------------------

    def _on_wait(self, group: Group) -> None:
        for endpoint in group.endpoints:
            part = endpoint.part
            if part is not None and not part.dry and endpoint.in_flight >= endpoint.share < part.most:
                self._short[endpoint] = None
        if self._short:
            self._hurry()

    def claims(self, place: Place) -> list[Claim]:
        """Return what of the endpoints is asked for: of those it is short of, and of others in turn. Those that are no
        more are given up as their requests end."""
        self._pool.leased, self._place = True, place
        there = [endpoint for endpoint in self._pool.endpoints if endpoint.part is not None]
        names = {endpoint.name for endpoint in there}
        known = there + [endpoint for endpoint in self._known if endpoint.name not in names]
        self._known = dict.fromkeys(known)
        begin = self._next % len(known) if known else 0
        in_turn = dict.fromkeys([*self._short, *known[begin:], *known[:begin]])
        self._claimed = [endpoint for endpoint in islice(in_turn, MOST_CLAIMS) if endpoint in self._known]
        self._next = begin + MOST_CLAIMS
        self._short.clear()
        return [self._claim(endpoint, gone=endpoint.name not in names) for endpoint in self._claimed]

    def _claim(self, endpoint: Endpoint, *, gone: bool) -> Claim:
        part, place, busy = endpoint.part, self._place, endpoint.in_flight
        assert part is not None
        if gone:
            return Claim(endpoint.name, part.most, 0, busy, busy, 0)
        asked = part.ask(busy, self._admission.waiting_for(endpoint), place.name, place.live, place.now // SECOND)
        endpoint.lease(part.share, place.live)
        return Claim(endpoint.name, part.most, part.held, busy, asked, part.want)

    def granted(self, grants: Sequence[Grant]) -> bool:
        """Use what was granted; who waits for it has his turn. Tell whether others want what is too much here."""
        place, too_much = self._place, False
        there = set(self._pool.endpoints)
        for endpoint, grant in zip(self._claimed, grants, strict=True):
            part = endpoint.part
            assert part is not None
            if endpoint not in there:
                if not grant.held:
                    del self._known[endpoint]
                continue
            part.granted(grant.held, grant.others)
            more = part.share > endpoint.share
            endpoint.lease(part.share, place.live)
            if more:
                self._admission.freed(endpoint)
            fair = part.target(place.name, place.live, place.now // SECOND)
            too_much = too_much or part.held > max(endpoint.in_flight, fair)
        return too_much

    def alone(self, gateways: int) -> None:
        """Use an equal part of each endpoint."""
        self._pool.share_among(gateways)
        for endpoint in self._pool.endpoints:
            self._admission.freed(endpoint)
