"""Batches, chains and dependencies.

Safe with the running release: its workers end jobs without what follows, which a scheduler of this one
makes good. After a downgrade jobs that wait for others stay `blocked`: they can be cancelled.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import sqlalchemy as sa
from alembic import op

revision = "20261122_2250"
down_revision = "20261122_2240"
branch_labels = None
depends_on = None

ID = sa.Uuid(as_uuid=False).with_variant(sa.String(36), "sqlite")
MOMENT = sa.DateTime(timezone=True)
INDEXES = (
    ("ix_jobs_batch", ["batch_id", "status"], "batch_id IS NOT NULL"),
    ("ix_jobs_chain", ["chain_id", "chain_run_id"], "chain_id IS NOT NULL"),
    ("ix_jobs_unfollowed", ["id"], "linked AND finished_at IS NOT NULL AND followed_seq < event_seq"),
)


def _columns() -> Iterator[sa.Column[object]]:
    yield sa.Column("batch_id", ID)
    yield sa.Column("chain_id", ID)
    yield sa.Column("chain_run_id", ID)
    yield sa.Column("chain_step", sa.Integer())
    yield sa.Column("depends_on", sa.Text())
    yield sa.Column("on_dependency_failure", sa.String(6), nullable=False, server_default="cancel")
    yield sa.Column("dependencies_left", sa.Integer(), nullable=False, server_default="0")
    yield sa.Column("linked", sa.Boolean(), nullable=False, server_default=sa.false())
    yield sa.Column("followed_seq", sa.Integer(), nullable=False, server_default="0")


def upgrade() -> None:
    now = sa.text("(strftime('%Y-%m-%d %H:%M:%f000', 'now'))" if _on_sqlite() else "now()")
    again = not _on_sqlite()  # a build of an index that broke off has left all of the rest
    for column in _columns():
        op.add_column("jobs", column, if_not_exists=again)
    op.create_table(
        "job_dependencies",
        sa.Column("parent_id", ID, nullable=False),
        sa.Column("job_id", ID, nullable=False),
        sa.Column("tenant_id", ID, nullable=False),
        sa.PrimaryKeyConstraint("parent_id", "job_id", name=op.f("pk_job_dependencies")),
        if_not_exists=again,
    )
    op.create_table(
        "batches",
        *_owned(now),
        sa.Column("total", sa.Integer(), nullable=False),
        sa.Column("enqueued", sa.Integer(), nullable=False),
        sa.Column("callbacks", sa.Text(), nullable=False),
        sa.Column("ends", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("counts", sa.Text()),
        sa.Column("finished_at", MOMENT),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_batches")),
        sa.CheckConstraint(
            "(counts IS NULL) = (finished_at IS NULL)", name=op.f("ck_batches_ended_has_counts")
        ),
        if_not_exists=again,
    )
    op.create_index("ix_batches_tenant_id_id", "batches", ["tenant_id", "id"], if_not_exists=again)
    op.create_table(
        "chains",
        *_owned(now),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("execution_mode", sa.String(10), nullable=False),
        sa.Column("chain_definition", sa.Text(), nullable=False),
        sa.Column("plan", sa.Text(), nullable=False),
        sa.Column("stop_on_failure", sa.Boolean(), nullable=False),
        sa.Column("timeout_seconds", sa.Integer()),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_chains")),
        sa.CheckConstraint(
            "execution_mode IN ('sequential', 'parallel')", name=op.f("ck_chains_execution_mode")
        ),
        if_not_exists=again,
    )
    op.create_index("ix_chains_tenant_id_id", "chains", ["tenant_id", "id"], if_not_exists=again)
    op.create_table(
        "chain_runs",
        *_owned(now),
        sa.Column("chain_id", ID, nullable=False),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("plan", sa.Text(), nullable=False),
        sa.Column("stop_on_failure", sa.Boolean(), nullable=False),
        sa.Column("status", sa.String(10), nullable=False),
        sa.Column("stopping", sa.String(10)),
        sa.Column("stop_reason", sa.String(200)),
        sa.Column("stopped_by", sa.String(100)),
        sa.Column("step_errors", sa.Text(), nullable=False),
        sa.Column("error_message", sa.String(1000)),
        sa.Column("deadline_at", MOMENT),
        sa.Column("finished_at", MOMENT),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_chain_runs")),
        sa.CheckConstraint(
            "status IN ('running', 'completed', 'failed', 'timeout', 'cancelled')",
            name=op.f("ck_chain_runs_status"),
        ),
        sa.CheckConstraint("stopping IN ('timeout', 'cancelled')", name=op.f("ck_chain_runs_stopping")),
        sa.CheckConstraint(
            "(status = 'running') = (finished_at IS NULL)", name=op.f("ck_chain_runs_ended_has_time")
        ),
        if_not_exists=again,
    )
    op.create_index("ix_chain_runs_chain_id_id", "chain_runs", ["chain_id", "id"], if_not_exists=again)
    for name, column, where, unique in (
        ("uq_chain_runs_active", "chain_id", "finished_at IS NULL", True),
        ("ix_chain_runs_deadline", "deadline_at", "finished_at IS NULL AND deadline_at IS NOT NULL", False),
        ("ix_chain_runs_stopping", "id", "finished_at IS NULL AND stopping IS NOT NULL", False),
    ):
        condition = sa.text(where)
        op.create_index(
            name,
            "chain_runs",
            [column],
            unique=unique,
            if_not_exists=again,
            postgresql_where=condition,
            sqlite_where=condition,
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
    for table in ("chain_runs", "chains", "batches", "job_dependencies"):
        op.drop_table(table)
    for column in reversed(list(_columns())):
        op.drop_column("jobs", column.name)


def _owned(now: sa.TextClause) -> list[sa.Column[object]]:
    return [
        sa.Column("id", ID, nullable=False),
        sa.Column("tenant_id", ID, nullable=False),
        sa.Column("created_by", sa.String(100), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False, server_default="1"),
        sa.Column("created_at", MOMENT, nullable=False, server_default=now),
        sa.Column("updated_at", MOMENT, nullable=False, server_default=now),
    ]


def _on_sqlite() -> bool:
    return op.get_context().dialect.name == "sqlite"


def _outside_of_a_transaction() -> AbstractContextManager[None]:
    return nullcontext() if _on_sqlite() else op.get_context().autocommit_block()


def _timeouts(*, lock: str, statement: str) -> None:
    if not _on_sqlite():
        op.execute(f"SET lock_timeout = '{lock}'")
        op.execute(f"SET statement_timeout = '{statement}'")
