"""Schedules and their runs.

Safe with the running release: it knows no schedules, and its jobs belong to none. After a downgrade the jobs
that runs have become stay.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import sqlalchemy as sa
from alembic import op

revision = "20261122_2240"
down_revision = "20261122_2230"
branch_labels = None
depends_on = None

ID = sa.Uuid(as_uuid=False).with_variant(sa.String(36), "sqlite")
MOMENT = sa.DateTime(timezone=True)
INDEXES = (
    ("ix_jobs_scheduled_job", ["scheduled_job_id", "id"], "scheduled_job_id IS NOT NULL"),
    (
        "ix_jobs_scheduled_job_active",
        ["scheduled_job_id"],
        "scheduled_job_id IS NOT NULL AND finished_at IS NULL",
    ),
)


def upgrade() -> None:
    now = sa.text("(strftime('%Y-%m-%d %H:%M:%f000', 'now'))" if _on_sqlite() else "now()")
    again = not _on_sqlite()  # a build of an index that broke off has left all of the rest
    op.add_column("jobs", sa.Column("scheduled_job_id", ID), if_not_exists=again)
    op.create_table(
        "schedules",
        *_owned(now),
        sa.Column("name", sa.String(100)),
        sa.Column("description", sa.String(500)),
        sa.Column("job_type", sa.String(100), nullable=False),
        sa.Column("parameters", sa.Text(), nullable=False),
        sa.Column("queue", sa.String(50), nullable=False),
        sa.Column("priority", sa.String(10), nullable=False),
        sa.Column("timeout_seconds", sa.Integer(), nullable=False),
        sa.Column("max_retries", sa.Integer(), nullable=False),
        sa.Column("retry_delay_seconds", sa.Float(), nullable=False),
        sa.Column("retry_backoff", sa.Float(), nullable=False),
        sa.Column("retry_max_delay_seconds", sa.Float(), nullable=False),
        sa.Column("retry_jitter", sa.Boolean(), nullable=False),
        sa.Column("cron_expression", sa.String(200)),
        sa.Column("interval_seconds", sa.Integer()),
        sa.Column("timezone", sa.String(64), nullable=False),
        sa.Column("starts_at", MOMENT),
        sa.Column("ends_at", MOMENT),
        sa.Column("jitter_seconds", sa.Integer(), nullable=False),
        sa.Column("max_concurrent_runs", sa.Integer(), nullable=False),
        sa.Column("overlap", sa.String(14), nullable=False),
        sa.Column("misfire", sa.String(9), nullable=False),
        sa.Column("is_active", sa.Boolean(), nullable=False),
        sa.Column("anchor_at", MOMENT, nullable=False),
        sa.Column("last_slot", MOMENT),
        sa.Column("next_slot", MOMENT),
        sa.Column("due_at", MOMENT),
        sa.Column("last_run_at", MOMENT),
        sa.Column("total_runs", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("successful_runs", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("failed_runs", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("skipped_runs", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("consecutive_failures", sa.Integer(), nullable=False, server_default="0"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_schedules")),
        sa.UniqueConstraint("tenant_id", "name", name=op.f("uq_schedules_tenant_id_name")),
        *_checks(
            "schedules",
            cron_or_interval="(cron_expression IS NULL) <> (interval_seconds IS NULL)",
            interval="interval_seconds >= 1",
            slot_has_time="(next_slot IS NULL) = (due_at IS NULL)",
            only_active_is_due="is_active OR due_at IS NULL",
            overlap="overlap IN ('skip', 'queue_one', 'cancel_running', 'allow')",
            misfire="misfire IN ('skip', 'fire_once', 'fire_all')",
            max_concurrent_runs="max_concurrent_runs >= 1",
        ),
        postgresql_with={"fillfactor": 70},
        if_not_exists=again,
    )
    op.create_table(
        "schedule_runs",
        *_owned(now),
        sa.Column("schedule_id", ID, nullable=False),
        sa.Column("slot", MOMENT, nullable=False),
        sa.Column("slots", sa.Integer(), nullable=False),
        sa.Column("last_slot", MOMENT, nullable=False),
        sa.Column("trigger", sa.String(8), nullable=False),
        sa.Column("status", sa.String(8), nullable=False),
        sa.Column("reason", sa.String(24)),
        sa.Column("job_id", ID),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_schedule_runs")),
        sa.UniqueConstraint("schedule_id", "slot", name=op.f("uq_schedule_runs_schedule_id_slot")),
        *_checks(
            "schedule_runs",
            trigger="trigger IN ('slot', 'manual')",
            status="status IN ('started', 'waiting', 'skipped')",
            started_has_job="(status = 'started') = (job_id IS NOT NULL)",
            skipped_has_reason="(status = 'skipped') = (reason IS NOT NULL)",
            slots="slots >= 1 AND (slots = 1 OR status = 'skipped')",
        ),
        if_not_exists=again,
    )
    op.create_table(
        "schedule_ends",
        sa.Column("id", ID, nullable=False),
        sa.Column("tenant_id", ID, nullable=False),
        sa.Column("schedule_id", ID, nullable=False),
        sa.Column("job_id", ID, nullable=False),
        sa.Column("successful", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_schedule_ends")),
        if_not_exists=again,
    )
    for name, table, columns, where in (
        ("ix_schedule_ends_schedule_id_id", "schedule_ends", ["schedule_id", "id"], None),
        ("ix_schedules_tenant_id_id", "schedules", ["tenant_id", "id"], None),
        ("ix_schedules_due", "schedules", ["due_at"], "due_at IS NOT NULL"),
        ("ix_schedule_runs_schedule_id_id", "schedule_runs", ["schedule_id", "id"], None),
        ("ix_schedule_runs_waiting", "schedule_runs", ["schedule_id"], "status = 'waiting'"),
    ):
        condition = None if where is None else sa.text(where)
        op.create_index(
            name,
            table,
            columns,
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
    op.drop_table("schedule_ends")
    op.drop_table("schedule_runs")
    op.drop_table("schedules")
    op.drop_column("jobs", "scheduled_job_id")


def _owned(now: sa.TextClause) -> list[sa.Column[object]]:
    return [
        sa.Column("id", ID, nullable=False),
        sa.Column("tenant_id", ID, nullable=False),
        sa.Column("created_by", sa.String(100), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False, server_default="1"),
        sa.Column("created_at", MOMENT, nullable=False, server_default=now),
        sa.Column("updated_at", MOMENT, nullable=False, server_default=now),
    ]


def _checks(table: str, **conditions: str) -> list[sa.CheckConstraint]:
    return [
        sa.CheckConstraint(condition, name=op.f(f"ck_{table}_{name}"))
        for name, condition in conditions.items()
    ]


def _on_sqlite() -> bool:
    return op.get_context().dialect.name == "sqlite"


def _outside_of_a_transaction() -> AbstractContextManager[None]:
    return nullcontext() if _on_sqlite() else op.get_context().autocommit_block()


def _timeouts(*, lock: str, statement: str) -> None:
    if not _on_sqlite():
        op.execute(f"SET lock_timeout = '{lock}'")
        op.execute(f"SET statement_timeout = '{statement}'")
