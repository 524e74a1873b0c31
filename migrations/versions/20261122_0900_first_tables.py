"""The first tables: tenants, keys, jobs and their events, workers, webhooks.

Written out, not taken from laneway.models: what a revision does must not change with the models.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "20261122_0900"
down_revision = None
branch_labels = None
depends_on = None

ID = sa.Uuid(as_uuid=False).with_variant(sa.String(36), "sqlite")
MOMENT = sa.DateTime(timezone=True)


def _now() -> sa.TextClause:
    if op.get_context().dialect.name == "sqlite":
        return sa.text("(strftime('%Y-%m-%d %H:%M:%f000', 'now'))")
    return sa.text("now()")


def _owned(now: sa.TextClause) -> list[sa.Column[object]]:
    return [
        sa.Column("tenant_id", ID, nullable=False),
        sa.Column("created_by", sa.String(100), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False, server_default="1"),
        sa.Column("created_at", MOMENT, nullable=False, server_default=now),
        sa.Column("updated_at", MOMENT, nullable=False, server_default=now),
    ]


def _index(
    name: str, table: str, columns: list[str], *, where: str | None = None, unique: bool = False
) -> None:
    condition = None if where is None else sa.text(where)
    op.create_index(name, table, columns, unique=unique, postgresql_where=condition, sqlite_where=condition)


def upgrade() -> None:
    now = _now()
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(12), nullable=False),
        *_owned(now),
        sa.Column("subject", sa.String(100), nullable=False),
        sa.Column("role", sa.String(20), nullable=False),
        sa.Column("digest", sa.LargeBinary(32), nullable=False),
        sa.Column("expires_at", MOMENT),
        sa.Column("revoked_at", MOMENT),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_keys")),
        sa.CheckConstraint("role IN ('user', 'operator', 'admin')", name=op.f("ck_api_keys_role")),
    )

    op.create_table(
        "job_events",
        sa.Column("job_id", ID, nullable=False),
        sa.Column("seq", sa.Integer(), nullable=False),
        sa.Column("tenant_id", ID, nullable=False),
        sa.Column("action", sa.String(20), nullable=False),
        sa.Column("status", sa.String(12), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("at", MOMENT, nullable=False),
        sa.Column("actor", sa.String(100), nullable=False),
        sa.Column("reason", sa.String(200)),
        sa.Column("error", sa.Text()),
        sa.PrimaryKeyConstraint("job_id", "seq", name=op.f("pk_job_events")),
    )

    op.create_table(
        "jobs",
        sa.Column("id", ID, nullable=False),
        *_owned(now),
        sa.Column("job_type", sa.String(100), nullable=False),
        sa.Column("parameters", sa.Text(), nullable=False),
        sa.Column("queue", sa.String(50), nullable=False),
        sa.Column("priority", sa.String(10), nullable=False),
        sa.Column("lane", sa.String(60), nullable=False),
        sa.Column("title", sa.String(200)),
        sa.Column("description", sa.Text()),
        sa.Column("tags", sa.Text(), nullable=False),
        sa.Column("metadata", sa.Text(), nullable=False),
        sa.Column("scheduled_for", MOMENT),
        sa.Column("expires_at", MOMENT),
        sa.Column("timeout_seconds", sa.Integer(), nullable=False),
        sa.Column("max_retries", sa.Integer(), nullable=False),
        sa.Column("retry_delay_seconds", sa.Float(), nullable=False),
        sa.Column("retry_backoff", sa.Float(), nullable=False),
        sa.Column("retry_max_delay_seconds", sa.Float(), nullable=False),
        sa.Column("retry_jitter", sa.Boolean(), nullable=False),
        sa.Column("unique_key", sa.String(200)),
        sa.Column("webhook_url", sa.String(2048)),
        sa.Column("webhook_events", sa.Text()),
        sa.Column("status", sa.String(12), nullable=False),
        sa.Column("status_reason", sa.String(200)),
        sa.Column("event_seq", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("attempt", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("retry_count", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("crash_count", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("lease_token", ID),
        sa.Column("worker_id", ID),
        sa.Column("next_retry_at", MOMENT),
        sa.Column("queued_at", MOMENT),
        sa.Column("started_at", MOMENT),
        sa.Column("finished_at", MOMENT),
        sa.Column("result", sa.Text()),
        sa.Column("error", sa.Text()),
        sa.Column("dead_letter_reason", sa.String(20)),
        sa.Column("cancel_requested_at", MOMENT),
        sa.Column("cancel_terminate", sa.Boolean(), nullable=False, server_default=sa.false()),
        sa.Column("cancel_grace_seconds", sa.Float()),
        sa.Column("cancel_reason", sa.String(200)),
        sa.Column("cancelled_by", sa.String(100)),
        sa.Column("progress", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("progress_message", sa.String(500)),
        sa.Column("progress_details", sa.Text()),
        sa.Column("webhook_delivered", sa.Boolean(), nullable=False, server_default=sa.false()),
        sa.Column("webhook_attempts", sa.Integer(), nullable=False, server_default="0"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_jobs")),
        sa.CheckConstraint(
            "status IN ('blocked', 'cancelled', 'completed', 'expired', 'failed', 'queued', 'retrying', "
            "'running', 'scheduled', 'timeout')",
            name=op.f("ck_jobs_status"),
        ),
        sa.CheckConstraint(
            "priority IN ('critical', 'high', 'low', 'normal')", name=op.f("ck_jobs_priority")
        ),
        sa.CheckConstraint(
            "(status = 'running') = (lease_token IS NOT NULL)", name=op.f("ck_jobs_running_has_lease")
        ),
        sa.CheckConstraint(
            "(status = 'running') = (worker_id IS NOT NULL)", name=op.f("ck_jobs_running_has_worker")
        ),
        sa.CheckConstraint(
            "(status IN ('cancelled', 'completed', 'expired', 'failed', 'timeout')) = "
            "(finished_at IS NOT NULL)",
            name=op.f("ck_jobs_final_has_end"),
        ),
        sa.CheckConstraint(
            "(status = 'retrying') = (next_retry_at IS NOT NULL)", name=op.f("ck_jobs_retrying_has_time")
        ),
        sa.CheckConstraint(
            "status <> 'scheduled' OR scheduled_for IS NOT NULL", name=op.f("ck_jobs_scheduled_has_time")
        ),
        sa.CheckConstraint(
            "status <> 'queued' OR queued_at IS NOT NULL", name=op.f("ck_jobs_queued_has_time")
        ),
        sa.CheckConstraint("progress BETWEEN 0 AND 100", name=op.f("ck_jobs_progress_percent")),
        sa.CheckConstraint("status <> 'completed' OR progress = 100", name=op.f("ck_jobs_completed_is_100")),
        sa.CheckConstraint(
            "attempt >= 0 AND retry_count >= 0 AND crash_count >= 0", name=op.f("ck_jobs_counts")
        ),
        postgresql_with={"fillfactor": 70, "autovacuum_vacuum_scale_factor": 0.02},
    )
    _index("ix_jobs_expiring", "jobs", ["expires_at"], where="expires_at IS NOT NULL AND finished_at IS NULL")
    _index("ix_jobs_queued", "jobs", ["lane", "queued_at", "id"], where="status = 'queued'")
    _index("ix_jobs_retrying", "jobs", ["next_retry_at"], where="status = 'retrying'")
    _index("ix_jobs_running", "jobs", ["worker_id"], where="status = 'running'")
    _index("ix_jobs_scheduled", "jobs", ["scheduled_for"], where="status = 'scheduled'")
    _index("ix_jobs_tenant_id_id", "jobs", ["tenant_id", "id"])
    _index(
        "uq_jobs_unique_key_active",
        "jobs",
        ["tenant_id", "unique_key"],
        unique=True,
        where="unique_key IS NOT NULL AND finished_at IS NULL",
    )

    op.create_table(
        "tenants",
        sa.Column("id", ID, nullable=False),
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("webhook_secret", sa.Text(), nullable=False),
        sa.Column("created_by", sa.String(100), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False, server_default="1"),
        sa.Column("created_at", MOMENT, nullable=False, server_default=now),
        sa.Column("updated_at", MOMENT, nullable=False, server_default=now),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tenants")),
        sa.UniqueConstraint("name", name=op.f("uq_tenants_name")),
    )

    op.create_table(
        "webhook_messages",
        sa.Column("id", sa.String(40), nullable=False),
        *_owned(now),
        sa.Column("job_id", ID, nullable=False),
        sa.Column("job_seq", sa.Integer(), nullable=False),
        sa.Column("event_type", sa.String(50), nullable=False),
        sa.Column("payload", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_webhook_messages")),
        sa.UniqueConstraint(
            "job_id", "job_seq", "event_type", name=op.f("uq_webhook_messages_job_id_job_seq_event_type")
        ),
    )

    op.create_table(
        "workers",
        sa.Column("id", ID, nullable=False),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("host", sa.String(200), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("version", sa.String(20), nullable=False),
        sa.Column("lanes", sa.Text(), nullable=False),
        sa.Column("state", sa.String(10), nullable=False),
        sa.Column("beat", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("beat_at", MOMENT, nullable=False, server_default=now),
        sa.Column("held", sa.Text(), nullable=False),
        sa.Column("started_at", MOMENT, nullable=False, server_default=now),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_workers")),
        sa.CheckConstraint("state IN ('active', 'draining', 'gone', 'dead')", name=op.f("ck_workers_state")),
        postgresql_with={"fillfactor": 50},
    )

    op.create_table(
        "webhook_deliveries",
        sa.Column("id", ID, nullable=False),
        *_owned(now),
        sa.Column("message_id", sa.String(40), nullable=False),
        sa.Column("job_id", ID, nullable=False),
        sa.Column("url", sa.String(2048), nullable=False),
        sa.Column("status", sa.String(12), nullable=False),
        sa.Column("attempt_count", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("max_attempts", sa.Integer(), nullable=False),
        sa.Column("next_at", MOMENT, nullable=False),
        sa.Column("lease_owner", ID),
        sa.Column("lease_until", MOMENT),
        sa.Column("last_status_code", sa.Integer()),
        sa.Column("last_error", sa.String(500)),
        sa.Column("delivered_at", MOMENT),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_webhook_deliveries")),
        sa.ForeignKeyConstraint(
            ["message_id"],
            ["webhook_messages.id"],
            name=op.f("fk_webhook_deliveries_message_id_webhook_messages"),
        ),
        sa.UniqueConstraint("message_id", "url", name=op.f("uq_webhook_deliveries_message_id_url")),
        sa.CheckConstraint(
            "status IN ('pending', 'sending', 'retrying', 'delivered', 'dead')",
            name=op.f("ck_webhook_deliveries_status"),
        ),
        sa.CheckConstraint(
            "(status = 'sending') = (lease_owner IS NOT NULL)",
            name=op.f("ck_webhook_deliveries_sending_has_owner"),
        ),
        sa.CheckConstraint(
            "(status = 'delivered') = (delivered_at IS NOT NULL)",
            name=op.f("ck_webhook_deliveries_delivered_has_time"),
        ),
        postgresql_with={"fillfactor": 70},
    )
    _index(
        "ix_webhook_deliveries_due",
        "webhook_deliveries",
        ["next_at", "id"],
        where="status IN ('pending', 'retrying')",
    )
    _index("ix_webhook_deliveries_job_id", "webhook_deliveries", ["job_id"])
    _index("ix_webhook_deliveries_sending", "webhook_deliveries", ["lease_until"], where="status = 'sending'")

    op.create_table(
        "webhook_attempts",
        sa.Column("id", ID, nullable=False),
        *_owned(now),
        sa.Column("delivery_id", ID, nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("started_at", MOMENT, nullable=False),
        sa.Column("status_code", sa.Integer()),
        sa.Column("error_class", sa.String(20)),
        sa.Column("error", sa.String(500)),
        sa.Column("total_ms", sa.Integer(), nullable=False),
        sa.Column("response_body", sa.Text()),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_webhook_attempts")),
        sa.ForeignKeyConstraint(
            ["delivery_id"],
            ["webhook_deliveries.id"],
            name=op.f("fk_webhook_attempts_delivery_id_webhook_deliveries"),
        ),
        sa.UniqueConstraint("delivery_id", "number", name=op.f("uq_webhook_attempts_delivery_id_number")),
    )


def downgrade() -> None:
    op.drop_table("webhook_attempts")
    op.drop_table("webhook_deliveries")
    op.drop_table("workers")
    op.drop_table("webhook_messages")
    op.drop_table("tenants")
    op.drop_table("jobs")
    op.drop_table("job_events")
    op.drop_table("api_keys")
