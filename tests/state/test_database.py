"""The state database is made, migrated once and opened by many, and explains itself when it cannot be used."""

from __future__ import annotations

import re
import stat
import sys
import threading
from math import inf
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import op
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg

from gateway.state import database
from gateway.state.database import (
    _UPGRADE_LOCK,
    MIGRATIONS,
    StateError,
    _revisions,
    metadata,
    open_database,
    reading,
    upgrade,
)
from gateway.state.keys import KeyStore
from gateway.state.postgresql import Connection
from tests.support.databases import Database, Postgresql, Sqlite, connected, execute, revision_of
from tests.support.sockets import free_port
from tests.support.table import each

SCRIPTS = ScriptDirectory(str(MIGRATIONS))
HEAD = SCRIPTS.get_current_head()


def test_an_empty_database_comes_up_and_a_second_upgrade_changes_nothing(no_tables: Database) -> None:
    upgrade(no_tables.url)
    with KeyStore(no_tables.url) as store:
        created = store.create("a")
        version = store.version()
    upgrade(no_tables.url)
    assert revision_of(no_tables) == HEAD
    with KeyStore(no_tables.url) as store:
        assert store.version() == version
        assert [key.record for key in store.list()] == [created.record]


def test_the_file_is_its_owner_s_and_writes_ahead(tmp_path: Path) -> None:
    made = Sqlite(tmp_path / "state" / "forebay.db")
    upgrade(made.url)
    assert stat.S_IMODE(made.file.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(made.file.stat().st_mode) == 0o600
    with connected(made) as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"


def test_the_migrations_make_the_tables_the_code_uses(no_tables: Database) -> None:
    upgrade(no_tables.url)
    with connected(no_tables) as connection:
        context = MigrationContext.configure(connection, opts={"compare_server_default": True})
        assert compare_metadata(context, metadata) == []


def test_a_migration_that_fails_leaves_nothing_behind(no_tables: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables and revision come in one transaction, so that the next start finds the state before or after."""

    def no_room(*_: object, **__: object) -> None:
        raise sa.exc.OperationalError("INSERT", {}, Exception("disk is full"))

    with monkeypatch.context() as broken:
        broken.setattr(op, "bulk_insert", no_room)
        with pytest.raises(StateError, match="failed: disk is full; check that it"):
            upgrade(no_tables.url)
    with connected(no_tables) as connection:
        assert sa.inspect(connection).get_table_names() == []
    upgrade(no_tables.url)
    assert revision_of(no_tables) == HEAD


def test_a_database_of_a_newer_release_is_used_as_it_is(no_tables: Database) -> None:
    """During a rolling update a replica of the older release may start again beside migrated state."""
    upgrade(no_tables.url)
    execute(no_tables, "UPDATE alembic_version SET version_num = '9999'")
    execute(no_tables, "ALTER TABLE keys ADD COLUMN added_later TEXT")
    upgrade(no_tables.url)
    assert revision_of(no_tables) == "9999"
    with KeyStore(no_tables.url) as store:
        store.create("a")
        assert len(store.load_all().records) == 1


def test_a_replica_waits_for_the_one_that_migrates(no_tables: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one holds the lock; whenever this one comes, it finds nothing left to do."""
    if isinstance(no_tables, Postgresql):
        # What hurries those who change a key does not hurry this.
        monkeypatch.setattr("gateway.state.database.BUSY_TIMEOUT", 0.02)
    upgrade(no_tables.url)
    with connected(no_tables) as other:
        if isinstance(no_tables, Postgresql):
            other.execute(sa.select(sa.func.pg_advisory_xact_lock(_UPGRADE_LOCK)))
        other.execute(sa.text("UPDATE alembic_version SET version_num = 'halfway'"))
        late = threading.Thread(target=upgrade, args=(no_tables.url,))
        late.start()
        late.join(0.05)
        assert late.is_alive()  # nothing but the lock can hold it
        other.execute(sa.text("UPDATE alembic_version SET version_num = :head"), {"head": HEAD})
        other.commit()
        late.join()
    assert revision_of(no_tables) == HEAD
    with KeyStore(no_tables.url) as store:
        assert store.version() == 1


@pytest.mark.parametrize("no_tables", ["postgresql"], indirect=True)
def test_migrations_and_sums_of_large_tables_may_take_long(
    no_tables: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what comes next on the same connection may not."""
    seen: list[float | None] = []

    def look(connection: sa.Connection) -> None:
        made: object = connection.connection.dbapi_connection
        assert isinstance(made, Connection)
        seen.append(made.within)

    monkeypatch.setattr(database, "_migrate", look)
    upgrade(no_tables.url)
    engine = open_database(no_tables.url)
    for long in (True, False):
        with reading(engine, long=long) as connection:
            look(connection)
    engine.dispose()
    assert seen == [inf, database.LONG, None]


def test_several_replicas_start_at_once_on_nothing(no_tables: Database) -> None:
    failures: list[BaseException] = []
    start = threading.Barrier(3)

    def replica() -> None:
        try:
            start.wait()
            upgrade(no_tables.url)
        except BaseException as error:
            failures.append(error)

    replicas = [threading.Thread(target=replica) for _ in range(3)]
    for one in replicas:
        one.start()
    for one in replicas:
        one.join()
    assert failures == []
    assert revision_of(no_tables) == HEAD
    with KeyStore(no_tables.url) as store:
        assert store.version() == 1


@each(
    ("wrong", "said"),
    [
        ("mysql://u:hunter2@h/d", "mysql is not supported; use sqlite or postgresql"),
        ("nonsense hunter2", "is not a database URL; write sqlite:////path"),
        ("postgresql+nodriver://u:hunter2@h/d", "is not a database URL"),
        ("sqlite://", "in memory forgets its keys"),
        ("sqlite:///:memory:", "in memory forgets its keys"),
    ],
)
def test_a_wrong_url_says_what_to_write(wrong: str, said: str) -> None:
    with pytest.raises(StateError, match=said) as caught:
        open_database(wrong)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("postgresql://u@h/d", "database driver psycopg is not installed; type: pip install 'forebay[postgresql]'"),
        ("postgresql+psycopg2://u@h/d", "database driver psycopg2 is not installed; type: pip install psycopg2"),
    ],
)
def test_a_missing_driver_says_what_to_type(monkeypatch: pytest.MonkeyPatch, url: str, said: str) -> None:
    for driver in ("psycopg", "psycopg2"):
        monkeypatch.setitem(sys.modules, driver, None)
    with pytest.raises(StateError, match=re.escape(said)):
        open_database(url)


def test_a_driver_without_its_library_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `pip install psycopg` alone gives on a machine without libpq."""

    def no_libpq() -> None:
        raise ImportError("no pq wrapper available.\nAttempts made:\n- ...")

    monkeypatch.setattr(PGDialect_psycopg, "import_dbapi", no_libpq)
    with pytest.raises(StateError, match=r"pip install 'forebay\[postgresql\]'"):
        open_database("postgresql://u@h/d")


def test_a_way_that_swallows_everything_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the URL says how long."""
    asked: list[dict[str, Any]] = []

    def refuse(**parameters: Any) -> None:
        asked.append(parameters)
        raise ConnectionError

    monkeypatch.setattr(Connection, "connect", refuse)
    for query in ("", "?connect_timeout=30"):
        with pytest.raises(ConnectionError):
            open_database(f"postgresql://u@h/d{query}").connect()
    assert [(one["connect_timeout"], one["application_name"]) for one in asked] == [(5, "forebay"), ("30", "forebay")]


def test_a_server_that_is_not_there_is_told_without_its_secrets() -> None:
    url = f"postgresql://u:hunter2@127.0.0.1:{free_port()}/d?sslpassword=hunter2"
    with pytest.raises(StateError, match=r"postgresql://u:\*\*\*@127.0.0.1:\d+/d failed: .*refused") as caught:
        upgrade(url)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("no_tables", ["postgresql"], indirect=True)
def test_what_the_server_does_not_let_us_do_is_told(no_tables: Postgresql) -> None:
    for url, said in (
        (no_tables.url.replace("forebay@", "nobody-knows@"), 'role "nobody-knows" does not exist'),
        (no_tables.url.replace("@/forebay", "@/nowhere"), 'database "nowhere" does not exist'),
        (no_tables.url.replace("@/forebay", "@/postgres"), "permission denied for schema public"),
    ):
        with pytest.raises(StateError, match=f"failed: .*{said}"):
            upgrade(url)


def test_a_place_that_cannot_be_written_and_a_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("this is no database, it is a text of some length")
    with pytest.raises(StateError, match=f"{tmp_path}/file/forebay.db cannot be made: .*name another place"):
        upgrade(f"sqlite:///{tmp_path}/file/forebay.db")
    with pytest.raises(StateError, match=f"{tmp_path}/file failed: file is not a database"):
        upgrade(f"sqlite:///{tmp_path}/file")


def test_the_names_of_the_migrations_say_what_alembic_finds() -> None:
    head, known = _revisions()
    assert head == HEAD
    assert known == {script.revision for script in SCRIPTS.walk_revisions()}
