"""Runs the migrations inside the transaction, and under the lock, that `gateway.state.database.upgrade` holds."""

from __future__ import annotations

from alembic import context

from gateway.state.database import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, transactional_ddl=True)
context.run_migrations()
