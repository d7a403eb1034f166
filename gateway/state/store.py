"""What every change of keys and tenants has in common: one transaction, an audit row, and a count-up of the version.

Each replica polls the version, so a change is known to all of them within a second. Everything here blocks: call it in
a thread.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pwd
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Literal, Self

import sqlalchemy as sa

from gateway.limits import LimitSet
from gateway.state.database import Stale, audit_table, open_database, reading, translated, version_table

Fields = Mapping[str, Any]
"""A key, a tenant or an organisation as JSON; never a secret or a hash among them."""
Kind = Literal["key", "tenant", "organisation"]


@dataclass(frozen=True, slots=True)
class Actor:
    """Who changes something, in the words of the audit; by the API, the request too."""

    who: str
    request_id: str | None = None


def local_actor() -> Actor:
    """Whoever runs a command on this machine, by the operating system's word."""
    user = os.getuid()
    try:
        return Actor(f"local command ({pwd.getpwuid(user).pw_name})")
    except KeyError:  # a container may run as a number that has no name
        return Actor(f"local command (user {user})")


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One change. `before` None: it was made; `after` None: it was removed."""

    id: int
    at: datetime
    actor: str
    action: str
    kind: str
    name: str
    before: Fields | None
    after: Fields | None
    request_id: str | None

    def as_json(self) -> dict[str, Any]:
        """The same as the API and `--json` tell it."""
        return {
            "id": self.id,
            "at": self.at.isoformat(),
            "actor": self.actor,
            "action": self.action,
            "kind": self.kind,
            "name": self.name,
            "before": self.before,
            "after": self.after,
            "request_id": self.request_id,
        }


class Change:
    """One transaction that changes something; `record` writes the audit."""

    def __init__(self, connection: sa.Connection, actor: Actor, now: datetime) -> None:
        self.connection = connection
        self.now = now
        self.made = False
        self._actor = actor

    def record(self, action: str, kind: Kind, name: str, before: Fields | None, after: Fields | None) -> None:
        """Put down what was just done."""
        self.made = True
        row = {"at": self.now, "actor": self._actor.who, "action": action, "kind": kind, "name": name}
        row |= {"before": before, "after": after, "request_id": self._actor.request_id}
        self.connection.execute(sa.insert(audit_table).values(row))

    def check_match(self, kind: Kind, name: str, fields: Fields, if_match: str | None) -> None:
        """Raise Stale, saying who was faster, unless `fields` are what `if_match` was made from."""
        if if_match is None or if_match == etag(fields):
            return
        told = f"{kind} {name!r} was changed since you read it"
        is_it = (audit_table.c.kind == kind) & (audit_table.c.name == name)
        rows = self.connection.execute(sa.select(audit_table).where(is_it).order_by(audit_table.c.id.desc()))
        for row in rows:
            # Several keys may have one name.
            if (row.after or row.before or {}).get("id") == fields.get("id"):
                told += f", by {row.actor} at {utc(row.at).isoformat(timespec='seconds')}"
                break
        raise Stale(f"{told}; read it again and decide anew")


class Store:
    """One state database, which `gateway.state.database.upgrade` has brought up to date before."""

    def __init__(self, url: str, actor: Actor | None = None) -> None:
        self._engine = open_database(url)
        self._actor = actor or local_actor()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()

    def acting_as(self, actor: Actor) -> Self:
        """The same database, changed in somebody else's name."""
        other = copy.copy(self)
        other._actor = actor
        return other

    def version(self) -> int:
        """The state version: higher after every change."""
        with self.reading() as connection:
            return read_version(connection)

    def audit(
        self,
        *,
        since: datetime | None = None,
        kind: str | None = None,
        name: str | None = None,
        before: int | None = None,
        limit: int = 100,
    ) -> tuple[AuditEntry, ...]:
        """What was changed, latest first; `before` is the id of an entry already seen."""
        query = sa.select(audit_table).order_by(audit_table.c.id.desc()).limit(limit)
        if since is not None:
            query = query.where(audit_table.c.at >= since)
        if kind is not None:
            query = query.where(audit_table.c.kind == kind)
        if name is not None:
            query = query.where(audit_table.c.name == name)
        if before is not None:
            query = query.where(audit_table.c.id < before)
        with self.reading() as connection:
            return tuple(
                AuditEntry(
                    row.id, utc(row.at), row.actor, row.action, row.kind, row.name, row.before, row.after,
                    row.request_id,
                )
                for row in connection.execute(query)
            )  # fmt: skip

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A connection that sees one state and writes nothing."""
        with reading(self._engine) as connection:
            yield connection

    @contextmanager
    def changing(self) -> Iterator[Change]:
        """A transaction; the version is counted up at its end if anything was recorded."""
        with translated(self._engine), self._engine.begin() as connection:
            # Locked until the commit: changes come one after another, and so do their versions.
            connection.execute(sa.select(version_table.c.version).with_for_update())
            change = Change(connection, self._actor, datetime.now(UTC))
            yield change
            if change.made:
                connection.execute(sa.update(version_table).values(version=version_table.c.version + 1))


def read_version(connection: sa.Connection) -> int:
    """The state version as this connection sees it."""
    return int(connection.execute(sa.select(version_table.c.version)).scalar_one())


def etag(fields: Fields) -> str:
    """What says that something is still as it was when it was read."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def limits_to_json(limits: LimitSet | None) -> Any:
    """Limits as the database and the API have them."""
    # What is set to `none` is something else than what is left out.
    return None if limits is None else limits.model_dump(mode="json", exclude_unset=True)


def limits_of_json(stored: Any) -> LimitSet | None:
    """Limits as the gateway has them; what a newer release has added to them is left to its replicas."""
    return None if stored is None else LimitSet.model_validate(stored, extra="ignore")


def time_to_json(moment: datetime | None) -> str | None:
    """A time as the API tells it."""
    return None if moment is None else moment.isoformat()


def utc(value: datetime) -> datetime:
    """SQLite gives times back without their zone; all of ours are UTC."""
    return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
