"""All that one replica holds of shared buckets, by their names.

Rule 1: what is held lets a request in only if all its draws fit.
Rule 2: slots are held as long as the others hear of this replica; after that only those in use are its own.
Rule 3: nothing here knows a clock or a connection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice

from gateway.policy.token_bucket import Shape
from gateway.store.lease import Lease, Seen
from gateway.store.protocol import Granted

_LOOKED_AT = 8
"""Old leases looked at for each new one."""


class Holdings(dict[str, Lease]):
    """The leases of a replica. Beyond ``most`` those are forgotten of which nothing is held and that nobody else needs:
    ``needed`` is asked with the name, the time, and whether there is room for what is merely worth keeping."""

    def __init__(self, most: int, needed: Callable[[str, int, bool], bool], *, leased: bool) -> None:
        self._most = most
        self._needed = needed
        self.leased = leased
        """Whether anything is held at all, or the store asked each time."""
        self.holding: set[str] = set()
        self._forgone: set[str] = set()

    def of(self, bucket: str, shape: Shape, now: int) -> Lease:
        """Return the lease of a bucket, at first an empty one."""
        lease = self.get(bucket)
        if lease is None:
            if len(self) >= self._most:
                self._forget(now)
            lease = self[bucket] = Lease(shape, now)
        lease.shape = shape
        return lease

    def _forget(self, now: int) -> None:
        for name in list(islice(self, _LOOKED_AT)):
            lease = self.pop(name)
            needed = lease.held or lease.used or name in self.holding or name in self._forgone
            if needed or self._needed(name, now, len(self) < 2 * self._most):
                self[name] = lease

    # --- spent and kept ---------------------------------------------------------------------------------------------

    def take(self, buckets: Sequence[str], amounts: Sequence[int], now: int, alive_until: int) -> Granted | None:
        """Let a request in by what is held, if that is enough."""
        if not self.leased:
            return None
        found = []
        for bucket, amount in zip(buckets, amounts, strict=True):
            lease = self.get(bucket)
            if lease is None or lease.held < amount:
                return None
            # Slots that are held by somebody not heard of are others' by now.
            if lease.shape.slots and now >= alive_until:
                return None
            found.append(lease)
        for lease, amount in zip(found, amounts, strict=True):
            lease.spend(amount, now)
        return Granted(Seen(found, now))

    def add(self, bucket: str, amount: int) -> None:
        """Hold so much more, which was taken out of the bucket."""
        self[bucket].held += amount
        self.holding.add(bucket)

    def keep(self, bucket: str, amount: int, now: int, sharers: int) -> int:
        """Hold what is worth it of what comes back, or pay what is owed; returns what is left for the store."""
        if not self.leased or not amount:
            return amount
        lease = self[bucket]
        amount -= lease.keep(amount, now, sharers)
        if lease.held:
            self.holding.add(bucket)
        return amount

    def surplus(self, now: int, sharers: int) -> list[tuple[str, Lease, int]]:
        """Return what is too much, or lies idle, of which bucket; it is held no more."""
        found = []
        for name in list(self.holding):
            lease = self[name]
            over = lease.surplus(now, sharers)
            if over:
                found.append((name, lease, over))
            if not lease.held:
                self.holding.discard(name)
        return found

    def empty(self) -> list[tuple[str, Lease, int]]:
        """Return all that is held, of which bucket; it is held no more."""
        found = []
        for name in self.holding:
            lease = self[name]
            held, lease.held = lease.held, 0
            if held:
                found.append((name, lease, held))
        return found

    # --- slots ------------------------------------------------------------------------------------------------------

    def forgo_slots(self, owed: Sequence[str]) -> None:
        """Only what is in use is still this replica's: of what it held for later others may have been given by now.
        ``owed``: whose slots were on their way back, and are forgone as well."""
        held = [name for name in self.holding if self[name].shape.slots]
        for name in held:
            self[name].held = 0
            self.holding.discard(name)
        self._forgone.update(held, owed)

    def slots(self, owed: Callable[[str], int]) -> dict[str, int]:
        """Return what the store should hold of this replica's slots, those still ``owed`` to it included."""
        held = {}
        for name, lease in self.items():
            if lease.shape.slots:
                amount = lease.used + lease.held + owed(name)
                if amount > 0 or name in self._forgone:
                    held[name] = amount
        return held

    def slots_said(self) -> None:
        """The store knows by now what is held of the slots."""
        self._forgone.clear()
