"""API keys: made, imported, rotated, changed, revoked and loaded, and how those of the file and of the database become
one table.

A key is an opaque string known by its SHA-256 alone; ours look like `fb-<public id>-<secret>`, and the public id is
what people and logs call it by. Everything that touches the database blocks: call it in a thread.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import sqlalchemy as sa
from pydantic import ValidationError

from gateway.limits import LimitSet
from gateway.settings import Caps, ConfigError, KeySettings, explain
from gateway.state.database import NoSuch, NotPossible, keys_table
from gateway.state.store import (
    Change,
    Fields,
    etag,
    limits_of_json,
    limits_to_json,
    read_version,
    time_to_json,
    utc,
)
from gateway.state.tenants import Group, GroupStore, read_groups

State = Literal["live", "expired", "revoked"]
CHANGEABLE = ("tenant", "models", "caps", "limits", "expires", "trust_domain")
"""What `KeyStore.update` changes; None takes back to what a key has that says nothing of it."""

SERVE_PREFIXES = ("serve-", "admin-of-serve-")
"""How the names of the keys begin that `forebay serve` makes for itself at each start."""

_ALPHABET = string.digits + string.ascii_uppercase + string.ascii_lowercase
SECRET_LENGTH = 43
"""Characters of 62 kinds that hold 256 bits; none of them is the separator `-`."""


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """What a key may do. `models` None: all; `expires_at` is in UTC; a file's key has its name as public id."""

    name: str
    public_id: str
    tenant: str
    models: tuple[str, ...] | None
    caps: Caps
    trust_domain: str | None
    expires_at: datetime | None
    source: Literal["file", "database"]
    admin: bool = False
    """Whether it may use the admin API."""
    limits: LimitSet | None = None
    """What it may use, as it is declared for this key itself."""
    replaces: str | None = None
    """Public id of the key it was rotated from."""


@dataclass(frozen=True, slots=True)
class StoredKey:
    """A key with its history, for listings. `created_at` None: the file declares it."""

    record: KeyRecord
    created_at: datetime | None = None
    revoked_at: datetime | None = None

    def state(self, now: datetime) -> State:
        """Whether it lets anybody in."""
        if self.revoked_at is not None:
            return "revoked"
        expires_at = self.record.expires_at
        return "expired" if expires_at is not None and expires_at <= now else "live"

    @property
    def fields(self) -> dict[str, Any]:
        """What the audit tells of it."""
        record = self.record
        return {
            "id": record.public_id,
            "name": record.name,
            "tenant": record.tenant,
            "models": None if record.models is None else [*record.models],
            "caps": record.caps.model_dump(mode="json", exclude_none=True),
            "limits": limits_to_json(record.limits),
            "trust_domain": record.trust_domain,
            "admin": record.admin,
            "expires": time_to_json(record.expires_at),
            "replaces": record.replaces,
            "revoked": time_to_json(self.revoked_at),
        }

    @property
    def etag(self) -> str:
        """What says that it is still as it was when it was read."""
        return etag(self.fields)

    def as_json(self, now: datetime) -> dict[str, Any]:
        """The same as the API and `--json` tell it; the file's keys have no id."""
        public_id = self.record.public_id if self.record.source == "database" else None
        created, state = time_to_json(self.created_at), self.state(now)
        return {**self.fields, "id": public_id, "created": created, "state": state, "source": self.record.source}


@dataclass(frozen=True, slots=True)
class CreatedKey:
    """A new key: the only moment at which the key itself is known."""

    key: str = field(repr=False)
    stored: StoredKey
    replaced: StoredKey | None = None
    """The key whose place it takes, as that is from now on."""

    @property
    def record(self) -> KeyRecord:
        """What it may do."""
        return self.stored.record


@dataclass(frozen=True, slots=True)
class KeySnapshot:
    """All keys of the database that are not revoked, by SHA-256, as of `version`. Expired ones are among them; so are
    the tenants and organisations, by name."""

    version: int
    records: Mapping[bytes, KeyRecord]
    tenants: Mapping[str, Group] = field(default_factory=dict)
    organisations: Mapping[str, Group] = field(default_factory=dict)


def new_public_id() -> str:
    """Twelve random hexadecimal digits."""
    return secrets.token_hex(6)


def new_key(public_id: str) -> str:
    """A key with a random secret of 256 bits."""
    number, digits = secrets.randbits(256), ""
    for _ in range(SECRET_LENGTH):
        number, digit = divmod(number, len(_ALPHABET))
        digits += _ALPHABET[digit]
    return f"fb-{public_id}-{digits}"


