"""Fair turns between tenants: their weights, how many of their jobs may wait, and who waits in a lane.

Safe with the running release: it puts ids at the end of a lane, and a tenant's ids without a turn are first
in, first out as they were.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import sqlalchemy as sa
from alembic import op

revision = "20261122_2265"
down_revision = "20261122_2260"
branch_labels = None
depends_on = None

QUEUED = "status = 'queued'"
OWN_TURNS = "weight <> 1 OR max_queued IS NOT NULL"


def upgrade() -> None:
    again = not _on_sqlite()  # a build of an index that broke off has left all of the rest
    weight = sa.Column("weight", sa.Integer(), nullable=False, server_default="1")
    op.add_column("tenants", weight, if_not_exists=again)
    op.add_column("tenants", sa.Column("max_queued", sa.Integer()), if_not_exists=again)
    own = sa.text(OWN_TURNS)
    op.create_index(
        "ix_tenants_own_turns",
        "tenants",
        ["id"],
        postgresql_where=own,
        sqlite_where=own,
        if_not_exists=again,
    )
    with _outside_of_a_transaction():
        _timeouts(lock="0", statement="2h")  # a build waits for older transactions, and holds nobody up
        queued = sa.text(QUEUED)
        # A build that broke off has left an invalid index under its name.
        op.drop_index("ix_jobs_queued_tenants", "jobs", if_exists=True, postgresql_concurrently=True)
        op.create_index(
            "ix_jobs_queued_tenants",
            "jobs",
            ["lane", "tenant_id", "queued_at", "id"],
            postgresql_where=queued,
            sqlite_where=queued,
            postgresql_concurrently=True,
        )
        _timeouts(lock="2s", statement="30s")  # as env.py has them


def downgrade() -> None:
    with _outside_of_a_transaction():
        op.drop_index("ix_jobs_queued_tenants", "jobs", if_exists=True, postgresql_concurrently=True)
    op.drop_index("ix_tenants_own_turns", "tenants")
    for column in ("max_queued", "weight"):
        op.drop_column("tenants", column)


def _on_sqlite() -> bool:
    return op.get_context().dialect.name == "sqlite"


def _outside_of_a_transaction() -> AbstractContextManager[None]:
    return nullcontext() if _on_sqlite() else op.get_context().autocommit_block()


def _timeouts(*, lock: str, statement: str) -> None:
    if not _on_sqlite():
        op.execute(f"SET lock_timeout = '{lock}'")
        op.execute(f"SET statement_timeout = '{statement}'")
