"""The tables. Every row names its tenant and who made it; rows that change carry a version.

`migrations/` makes the same tables; a test wants zero differences. What must hold is written here as
CHECK and UNIQUE, so that no code, ours or an operator's, can break it.
"""

from __future__ import annotations

from uuid import UUID

import sqlalchemy as sa

from laneway.db import Id, Json, Moment, transaction_number, utc_now
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
    sa.Column("max_running", sa.Integer),  # of its jobs at once; NULL: any number
    sa.Column("weight", sa.Integer, nullable=False, server_default="1"),  # its share of a lane's turns
    sa.Column("max_queued", sa.Integer),  # of its jobs may wait; NULL: what the setting says
    sa.Column("created_by", sa.String(100), nullable=False),
    sa.Column("version", sa.Integer, nullable=False, server_default="1"),
    sa.Column("created_at", Moment, nullable=False, server_default=utc_now()),
    sa.Column("updated_at", Moment, nullable=False, server_default=utc_now()),
    sa.Index(
        "ix_tenants_own_turns",
        "id",
        postgresql_where=sa.text("weight <> 1 OR max_queued IS NOT NULL"),
        sqlite_where=sa.text("weight <> 1 OR max_queued IS NOT NULL"),
    ),
    sa.Index(
        "ix_tenants_limited",
        "id",
        postgresql_where=sa.text("max_running IS NOT NULL"),
        sqlite_where=sa.text("max_running IS NOT NULL"),
    ),
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
    sa.Column("name", sa.String(100)),  # for people
    sa.Column("scopes", Json),  # NULL: all that the role has
    sa.Column("allowed_cidrs", Json),  # NULL: from anywhere
    sa.Column("replaces", sa.String(12)),  # the key this one was rotated from
    # Written at most once a minute, and not as a change of the key: `updated_at` stays.
    sa.Column("last_used_at", Moment),
    sa.Column("last_used_ip", sa.String(45)),
    sa.CheckConstraint("role IN ('user', 'operator', 'admin')", name="role"),
    sa.Index("ix_api_keys_tenant_id", "tenant_id"),
    sa.Index("ix_api_keys_updated_at", "updated_at"),  # every API process asks what changed just now
)

# Who did what that others should be able to look up (engine/access/audit.py). The store refuses to change it.
audit_log = sa.Table(
    "audit_log",
    metadata,
    sa.Column("id", Id, primary_key=True),
    sa.Column("tenant_id", Id, nullable=False),  # whose caller it was
    sa.Column("created_at", Moment, nullable=False, server_default=utc_now()),
    sa.Column("actor", sa.String(100), nullable=False),
    sa.Column("role", sa.String(20), nullable=False),
    sa.Column("key_id", sa.String(12)),
    sa.Column("action", sa.String(40), nullable=False),
    sa.Column("target", sa.String(200), nullable=False),
    sa.Column("facts", Json, nullable=False),
    sa.Column("address", sa.String(45)),
    sa.Column("request_id", sa.String(64)),
    sa.Index("ix_audit_log_tenant_id_id", "tenant_id", "id"),
)

AUDIT_LOG_STAYS = {
    "sqlite": [
        f"CREATE TRIGGER audit_log_no_{what} BEFORE {what} ON audit_log "
        "BEGIN SELECT RAISE(ABORT, 'the audit log is only added to'); END"
        for what in ("update", "delete")
    ],
    "postgresql": [
        "CREATE OR REPLACE FUNCTION audit_log_stays() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION 'the audit log is only added to'; END $$",
        "CREATE TRIGGER audit_log_stays BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_log "
        "FOR EACH STATEMENT EXECUTE FUNCTION audit_log_stays()",
    ],
}
for _dialect, _statements in AUDIT_LOG_STAYS.items():
    for _statement in _statements:
        _ddl = sa.DDL(_statement).execute_if(dialect=_dialect)  # type: ignore[no-untyped-call]
        sa.event.listen(audit_log, "after_create", _ddl)

