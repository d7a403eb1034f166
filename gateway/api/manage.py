"""The admin API over keys, tenants, organisations and who changed them. Admin keys only, on the operators' listener.

A change is known to this replica when it is answered, and to every other one within a second. `etag` says what was
read: sent back as `if-match`, a change is refused when somebody else was faster.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, Protocol, TypeVar

from fastapi import APIRouter, Depends, Header, Query, Request
from fastapi.responses import JSONResponse
from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field

from gateway.api.endpoints import Refused, require_admin
from gateway.errors import Kind, Refusal
from gateway.limits import LimitSet, OrganisationLimits, TenantLimits
from gateway.settings import Caps
from gateway.state.database import NoSuch, NotPossible, Stale, StateError
from gateway.state.declared import InFile
from gateway.state.keys import CreatedKey, KeyRecord, State, StoredKey
from gateway.state.management import Management
from gateway.state.store import Actor
from gateway.state.tenants import Entry, Group, GroupKind
from gateway.values import Duration, ModelPattern, Moment, Name, parse_moment, parse_past

T = TypeVar("T")


class Managed(Protocol):
    """Where keys and tenants are kept."""

    def management(self, actor: Actor) -> Management:
        """What is done to them in somebody's name. Raises StateError."""
        ...

    async def look(self) -> None:
        """Take over what has changed."""
        ...


def _ahead(value: object) -> object:
    return parse_moment(value, datetime.now(UTC)) if isinstance(value, str) else value


def _ago(value: object) -> object:
    """A time, or how long it is ago."""
    return parse_past(value, datetime.now(UTC)) if isinstance(value, str) else value


Ahead = Annotated[Moment, BeforeValidator(_ahead)]
Ago = Annotated[Moment, BeforeValidator(_ago)]
TEAM = AliasChoices("tenant", "team")


