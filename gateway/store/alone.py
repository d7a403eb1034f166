"""What one replica lets in by its own word while the store is lost.

Rule 1: the policy decides: its share of every limit, everybody, or nobody.
Rule 2: what is let in is noted, and charged to the store when that is found again.
Rule 3: nothing here knows a clock or a connection.
"""

from __future__ import annotations

from collections.abc import Sequence

from gateway.policy.reservation import Need, Short, take
from gateway.policy.token_bucket import SECOND, Bucket, Shape
from gateway.store.holdings import Holdings
from gateway.store.lease import Lease, Seen, Share
from gateway.store.protocol import Draw, Granted, Known, Refused, Standing, Verdict


class Shares(dict[str, Share]):
    """A replica's shares of limits, by the bucket's name, since the store was lost. ``policy`` is by whose word it
    answers then."""

    def __init__(self, policy: Standing, leases: Holdings) -> None:
        self.policy = policy
        self._leases = leases

    def decide(self, draws: Sequence[Draw], who: int, now: int, replicas: int, *, first: bool) -> Verdict:
        """Take every draw, or none, without the store."""
        leases = [self._leases.of(draw.bucket, draw.shape, now) for draw in draws]
        if self.policy is Standing.CLOSED:
            return Refused(tuple(lease.seen(now) for lease in leases), 0, SECOND, standing=self.policy)
        shares = [self._of(draw, lease, replicas, now) for draw, lease in zip(draws, leases, strict=True)]
        if self.policy is Standing.OPEN:
            for draw, lease, share in zip(draws, leases, shares, strict=True):
                share.let_in(draw.amount, now)
                lease.used += draw.amount if draw.shape.slots else 0
            return Granted(Seen(leases, now), self.policy)
        before = [
            Bucket(-lease.used, now) if share.shape.slots else share.bucket
            for lease, share in zip(leases, shares, strict=True)
        ]
        needs = [Need(share.shape, share.amount(draw.amount)) for draw, share in zip(draws, shares, strict=True)]
        taken = take(needs, before, now, who, first=first)
        if isinstance(taken, Short):
            for share, bucket in zip(shares, taken.buckets, strict=True):
                share.bucket = bucket
            return Refused(taken.buckets, taken.index, taken.wait, taken.early, self.policy)
        for draw, lease, share, bucket in zip(draws, leases, shares, taken.buckets, strict=True):
            share.spend(draw.amount, bucket)
            lease.used += draw.amount if draw.shape.slots else 0
        return Granted(Known([share.shape for share in shares], taken.buckets), self.policy)

    def _of(self, draw: Draw, lease: Lease, replicas: int, now: int) -> Share:
        share = self.get(draw.bucket)
        if share is None:
            share = self[draw.bucket] = Share(draw.shape, lease, replicas, now)
        return share

    def back(self, bucket: str, amount: int, now: int) -> int:
        """Give back to a share what was spent of it, or charge it; returns what is not the share's."""
        share = self.get(bucket)
        return amount if share is None else share.back(amount, now)

    def needs(self, bucket: str, now: int, room: bool) -> bool:
        """Return whether a share must not be forgotten; one that need not be is. ``room``: there is some for what was
        spent."""
        share = self.get(bucket)
        if share is None:
            return False
        if room and not share.is_whole(now):
            return True
        del self[bucket]
        return False

    def charges(self, now: int) -> list[tuple[str, Shape, int]]:
        """Return what the store is charged, of which bucket; there are no shares any more."""
        charged = [(name, self._leases[name].shape, share.charge(now)) for name, share in self.items()]
        self.clear()
        return charged