# Limits of single tenants and callers, in place of what the setting `rate_limits` says.
rate_limit_overrides = sa.Table(
    "rate_limit_overrides",
    metadata,
    *_owned(),
    sa.Column("policy", sa.String(20), nullable=False),
    sa.Column("subject", sa.String(100), nullable=False),  # '' is the whole tenant
    sa.Column("quota", sa.Integer),  # NULL: unlimited
    sa.Column("window_seconds", sa.Integer),
    sa.Column("mode", sa.String(10), nullable=False),
    sa.Column("reason", sa.String(500), nullable=False),
    sa.Column("expires_at", Moment),
    sa.Column("updated_by", sa.String(100), nullable=False),
    sa.PrimaryKeyConstraint("tenant_id", "policy", "subject"),
    sa.CheckConstraint("mode IN ('enforce', 'shadow')", name="mode"),
    sa.CheckConstraint("(quota IS NULL) = (window_seconds IS NULL)", name="quota_has_window"),
    sa.CheckConstraint("quota >= 0", name="quota"),
)

# One row a table that processes keep in memory, counted up in the transaction of each change.
change_counters = sa.Table(
    "change_counters",
    metadata,
    sa.Column("name", sa.String(50), primary_key=True),
    sa.Column("value", sa.Integer, nullable=False),
)

