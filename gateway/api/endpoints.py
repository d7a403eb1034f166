"""The admin API over endpoints: see them, keep requests from them, restart what has a minder. Admin keys only."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Request
from pydantic import BaseModel, ConfigDict, Field

from engines.minder import DRAINING, MAX_WAIT, READY, SERVING
from engines.minding import MinderError
from gateway.api.auth import ANONYMOUS
from gateway.api.edge import Edge
from gateway.errors import Kind, Refusal
from gateway.serving.minded import Minders
from gateway.serving.pool import Endpoint
from gateway.state.keys import KeyRecord

HOLD = "command"
"""Under which name an operator keeps requests from an endpoint."""

Seconds = Annotated[float, Field(ge=0, le=MAX_WAIT)]


class Refused(Exception):  # noqa: N818 - a refusal on its way to the table, not an error of ours
    """A refusal raised inside a FastAPI route."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


class Action(StrEnum):
    """What can be done with an endpoint."""

    CORDON = "cordon"
    UNCORDON = "uncordon"
    DRAIN = "drain"
    EJECT = "eject"
    RESTART = "restart"
    STOP = "stop"


class Patience(BaseModel):
    """How long a restart or stop waits: for requests under way, then from SIGTERM to SIGKILL. In seconds."""

    model_config = ConfigDict(extra="forbid")

    drain: Seconds = 60.0
    grace: Seconds = 10.0


def _edge(request: Request) -> Edge:
    edge: Edge = request.app.state.edge
    return edge


def find_key(edge: Edge, name: str | None) -> KeyRecord:
    """Return the key of an id or name; None: of whoever has none. Raises Refused unless there is exactly one."""
    if name is None:
        return ANONYMOUS
    found = edge.authenticator.named(name)
    if len(found) != 1:
        told = f"{len(found)} keys are called {name!r}; name one by its id." if found else f"There is no key {name!r}."
        raise Refused(Refusal(Kind.NOT_FOUND, f"{told} `forebay keys list` shows them.", "key"))
    return found[0]


def require_admin(request: Request) -> None:
    """Refuse who has no admin key; who has one is ``request.state.admin`` from here on."""
    who = _edge(request).authenticator.identify_admin(dict(request.headers.raw))
    if isinstance(who, Refusal):
        raise Refused(who)
    request.state.admin = who


ADMIN = APIRouter(prefix="/admin", tags=["admin"], dependencies=[Depends(require_admin)])


@ADMIN.get("/endpoints", summary="List the endpoints and what is known of them")
async def list_endpoints(request: Request) -> dict[str, Any]:
    """List every endpoint of this replica."""
    return {"object": "list", "data": [_describe(request, one) for one in _edge(request).pool.endpoints]}


@ADMIN.post(
    "/endpoints/{name:path}/{action}", summary="Cordon, uncordon, drain, eject, restart or stop", status_code=202
)
async def act_on_endpoint(
    name: str, action: Action, request: Request, patience: Annotated[Patience | None, Body()] = None
) -> dict[str, Any]:
    """Begin it at once; what follows is seen in the list.

    `cordon`: no new requests, those under way finish. `drain`: the same, and where there is a minder every replica does
    it. `eject`: no new requests, those under way are cut off. `uncordon`: undo these. `restart`: drain, stop, start,
    traffic again. `stop`: drain, stop.
    """
    endpoint = next((one for one in _edge(request).pool.endpoints if one.name == name), None)
    if endpoint is None:
        names = ", ".join(one.name for one in _edge(request).pool.endpoints) or "none"
        raise Refused(Refusal(Kind.NO_ENDPOINT, f"There is no endpoint {name!r}. There are: {names}."))
    try:
        await _act(request.app.state.minders, endpoint, action, patience or Patience())
    except MinderError as error:
        raise Refused(Refusal(Kind.NOT_POSSIBLE, f"{name} cannot be told: {error}")) from None
    _edge(request).log.say("info", "endpoint_told", endpoint=name, action=action.value)
    return _describe(request, endpoint)


async def _act(minders: Minders, endpoint: Endpoint, action: Action, patience: Patience) -> None:
    phase = minders.states[endpoint].phase if endpoint in minders.states else None
    if action in (Action.RESTART, Action.STOP):
        if endpoint.spec.minder is None:
            told = f"{endpoint.name} has no minder: it can be drained here, but is stopped and started where it runs."
            raise Refused(Refusal(Kind.NOT_POSSIBLE, told))
        await minders.tell(endpoint, f"/{action.value}", drain=patience.drain, grace=patience.grace)
        # From here on it is the minder's word that keeps requests away, and lets them come again.
        endpoint.holds.discard(HOLD)
    elif action is Action.DRAIN and phase in (READY, SERVING):
        await minders.tell(endpoint, "/drain")
    elif action is Action.UNCORDON:
        endpoint.holds.discard(HOLD)
        if phase == DRAINING:
            await minders.tell(endpoint, "/start")
    else:
        endpoint.holds.add(HOLD)
    if action is Action.EJECT:
        endpoint.connections.cut("the endpoint was ejected by command")


def _describe(request: Request, endpoint: Endpoint) -> dict[str, Any]:
    minders: Minders = request.app.state.minders
    state = minders.states.get(endpoint)
    minded: dict[str, Any] | None = None
    if endpoint.spec.minder is not None:
        minded = {"address": endpoint.spec.minder.address, "reached": state is not None}
    if minded is not None and state is not None:
        minded |= {
            "phase": state.phase,
            "since": state.since,
            "pid": state.pid,
            "minder_pid": state.minder_pid,
            "starts": state.starts,
            "restarts": state.restarts,
            "drained": state.drained,
            "kept": state.kept,
            "progress": state.progress.text if state.progress is not None else None,
            "message": state.message,
        }
    return {
        "name": endpoint.name,
        "url": endpoint.spec.url,
        "engine": endpoint.engine.name,
        "models": sorted(endpoint.models),
        "state": _state_of(endpoint, state.phase if state is not None else None),
        "healthy": endpoint.healthy,
        "trouble": endpoint.trouble,
        "breaker": endpoint.breaker.state.value,
        "cordoned": endpoint.cordoned,
        "held_by": sorted(endpoint.holds),
        "in_flight": endpoint.in_flight,
        "minder": minded,
    }


def _state_of(endpoint: Endpoint, phase: str | None) -> str:
    """Return the one word that matters most to whoever looks."""
    if phase is not None and phase != SERVING:
        return phase
    if HOLD in endpoint.holds:
        return "cordoned"
    if not endpoint.healthy:
        return "down"
    return "serving" if not endpoint.holds else "held"
