"""The tables. Every row names its tenant and who made it; rows that change carry a version.

`migrations/` makes the same tables; a test wants zero differences. What must hold is written here as
CHECK and UNIQUE, so that no code, ours or an operator's, can break it.
"""

from __future__ import annotations

from uuid import UUID

import sqlalchemy as sa

from laneway.db import Id, Json, Moment, utc_now
from laneway.domain.spec import Priority
from laneway.domain.states import FINAL, JobStatus

metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def _one_of(column: str, values: object) -> str:
    return f"{column} IN ({', '.join(repr(str(value)) for value in sorted(values))})"  # type: ignore[call-overload]


def _owned() -> list[sa.Column[object]]:
    """Whose a row is, who made it, when it last changed.

    No foreign key to `tenants`: each insert would lock the tenant's row, which all of them share.
    """
    return [
        sa.Column("tenant_id", Id, nullable=False),
        sa.Column("created_by", sa.String(100), nullable=False),
        sa.Column("version", sa.Integer, nullable=False, server_default="1"),
        sa.Column("created_at", Moment, nullable=False, server_default=utc_now()),
        sa.Column("updated_at", Moment, nullable=False, server_default=utc_now()),
    ]


tenants = sa.Table(
    "tenants",
    metadata,
    sa.Column("id", Id, primary_key=True),
    sa.Column("name", sa.String(100), nullable=False, unique=True),
    # The secret that signs what goes to a job's own webhook_url, encrypted (webhooks/secrets.py).
    sa.Column("webhook_secret", sa.Text, nullable=False),
    sa.Column("old_webhook_secrets", Json, nullable=False, server_default="[]"),  # [{"sealed", "expires_at"}]
    sa.Column("webhook_signing_key", sa.Text),  # ed25519, sealed; made when an endpoint first wants v1a
    sa.Column("created_by", sa.String(100), nullable=False),
    sa.Column("version", sa.Integer, nullable=False, server_default="1"),
    sa.Column("created_at", Moment, nullable=False, server_default=utc_now()),
    sa.Column("updated_at", Moment, nullable=False, server_default=utc_now()),
)

api_keys = sa.Table(
    "api_keys",
    metadata,
    sa.Column("id", sa.String(12), primary_key=True),
    *_owned(),
    sa.Column(
        "subject", sa.String(100), nullable=False
    ),  # who the key speaks for; owns the jobs, holds the limits
    sa.Column("role", sa.String(20), nullable=False),
    sa.Column("digest", sa.LargeBinary(32), nullable=False),  # SHA-256 of the 256-bit secret
    sa.Column("expires_at", Moment),
    sa.Column("revoked_at", Moment),
    sa.CheckConstraint("role IN ('user', 'operator', 'admin')", name="role"),
)

jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("id", Id, primary_key=True),
    *_owned(),
    # What was asked for
    sa.Column("job_type", sa.String(100), nullable=False),
    sa.Column("parameters", Json, nullable=False),
    sa.Column("queue", sa.String(50), nullable=False),
    sa.Column("priority", sa.String(10), nullable=False),
    sa.Column("lane", sa.String(60), nullable=False),
    sa.Column("title", sa.String(200)),
    sa.Column("description", sa.Text),
    sa.Column("tags", Json, nullable=False),
    sa.Column("metadata", Json, nullable=False),
    sa.Column("scheduled_for", Moment),
    sa.Column("expires_at", Moment),
    sa.Column("timeout_seconds", sa.Integer, nullable=False),
    sa.Column("max_retries", sa.Integer, nullable=False),
    sa.Column("retry_delay_seconds", sa.Float, nullable=False),
    sa.Column("retry_backoff", sa.Float, nullable=False),
    sa.Column("retry_max_delay_seconds", sa.Float, nullable=False),
    sa.Column("retry_jitter", sa.Boolean, nullable=False),
    sa.Column("unique_key", sa.String(200)),
    sa.Column("webhook_url", sa.String(2048)),
    sa.Column("webhook_events", Json),
    # Where it is: written by engine/transitions.py alone
    sa.Column("status", sa.String(12), nullable=False),
    sa.Column("status_reason", sa.String(200)),
    sa.Column("event_seq", sa.Integer, nullable=False, server_default="0"),
    sa.Column("attempt", sa.Integer, nullable=False, server_default="0"),
    sa.Column("retry_count", sa.Integer, nullable=False, server_default="0"),
    sa.Column("crash_count", sa.Integer, nullable=False, server_default="0"),
    sa.Column("lease_token", Id),
    sa.Column("worker_id", Id),
    sa.Column("next_retry_at", Moment),
    sa.Column("queued_at", Moment),
    sa.Column("started_at", Moment),
    sa.Column("finished_at", Moment),
    sa.Column("result", Json),
    sa.Column("error", Json),
    sa.Column("dead_letter_reason", sa.String(20)),
    # Wishes and news, which are no transitions
    sa.Column("cancel_requested_at", Moment),
    sa.Column("cancel_terminate", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("cancel_grace_seconds", sa.Float),
    sa.Column("cancel_reason", sa.String(200)),
    sa.Column("cancelled_by", sa.String(100)),
    sa.Column("progress", sa.Integer, nullable=False, server_default="0"),
    sa.Column("progress_message", sa.String(500)),
    sa.Column("progress_details", Json),
    sa.Column("webhook_delivered", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("webhook_attempts", sa.Integer, nullable=False, server_default="0"),
    sa.CheckConstraint(_one_of("status", JobStatus), name="status"),
    sa.CheckConstraint(_one_of("priority", Priority), name="priority"),
    sa.CheckConstraint("(status = 'running') = (lease_token IS NOT NULL)", name="running_has_lease"),
    sa.CheckConstraint("(status = 'running') = (worker_id IS NOT NULL)", name="running_has_worker"),
    sa.CheckConstraint(f"({_one_of('status', FINAL)}) = (finished_at IS NOT NULL)", name="final_has_end"),
    sa.CheckConstraint("(status = 'retrying') = (next_retry_at IS NOT NULL)", name="retrying_has_time"),
    sa.CheckConstraint("status <> 'scheduled' OR scheduled_for IS NOT NULL", name="scheduled_has_time"),
    sa.CheckConstraint("status <> 'queued' OR queued_at IS NOT NULL", name="queued_has_time"),
    sa.CheckConstraint("progress BETWEEN 0 AND 100", name="progress_percent"),
    sa.CheckConstraint("status <> 'completed' OR progress = 100", name="completed_is_100"),
    sa.CheckConstraint("attempt >= 0 AND retry_count >= 0 AND crash_count >= 0", name="counts"),
    # The fewer indexes, the cheaper each change of status. Each of these serves one query.
    sa.Index("ix_jobs_tenant_id_id", "tenant_id", "id"),
    sa.Index("ix_jobs_tenant_id_created_by_id", "tenant_id", "created_by", "id"),
    sa.Index("ix_jobs_tenant_id_job_type_id", "tenant_id", "job_type", "id"),
    sa.Index(
        "ix_jobs_blocked",
        "tenant_id",
        "id",
        postgresql_where=sa.text("status = 'blocked'"),
        sqlite_where=sa.text("status = 'blocked'"),
    ),
    sa.Index(
        "ix_jobs_dead_letters",
        "tenant_id",
        "id",
        postgresql_where=sa.text("dead_letter_reason IS NOT NULL"),
        sqlite_where=sa.text("dead_letter_reason IS NOT NULL"),
    ),
    sa.Index(
        "ix_jobs_queued",
        "lane",
        "queued_at",
        "id",
        postgresql_where=sa.text("status = 'queued'"),
        sqlite_where=sa.text("status = 'queued'"),
    ),
    sa.Index(
        "ix_jobs_scheduled",
        "scheduled_for",
        postgresql_where=sa.text("status = 'scheduled'"),
        sqlite_where=sa.text("status = 'scheduled'"),
    ),
    sa.Index(
        "ix_jobs_retrying",
        "next_retry_at",
        postgresql_where=sa.text("status = 'retrying'"),
        sqlite_where=sa.text("status = 'retrying'"),
    ),
    sa.Index(
        "ix_jobs_expiring",
        "expires_at",
        postgresql_where=sa.text("expires_at IS NOT NULL AND finished_at IS NULL"),
        sqlite_where=sa.text("expires_at IS NOT NULL AND finished_at IS NULL"),
    ),
    sa.Index(
        "ix_jobs_running",
        "worker_id",
        postgresql_where=sa.text("status = 'running'"),
        sqlite_where=sa.text("status = 'running'"),
    ),
    sa.Index(
        "ix_jobs_ended",
        "status",
        "finished_at",
        postgresql_where=sa.text("finished_at IS NOT NULL"),
        sqlite_where=sa.text("finished_at IS NOT NULL"),
    ),
    sa.Index(
        "uq_jobs_unique_key_active",
        "tenant_id",
        "unique_key",
        unique=True,
        postgresql_where=sa.text("unique_key IS NOT NULL AND finished_at IS NULL"),
        sqlite_where=sa.text("unique_key IS NOT NULL AND finished_at IS NULL"),
    ),
    postgresql_with={"fillfactor": 70, "autovacuum_vacuum_scale_factor": 0.02},
)

# One row per transition, in the transition's transaction; never changed, so it needs no version.
job_events = sa.Table(
    "job_events",
    metadata,
    sa.Column("job_id", Id, nullable=False),
    sa.Column("seq", sa.Integer, nullable=False),
    sa.Column("tenant_id", Id, nullable=False),
    sa.Column("action", sa.String(20), nullable=False),
    sa.Column("status", sa.String(12), nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("at", Moment, nullable=False),
    sa.Column("actor", sa.String(100), nullable=False),  # a caller's subject, `worker:<id>`, `scheduler`
    sa.Column("reason", sa.String(200)),
    sa.Column("error", Json),
    sa.PrimaryKeyConstraint("job_id", "seq"),
)

workers = sa.Table(
    "workers",
    metadata,
    sa.Column("id", Id, primary_key=True),  # one per process start
    sa.Column("name", sa.String(200), nullable=False),
    sa.Column("host", sa.String(200), nullable=False),
    sa.Column("pid", sa.Integer, nullable=False),
    sa.Column("version", sa.String(20), nullable=False),  # of Laneway
    sa.Column("lanes", Json, nullable=False),
    sa.Column("job_types", Json),  # those it can run; NULL: it did not say
    sa.Column("state", sa.String(10), nullable=False),
    sa.Column("beat", sa.Integer, nullable=False, server_default="0"),
    sa.Column("beat_at", Moment, nullable=False, server_default=utc_now()),
    sa.Column("held", Json, nullable=False),  # lease tokens
    sa.Column("begun", Json),  # those of them whose handlers have started, or are about to; NULL: not said
    sa.Column("started_at", Moment, nullable=False, server_default=utc_now()),
    sa.CheckConstraint("state IN ('active', 'draining', 'gone', 'dead')", name="state"),
    postgresql_with={"fillfactor": 50},  # beats touch no indexed column: HOT updates
)

# What receivers registered, beside the `webhook_url` of single jobs.
webhook_endpoints = sa.Table(
    "webhook_endpoints",
    metadata,
    sa.Column("id", Id, primary_key=True),
    *_owned(),
    sa.Column("url", sa.String(2048), nullable=False),
    sa.Column("description", sa.String(500)),
    sa.Column("event_types", Json, nullable=False),  # names and globs: ["job.*"]
    sa.Column("filters", Json, nullable=False),  # {"queues": […], "job_types": […], "tags": […]}; {} is all
    sa.Column("format", sa.String(12), nullable=False),
    sa.Column("status", sa.String(10), nullable=False),
    sa.Column("disabled_reason", sa.String(20)),
    sa.Column("disabled_at", Moment),
    sa.Column("enabled_at", Moment, nullable=False),  # failures before this do not count
    # Sealed (webhooks/secrets.py): the newest secret, [{"sealed", "expires_at"}] of those in their grace,
    # and what goes along or proves who we are.
    sa.Column("secret", sa.Text, nullable=False),
    sa.Column("old_secrets", Json, nullable=False),
    sa.Column("headers", sa.Text),  # a JSON object
    sa.Column("client_certificate", sa.Text),  # PEM: certificate, then key
    sa.Column("ca_certificate", sa.Text),  # PEM, not secret
    sa.Column("sign_with", sa.String(4), nullable=False),
    sa.Column("timeout_seconds", sa.Float, nullable=False),
    sa.Column("retry_schedule", Json, nullable=False),  # seconds before each retry
    sa.Column("max_in_flight", sa.Integer, nullable=False),
    sa.Column("max_per_second", sa.Float),
    sa.Column("in_order", sa.Boolean, nullable=False),  # one job's messages one after the other
    sa.CheckConstraint("format IN ('standard', 'cloudevents', 'thin')", name="format"),
    sa.CheckConstraint("status IN ('enabled', 'paused', 'disabled')", name="status"),
    sa.CheckConstraint("(status = 'disabled') = (disabled_at IS NOT NULL)", name="disabled_has_time"),
    sa.CheckConstraint("sign_with IN ('v1', 'v1a', 'both')", name="sign_with"),
    sa.Index("ix_webhook_endpoints_tenant_id_id", "tenant_id", "id"),
)

# How a target has been answering: a registered endpoint, or one tenant's way to one origin
# (webhooks/health.py). No row means: nothing bad is known. Couriers write it, callers never do.
webhook_health = sa.Table(
    "webhook_health",
    metadata,
    sa.Column("target_id", Id, primary_key=True),
    *_owned(),
    sa.Column("consecutive_failures", sa.Integer, nullable=False),
    sa.Column("failing_since", Moment),
    sa.Column("last_failure_at", Moment),
    sa.Column("last_success_at", Moment),
    sa.Column("opened", sa.Integer, nullable=False),  # how often the breaker opened since the last success
    sa.Column("blocked_until", Moment),
    sa.Column("blocked_reason", sa.String(12)),
    sa.Column("warned_percent", sa.Integer, nullable=False),  # of the way to being disabled
    sa.CheckConstraint("(blocked_until IS NULL) = (blocked_reason IS NULL)", name="blocked_has_reason"),
    sa.Index(
        "ix_webhook_health_blocked",
        "blocked_until",
        postgresql_where=sa.text("blocked_until IS NOT NULL"),
        sqlite_where=sa.text("blocked_until IS NOT NULL"),
    ),
    postgresql_with={"fillfactor": 50},
)

webhook_messages = sa.Table(
    "webhook_messages",
    metadata,
    sa.Column("id", sa.String(40), primary_key=True),  # msg_…, the webhook-id of every try
    *_owned(),
    sa.Column("job_id", Id),  # NULL: it tells of no job
    sa.Column("job_seq", sa.Integer),  # job_events.seq of the transition it tells of; NULL: of none
    sa.Column("event_type", sa.String(50), nullable=False),
    sa.Column("payload", sa.LargeBinary),  # the exact bytes, in the standard format; NULL once pruned
    sa.UniqueConstraint("job_id", "job_seq", "event_type"),
    sa.Index("ix_webhook_messages_tenant_id_created_at", "tenant_id", "created_at"),
    sa.Index("ix_webhook_messages_created_at", "created_at"),
)

_OPEN_DELIVERY = "status IN ('pending', 'retrying')"

webhook_deliveries = sa.Table(
    "webhook_deliveries",
    metadata,
    sa.Column("id", Id, primary_key=True),
    *_owned(),
    sa.Column("message_id", sa.String(40), sa.ForeignKey("webhook_messages.id"), nullable=False),
    sa.Column("job_id", Id),
    sa.Column("endpoint_id", Id),  # NULL: a job's own webhook_url
    # Whose health counts: the endpoint, or tenant and origin. The default was written by older releases.
    sa.Column("target_id", Id, nullable=False, server_default=str(UUID(int=0))),
    sa.Column("channel", sa.String(10), nullable=False, server_default="webhook"),
    sa.Column("url", sa.String(2048), nullable=False),
    sa.Column("trigger", sa.String(10), nullable=False, server_default="auto"),
    sa.Column("priority", sa.Integer, nullable=False, server_default="0"),  # 0 live, 1 recovered
    sa.Column("status", sa.String(12), nullable=False),
    sa.Column("attempt_count", sa.Integer, nullable=False, server_default="0"),
    sa.Column("max_attempts", sa.Integer, nullable=False),
    sa.Column("retry_schedule", Json, nullable=False, server_default="[5.0,60.0]"),  # as of an endpoint
    sa.Column("next_at", Moment, nullable=False),
    sa.Column("give_up_at", Moment),  # however few attempts were made
    sa.Column("lease_owner", Id),
    sa.Column("lease_until", Moment),
    sa.Column("last_status_code", sa.Integer),
    sa.Column("last_error", sa.String(500)),
    sa.Column("delivered_at", Moment),
    sa.UniqueConstraint("message_id", "target_id", "url"),
    sa.CheckConstraint(
        "status IN ('pending', 'sending', 'retrying', 'delivered', 'dead', 'cancelled',"
        " 'superseded', 'skipped')",
        name="status",
    ),
    sa.CheckConstraint("channel IN ('webhook', 'email', 'log')", name="channel"),
    sa.CheckConstraint("trigger IN ('auto', 'manual', 'recover', 'test')", name="trigger"),
    sa.CheckConstraint("(status = 'sending') = (lease_owner IS NOT NULL)", name="sending_has_owner"),
    sa.CheckConstraint("(status = 'delivered') = (delivered_at IS NOT NULL)", name="delivered_has_time"),
    sa.Index(
        "ix_webhook_deliveries_due",
        "priority",
        "next_at",
        "id",
        postgresql_where=sa.text(_OPEN_DELIVERY),
        sqlite_where=sa.text(_OPEN_DELIVERY),
    ),
    sa.Index(
        "ix_webhook_deliveries_open_target",
        "target_id",
        postgresql_where=sa.text(_OPEN_DELIVERY),
        sqlite_where=sa.text(_OPEN_DELIVERY),
    ),
    sa.Index(
        "ix_webhook_deliveries_sending",
        "lease_until",
        postgresql_where=sa.text("status = 'sending'"),
        sqlite_where=sa.text("status = 'sending'"),
    ),
    sa.Index(
        "ix_webhook_deliveries_delivered",
        "delivered_at",
        postgresql_where=sa.text("delivered_at IS NOT NULL"),
        sqlite_where=sa.text("delivered_at IS NOT NULL"),
    ),
    sa.Index("ix_webhook_deliveries_job_id", "job_id"),
    sa.Index("ix_webhook_deliveries_tenant_id_id", "tenant_id", "id"),
    sa.Index("ix_webhook_deliveries_endpoint_id_id", "endpoint_id", "id"),
    postgresql_with={"fillfactor": 70},
)

# Written out, not bound: only so do both stores see that the partial indexes serve.
open_delivery: sa.ColumnElement[bool] = sa.literal_column(f"webhook_deliveries.{_OPEN_DELIVERY}")
"""The condition of a delivery that waits to be sent, or sent again."""

webhook_attempts = sa.Table(
    "webhook_attempts",
    metadata,
    sa.Column("id", Id, primary_key=True),
    *_owned(),
    sa.Column("delivery_id", Id, sa.ForeignKey("webhook_deliveries.id"), nullable=False),
    sa.Column("number", sa.Integer, nullable=False),  # counted from 1
    sa.Column("trigger", sa.String(10), nullable=False, server_default="auto"),
    sa.Column("started_at", Moment, nullable=False),
    sa.Column("remote_ip", sa.String(45)),
    sa.Column("status_code", sa.Integer),
    sa.Column("error_class", sa.String(20)),
    sa.Column("error", sa.String(500)),
    sa.Column("dns_ms", sa.Integer),  # NULL: it was not needed, or never got there
    sa.Column("connect_ms", sa.Integer),  # with the TLS handshake
    sa.Column("first_byte_ms", sa.Integer),
    sa.Column("total_ms", sa.Integer, nullable=False),
    sa.Column("request_bytes", sa.Integer),
    sa.Column("response_headers", Json),
    sa.Column("response_body", sa.Text),  # at most 4 KiB
    sa.Column("response_truncated", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.UniqueConstraint("delivery_id", "number"),
)

# A bulk replay under way: it survives whoever works at it.
webhook_recoveries = sa.Table(
    "webhook_recoveries",
    metadata,
    sa.Column("id", Id, primary_key=True),
    *_owned(),
    sa.Column("endpoint_id", Id, nullable=False),
    sa.Column("mode", sa.String(10), nullable=False),
    sa.Column("since", Moment, nullable=False),
    sa.Column("until", Moment, nullable=False),
    sa.Column("per_second", sa.Float, nullable=False),
    sa.Column("status", sa.String(10), nullable=False),
    sa.Column("place", sa.String(40)),  # the last message looked at
    sa.Column("place_at", Moment),
    sa.Column("queued", sa.Integer, nullable=False, server_default="0"),
    sa.Column("finished_at", Moment),
    sa.CheckConstraint("mode IN ('failed', 'missing', 'all')", name="mode"),
    sa.CheckConstraint("status IN ('running', 'done', 'cancelled')", name="status"),
    sa.CheckConstraint("(status = 'running') = (finished_at IS NULL)", name="ended_has_time"),
    sa.Index("ix_webhook_recoveries_tenant_id_id", "tenant_id", "id"),
    sa.Index(
        "ix_webhook_recoveries_running",
        "id",
        postgresql_where=sa.text("status = 'running'"),
        sqlite_where=sa.text("status = 'running'"),
    ),
)
