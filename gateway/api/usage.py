"""The admin API over what was used: sums of the ledger, and one request explained. Admin keys only."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from gateway.api.edge import Edge
from gateway.api.endpoints import Refused, require_admin
from gateway.errors import Kind, Refusal
from gateway.serving.bookkeeper import Bookkeeper
from gateway.serving.explain import explanation, row_of
from gateway.serving.ticket import Ticket
from gateway.state.database import StateError
from gateway.state.usage import Wanted, csv_lines, dollars, read_by, read_moment, sum_columns

MOST_GROUPS = 10_000
"""Groups of one answer in JSON; CSV holds them all."""

T = TypeVar("T")

USAGE = APIRouter(prefix="/admin", tags=["admin"], dependencies=[Depends(require_admin)])


@USAGE.get("/usage", summary="Sum up what was used")
async def show_usage(
    request: Request,
    by: Annotated[str, Query(description="Any of key, tenant (or team), organisation, model, day, outcome, …")] = "",
    since: Annotated[str | None, Query(description="2026-11-01, 2026-11-01T12:00 (UTC) or so long ago: 7d")] = None,
    until: Annotated[str | None, Query(description="The same; a day is counted in")] = None,
    key: Annotated[str | None, Query(description="A key's id or name")] = None,
    tenant: str | None = None,
    team: Annotated[str | None, Query(description="Another word for tenant")] = None,
    model: str | None = None,
    format: Literal["json", "csv"] = "json",
) -> Response:
    """Sum requests, tokens and cost of every combination of what ``by`` names. Costs are billionths of a dollar."""
    now = datetime.now(UTC)
    try:
        groups = read_by(by)
        wanted = Wanted(
            since=read_moment(since, now) if since is not None else None,
            until=read_moment(until, now, end=True) if until is not None else None,
            key=key,
            tenant=tenant if tenant is not None else team,
            model=model,
        )
    except ValueError as error:
        raise Refused(Refusal(Kind.INVALID, f"{error}.")) from None
    books = _books(request)
    await books.flush()
    most = MOST_GROUPS + 1 if format == "json" else None
    sums = await _read(lambda: books.ledger.store.sums(groups, wanted, most))
    if format == "csv":
        headers = {"content-disposition": 'attachment; filename="usage.csv"'}
        return StreamingResponse(csv_lines(sum_columns(groups), sums), media_type="text/csv", headers=headers)
    shown = [{**one, "cost": dollars(one["cost_nanos"])} for one in sums[:MOST_GROUPS]]
    return JSONResponse({"object": "list", "by": groups, "data": shown, "truncated": len(sums) > MOST_GROUPS})


@USAGE.get("/requests/{request_id}", summary="Explain one request")
async def explain_request(request_id: str, request: Request) -> dict[str, Any]:
    """Tell who sent it, which engine served it and why, what it used and where its time went."""
    edge: Edge = request.app.state.edge
    books: Bookkeeper | None = request.app.state.books
    ticket = _in_memory(edge, request_id)
    if ticket is not None:
        return explanation(row_of(ticket, edge.deadlines.clock()), "memory")
    where = f"the latest {len(edge.recent)} requests of this replica"
    if books is None:
        where += "; no ledger is kept (state.ledger is off)"
    else:
        await books.flush()
        row = await _read(lambda: books.ledger.store.find(request_id))
        if row is not None:
            return explanation(row, "ledger")
        kept = f"{books.ledger.days} days" if books.ledger.days else "for ever"
        where += f" and the ledger, whose rows are kept {kept}"
    raise Refused(Refusal(Kind.NO_REQUEST, f"There is no request {request_id[:80]!r}. Looked at: {where}."))


def _in_memory(edge: Edge, request_id: str) -> Ticket | None:
    running = (request.ticket for request in edge.active)
    return next((one for one in (*running, *reversed(edge.recent)) if one.request_id == request_id), None)


def _books(request: Request) -> Bookkeeper:
    books: Bookkeeper | None = request.app.state.books
    if books is None:
        raise Refused(Refusal(Kind.NOT_POSSIBLE, "No ledger is kept: state.ledger is off."))
    return books


async def _read(question: Callable[[], T]) -> T:
    """Ask the database in a thread."""
    try:
        return await asyncio.to_thread(question)
    except StateError as error:
        raise Refused(Refusal(Kind.STATE_AWAY, f"The ledger cannot be read: {error}.")) from None
