"""The admin API over routing: who would serve a request now, and what is thought of every endpoint. Admin keys only."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends, Query, Request

from gateway.api.edge import Edge
from gateway.api.endpoints import Refused, find_key, require_admin
from gateway.api.routes import RELAYED
from gateway.errors import Kind, Refusal, no_model
from gateway.policy.estimate import Estimator
from gateway.policy.routing import Scored
from gateway.policy.split import Arm
from gateway.serving.jobs import job_of, needs_of
from gateway.serving.pool import Endpoint

ROUTE = APIRouter(prefix="/admin", tags=["admin"], dependencies=[Depends(require_admin)])

_ASSUMED_OUTPUT = 256


_decode = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


@ROUTE.post("/route", summary="Explain where a request would be sent")
async def explain_route(
    request: Request,
    model: Annotated[str, Query(description="A model's public name")],
    path: Annotated[str, Query(description="The path it would be sent to")] = "/v1/chat/completions",
    key: Annotated[str | None, Query(description="A key's name or id; without one, as for nobody known")] = None,
    trust_domain: Annotated[str | None, Query(description="The trust domain of its key")] = None,
) -> dict[str, Any]:
    """Tell who would serve it now and why, by this replica's knowledge. Nothing is sent, nothing is learnt of it.

    The body, where there is one, is that of the request, byte for byte: what it says decides whose cache holds it.
    """
    edge: Edge = request.app.state.edge
    if edge.pool.catalogue.resolve(model) is None:
        raise Refused(no_model(model))
    if path not in RELAYED:
        raise Refused(Refusal(Kind.INVALID, f"{path} is no path that is relayed to engines.", "path"))
    body = await request.body()
    try:
        fields = _decode(body) if body else {}
    except (ValueError, RecursionError):
        raise Refused(Refusal(Kind.INVALID, "The body is no JSON object. Send that of a request, or none.")) from None
    admission, salt = edge.admission, trust_domain
    lineup = edge.lineup(model, fields, find_key(edge, key), "") or (Arm(model),)
    served = lineup[0].model
    group = edge.pool.group(served, path, salt is not None, lineup[0].device)
    if served in edge.pool.uneven:
        group = admission.fitting(group, served, needs_of(fields), (0, 0))
    prompt = Estimator().of("", served).prompt(len(body), 0)
    job = job_of(fields, served, salt, (prompt, _ASSUMED_OUTPUT), chosen=True)
    now = edge.deadlines.clock()
    choice = admission.would_choose(group, job, now)
    scored = {one.endpoint: one for one in choice.scored} if choice is not None else {}
    return {
        "model": model,
        "served": served,
        "fallback": [arm.model for arm in lineup[1:]],
        "path": path,
        "endpoint": choice.endpoint.name if choice is not None else None,
        "waiting": admission.queue.waiting(group),
        "blocks": len(job.blocks),
        "data": [_describe(one, scored.get(one), now) for one in group.endpoints],
    }


def _describe(endpoint: Endpoint, scored: Scored[Endpoint] | None, now: float) -> dict[str, Any]:
    told: dict[str, Any] = {
        "name": endpoint.name,
        "state": _state(endpoint, now),
        "in_flight": endpoint.in_flight,
        "limit": endpoint.most_now,
        "tokens": endpoint.tokens,
        "prompts_ahead": endpoint.prefilling,
        "prompt_tokens_per_second": round(endpoint.prefill_rate),
    }
    if scored is not None:
        told |= {
            "cost_ms": round(scored.cost * 1000, 3),
            "first_token_ms": round(scored.seconds * 1000, 3),
            "blocks_cached": scored.matched,
            "home": scored.home,
        }
    return told


def _state(endpoint: Endpoint, now: float) -> str:
    if not endpoint.healthy:
        return "down"
    if endpoint.holds:
        return "kept out"
    if not endpoint.trusted(now):
        return "ejected"
    return "ready" if endpoint.available and endpoint.room(0) else "full"