def declared(keys: Iterable[KeySettings]) -> dict[bytes, KeyRecord]:
    """The file's keys by SHA-256; ConfigError when one cannot be read from where the file says it is."""
    return {key.digest(): record_of_setting(key, key.name, "file") for key in keys}


def merge(file_keys: Mapping[bytes, KeyRecord], snapshot: KeySnapshot) -> dict[bytes, KeyRecord]:
    """One table of both. What the file declares wins: on a key it also has, and on every name it uses."""
    names = {record.name for record in file_keys.values()}
    stored = {digest: record for digest, record in snapshot.records.items() if record.name not in names}
    return {**stored, **file_keys}


def made_by_serve(name: str) -> bool:
    """Whether a key is one that `forebay serve` makes for itself, and nobody manages."""
    return name.startswith(SERVE_PREFIXES)


class KeyStore(GroupStore):
    """The keys of one state database; a key is named by its public id, or by its name if that is the only one's."""

    def load_all(self) -> KeySnapshot:
        """Every key that is not revoked, and whom they belong to."""
        query = sa.select(keys_table).where(keys_table.c.revoked_at.is_(None))
        with self.reading() as connection:
            # The version first: when a change slips in between, the keys are newer than it says and are read again.
            version = read_version(connection)
            rows = connection.execute(query).all()
            return KeySnapshot(
                version,
                {bytes.fromhex(row.sha256): _record_of_row(row) for row in rows},
                {one.name: one for one in read_groups(connection, "tenant")},
                {one.name: one for one in read_groups(connection, "organisation")},
            )

    def list(self, tenant: str | None = None, state: State | None = None) -> tuple[StoredKey, ...]:
        """Every key, revoked ones too, oldest first; or those alone of a tenant or in a state."""
        query = sa.select(keys_table).order_by(keys_table.c.id)
        if tenant is not None:
            query = query.where(keys_table.c.tenant == tenant)
        with self.reading() as connection:
            keys = [_stored(row) for row in connection.execute(query)]
        now = datetime.now(UTC)
        return tuple(key for key in keys if state in (None, key.state(now)))

    def find(self, which: str) -> StoredKey:
        """One key. NoSuch when there is none, NotPossible when several have that name."""
        with self.reading() as connection:
            return find_key(connection, which, datetime.now(UTC))

    def create(
        self,
        name: str,
        tenant: str | None = None,
        models: Iterable[str] | None = None,
        caps: Caps | None = None,
        expires: datetime | None = None,
        trust_domain: str | None = None,
        *,
        admin: bool = False,
        limits: LimitSet | None = None,
        replace: bool = False,
    ) -> CreatedKey:
        """Make a key and store its SHA-256. `replace` deletes what had that name before, in the same transaction."""
        public_id = new_public_id()
        key = new_key(public_id)
        digest, checked = checked_key(
            name=name,
            key=key,
            tenant=tenant,
            models=models,
            caps=caps,
            expires=expires,
            trust_domain=trust_domain,
            admin=admin,
            limits=limits,
        )
        record = record_of_setting(checked, public_id, "database")
        with self.changing() as change:
            if replace:
                delete_keys(change, name)
            return CreatedKey(key, insert_key(change, digest.hex(), record))

    def import_key(
        self,
        name: str,
        *,
        sha256: str | None = None,
        key: str | None = None,
        tenant: str | None = None,
        models: Iterable[str] | None = None,
        caps: Caps | None = None,
        expires: datetime | None = None,
        trust_domain: str | None = None,
        admin: bool = False,
        limits: LimitSet | None = None,
    ) -> StoredKey:
        """Store a key that was made elsewhere, given itself or as its SHA-256 in hexadecimal (exactly one of them).

        NotPossible when it is neither, or already here (a revoked key cannot come back).
        """
        digest, checked = checked_key(
            name=name,
            key=key,
            sha256=sha256,
            tenant=tenant,
            models=models,
            caps=caps,
            expires=expires,
            trust_domain=trust_domain,
            admin=admin,
            limits=limits,
        )
        record = record_of_setting(checked, new_public_id(), "database")
        with self.changing() as change:
            return insert_key(change, digest.hex(), record)

    def rotate(
        self, which: str, overlap: float, expires: datetime | None = None, *, if_match: str | None = None
    ) -> CreatedKey:
        """Make the key that takes another one's place, with its name and rights; the old one works for `overlap`
        seconds more. `expires` None: when the old one would have."""
        public_id = new_public_id()
        key = new_key(public_id)
        digest, _ = checked_key(name="new", key=key)
        with self.changing() as change:
            old = _find_live(change, which, if_match)
            after = keys_table.c.replaces == old.record.public_id
            query = sa.select(keys_table.c.public_id).where(after, keys_table.c.revoked_at.is_(None))
            successor = change.connection.execute(query).scalar()
            if successor is not None:
                raise NotPossible(f"key {old.record.public_id} is rotated already: {successor} takes its place")
            until = change.now + timedelta(seconds=overlap)
            ends = until if old.record.expires_at is None else min(until, old.record.expires_at)
            record = replace(
                old.record,
                public_id=public_id,
                replaces=old.record.public_id,
                expires_at=expires or old.record.expires_at,
            )
            made = insert_key(change, digest.hex(), record, "rotate")
            replaced = replace(old, record=replace(old.record, expires_at=ends))
            write_key(change, old, replaced, "rotate")
        return CreatedKey(key, made, replaced)

    def update(
        self, which: str, changes: Mapping[str, object], *, if_match: str | None = None, keep_admin: bool = False
    ) -> StoredKey:
        """Change what `CHANGEABLE` names; Stale when the key is not what `if_match` was made from. `keep_admin`:
        NotPossible when no admin key of the database would be left."""
        with self.changing() as change:
            old = _find(change, which, if_match)
            if old.revoked_at is not None:
                raise NotPossible(f"key {old.record.public_id} ({old.record.name}) is revoked and stays so")
            new = replace(old, record=changed_record(old.record, changes))
            if keep_admin and new.state(change.now) != "live":
                _keep_an_admin(change, old)
            write_key(change, old, new, "update")
        return new

    def revoke(self, which: str, *, if_match: str | None = None, keep_admin: bool = False) -> StoredKey:
        """Make a key stop working, within a second on every replica. NoSuch when there is no such live key;
        `keep_admin`: NotPossible when no admin key of the database would be left."""
        with self.changing() as change:
            key = _find(change, which, if_match)
            if key.revoked_at is not None:
                raise NotPossible(f"key {key.record.public_id} ({key.record.name}) is revoked already")
            if keep_admin:
                _keep_an_admin(change, key)
            revoked = replace(key, revoked_at=change.now)
            write_key(change, key, revoked, "revoke")
        return revoked


