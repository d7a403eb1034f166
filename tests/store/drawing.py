"""Stores asked by draws: a bucket's name, what it is, and how much, in one value."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from gateway.policy.token_bucket import Bucket
from gateway.store.protocol import Buckets, Draw, Store, Verdict


def split(draws: Sequence[Draw]) -> tuple[Buckets, list[int]]:
    """Return the buckets and what is drawn from each."""
    buckets = Buckets(tuple(draw.bucket for draw in draws), tuple(draw.shape for draw in draws))
    return buckets, [draw.amount for draw in draws]


def take(store: Store, draws: Sequence[Draw], who: int, *, first: bool = False) -> Verdict | asyncio.Future[Verdict]:
    """Reserve every draw, or none."""
    buckets, amounts = split(draws)
    return store.reserve(buckets, amounts, lambda: who, first=first)


def back(store: Store, draws: Sequence[Draw]) -> None:
    """Give back every draw."""
    store.settle(*split(draws))


async def look(store: Store, draws: Sequence[Draw]) -> tuple[Bucket, ...]:
    """Look at the buckets of draws."""
    return await store.look(split(draws)[0])
