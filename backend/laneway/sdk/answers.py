"""What the API answers, as values. A field that a newer server adds is left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from laneway.domain.spec import Priority
from laneway.domain.states import FINAL, JobStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class JobError:
    """Why an attempt failed."""

    type: str
    message: str
    category: str
    traceback: str | None = None
    process: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job as it was when the API answered."""

    id: str
    status: JobStatus
    status_reason: str | None
    cancelling: bool
    progress: int
    progress_message: str | None
    progress_details: Mapping[str, Any] | None
    attempt: int
    retry_count: int
    next_retry_at: datetime | None
    created_at: datetime
    queued_at: datetime | None
    started_at: datetime | None
    finished_at: datetime | None
    updated_at: datetime
    tenant_id: str
    created_by: str
    job_type: str
    parameters: Mapping[str, Any]
    queue: str
    priority: Priority
    title: str | None
    description: str | None
    tags: tuple[str, ...]
    metadata: Mapping[str, Any]
    scheduled_for: datetime | None
    expires_at: datetime | None
    timeout_seconds: int
    max_retries: int
    retry_delay_seconds: float
    retry_backoff: float
    retry_max_delay_seconds: float
    retry_jitter: bool
    unique_key: str | None
    result: Any
    error: JobError | None
    worker: str | None
    dead_letter_reason: str | None
    cancelled_at: datetime | None
    cancelled_by: str | None
    webhook_url: str | None
    webhook_events: tuple[str, ...] | None
    webhook_delivered: bool
    webhook_attempts: int
    batch_id: str | None = None
    chain_id: str | None = None
    chain_step: int | None = None
    scheduled_job_id: str | None = None
    parent_job_id: str | None = None
    depends_on: tuple[str, ...] | None = None
    concurrency_key: str | None = None
    concurrency_limit: int | None = None
    position: int | None = None

    @property
    def ended(self) -> bool:
        """Whether it has a final status."""
        return self.status in FINAL


@dataclass(frozen=True, slots=True, kw_only=True)
class JobResult:
    """How a job ended: what it returned, or why it failed."""

    id: str
    status: JobStatus
    result: Any
    error: JobError | None
    finished_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One run of a job's handler."""

    attempt: int
    outcome: str
    worker: str
    started_at: datetime
    finished_at: datetime | None
    reason: str | None
    error: JobError | None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEvent:
    """News of a job: `name` is like `job.progress`, `data` is where the job was."""

    id: str
    name: str
    data: Mapping[str, Any]

    @property
    def progress(self) -> int:
        """From 0 to 100."""
        return int(self.data.get("progress") or 0)

    @property
    def is_last(self) -> bool:
        """Whether the job has ended with it."""
        return bool(self.data.get("finished_at"))


@dataclass(frozen=True, slots=True, kw_only=True)
class JobType:
    """A job type: the JSON Schema of its parameters, and the defaults of its jobs."""

    name: str
    description: str | None
    parameters_schema: Mapping[str, Any]
    defaults: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancelled:
    """What cancelling many jobs did; `remaining` are left to the next call."""

    matched: int
    cancelled: int
    cancelling: int
    remaining: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Bulk:
    """What was done with many dead letters, or with `dry_run` would be."""

    dry_run: bool
    count: int
    sample_ids: tuple[str, ...]
    skipped: int
    remaining: int
    last_due_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """One lane: rows that wait, and ids in Redis (None while it is away)."""

    lane: str
    priority: str
    queued: int
    depth: int | None
    oldest_age_seconds: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Queue:
    """A queue and its lanes."""

    name: str
    queued: int
    lanes: tuple[Lane, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueStats:
    """The queues, and the tenant's active jobs by status."""

    queues: tuple[Queue, ...]
    jobs: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueHealth:
    """Whether somebody works; `reasons` says what is not well."""

    status: str
    reasons: tuple[str, ...]
    redis: str

    @property
    def healthy(self) -> bool:
        return self.status == "healthy"


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """A worker process."""

    id: str
    name: str
    host: str
    pid: int
    version: str
    state: str
    lanes: tuple[str, ...]
    held: int
    held_jobs: tuple[str, ...]
    beat_age_seconds: float
    started_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """A registered receiver of webhooks. `secret` is there when it was just made or rotated."""

    id: str
    url: str
    description: str | None
    event_types: tuple[str, ...]
    filters: Mapping[str, Any]
    format: str
    status: Literal["enabled", "paused", "disabled"]
    disabled_reason: str | None
    created_by: str
    created_at: datetime
    updated_at: datetime
    health: Mapping[str, Any]
    secret: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """One message on its way to one receiver; `attempts` and `payload` only when it was asked for alone."""

    id: str
    message_id: str
    event_type: str
    job_id: str | None
    endpoint_id: str | None
    url: str
    status: str
    attempt_count: int
    max_attempts: int
    last_status_code: int | None
    last_error: str | None
    created_at: datetime
    next_at: datetime
    delivered_at: datetime | None
    payload: str | None = None
    attempts: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Many jobs that were queued at once; `counts` of them by status."""

    id: str
    status: str
    total: int
    enqueued: int
    counts: Mapping[str, int]
    progress_percent: float
    created_by: str
    created_at: datetime
    updated_at: datetime
    finished_at: datetime | None
    rejected: tuple[Mapping[str, Any], ...] = ()
    retried: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """Steps that run one after the other, or side by side, and how far the latest run is."""

    id: str
    name: str
    status: str | None
    execution_mode: str
    chain_definition: tuple[Any, ...]
    stop_on_failure: bool
    timeout_seconds: int | None
    current_step: int | None
    total_steps: int
    progress_percent: float
    results: Mapping[str, Any] | None
    error_message: str | None
    run_id: str | None
    created_by: str
    created_at: datetime
    updated_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """A job that runs again and again."""

    id: str
    name: str | None
    job_type: str
    parameters: Mapping[str, Any]
    queue: str
    priority: Priority
    cron_expression: str | None
    interval_seconds: float | None
    cron_description: str | None
    timezone: str
    is_active: bool
    max_concurrent_runs: int
    overlap: str
    misfire: str
    next_run_at: datetime | None
    last_run_at: datetime | None
    total_runs: int
    successful_runs: int
    failed_runs: int
    success_rate: float | None
    created_by: str
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Me:
    """Whom a key or token stands for."""

    tenant_id: str
    subject: str
    role: str
    scopes: tuple[str, ...]
    key_id: str | None
    job_id: str | None
    expires_at: datetime | None