class Asked(BaseModel):
    """A body or a query of this API: unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)


class KeyChanges(Asked):
    """What changes of a key. What is left out stays; null takes it back to what a key has that says nothing of it."""

    tenant: Name | None = Field(default=None, validation_alias=TEAM, description="Who is charged; its name by default.")
    models: tuple[ModelPattern, ...] | None = Field(default=None, description="Which it may use; null: all.")
    caps: Caps | None = Field(default=None, description="The most of one request, as a whole.")
    limits: LimitSet | None = Field(default=None, description="What it may use in a time, as a whole.")
    expires: Ahead | None = Field(default=None, description="A time, or in how long, such as 30d; null: never.")
    trust_domain: Name | None = Field(default=None, description="Keys of one domain may share a prefix cache.")


class NewKey(KeyChanges):
    """A key to make, or to let in by its SHA-256."""

    name: Name = Field(description="Who uses it; shown in logs and metrics.")
    admin: bool = Field(default=False, description="Whether it may use the admin API.")
    sha256: str | None = Field(default=None, description="Of a key made elsewhere; then none is made.", repr=False)


class Rotation(Asked):
    """How a key is replaced by a new one with the same name and rights."""

    overlap: Duration = Field(default=86400.0, description="How long the old one still works.")
    expires: Ahead | None = Field(default=None, description="When the new one ends; null: when the old one would have.")


class KeyFilter(Asked):
    """Which keys to list."""

    tenant: str | None = Field(default=None, description="Those of a tenant.")
    team: str | None = Field(default=None, description="Another word for tenant.")
    state: State | None = Field(default=None, description="Those in a state.")


class AuditFilter(Asked):
    """Which changes to list, latest first."""

    since: Ago | None = Field(default=None, description="A time, or how long ago, such as 7d.")
    kind: Literal["key", "tenant", "organisation"] | None = Field(default=None, description="Of what was changed.")
    name: str | None = Field(default=None, description="Of one thing alone.")
    limit: int = Field(default=100, ge=1, le=1000, description="At most so many.")
    before: int | None = Field(default=None, description="`next` of the page before.")


IfMatch = Annotated[str | None, Header(description="The etag of what was read, so that nothing newer is lost.")]

MANAGE = APIRouter(prefix="/admin", tags=["admin"], dependencies=[Depends(require_admin)])


# --- keys ---------------------------------------------------------------------------------------------------------


@MANAGE.get("/keys", summary="List keys")
async def list_keys(request: Request, asked: Annotated[KeyFilter, Query()]) -> dict[str, Any]:
    """Those of the file and of the database, revoked ones too; never a key itself."""
    keys = await _do(request, lambda management: management.keys(asked.tenant or asked.team, asked.state))
    now = datetime.now(UTC)
    return {"object": "list", "data": [key.as_json(now) for key in keys]}


@MANAGE.post("/keys", summary="Make a key, or let one in by its SHA-256", status_code=201)
async def create_key(request: Request, asked: NewKey) -> JSONResponse:
    """`key` in this answer is the only time it is told."""
    rights = {name: getattr(asked, name) for name in NewKey.model_fields if name not in ("name", "sha256")}
    if asked.sha256 is not None:
        stored = await _change(
            request, lambda management: management.import_key(asked.name, sha256=asked.sha256, **rights)
        )
        return _key(stored, 201)
    return _secret(await _change(request, lambda management: management.create(asked.name, **rights)))


@MANAGE.post("/keys/{key:path}/rotate", summary="Replace a key by a new one; both work for a while", status_code=201)
async def rotate_key(
    request: Request, key: str, asked: Rotation | None = None, if_match: IfMatch = None
) -> JSONResponse:
    """The new one has the same name and rights; `key` in this answer is the only time it is told."""
    how = asked or Rotation()
    made = await _change(
        request, lambda management: management.rotate(key, how.overlap, how.expires, _unquoted(if_match))
    )
    return _secret(made)


@MANAGE.get("/keys/{key:path}", summary="Describe a key")
async def show_key(request: Request, key: str) -> JSONResponse:
    """By its id, or by its name where only one has it."""
    return _key(await _do(request, lambda management: management.key(key)))


@MANAGE.patch("/keys/{key:path}", summary="Change what a key may do")
async def change_key(
    request: Request, key: str, asked: KeyChanges, force: bool = False, if_match: IfMatch = None
) -> JSONResponse:
    """What is left out stays as it is."""
    changes = {name: getattr(asked, name) for name in asked.model_fields_set}
    changed = await _change(
        request,
        lambda management: management.update(key, changes, if_match=_unquoted(if_match), keep_admin=not force),
    )
    return _key(changed)


@MANAGE.delete("/keys/{key:path}", summary="Revoke a key")
async def revoke_key(request: Request, key: str, force: bool = False, if_match: IfMatch = None) -> JSONResponse:
    """It stops working on every replica within a second. The last admin key goes with `force=true` only."""
    revoked = await _change(
        request, lambda management: management.revoke(key, if_match=_unquoted(if_match), keep_admin=not force)
    )
    return _key(revoked)


# --- tenants and organisations ------------------------------------------------------------------------------------


@MANAGE.get("/tenants", summary="List tenants")
async def list_tenants(request: Request) -> dict[str, Any]:
    """Those of the file and of the database."""
    return await _list_groups(request, "tenant")


@MANAGE.get("/tenants/{name:path}", summary="Describe a tenant")
async def show_tenant(request: Request, name: str) -> JSONResponse:
    """Its limits and its organisation."""
    return await _show_group(request, "tenant", name)


@MANAGE.put("/tenants/{name:path}", summary="Make a tenant, or change it")
async def put_tenant(request: Request, name: str, asked: TenantLimits, if_match: IfMatch = None) -> JSONResponse:
    """What is left out is taken away."""
    return await _put_group(request, "tenant", name, asked, if_match)


@MANAGE.delete("/tenants/{name:path}", summary="Delete a tenant")
async def delete_tenant(request: Request, name: str, if_match: IfMatch = None) -> JSONResponse:
    """Not while keys belong to it."""
    return await _delete_group(request, "tenant", name, if_match)


@MANAGE.get("/organisations", summary="List organisations")
async def list_organisations(request: Request) -> dict[str, Any]:
    """Those of the file and of the database."""
    return await _list_groups(request, "organisation")


@MANAGE.get("/organisations/{name:path}", summary="Describe an organisation")
async def show_organisation(request: Request, name: str) -> JSONResponse:
    """Its limits."""
    return await _show_group(request, "organisation", name)


@MANAGE.put("/organisations/{name:path}", summary="Make an organisation, or change it")
async def put_organisation(
    request: Request, name: str, asked: OrganisationLimits, if_match: IfMatch = None
) -> JSONResponse:
    """What is left out is taken away."""
    return await _put_group(request, "organisation", name, asked, if_match)


@MANAGE.delete("/organisations/{name:path}", summary="Delete an organisation")
async def delete_organisation(request: Request, name: str, if_match: IfMatch = None) -> JSONResponse:
    """Not while tenants belong to it."""
    return await _delete_group(request, "organisation", name, if_match)


async def _list_groups(request: Request, kind: GroupKind) -> dict[str, Any]:
    groups = await _do(request, lambda management: management.groups(kind))
    return {"object": "list", "data": [group.as_json() for group in groups]}


async def _show_group(request: Request, kind: GroupKind, name: str) -> JSONResponse:
    return _group(await _do(request, lambda management: management.group(kind, name)))


async def _put_group(request: Request, kind: GroupKind, name: str, entry: Entry, if_match: str | None) -> JSONResponse:
    match = _unquoted(if_match)
    return _group(await _change(request, lambda management: management.put_group(kind, name, entry, if_match=match)))


async def _delete_group(request: Request, kind: GroupKind, name: str, if_match: str | None) -> JSONResponse:
    match = _unquoted(if_match)
    return _group(await _change(request, lambda management: management.delete_group(kind, name, if_match=match)))


# --- audit --------------------------------------------------------------------------------------------------------


@MANAGE.get("/audit", summary="List who changed what")
async def list_changes(request: Request, asked: Annotated[AuditFilter, Query()]) -> dict[str, Any]:
    """Latest first, a page at a time: `next` as `before` asks for the next one."""
    entries = await _do(
        request,
        lambda management: management.store.audit(
            since=asked.since, kind=asked.kind, name=asked.name, before=asked.before, limit=asked.limit + 1
        ),
    )
    page = entries[: asked.limit]
    more = len(entries) > asked.limit
    return {
        "object": "list",
        "data": [entry.as_json() for entry in page],
        "has_more": more,
        "next": page[-1].id if more else None,
    }


# --- what they have in common -------------------------------------------------------------------------------------


async def _do(request: Request, work: Callable[[Management], T]) -> T:
    """Do it in a thread, in the name of the request's key; what cannot be done is refused by the table."""
    who: KeyRecord = request.state.admin
    of = "of the file" if who.source == "file" else f"({who.public_id})"
    managed: Managed = request.app.state.managed
    try:
        management = managed.management(Actor(f"key {who.name} {of}", request.state.request_id))
        return await asyncio.to_thread(work, management)
    except StateError as error:
        raise Refused(Refusal(_kind(error), _sentence(str(error)))) from None