# --- inside a transaction ----------------------------------------------------------------------------------------


def find_key(connection: sa.Connection, which: str, now: datetime) -> StoredKey:
    """A key by its public id, else the only one of a name, where those that still work go before the others."""
    row = connection.execute(sa.select(keys_table).where(keys_table.c.public_id == which)).one_or_none()
    if row is not None:
        return _stored(row)
    keys = [_stored(row) for row in connection.execute(sa.select(keys_table).where(keys_table.c.name == which))]
    live = [key for key in keys if key.state(now) == "live"]
    found = live or keys
    if not found:
        raise NoSuch(f"no key {which!r} in the database; `forebay keys list` shows them")
    if len(found) > 1:
        ids = ", ".join(key.record.public_id for key in found)
        raise NotPossible(f"several keys are named {which!r}: {ids}; say which one by its id")
    return found[0]


def _find(change: Change, which: str, if_match: str | None) -> StoredKey:
    key = find_key(change.connection, which, change.now)
    change.check_match("key", key.record.name, key.fields, if_match)
    return key


def _find_live(change: Change, which: str, if_match: str | None) -> StoredKey:
    key = _find(change, which, if_match)
    state = key.state(change.now)
    if state != "live":
        raise NotPossible(f"key {key.record.public_id} ({key.record.name}) is {state}; make a new one")
    return key


def read_keys(connection: sa.Connection) -> dict[str, StoredKey]:
    """Every key by its SHA-256 in hexadecimal."""
    rows = connection.execute(sa.select(keys_table).order_by(keys_table.c.id))
    return {row.sha256: _stored(row) for row in rows}


def insert_key(change: Change, sha256: str, record: KeyRecord, action: str = "create") -> StoredKey:
    """Store a key. NotPossible when it is here already."""
    same = sa.select(keys_table.c.public_id, keys_table.c.revoked_at).where(keys_table.c.sha256 == sha256)
    there = change.connection.execute(same).one_or_none()
    if there is not None:
        state = "already here" if there.revoked_at is None else "revoked and cannot come back"
        raise NotPossible(f"this key is {state}: {there.public_id}")
    row = _columns(record) | {"public_id": record.public_id, "sha256": sha256, "created_at": change.now}
    change.connection.execute(sa.insert(keys_table).values(row))
    stored = StoredKey(record, change.now)
    change.record(action, "key", record.name, None, stored.fields)
    return stored


