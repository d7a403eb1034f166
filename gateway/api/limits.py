"""The admin API over limits: which apply to a key on a model, where each comes from, what is left. Admin keys only."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request

from gateway.api.edge import Edge
from gateway.api.endpoints import Refused, find_key, require_admin
from gateway.errors import no_model
from gateway.policy.limits import UNIT, Counts, Limit
from gateway.policy.token_bucket import NEVER, SECOND, Bucket, spare, wait

LIMITS = APIRouter(prefix="/admin", tags=["admin"], dependencies=[Depends(require_admin)])


@LIMITS.get("/limits", summary="Explain which limits apply to a key on a model")
async def explain_limits(
    request: Request,
    model: Annotated[str, Query(description="A model's public name")],
    key: Annotated[str | None, Query(description="A key's id or name; none: a client without a key")] = None,
    client: Annotated[str, Query(description="The address of a client without a key")] = "127.0.0.1",
) -> dict[str, Any]:
    """Tell every limit a request would fall under, nearest subject first, and what this replica knows is left of it."""
    edge: Edge = request.app.state.edge
    if edge.pool.catalogue.resolve(model) is None:
        raise Refused(no_model(model))
    who = find_key(edge, key)
    plan = edge.plan(who, model, client, edge.lineup(model, {}, who, client))
    limits = [_describe(limit, bucket) for limit, bucket in await edge.limiter.explain(plan)]
    return {
        "object": "list",
        "key": who.public_id or None,
        "tenant": who.tenant,
        "organisation": plan.organisation or None,
        "model": model,
        "standing": edge.limiter.standing.value,
        "data": limits,
    }


def _describe(limit: Limit, bucket: Bucket) -> dict[str, Any]:
    shape = limit.shape
    full = wait(shape, bucket, shape.capacity, bucket.at)
    return {
        "bucket": limit.bucket,
        "scope": limit.scope,
        "subject": limit.subject,
        "counts": limit.said,
        "declared_in": limit.source,
        "holds": _amount(limit, shape.capacity),
        "left": _amount(limit, spare(shape, bucket)),
        "full_again_in": None if full >= NEVER else full / SECOND,
        "promised": len(bucket.promises),
        "budget": limit.budget,
    }


def _amount(limit: Limit, amount: int) -> float:
    """Return whole requests, tokens or slots; dollars of money."""
    return amount / UNIT / 1_000_000 if limit.counts is Counts.MONEY else amount / UNIT
