"""API keys: made, imported, revoked and loaded, and how those of the file and of the database become one table.

A key is an opaque string known by its SHA-256 alone; ours look like `fb-<public id>-<secret>`, and the public id is
what people and logs call it by. Every change counts the state version up in the same transaction, and each replica
polls that version. Everything that touches the database blocks: call it in a thread.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import TracebackType
from typing import Literal, Self

import sqlalchemy as sa
from pydantic import ValidationError

from gateway.limits import LimitSet
from gateway.settings import Caps, ConfigError, KeySettings, explain
from gateway.state.database import READ_ONLY, StateError, keys_table, open_database, translated, version_table

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


@dataclass(frozen=True, slots=True)
class StoredKey:
    """A key of the database with its history, for listings."""

    record: KeyRecord
    created_at: datetime
    revoked_at: datetime | None


@dataclass(frozen=True, slots=True)
class CreatedKey:
    """A new key: the only moment at which the key itself is known."""

    key: str = field(repr=False)
    record: KeyRecord


@dataclass(frozen=True, slots=True)
class KeySnapshot:
    """All keys of the database that are not revoked, by SHA-256, as of `version`. Expired ones are among them."""

    version: int
    records: Mapping[bytes, KeyRecord]


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
    return {key.digest(): _record_of_setting(key, key.name, "file") for key in keys}


def merge(file_keys: Mapping[bytes, KeyRecord], snapshot: KeySnapshot) -> dict[bytes, KeyRecord]:
    """One table of both. What the file declares wins: on a key it also has, and on every name it uses."""
    names = {record.name for record in file_keys.values()}
    stored = {digest: record for digest, record in snapshot.records.items() if record.name not in names}
    return {**stored, **file_keys}


class KeyStore:
    """The keys of one state database, which `gateway.state.database.upgrade` has brought up to date before."""

    def __init__(self, url: str) -> None:
        self._engine = open_database(url)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()

    def version(self) -> int:
        """The state version: higher after every change."""
        with translated(self._engine), self._reading() as connection:
            return _read_version(connection)

    def load_all(self) -> KeySnapshot:
        """Every key that is not revoked."""
        query = sa.select(keys_table).where(keys_table.c.revoked_at.is_(None))
        with translated(self._engine), self._reading() as connection:
            # The version first: when a change slips in between, the keys are newer than it says and are read again.
            version = _read_version(connection)
            rows = connection.execute(query).all()
        return KeySnapshot(version, {bytes.fromhex(row.sha256): _record_of_row(row) for row in rows})

    def list(self) -> tuple[StoredKey, ...]:
        """Every key, revoked ones too, oldest first."""
        with translated(self._engine), self._reading() as connection:
            rows = connection.execute(sa.select(keys_table).order_by(keys_table.c.id)).all()
        return tuple(
            StoredKey(_record_of_row(row), _required_utc(row.created_at), _utc(row.revoked_at)) for row in rows
        )

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
        replace: bool = False,
    ) -> CreatedKey:
        """Make a key and store its SHA-256. `replace` deletes what had that name before, in the same transaction."""
        public_id = new_public_id()
        key = new_key(public_id)
        digest, checked = _checked(
            name=name,
            key=key,
            tenant=tenant,
            models=models,
            caps=caps,
            expires=expires,
            trust_domain=trust_domain,
            admin=admin,
        )
        return CreatedKey(key, self._insert(digest, checked, public_id, replace))

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
    ) -> KeyRecord:
        """Store a key that was made elsewhere, given itself or as its SHA-256 in hexadecimal (exactly one of them).

        StateError when it is neither, or already here (a revoked key cannot come back).
        """
        digest, checked = _checked(
            name=name,
            key=key,
            sha256=sha256,
            tenant=tenant,
            models=models,
            caps=caps,
            expires=expires,
            trust_domain=trust_domain,
        )
        return self._insert(digest, checked, new_public_id(), replace=False)

    def revoke(self, public_id: str) -> KeyRecord:
        """Make a key stop working, within a second on every replica. StateError when there is no such live key."""
        live = (keys_table.c.public_id == public_id) & keys_table.c.revoked_at.is_(None)
        with translated(self._engine), self._engine.begin() as connection:
            row = connection.execute(sa.select(keys_table).where(live)).one_or_none()
            if row is None:
                raise StateError(f"no key {public_id!r} to revoke; `forebay keys list` shows them")
            connection.execute(sa.update(keys_table).where(live).values(revoked_at=datetime.now(UTC)))
            _count_up(connection)
        return _record_of_row(row)

    def _reading(self) -> sa.Connection:
        return self._engine.connect().execution_options(**{READ_ONLY: True})

    def _insert(self, digest: bytes, key: KeySettings, public_id: str, replace: bool) -> KeyRecord:
        row = {
            "public_id": public_id,
            "name": key.name,
            "tenant": key.tenant or key.name,
            "sha256": digest.hex(),
            "models": None if key.models is None else [*key.models],
            "caps": key.caps.model_dump(mode="json", exclude_none=True),
            "trust_domain": key.trust_domain,
            "created_at": datetime.now(UTC),
            "expires_at": key.expires,
            "admin": key.admin,
        }
        with translated(self._engine), self._engine.begin() as connection:
            if replace:
                connection.execute(sa.delete(keys_table).where(keys_table.c.name == key.name))
            same = sa.select(keys_table.c.public_id, keys_table.c.revoked_at).where(keys_table.c.sha256 == digest.hex())
            there = connection.execute(same).one_or_none()
            if there is not None:
                state = "already here" if there.revoked_at is None else "revoked and cannot come back"
                raise StateError(f"this key is {state}: {there.public_id}")
            connection.execute(sa.insert(keys_table).values(row))
            _count_up(connection)
        return _record_of_setting(key, public_id, "database")


def _checked(**fields: object) -> tuple[bytes, KeySettings]:
    """A key under the rules of the file's keys, and its SHA-256; StateError when it breaks one."""
    try:
        key = KeySettings.model_validate({name: value for name, value in fields.items() if value is not None})
        return key.digest(), key
    except ValidationError as error:
        raise StateError("; ".join(explain(error))) from None
    except ConfigError as error:
        raise StateError("; ".join(error.problems)) from None


def _record_of_setting(key: KeySettings, public_id: str, source: Literal["file", "database"]) -> KeyRecord:
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
        expires_at=_utc(row.expires_at),
        source="database",
        admin=bool(row.admin),
    )


def _count_up(connection: sa.Connection) -> None:
    # The row stays locked until the commit, so versions become visible in the order of their changes.
    connection.execute(sa.update(version_table).values(version=version_table.c.version + 1))


def _read_version(connection: sa.Connection) -> int:
    return int(connection.execute(sa.select(version_table.c.version)).scalar_one())


def _utc(value: datetime | None) -> datetime | None:
    """SQLite gives times back without their zone; all of ours are UTC."""
    return None if value is None else _required_utc(value)


def _required_utc(value: datetime) -> datetime:
    return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
