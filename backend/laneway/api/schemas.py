"""Answers as types: what OpenAPI documents and what `engine/queries.view` makes."""

from __future__ import annotations

from datetime import datetime
from http import HTTPStatus
from typing import Annotated, Any

from pydantic import BaseModel, Field

from laneway.domain.events import EventType
from laneway.domain.spec import Priority
from laneway.domain.states import JobStatus
from laneway.engine.positions import MAX_POSITION


class DeathView(BaseModel):
    """How the process that ran a job died: of `signal` and `exit_status` one is null."""

    signal: str | None
    exit_status: int | None
    peak_memory_mib: int = Field(description="Its largest resident set since it got the job.")
    progress_percent: int | None = Field(description="The last that was heard of the job.")
    progress_message: str | None


class ErrorView(BaseModel):
    type: str
    message: str
    category: str
    traceback: str | None
    process: DeathView | None = Field(None, description="Only where the job's process died.")


class JobStatusView(BaseModel):
    """Where a job is."""

    id: str
    status: JobStatus
    status_reason: str | None = Field(
        description="Why it waits; `queue_paused`: until somebody resumes its queue; `no_capable_worker`: no "
        "living worker serves its queue and knows its type; `concurrency_key`, `tenant_limit`: until another "
        "job of its key, or of its tenant, ends."
    )
    cancelling: bool = Field(description="It runs, and was asked to stop.")
    progress: Annotated[int, Field(ge=0, le=100)]
    progress_message: str | None
    progress_details: dict[str, Any] | None
    attempt: int
    retry_count: int
    next_retry_at: datetime | None
    created_at: datetime
    queued_at: datetime | None
    started_at: datetime | None
    finished_at: datetime | None
    updated_at: datetime


class JobView(JobStatusView):
    """A job."""

    tenant_id: str
    created_by: str
    job_type: str
    parameters: dict[str, Any]
    queue: str
    priority: Priority
    title: str | None
    description: str | None
    tags: list[str]
    metadata: dict[str, Any]
    scheduled_for: datetime | None
    expires_at: datetime | None
    timeout_seconds: int
    max_retries: int
    retry_delay_seconds: float
    retry_backoff: float
    retry_max_delay_seconds: float
    retry_jitter: bool
    unique_key: str | None
    concurrency_key: str | None
    concurrency_limit: int | None
    position: int | None = Field(
        description="Of a queued job among its tenant's in its lane, of one that waits for a slot among "
        f"those that do: 1 is next. null behind {MAX_POSITION:,} others, and on lists."
    )
    result: Any
    error: ErrorView | None
    worker: str | None
    dead_letter_reason: str | None
    scheduled_job_id: str | None = Field(description="The schedule that it is a run of.")
    depends_on: list[str]
    on_dependency_failure: str
    batch_id: str | None
    chain_id: str | None
    chain_step: int | None
    cancelled_at: datetime | None
    cancelled_by: str | None
    webhook_url: str | None
    webhook_events: list[EventType] | None
    webhook_delivered: bool
    webhook_attempts: int


class ResultView(BaseModel):
    id: str
    status: JobStatus
    result: Any
    error: ErrorView | None
    finished_at: datetime


class JobPage(BaseModel):
    data: list[JobView]
    next_cursor: str | None
    has_more: bool


class Problem(BaseModel):
    """RFC 9457 problem details."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    code: str
    request_id: str
    facts: dict[str, Any] | None = None
    errors: list[dict[str, str]] | None = None


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that may answer with these problems, and with those that any may."""
    every = {*statuses, 401, 403, 422, 429, 500, 503}
    content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {
        status: {"description": HTTPStatus(status).phrase, "content": content} for status in sorted(every)
    }
