"""Paused queues: a row stands for a queue whose jobs wait until it is resumed.

Safe with the running release, which does not know the table: its workers go on with every queue until
they are replaced. Statistics are read through `ix_jobs_ended`, which is there already.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "20261122_2230"
down_revision = "20261122_2220"
branch_labels = None
depends_on = None


def _now() -> sa.TextClause:
    if op.get_context().dialect.name != "postgresql":
        return sa.text("(strftime('%Y-%m-%d %H:%M:%f000', 'now'))")
    return sa.text("now()")


def upgrade() -> None:
    op.create_table(
        "paused_queues",
        sa.Column("queue", sa.String(50), nullable=False),
        sa.Column("reason", sa.String(200)),
        sa.Column("created_by", sa.String(100), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False, server_default=_now()),
        sa.PrimaryKeyConstraint("queue", name=op.f("pk_paused_queues")),
    )


def downgrade() -> None:
    op.drop_table("paused_queues")