def write_key(change: Change, old: StoredKey, new: StoredKey, action: str) -> None:
    """Change a key, unless it is so already."""
    if old.fields == new.fields:
        return
    row = _columns(new.record) | {"revoked_at": new.revoked_at}
    is_it = keys_table.c.public_id == old.record.public_id
    change.connection.execute(sa.update(keys_table).where(is_it).values(row))
    change.record(action, "key", new.record.name, old.fields, new.fields)


def delete_keys(change: Change, name: str) -> None:
    """Forget every key of a name."""
    is_it = keys_table.c.name == name
    for row in change.connection.execute(sa.select(keys_table).where(is_it)).all():
        change.record("delete", "key", name, _stored(row).fields, None)
    change.connection.execute(sa.delete(keys_table).where(is_it))


def _keep_an_admin(change: Change, gone: StoredKey) -> None:
    """Make sure that somebody else is left who could undo it. The passes of `forebay serve` are nobody's."""
    if not gone.record.admin or made_by_serve(gone.record.name):
        return
    admins = sa.select(keys_table).where(keys_table.c.admin, keys_table.c.public_id != gone.record.public_id)
    for row in change.connection.execute(admins):
        if not made_by_serve(row.name) and _stored(row).state(change.now) == "live":
            return
    raise NotPossible(
        f"{gone.record.public_id} ({gone.record.name}) is the last admin key: without it only commands on the gateway's"
        " machine manage keys. Make another one first, or say force=true"
    )


# --- records -----------------------------------------------------------------------------------------------------


def checked_key(**fields: object) -> tuple[bytes, KeySettings]:
    """A key under the rules of the file's keys, and its SHA-256; NotPossible when it breaks one."""
    try:
        key = KeySettings.model_validate({name: value for name, value in fields.items() if value is not None})
        return key.digest(), key
    except ValidationError as error:
        raise NotPossible("; ".join(explain(error, KeySettings))) from None
    except ConfigError as error:
        raise NotPossible("; ".join(error.problems)) from None


def changed_record(record: KeyRecord, changes: Mapping[str, object]) -> KeyRecord:
    """The record with other rights, under the same rules."""
    unknown = changes.keys() - {*CHANGEABLE}
    assert not unknown, f"cannot be changed: {unknown}"
    as_it_is = {
        "tenant": record.tenant,
        "models": record.models,
        "caps": record.caps,
        "limits": record.limits,
        "expires": record.expires_at,
        "trust_domain": record.trust_domain,
    }
    _, key = checked_key(name=record.name, sha256="0" * 64, admin=record.admin, **{**as_it_is, **changes})
    return replace(record_of_setting(key, record.public_id, record.source), replaces=record.replaces)


def record_of_setting(key: KeySettings, public_id: str, source: Literal["file", "database"]) -> KeyRecord:
    """What a key may do that was written down under the rules of the file's."""
    return KeyRecord(
        name=key.name,
        public_id=public_id,
        tenant=key.tenant or key.name,
        models=key.models,
        caps=key.caps,
        trust_domain=key.trust_domain,
        expires_at=key.expires,
        source=source,
        admin=key.admin,
        limits=key.limits,
    )


def _record_of_row(row: sa.Row[tuple[object, ...]]) -> KeyRecord:
    return KeyRecord(
        name=row.name,
        public_id=row.public_id,
        tenant=row.tenant,
        models=None if row.models is None else tuple(row.models),
        caps=Caps.model_validate(row.caps),
        trust_domain=row.trust_domain,
        expires_at=None if row.expires_at is None else utc(row.expires_at),
        source="database",
        admin=bool(row.admin),
        limits=limits_of_json(row.limits),
        replaces=row.replaces,
    )


def _stored(row: sa.Row[tuple[object, ...]]) -> StoredKey:
    return StoredKey(_record_of_row(row), utc(row.created_at), None if row.revoked_at is None else utc(row.revoked_at))


def _columns(record: KeyRecord) -> dict[str, Any]:
    """The columns that may change; the others are the key's own for ever."""
    fields: Fields = StoredKey(record).fields
    kept = ("name", "tenant", "models", "caps", "limits", "trust_domain", "admin", "replaces")
    return {name: fields[name] for name in kept} | {"expires_at": record.expires_at}
