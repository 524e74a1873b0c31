"""Rate limit overrides of single tenants and callers, and counters of what processes keep in memory."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "20261122_2200"
down_revision = "20261122_2100"
branch_labels = None
depends_on = None

ID = sa.Uuid(as_uuid=False).with_variant(sa.String(36), "sqlite")
MOMENT = sa.DateTime(timezone=True)


def _now() -> sa.TextClause:
    if op.get_context().dialect.name == "sqlite":
        return sa.text("(strftime('%Y-%m-%d %H:%M:%f000', 'now'))")
    return sa.text("now()")


def upgrade() -> None:
    now = _now()
    op.create_table(
        "rate_limit_overrides",
        sa.Column("tenant_id", ID, nullable=False),
        sa.Column("created_by", sa.String(100), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False, server_default="1"),
        sa.Column("created_at", MOMENT, nullable=False, server_default=now),
        sa.Column("updated_at", MOMENT, nullable=False, server_default=now),
        sa.Column("policy", sa.String(20), nullable=False),
        sa.Column("subject", sa.String(100), nullable=False),
        sa.Column("quota", sa.Integer()),
        sa.Column("window_seconds", sa.Integer()),
        sa.Column("mode", sa.String(10), nullable=False),
        sa.Column("reason", sa.String(500), nullable=False),
        sa.Column("expires_at", MOMENT),
        sa.Column("updated_by", sa.String(100), nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "policy", "subject", name=op.f("pk_rate_limit_overrides")),
        sa.CheckConstraint("mode IN ('enforce', 'shadow')", name=op.f("ck_rate_limit_overrides_mode")),
        sa.CheckConstraint(
            "(quota IS NULL) = (window_seconds IS NULL)",
            name=op.f("ck_rate_limit_overrides_quota_has_window"),
        ),
        sa.CheckConstraint("quota >= 0", name=op.f("ck_rate_limit_overrides_quota")),
    )
    op.create_table(
        "change_counters",
        sa.Column("name", sa.String(50), nullable=False),
        sa.Column("value", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_change_counters")),
    )


def downgrade() -> None:
    op.drop_table("change_counters")
    op.drop_table("rate_limit_overrides")
