"""Indexes that lead the pruner to what ended, and to what was delivered, long ago.

Safe with the running release: on PostgreSQL they are built while it reads and writes.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import sqlalchemy as sa
from alembic import op

revision = "20261122_1800"
down_revision = "20261122_0900"
branch_labels = None
depends_on = None

INDEXES = (
    ("ix_jobs_ended", "jobs", ["status", "finished_at"], "finished_at IS NOT NULL"),
    ("ix_webhook_deliveries_delivered", "webhook_deliveries", ["delivered_at"], "delivered_at IS NOT NULL"),
)


def upgrade() -> None:
    with _outside_of_a_transaction():
        _timeouts(lock="0", statement="2h")  # a build waits for older transactions, and holds nobody up
        for name, table, columns, where in INDEXES:
            condition = sa.text(where)
            # A build that broke off has left an invalid index under its name.
            op.drop_index(name, table, if_exists=True, postgresql_concurrently=True)
            op.create_index(
                name,
                table,
                columns,
                postgresql_where=condition,
                sqlite_where=condition,
                postgresql_concurrently=True,
            )
        _timeouts(lock="2s", statement="30s")  # as env.py has them


def downgrade() -> None:
    with _outside_of_a_transaction():
        for name, table, _, _ in reversed(INDEXES):
            op.drop_index(name, table, if_exists=True, postgresql_concurrently=True)


def _outside_of_a_transaction() -> AbstractContextManager[None]:
    context = op.get_context()
    return nullcontext() if context.dialect.name == "sqlite" else context.autocommit_block()


def _timeouts(*, lock: str, statement: str) -> None:
    if op.get_context().dialect.name == "postgresql":
        op.execute(f"SET lock_timeout = '{lock}'")
        op.execute(f"SET statement_timeout = '{statement}'")
