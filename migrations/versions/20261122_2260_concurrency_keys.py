"""Concurrency keys, and how many jobs of a tenant may run at once.

Safe with the running release: its workers claim jobs with a key without asking for a slot, so the limits
hold once the last of them has stopped. After a downgrade jobs that wait for a slot stay `blocked`: they can
be cancelled.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import sqlalchemy as sa
from alembic import op

revision = "20261122_2260"
down_revision = "20261122_2250"
branch_labels = None
depends_on = None

INDEXES = (
    ("ix_jobs_gated", ["tenant_id", "concurrency_key"], "status = 'running' AND gated"),
    (
        "ix_jobs_waiting_for_key",
        ["tenant_id", "concurrency_key", "priority", "queued_at", "id"],
        "status = 'blocked' AND status_reason = 'concurrency_key'",
    ),
    (
        "ix_jobs_waiting_for_tenant",
        ["tenant_id", "priority", "queued_at", "id"],
        "status = 'blocked' AND status_reason = 'tenant_limit'",
    ),
)


def upgrade() -> None:
    again = not _on_sqlite()  # a build of an index that broke off has left all of the rest
    op.add_column("jobs", sa.Column("concurrency_key", sa.String(200)), if_not_exists=again)
    op.add_column("jobs", sa.Column("concurrency_limit", sa.Integer()), if_not_exists=again)
    gated = sa.Column("gated", sa.Boolean(), nullable=False, server_default=sa.false())
    op.add_column("jobs", gated, if_not_exists=again)
    op.add_column("tenants", sa.Column("max_running", sa.Integer()), if_not_exists=again)
    limited = sa.text("max_running IS NOT NULL")
    op.create_index(
        "ix_tenants_limited",
        "tenants",
        ["id"],
        postgresql_where=limited,
        sqlite_where=limited,
        if_not_exists=again,
    )
    with _outside_of_a_transaction():
        _timeouts(lock="0", statement="2h")  # a build waits for older transactions, and holds nobody up
        for name, columns, where in INDEXES:
            condition = sa.text(where)
            # A build that broke off has left an invalid index under its name.
            op.drop_index(name, "jobs", if_exists=True, postgresql_concurrently=True)
            op.create_index(
                name,
                "jobs",
                columns,
                postgresql_where=condition,
                sqlite_where=condition,
                postgresql_concurrently=True,
            )
        _timeouts(lock="2s", statement="30s")  # as env.py has them


def downgrade() -> None:
    with _outside_of_a_transaction():
        for name, _, _ in reversed(INDEXES):
            op.drop_index(name, "jobs", if_exists=True, postgresql_concurrently=True)
    op.drop_index("ix_tenants_limited", "tenants")
    op.drop_column("tenants", "max_running")
    for column in ("gated", "concurrency_limit", "concurrency_key"):
        op.drop_column("jobs", column)


def _on_sqlite() -> bool:
    return op.get_context().dialect.name == "sqlite"


def _outside_of_a_transaction() -> AbstractContextManager[None]:
    return nullcontext() if _on_sqlite() else op.get_context().autocommit_block()


def _timeouts(*, lock: str, statement: str) -> None:
    if not _on_sqlite():
        op.execute(f"SET lock_timeout = '{lock}'")
        op.execute(f"SET statement_timeout = '{statement}'")
