"""The state database: its tables, how it is opened and how it is brought up to date.

SQLite in WAL mode by default, PostgreSQL by URL; both through the same SQL. Everything here blocks: call it in a
thread. Every failure leaves as a StateError whose text holds no password.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from pydantic import ValidationError
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.pool import ConnectionPoolEntry

if TYPE_CHECKING:
    from alembic.config import Config

MIGRATIONS = Path(__file__).parent / "migrations"
BUSY_TIMEOUT = 5.0
"""Seconds a writer waits for another one."""
LONG = 600.0
"""Seconds that PostgreSQL may take to sum, or to list, a large table."""
_READ_ONLY = "forebay_read_only"
"""Execution option of a SQLite connection that will write nothing."""
_UPGRADE_LOCK = 0x464F5245
"""PostgreSQL advisory lock under which one replica migrates while the others wait."""

_NO_TEXT = re.compile("[\0\ud800-\udfff]")

# For every None the driver looks for an adapter, and one that it does not find costs it more than binding ten values.
sqlite3.register_adapter(type(None), lambda nothing: nothing)


class _Text(sa.TypeDecorator[str]):
    """Text as each database takes it. PostgreSQL's holds no NUL and neither's holds half a character: whoever looks for
    such a name finds nothing, which is no failure of the database."""

    impl = sa.String
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: sa.Dialect) -> str | None:
        """Put what no name may hold in the place of what no text can."""
        return None if value is None else _NO_TEXT.sub("\1", value)


metadata = sa.MetaData(
    naming_convention={  # names both databases know
        "pk": "pk_%(table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    }
)

keys_table = sa.Table(
    "keys",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("public_id", _Text(32), nullable=False, unique=True),
    sa.Column("name", _Text(200), nullable=False),
    sa.Column("tenant", _Text(200), nullable=False),
    sa.Column("sha256", _Text(64), nullable=False, unique=True),
    sa.Column("models", sa.JSON(none_as_null=True)),
    sa.Column("caps", sa.JSON, nullable=False),
    sa.Column("trust_domain", _Text(200)),
    sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
    sa.Column("expires_at", sa.DateTime(timezone=True)),
    sa.Column("revoked_at", sa.DateTime(timezone=True)),
    sa.Column("admin", sa.Boolean(create_constraint=False), nullable=False, server_default=sa.false()),
    sa.Column("limits", sa.JSON(none_as_null=True)),
    sa.Column("replaces", _Text(32)),
)

tenants_table = sa.Table(
    "tenants",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", _Text(200), nullable=False, unique=True),
    sa.Column("organisation", _Text(200)),
    sa.Column("limits", sa.JSON(none_as_null=True)),
    sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
)

organisations_table = sa.Table(
    "organisations",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", _Text(200), nullable=False, unique=True),
    sa.Column("limits", sa.JSON(none_as_null=True)),
    sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
)

audit_table = sa.Table(
    "audit",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("at", sa.DateTime(timezone=True), nullable=False, index=True),
    sa.Column("actor", _Text(500), nullable=False),
    sa.Column("action", _Text(32), nullable=False),
    sa.Column("kind", _Text(32), nullable=False),
    sa.Column("name", _Text(200), nullable=False),
    sa.Column("before", sa.JSON(none_as_null=True)),
    sa.Column("after", sa.JSON(none_as_null=True)),
    sa.Column("request_id", _Text(64)),
    sa.Index(None, "kind", "name"),
)

usage_table = sa.Table(
    "usage",
    metadata,
    sa.Column("request_id", _Text(64), primary_key=True),
    sa.Column("at", sa.DateTime(timezone=True), nullable=False),
    sa.Column("day", _Text(10), nullable=False),
    sa.Column("key_id", _Text(200), nullable=False),
    sa.Column("key", _Text(200), nullable=False),
    sa.Column("tenant", _Text(200), nullable=False),
    sa.Column("organisation", _Text(200), nullable=False),
    sa.Column("model", _Text(400), nullable=False),
    sa.Column("version", _Text(200), nullable=False),
    sa.Column("path", _Text(200), nullable=False),
    sa.Column("endpoint", _Text(400), nullable=False),
    sa.Column("outcome", _Text(32), nullable=False),
    sa.Column("status", sa.Integer, nullable=False),
    sa.Column("settlement", _Text(16), nullable=False),
    sa.Column("tokens_in", sa.Integer),
    sa.Column("tokens_cached", sa.Integer),
    sa.Column("tokens_out", sa.Integer),
    sa.Column("tokens_reasoning", sa.Integer),
    sa.Column("cost_nanos", sa.BigInteger, nullable=False),
    sa.Column("ttft_ms", sa.Float),
    sa.Column("duration_ms", sa.Float, nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("detail", sa.Text, nullable=False),
    sa.Column("served", _Text(400), nullable=False, server_default=sa.text("''")),
    sa.Index("ix_usage_at", "at"),
)

version_table = sa.Table(
    "state_version",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("version", sa.BigInteger, nullable=False),
)


class StateError(Exception):
    """The state database cannot be used, or refuses what was asked; the text says why and what to do."""


class NotPossible(StateError):  # noqa: N818 - an answer to whoever asked, the database is well
    """What was asked breaks a rule of keys and tenants."""


class NoSuch(NotPossible):
    """There is nothing of that name."""


class Stale(NotPossible):
    """It was changed since it was read."""


def open_database(url: str) -> sa.Engine:
    """An engine for `url`, without connecting yet. StateError when the URL is wrong or its driver is not installed."""
    try:
        parsed = sa.make_url(url)
        if parsed.get_backend_name() not in ("sqlite", "postgresql"):
            raise StateError(f"state.url: {parsed.get_backend_name()} is not supported; use sqlite or postgresql")
        engine = sa.create_engine(parsed, pool_pre_ping=parsed.get_backend_name() == "postgresql")
    except (ArgumentError, NoSuchModuleError):
        raise StateError(
            "state.url: is not a database URL; write sqlite:////path/to/forebay.db or postgresql://user@host/database"
        ) from None
    except ImportError as error:
        # One that is there without the library beneath it has no name here.
        driver = error.name or parsed.get_driver_name()
        extra = "'forebay[postgresql]'" if driver == "psycopg" else driver
        raise StateError(
            f"state.url: the database driver {driver} is not installed; type: pip install {extra}"
        ) from None
    if engine.dialect.name == "sqlite":
        if not parsed.database or parsed.database == ":memory:":
            raise StateError("state.url: a database in memory forgets its keys; write sqlite:////path/to/forebay.db")
        sa.event.listen(engine, "connect", _prepare_sqlite_connection)
        sa.event.listen(engine, "begin", _begin_sqlite)
    else:
        sa.event.listen(engine, "connect", _prepare_postgresql_connection)
        if engine.dialect.driver == "psycopg":
            from gateway.state import postgresql

            sa.event.listen(engine, "do_connect", postgresql.connect)
    return engine


def _prepare_sqlite_connection(connection: DBAPIConnection, _: ConnectionPoolEntry) -> None:
    # The driver's own transactions start too late (at the first write): we say BEGIN ourselves.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {int(BUSY_TIMEOUT * 1000)}")
    cursor.execute("PRAGMA synchronous = NORMAL")
    cursor.close()


def _begin_sqlite(connection: sa.Connection) -> None:
    # A transaction that reads and then writes would fail at once beside another writer, whatever busy_timeout says;
    # one that takes the write lock first waits for it. Readers see one snapshot and wait for nobody.
    reads = connection.get_execution_options().get(_READ_ONLY, False)
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")


def _prepare_postgresql_connection(connection: DBAPIConnection, _: ConnectionPoolEntry) -> None:
    cursor = connection.cursor()
    # In the server's own zone the last moment of 9999 may be one that no driver can read.
    cursor.execute(f"SET TIME ZONE 'UTC'; SET lock_timeout = {int(BUSY_TIMEOUT * 1000)}")
    cursor.close()
    connection.commit()


@contextmanager
def reading(engine: sa.Engine, *, long: bool = False) -> Iterator[sa.Connection]:
    """A connection that sees one state, waits for no writer and writes nothing. Raises StateError. ``long``: answers
    may take a while."""
    sees_one: dict[str, Any] = {_READ_ONLY: True}
    if engine.dialect.name == "postgresql":
        sees_one = {"isolation_level": "REPEATABLE READ"}
    with (
        translated(engine),
        engine.connect().execution_options(**sees_one) as connection,
        _patient(connection, LONG if long else None),
    ):
        yield connection


def _patient(connection: sa.Connection, seconds: float | None) -> AbstractContextManager[None]:
    if connection.dialect.driver != "psycopg":
        return nullcontext()
    from gateway.state import postgresql

    return postgresql.patient(connection, seconds)


@contextmanager
def translated(engine: sa.Engine) -> Iterator[None]:
    """Turn what SQLAlchemy, or sqlite3 beneath it, raises inside into a StateError; so too what is in it and
    cannot be read."""
    try:
        yield
    except ValidationError as error:
        what = "; ".join(".".join(map(str, one["loc"])) for one in error.errors())
        raise StateError(
            f"the state database {describe(engine.url)} holds what cannot be read: {what}; another release wrote it"
        ) from None
    except (SQLAlchemyError, sqlite3.Error) as error:
        cause = error.orig if isinstance(error, DBAPIError) else error
        lines = str(cause).strip().splitlines() if isinstance(error, DBAPIError | sqlite3.Error) else []
        reason = lines[0] if lines else type(cause).__name__
        raise StateError(f"the state database {describe(engine.url)} failed: {reason}; {_advice(engine)}") from error


def exists(url: str) -> bool:
    """Tell whether there is a database to open: a SQLite file that was made, or any other kind."""
    parsed = sa.make_url(url)
    return parsed.get_backend_name() != "sqlite" or Path(str(parsed.database)).exists()


def describe(url: sa.URL) -> str:
    """The database as a person may see it: the file, or the URL without its password and whatever else is secret."""
    if url.get_backend_name() == "sqlite":
        return str(url.database)
    shown = {name: value for name, value in url.query.items() if name in ("host", "port")}
    return url.set(query=shown).render_as_string(hide_password=True)


def _advice(engine: sa.Engine) -> str:
    if engine.dialect.name == "sqlite":
        return "check that its directory can be written and has room, or name another place with state.url"
    return "check that it is running and that state.url is right"


def upgrade(url: str) -> None:
    """Create the database or bring it up to date; does nothing when it is. Safe when several replicas start at once.

    One that a newer release has migrated already is left alone: a migration only adds what the release before it can
    ignore (expand, then contract one release later), so that a rolling update may go back.
    """
    engine = open_database(url)
    try:
        with translated(engine):
            if engine.dialect.name == "sqlite":
                _make_sqlite_file(engine)
            with engine.begin() as connection, _patient(connection, inf):
                if engine.dialect.name == "postgresql":
                    # A migration takes as long as it does.
                    connection.execute(sa.text("SET LOCAL lock_timeout = 0"))
                    connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_UPGRADE_LOCK)))
                _migrate(connection)
    finally:
        engine.dispose()


def _make_sqlite_file(engine: sa.Engine) -> None:
    """Directory and file, readable by their owner alone, in WAL mode (which the file remembers)."""
    file = Path(str(engine.url.database))
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file.touch(mode=0o600)
    except OSError as error:
        raise StateError(f"the state database {file} cannot be made: {error.strerror}; {_advice(engine)}") from None
    connection = engine.raw_connection()
    try:
        connection.cursor().execute("PRAGMA journal_mode = WAL")
    finally:
        connection.close()


def _migrate(connection: sa.Connection) -> None:
    head, known = _revisions()
    current = current_revision(connection)
    # Nearly every start finds the database up to date: then neither the migrations nor Alembic are read, a tenth of it.
    if current != head and current in known | {None}:
        from alembic import command

        config = _alembic()
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def _alembic() -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


@cache
def _revisions() -> tuple[str, frozenset[str]]:
    """The newest migration of this release, and all of them: their files bear their numbers (``r0001_keys.py``)."""
    known = frozenset(file.name[1:5] for file in (MIGRATIONS / "versions").glob("r*.py"))
    return max(known), known


def current_revision(connection: sa.Connection) -> str | None:
    """The migration this database stands at; None before the first."""
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    revision: str | None = connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()
    return revision
