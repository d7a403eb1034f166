"""A connection to PostgreSQL that waits for no answer without end: the driver's own waits as long as the server lives.

A server that is stopped, or a way to it that drops packets, is then one that is away, as any that refuses connections.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import sqlalchemy as sa

ANSWER_WITHIN = 15.0
"""Seconds that a statement may take, unless it is said to be a long one."""
CONNECTING = {"application_name": "forebay", "connect_timeout": 5}
"""How a connection is asked for where the URL does not say otherwise."""


class Connection(psycopg.Connection[Any]):
    """Closed, with an OperationalError, once an answer is overdue."""

    within: float | None = None
    """Seconds for an answer; None: ``ANSWER_WITHIN``."""

    def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
        """Consume what the driver does, for so long and no longer."""
        if timeout is not None:
            return super().wait(gen, interval, timeout)
        began, within = time.monotonic(), ANSWER_WITHIN if self.within is None else self.within
        try:
            return super().wait(gen, interval, within)
        except psycopg.OperationalError:
            if time.monotonic() - began < within:
                raise
            # Half an answer may still come: nothing can be asked after that.
            self.pgconn.finish()
            raise psycopg.OperationalError(f"no answer within {within:g} s") from None


def connect(_dialect: sa.Dialect, _entry: object, arguments: list[Any], parameters: dict[str, Any]) -> Connection:
    """Make one, for SQLAlchemy's event."""
    return Connection.connect(*arguments, **{**CONNECTING, **parameters})


@contextmanager
def patient(connection: sa.Connection, seconds: float | None) -> Iterator[None]:
    """Let the answers on a connection take so long; None: as long as any."""
    made: object = connection.connection.dbapi_connection
    if not isinstance(made, Connection):
        yield
        return
    made.within = seconds
    try:
        yield
    finally:
        made.within = None
