"""A row of the usage ledger says which model served it, where the name that was asked for stands for several.

A release that does not know the column writes rows without it: they say nothing, as do those there are.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Add a column; no row is rewritten for it."""
    op.add_column("usage", sa.Column("served", sa.String(400), nullable=False, server_default=sa.text("''")))
