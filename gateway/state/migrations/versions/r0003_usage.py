"""The usage ledger: one row a request. A release that does not know the table leaves it alone."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Make the table and what sums are looked up by."""
    op.create_table(
        "usage",
        sa.Column("request_id", sa.String(64), primary_key=True),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("day", sa.String(10), nullable=False),
        sa.Column("key_id", sa.String(200), nullable=False),
        sa.Column("key", sa.String(200), nullable=False),
        sa.Column("tenant", sa.String(200), nullable=False),
        sa.Column("organisation", sa.String(200), nullable=False),
        sa.Column("model", sa.String(400), nullable=False),
        sa.Column("version", sa.String(200), nullable=False),
        sa.Column("path", sa.String(200), nullable=False),
        sa.Column("endpoint", sa.String(400), nullable=False),
        sa.Column("outcome", sa.String(32), nullable=False),
        sa.Column("status", sa.Integer, nullable=False),
        sa.Column("settlement", sa.String(16), nullable=False),
        sa.Column("tokens_in", sa.Integer),
        sa.Column("tokens_cached", sa.Integer),
        sa.Column("tokens_out", sa.Integer),
        sa.Column("tokens_reasoning", sa.Integer),
        sa.Column("cost_nanos", sa.BigInteger, nullable=False),
        sa.Column("ttft_ms", sa.Float),
        sa.Column("duration_ms", sa.Float, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("detail", sa.Text, nullable=False),
    )
    op.create_index("ix_usage_at", "usage", ["at"])
    for who in ("key_id", "tenant", "model"):
        op.create_index(f"ix_usage_{who}_at", "usage", [who, "at"])
