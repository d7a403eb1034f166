"""Alembic's migrations of the state database; `gateway.state.database.upgrade` runs them."""
