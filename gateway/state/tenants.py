"""Tenants and organisations of the database: who keys belong to, and whom limits are shared by.

A key may name a tenant that has no entry here: then there is nothing to say of it. An organisation that a tenant names
has to be there, for a mistyped one would leave the tenant without its limits.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal

import sqlalchemy as sa

from gateway.limits import LimitSet, OrganisationLimits, TenantLimits
from gateway.state.database import NoSuch, NotPossible, keys_table, organisations_table, tenants_table
from gateway.state.store import Change, Store, etag, limits_to_json, time_to_json, utc
from gateway.values import check_name

GroupKind = Literal["tenant", "organisation"]
Entry = TenantLimits | OrganisationLimits
"""What is said of a tenant, or of an organisation."""
ENTRIES: Mapping[GroupKind, type[Entry]] = {"tenant": TenantLimits, "organisation": OrganisationLimits}
_TABLES = {"tenant": tenants_table, "organisation": organisations_table}


@dataclass(frozen=True, slots=True)
class Group:
    """A tenant or an organisation. `created_at` None: the file declares it."""

    kind: GroupKind
    name: str
    entry: Entry
    created_at: datetime | None = None

    @property
    def organisation(self) -> str | None:
        """Whom a tenant belongs to."""
        return self.entry.organisation if isinstance(self.entry, TenantLimits) else None

    @property
    def limits(self) -> dict[str, Any]:
        """Its own limits and those it hands down, as JSON; empty sets where nothing is said."""
        values = {name: getattr(self.entry, name) for name in type(self.entry).model_fields if name != "organisation"}
        return {name: limits_to_json(one) if isinstance(one, LimitSet) else one for name, one in values.items()}

    @property
    def fields(self) -> dict[str, Any]:
        """What can be changed of it, and its name."""
        organisation = {"organisation": self.organisation} if self.kind == "tenant" else {}
        return {"name": self.name, **organisation, **self.limits}

    @property
    def etag(self) -> str:
        """What says that it is still as it was when it was read."""
        return etag(self.fields)

    def as_json(self) -> dict[str, Any]:
        """The same as the API and `--json` tell it."""
        source = "file" if self.created_at is None else "database"
        return {**self.fields, "created": time_to_json(self.created_at), "source": source}


class GroupStore(Store):
    """The tenants and organisations of one state database."""

    def groups(self, kind: GroupKind) -> tuple[Group, ...]:
        """All tenants, or all organisations, by name."""
        with self.reading() as connection:
            return read_groups(connection, kind)

    def group(self, kind: GroupKind, name: str) -> Group:
        """One of them. NoSuch when there is none of that name."""
        with self.reading() as connection:
            return _find(connection, kind, name)

    def put_group(
        self,
        kind: GroupKind,
        name: str,
        entry: Entry,
        *,
        if_match: str | None = None,
        known: Collection[str] = (),
    ) -> Group:
        """Make it, or let it be from now on as said. `known` are organisations that are not of the database."""
        try:
            wanted = Group(kind, check_name(name), entry)
        except ValueError as error:
            raise NotPossible(f"name: {error}") from None
        with self.changing() as change:
            if wanted.organisation is not None and wanted.organisation not in known:
                _find(change.connection, "organisation", wanted.organisation)
            before = find_group(change.connection, kind, name)
            if before is None and if_match is not None:
                raise _no_such(kind, name)
            if before is not None:
                change.check_match(kind, name, before.fields, if_match)
            return write_group(change, before, wanted)

    def delete_group(
        self, kind: GroupKind, name: str, *, if_match: str | None = None, used_by: Collection[str] = ()
    ) -> Group:
        """Forget it. NotPossible while keys, or tenants, belong to it; `used_by` are such of the file."""
        with self.changing() as change:
            before = _find(change.connection, kind, name)
            change.check_match(kind, name, before.fields, if_match)
            users = [*used_by, *_users(change.connection, kind, name)]
            if users:
                raise NotPossible(
                    f"{kind} {name!r} cannot be deleted while {'keys' if kind == 'tenant' else 'tenants'} belong to it:"
                    f" {', '.join(users)}"
                )
            remove_group(change, before)
            return before


def read_groups(connection: sa.Connection, kind: GroupKind) -> tuple[Group, ...]:
    """All of a kind, by name."""
    table = _TABLES[kind]
    return tuple(_group(kind, row) for row in connection.execute(sa.select(table).order_by(table.c.name)))


def find_group(connection: sa.Connection, kind: GroupKind, name: str) -> Group | None:
    """One of a kind, or None."""
    table = _TABLES[kind]
    row = connection.execute(sa.select(table).where(table.c.name == name)).one_or_none()
    return None if row is None else _group(kind, row)


def write_group(change: Change, before: Group | None, after: Group) -> Group:
    """Make or change it, unless it is so already."""
    table = _TABLES[after.kind]
    columns = {"limits": after.limits} | ({"organisation": after.organisation} if after.kind == "tenant" else {})
    if before is None:
        change.connection.execute(sa.insert(table).values(**columns, name=after.name, created_at=change.now))
        change.record("create", after.kind, after.name, None, after.fields)
        return replace(after, created_at=change.now)
    if before.fields != after.fields:
        change.connection.execute(sa.update(table).where(table.c.name == after.name).values(**columns))
        change.record("update", after.kind, after.name, before.fields, after.fields)
    return replace(after, created_at=before.created_at)


def remove_group(change: Change, group: Group) -> None:
    """Forget it."""
    table = _TABLES[group.kind]
    change.connection.execute(sa.delete(table).where(table.c.name == group.name))
    change.record("delete", group.kind, group.name, group.fields, None)


def _find(connection: sa.Connection, kind: GroupKind, name: str) -> Group:
    group = find_group(connection, kind, name)
    if group is None:
        raise _no_such(kind, name)
    return group


def _no_such(kind: GroupKind, name: str) -> NoSuch:
    return NoSuch(f"no {kind} {name!r} in the database; `forebay {kind}s list` shows them")


def _users(connection: sa.Connection, kind: GroupKind, name: str) -> list[str]:
    if kind == "organisation":
        query = sa.select(tenants_table.c.name).where(tenants_table.c.organisation == name)
    else:
        query = sa.select(keys_table.c.name).where(keys_table.c.tenant == name, keys_table.c.revoked_at.is_(None))
    return sorted(set(connection.execute(query).scalars()))


def entry_of(kind: GroupKind, fields: Mapping[str, Any]) -> Entry:
    """What `Group.fields` was made from. Raises pydantic's ValidationError."""
    return ENTRIES[kind].model_validate({name: value for name, value in fields.items() if name != "name"})


def _group(kind: GroupKind, row: sa.Row[tuple[object, ...]]) -> Group:
    organisation = {"organisation": row.organisation} if kind == "tenant" else {}
    # What a newer release has added is left to its replicas.
    entry = ENTRIES[kind].model_validate({**(row.limits or {}), **organisation}, extra="ignore")
    return Group(kind, row.name, entry, utc(row.created_at))