def _sentence(text: str) -> str:
    """As the API's other messages are written; the name of a field stays as it is."""
    first = text.partition(" ")[0]
    return f"{text if first.endswith(':') else text[0].upper() + text[1:]}."


_KINDS: dict[type[StateError], Kind] = {
    NoSuch: Kind.NOT_FOUND,
    Stale: Kind.STALE,
    InFile: Kind.DECLARED,
    NotPossible: Kind.NOT_POSSIBLE,
}


def _kind(error: StateError) -> Kind:
    return _KINDS.get(type(error), Kind.STATE_AWAY)


async def _change(request: Request, work: Callable[[Management], T]) -> T:
    """The same for a change, which this replica knows when it is answered."""
    done = await _do(request, work)
    await request.app.state.managed.look()
    return done


def _unquoted(if_match: str | None) -> str | None:
    """What an `if-match` asks for; any version where it says `*`."""
    return None if if_match is None or if_match.strip() == "*" else if_match.strip().removeprefix("W/").strip('"')


def _key(key: StoredKey, status: int = 200) -> JSONResponse:
    return JSONResponse({"object": "key", **key.as_json(datetime.now(UTC))}, status, {"etag": f'"{key.etag}"'})


def _secret(made: CreatedKey) -> JSONResponse:
    """The one answer that holds a key."""
    content = {"object": "key", "key": made.key, **made.stored.as_json(datetime.now(UTC))}
    if made.replaced is not None:
        content["replaced"] = made.replaced.as_json(datetime.now(UTC))
    return JSONResponse(content, 201, {"etag": f'"{made.stored.etag}"', "cache-control": "no-store"})


def _group(group: Group) -> JSONResponse:
    return JSONResponse({"object": group.kind, **group.as_json()}, headers={"etag": f'"{group.etag}"'})
