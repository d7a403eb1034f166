"""State databases: what is said of them holds for both kinds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.databases import Database, Postgresql, Sqlite, given_sqlite

KINDS = ("sqlite", "postgresql")


@pytest.fixture(params=KINDS)
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Database:
    """One of each kind in turn, up to date, with nothing in it."""
    if request.param == "sqlite":
        return given_sqlite(tmp_path)
    found: Postgresql = request.getfixturevalue("postgresql")
    found.clear()
    return found


@pytest.fixture(params=KINDS)
def no_tables(request: pytest.FixtureRequest, tmp_path: Path) -> Database:
    """A place of each kind in turn where a database can be made."""
    if request.param == "sqlite":
        return Sqlite(tmp_path / "state" / "forebay.db")
    found: Postgresql = request.getfixturevalue("postgresql")
    found.empty()
    return found
