"""The state database is made, migrated once and opened by many, and explains itself when it cannot be used."""

from __future__ import annotations

import sqlite3
import stat
import sys
import threading
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import op
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from gateway.state.database import (
    MIGRATIONS,
    StateError,
    _revisions,
    current_revision,
    metadata,
    open_database,
    upgrade,
)
from gateway.state.keys import KeyStore

SCRIPTS = ScriptDirectory(str(MIGRATIONS))
HEAD = SCRIPTS.get_current_head()


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/state/forebay.db"


def revision_of(url: str) -> str | None:
    engine = open_database(url)
    try:
        with engine.connect() as connection:
            return current_revision(connection)
    finally:
        engine.dispose()


def test_an_empty_database_comes_up_and_a_second_upgrade_changes_nothing(url: str, tmp_path: Path) -> None:
    upgrade(url)
    with KeyStore(url) as store:
        created = store.create("a")
        version = store.version()
    upgrade(url)
    assert revision_of(url) == HEAD
    with KeyStore(url) as store:
        assert store.version() == version
        assert [key.record for key in store.list()] == [created.record]


def test_the_file_is_its_owner_s_and_writes_ahead(url: str, tmp_path: Path) -> None:
    upgrade(url)
    file = tmp_path / "state" / "forebay.db"
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    engine = open_database(url)
    with engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
    engine.dispose()


def test_the_migrations_make_the_tables_the_code_uses(url: str) -> None:
    upgrade(url)
    engine = open_database(url)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    engine.dispose()


def test_a_migration_that_fails_leaves_nothing_behind(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables and revision come in one transaction, so that the next start finds the state before or after."""

    def no_room(*_: object, **__: object) -> None:
        raise sa.exc.OperationalError("INSERT", {}, Exception("disk is full"))

    with monkeypatch.context() as broken:
        broken.setattr(op, "bulk_insert", no_room)
        with pytest.raises(StateError, match="failed: disk is full; check that its directory can be written"):
            upgrade(url)
    engine = open_database(url)
    assert sa.inspect(engine).get_table_names() == []
    engine.dispose()
    upgrade(url)
    assert revision_of(url) == HEAD


def test_a_database_of_a_newer_release_is_used_as_it_is(url: str) -> None:
    """During a rolling update a replica of the older release may start again beside migrated state."""
    upgrade(url)
    engine = open_database(url)
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
        connection.exec_driver_sql("ALTER TABLE keys ADD COLUMN added_later TEXT")
    engine.dispose()
    upgrade(url)
    assert revision_of(url) == "9999"
    with KeyStore(url) as store:
        store.create("a")
        assert len(store.load_all().records) == 1


def test_a_replica_waits_for_the_one_that_migrates(url: str) -> None:
    """The other one holds the write lock; whenever this one comes, it finds nothing left to do."""
    upgrade(url)
    other = sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    other.execute("UPDATE alembic_version SET version_num = 'halfway'")
    late = threading.Thread(target=upgrade, args=(url,))
    late.start()
    late.join(0.05)
    assert late.is_alive()  # nothing but the lock can hold it
    other.execute("UPDATE alembic_version SET version_num = ?", (HEAD,))
    other.execute("COMMIT")
    late.join()
    other.close()
    assert revision_of(url) == HEAD
    with KeyStore(url) as store:
        assert store.version() == 1


@pytest.mark.parametrize(
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


def test_a_missing_driver_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(StateError, match="database driver psycopg is not installed; type: pip install psycopg"):
        open_database("postgresql+psycopg://u@h/d")


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
