"""Keys that may use the admin API. A release that does not know the column makes keys without that right."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add the column; every key there was is without the right."""
    column: sa.Column[bool] = sa.Column(
        "admin", sa.Boolean(create_constraint=False), nullable=False, server_default=sa.false()
    )
    op.add_column("keys", column)
