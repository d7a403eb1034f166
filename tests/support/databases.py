"""State databases of each kind for tests, and what happens to them behind the code's back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import psycopg
import sqlalchemy as sa

from gateway.state.database import current_revision, metadata, open_database, upgrade
from tests.support.gateway import give_database
from tests.support.postgresql import Server


class Database(Protocol):
    """One state database."""

    @property
    def url(self) -> str:
        """Where it is."""
        ...

    def go_away(self) -> None:
        """Have every transaction fail, as one would that finds no server."""
        ...

    def come_back(self) -> None:
        """With everything that was in it."""
        ...


class Sqlite:
    """A file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    @property
    def url(self) -> str:
        return f"sqlite:///{self.file}"

    def go_away(self) -> None:
        self.file.rename(self.file.with_suffix(".away"))
        self.file.mkdir()

    def come_back(self) -> None:
        self.file.rmdir()
        self.file.with_suffix(".away").rename(self.file)


class Postgresql:
    """The database of a server, which tests have in turn."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._is_current = False
        self._kept: psycopg.Connection | None = None

    @property
    def url(self) -> str:
        return self.server.url

    def go_away(self) -> None:
        self.server.shut()

    def come_back(self) -> None:
        self.server.let_in()

    def empty(self) -> None:
        """Leave no table in it."""
        self.server.empty()
        self._is_current = False

    def clear(self) -> None:
        """Leave it up to date with nothing in it: emptying tables costs a tenth of making them."""
        if self._is_current:
            try:
                self._delete_all()
                return
            except psycopg.Error:
                self.close()
                self.server.empty()
        upgrade(self.url)
        self._is_current = True

    def close(self) -> None:
        """Give up the connection that is kept."""
        if self._kept is not None:
            self._kept.close()
            self._kept = None

    def _delete_all(self) -> None:
        # One connection for all tests: for each the server starts a process.
        if self._kept is None:
            self._kept = psycopg.connect(self.url, autocommit=True)
        deletes = [f"DELETE FROM {name}" for name in metadata.tables if name != "state_version"]
        self._kept.execute("; ".join([*deletes, "UPDATE state_version SET version = 1"]).encode())


@contextmanager
def connected(database: Database) -> Iterator[sa.Connection]:
    """A transaction of somebody else, rolled back at the end unless it is committed."""
    engine = open_database(database.url)
    try:
        with engine.connect() as connection:
            yield connection
    finally:
        engine.dispose()


def execute(database: Database, statement: str, **values: Any) -> None:
    """Change something behind the code's back."""
    with connected(database) as connection:
        connection.execute(sa.text(statement), values)
        connection.commit()


def revision_of(database: Database) -> str | None:
    """The migration that it stands at."""
    with connected(database) as connection:
        return current_revision(connection)


def given_sqlite(folder: Path) -> Sqlite:
    """One that is up to date and has nothing in it."""
    give_database(folder / "forebay.db")
    return Sqlite(folder / "forebay.db")