_UNFOLLOWED = "linked AND finished_at IS NOT NULL AND followed_seq < event_seq"

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
    sa.Column("scheduled_job_id", Id),  # the schedule that it is a run of
    # What it belongs to and waits for. Every end of a `linked` job is followed (engine/flow.py); all has
    # followed once `followed_seq` is the `event_seq` of that end.
    sa.Column("batch_id", Id),
    sa.Column("chain_id", Id),
    sa.Column("chain_run_id", Id),
    sa.Column("chain_step", sa.Integer),
    sa.Column("depends_on", Json),
    sa.Column("on_dependency_failure", sa.String(6), nullable=False, server_default="cancel"),
    sa.Column("dependencies_left", sa.Integer, nullable=False, server_default="0"),
    sa.Column("linked", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("followed_seq", sa.Integer, nullable=False, server_default="0"),
    # Of a job that is `gated` a slot of its key, or of its tenant, is taken up while it runs
    # (engine/concurrency.py).
    sa.Column("concurrency_key", sa.String(200)),
    sa.Column("concurrency_limit", sa.Integer),
    sa.Column("gated", sa.Boolean, nullable=False, server_default=sa.false()),
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
        "ix_jobs_queued_tenants",
        "lane",
        "tenant_id",
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
        "ix_jobs_scheduled_job",
        "scheduled_job_id",
        "id",
        postgresql_where=sa.text("scheduled_job_id IS NOT NULL"),
        sqlite_where=sa.text("scheduled_job_id IS NOT NULL"),
    ),
    sa.Index(
        "ix_jobs_scheduled_job_active",
        "scheduled_job_id",
        postgresql_where=sa.text("scheduled_job_id IS NOT NULL AND finished_at IS NULL"),
        sqlite_where=sa.text("scheduled_job_id IS NOT NULL AND finished_at IS NULL"),
    ),
    sa.Index(
        "ix_jobs_batch",
        "batch_id",
        "status",
        postgresql_where=sa.text("batch_id IS NOT NULL"),
        sqlite_where=sa.text("batch_id IS NOT NULL"),
    ),
    sa.Index(
        "ix_jobs_chain",
        "chain_id",
        "chain_run_id",
        postgresql_where=sa.text("chain_id IS NOT NULL"),
        sqlite_where=sa.text("chain_id IS NOT NULL"),
    ),
    sa.Index(
        "ix_jobs_unfollowed",
        "id",
        postgresql_where=sa.text(_UNFOLLOWED),
        sqlite_where=sa.text(_UNFOLLOWED),
    ),
    sa.Index(
        "ix_jobs_gated",
        "tenant_id",
        "concurrency_key",
        postgresql_where=sa.text("status = 'running' AND gated"),
        sqlite_where=sa.text("status = 'running' AND gated"),
    ),
    sa.Index(
        "ix_jobs_waiting_for_key",
        "tenant_id",
        "concurrency_key",
        "priority",
        "queued_at",
        "id",
        postgresql_where=sa.text("status = 'blocked' AND status_reason = 'concurrency_key'"),
        sqlite_where=sa.text("status = 'blocked' AND status_reason = 'concurrency_key'"),
    ),
    sa.Index(
        "ix_jobs_waiting_for_tenant",
        "tenant_id",
        "priority",
        "queued_at",
        "id",
        postgresql_where=sa.text("status = 'blocked' AND status_reason = 'tenant_limit'"),
        sqlite_where=sa.text("status = 'blocked' AND status_reason = 'tenant_limit'"),
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

# Written out, not bound: only so do both stores see that the partial index serves.
unfollowed: sa.ColumnElement[bool] = sa.literal_column(
    "jobs.linked AND jobs.finished_at IS NOT NULL AND jobs.followed_seq < jobs.event_seq"
)
"""The condition of an end from which something is still to follow."""

# Who waits for whom, until the parent ends: a row is deleted when it is counted.
job_dependencies = sa.Table(
    "job_dependencies",
    metadata,
    sa.Column("parent_id", Id, nullable=False),
    sa.Column("job_id", Id, nullable=False),
    sa.Column("tenant_id", Id, nullable=False),
    sa.PrimaryKeyConstraint("parent_id", "job_id"),
)

batches = sa.Table(
    "batches",
    metadata,
    sa.Column("id", Id, primary_key=True),
    *_owned(),
    sa.Column("total", sa.Integer, nullable=False),  # jobs asked for
    sa.Column("enqueued", sa.Integer, nullable=False),  # of them accepted
    sa.Column("callbacks", Json, nullable=False),  # {"on_complete": a job to be made, …} (engine/plans.py)
    sa.Column("ends", sa.Integer, nullable=False, server_default="0"),  # how often all jobs had ended
    sa.Column("counts", Json),  # of its jobs by status, as they were at its end; NULL while one is active
    sa.Column("finished_at", Moment),
    sa.CheckConstraint("(counts IS NULL) = (finished_at IS NULL)", name="ended_has_counts"),
    sa.Index("ix_batches_tenant_id_id", "tenant_id", "id"),
)

chains = sa.Table(
    "chains",
    metadata,
    sa.Column("id", Id, primary_key=True),
    *_owned(),
    sa.Column("name", sa.String(200), nullable=False),
    sa.Column("execution_mode", sa.String(10), nullable=False),
    sa.Column("chain_definition", Json, nullable=False),  # as its caller wrote it
    sa.Column("plan", Json, nullable=False),  # what a run is made of (engine/plans.py)
    sa.Column("stop_on_failure", sa.Boolean, nullable=False),
    sa.Column("timeout_seconds", sa.Integer),
    sa.CheckConstraint("execution_mode IN ('sequential', 'parallel')", name="execution_mode"),
    sa.Index("ix_chains_tenant_id_id", "tenant_id", "id"),
)

# One way through a chain. Its steps are jobs, made when they fall due.
chain_runs = sa.Table(
    "chain_runs",
    metadata,
    sa.Column("id", Id, primary_key=True),
    *_owned(),
    sa.Column("chain_id", Id, nullable=False),
    sa.Column("name", sa.String(200), nullable=False),
    sa.Column("plan", Json, nullable=False),  # the chain's, as it was when the run began
    sa.Column("stop_on_failure", sa.Boolean, nullable=False),
    sa.Column("status", sa.String(10), nullable=False),
    sa.Column("stopping", sa.String(10)),  # the status it shall end with, once somebody wants it stopped
    sa.Column("stop_reason", sa.String(200)),
    sa.Column("stopped_by", sa.String(100)),
    sa.Column("step_errors", Json, nullable=False),  # {"2": why it could not be made a job}
    sa.Column("error_message", sa.String(1000)),
    sa.Column("deadline_at", Moment),
    sa.Column("finished_at", Moment),
    sa.CheckConstraint("status IN ('running', 'completed', 'failed', 'timeout', 'cancelled')", name="status"),
    sa.CheckConstraint("stopping IN ('timeout', 'cancelled')", name="stopping"),
    sa.CheckConstraint("(status = 'running') = (finished_at IS NULL)", name="ended_has_time"),
    sa.Index("ix_chain_runs_chain_id_id", "chain_id", "id"),
    sa.Index(
        "uq_chain_runs_active",
        "chain_id",
        unique=True,
        postgresql_where=sa.text("finished_at IS NULL"),
        sqlite_where=sa.text("finished_at IS NULL"),
    ),
    sa.Index(
        "ix_chain_runs_deadline",
        "deadline_at",
        postgresql_where=sa.text("finished_at IS NULL AND deadline_at IS NOT NULL"),
        sqlite_where=sa.text("finished_at IS NULL AND deadline_at IS NOT NULL"),
    ),
    sa.Index(
        "ix_chain_runs_stopping",
        "id",
        postgresql_where=sa.text("finished_at IS NULL AND stopping IS NOT NULL"),
        sqlite_where=sa.text("finished_at IS NULL AND stopping IS NOT NULL"),
    ),
)

# What runs again and again. Whoever locks a schedule locks no job after it.
schedules = sa.Table(
    "schedules",
    metadata,
    sa.Column("id", Id, primary_key=True),
    *_owned(),
    sa.Column("name", sa.String(100)),
    sa.Column("description", sa.String(500)),
    # The jobs that its runs are
    sa.Column("job_type", sa.String(100), nullable=False),
    sa.Column("parameters", Json, nullable=False),
    sa.Column("queue", sa.String(50), nullable=False),
    sa.Column("priority", sa.String(10), nullable=False),
    sa.Column("timeout_seconds", sa.Integer, nullable=False),
    sa.Column("max_retries", sa.Integer, nullable=False),
    sa.Column("retry_delay_seconds", sa.Float, nullable=False),
    sa.Column("retry_backoff", sa.Float, nullable=False),
    sa.Column("retry_max_delay_seconds", sa.Float, nullable=False),
    sa.Column("retry_jitter", sa.Boolean, nullable=False),
    # When
    sa.Column("cron_expression", sa.String(200)),
    sa.Column("interval_seconds", sa.Integer),
    sa.Column("timezone", sa.String(64), nullable=False),
    sa.Column("starts_at", Moment),
    sa.Column("ends_at", Moment),
    sa.Column("jitter_seconds", sa.Integer, nullable=False),
    sa.Column("max_concurrent_runs", sa.Integer, nullable=False),
    sa.Column("overlap", sa.String(14), nullable=False),
    sa.Column("misfire", sa.String(9), nullable=False),
    sa.Column("is_active", sa.Boolean, nullable=False),
    # Where it is: every slot up to `last_slot` has been decided, `next_slot` is decided from `due_at` on.
    sa.Column("anchor_at", Moment, nullable=False),  # an interval's slots are counted from here
    sa.Column("last_slot", Moment),
    sa.Column("next_slot", Moment),
    sa.Column("due_at", Moment),
    # What became of it; ends that are not counted yet are in `schedule_ends`
    sa.Column("last_run_at", Moment),
    sa.Column("total_runs", sa.Integer, nullable=False, server_default="0"),
    sa.Column("successful_runs", sa.Integer, nullable=False, server_default="0"),
    sa.Column("failed_runs", sa.Integer, nullable=False, server_default="0"),
    sa.Column("skipped_runs", sa.Integer, nullable=False, server_default="0"),
    sa.Column("consecutive_failures", sa.Integer, nullable=False, server_default="0"),
    sa.CheckConstraint("(cron_expression IS NULL) <> (interval_seconds IS NULL)", name="cron_or_interval"),
    sa.CheckConstraint("interval_seconds >= 1", name="interval"),
    sa.CheckConstraint("(next_slot IS NULL) = (due_at IS NULL)", name="slot_has_time"),
    sa.CheckConstraint("is_active OR due_at IS NULL", name="only_active_is_due"),
    sa.CheckConstraint("overlap IN ('skip', 'queue_one', 'cancel_running', 'allow')", name="overlap"),
    sa.CheckConstraint("misfire IN ('skip', 'fire_once', 'fire_all')", name="misfire"),
    sa.CheckConstraint("max_concurrent_runs >= 1", name="max_concurrent_runs"),
    sa.UniqueConstraint("tenant_id", "name"),
    sa.Index("ix_schedules_tenant_id_id", "tenant_id", "id"),
    sa.Index(
        "ix_schedules_due",
        "due_at",
        postgresql_where=sa.text("due_at IS NOT NULL"),
        sqlite_where=sa.text("due_at IS NOT NULL"),
    ),
    postgresql_with={"fillfactor": 70},
)

# Ends of runs that are not yet counted in `schedules`: whoever ends a job waits for no lock on its schedule.
schedule_ends = sa.Table(
    "schedule_ends",
    metadata,
    sa.Column("id", Id, primary_key=True),
    sa.Column("tenant_id", Id, nullable=False),
    sa.Column("schedule_id", Id, nullable=False),
    sa.Column("job_id", Id, nullable=False),
    sa.Column("successful", sa.Boolean, nullable=False),
    sa.Index("ix_schedule_ends_schedule_id_id", "schedule_id", "id"),
)

# What was decided about a slot, once: a job was made of it, or will be, or the reason why not.
schedule_runs = sa.Table(
    "schedule_runs",
    metadata,
    sa.Column("id", Id, primary_key=True),
    *_owned(),
    sa.Column("schedule_id", Id, nullable=False),
    sa.Column("slot", Moment, nullable=False),
    sa.Column("slots", sa.Integer, nullable=False),  # so many from `slot` to `last_slot` share a reason
    sa.Column("last_slot", Moment, nullable=False),
    sa.Column("trigger", sa.String(8), nullable=False),
    sa.Column("status", sa.String(8), nullable=False),
    sa.Column("reason", sa.String(24)),
    sa.Column("job_id", Id),
    sa.UniqueConstraint("schedule_id", "slot"),
    sa.CheckConstraint("trigger IN ('slot', 'manual')", name="trigger"),
    sa.CheckConstraint("status IN ('started', 'waiting', 'skipped')", name="status"),
    sa.CheckConstraint("(status = 'started') = (job_id IS NOT NULL)", name="started_has_job"),
    sa.CheckConstraint("(status = 'skipped') = (reason IS NOT NULL)", name="skipped_has_reason"),
    sa.CheckConstraint("slots >= 1 AND (slots = 1 OR status = 'skipped')", name="slots"),
    sa.Index("ix_schedule_runs_schedule_id_id", "schedule_id", "id"),
    sa.Index(
        "ix_schedule_runs_waiting",
        "schedule_id",
        postgresql_where=sa.text("status = 'waiting'"),
        sqlite_where=sa.text("status = 'waiting'"),
    ),
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
    # Which transaction wrote it: streams read on from one (engine/happenings.py). NULL: by an older release.
    sa.Column("tx", sa.BigInteger, server_default=transaction_number()),
    sa.PrimaryKeyConstraint("job_id", "seq"),
    sa.Index("ix_job_events_tenant_id_tx", "tenant_id", "tx"),
)

# One row for each of a job's tags, so that lists can be asked for one; `jobs.tags` is what callers see.
job_tags = sa.Table(
    "job_tags",
    metadata,
    sa.Column("job_id", Id, nullable=False),
    sa.Column("tag", sa.String(100), nullable=False),
    sa.Column("tenant_id", Id, nullable=False),
    sa.PrimaryKeyConstraint("job_id", "tag"),
    sa.Index("ix_job_tags_tenant_id_tag_job_id", "tenant_id", "tag", "job_id"),
)

# What was answered to a request with an Idempotency-Key, written in the transaction that did the work.
idempotency_keys = sa.Table(
    "idempotency_keys",
    metadata,
    sa.Column("id", Id, primary_key=True),  # of tenant, subject, operation and key: engine/idempotency.py
    sa.Column("tenant_id", Id, nullable=False),
    sa.Column("created_by", sa.String(100), nullable=False),
    sa.Column("request", Id, nullable=False),  # a digest of what was asked for
    sa.Column("answer", Json),  # NULL only inside the transaction that works it out
    sa.Column("created_at", Moment, nullable=False),
    sa.Index("ix_idempotency_keys_created_at", "created_at"),
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

# Queues whose jobs wait until they are resumed. Like workers, queues are everybody's: no tenant.
paused_queues = sa.Table(
    "paused_queues",
    metadata,
    sa.Column("queue", sa.String(50), primary_key=True),
    sa.Column("reason", sa.String(200)),
    sa.Column("created_by", sa.String(100), nullable=False),
    sa.Column("created_at", Moment, nullable=False, server_default=utc_now()),
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
