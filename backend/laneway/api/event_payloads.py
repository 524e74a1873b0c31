"""What each event carries as `data`: the types behind OpenAPI's `webhooks`, with an example of each."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import BaseModel, Field, create_model
from pydantic.json_schema import models_json_schema

from laneway.api.schemas import JobView
from laneway.domain.events import EventType, SystemEvent
from laneway.domain.states import JobStatus
from laneway.engine.telling import LEFT_OUT

_JOB_FIELDS: dict[str, Any] = {
    name: (field.annotation, field) for name, field in JobView.model_fields.items() if name not in LEFT_OUT
}

JobEventData = create_model(
    "JobEventData",
    __doc__="A job when the event happened: its fields, without parameters and traceback.",
    job_id=(str, Field(description="The job's `id`.")),
    **_JOB_FIELDS,
    result_truncated=(
        bool,
        Field(False, description="The result was too large to send: `result` is null, the job has it."),
    ),
)


class JobTypeEventData(BaseModel):
    """How the jobs of one type have been ending."""

    job_type: str
    failed: int = Field(description="Jobs that failed or timed out.")
    ended: int = Field(description="Those, and the jobs that completed.")
    percent: float = Field(description="How many of a hundred may fail.")
    within_seconds: int


class BatchEventData(BaseModel):
    """How a batch ended."""

    batch_id: str
    status: str = Field(description="`completed`, or `failed` when not all jobs completed.")
    total: int = Field(description="Jobs that the request held.")
    enqueued: int = Field(description="Of them accepted.")
    counts: dict[JobStatus, int]
    created_at: datetime
    finished_at: datetime


class ChainEventData(BaseModel):
    """How a chain's run ended."""

    chain_id: str
    run_id: str
    name: str
    status: str = Field(description="`completed`, `failed`, `timeout` or `cancelled`.")
    error_message: str | None
    total_steps: int
    started_at: datetime
    finished_at: datetime


class ScheduleEventData(BaseModel):
    """A schedule that something happened to."""

    schedule_id: str
    name: str | None
    job_type: str


class ScheduleMissedData(ScheduleEventData):
    """Slots that did not run: one, or several in a row with the same reason."""

    slot: datetime = Field(description="The first of them.")
    last_slot: datetime
    slots: int
    reason: str = Field(description="As in `GET /scheduled-jobs/{id}/runs`.")


class ScheduleFailingData(ScheduleEventData):
    """A schedule whose runs fail one after the other."""

    consecutive_failures: int
    last_job_id: str


class EndpointEventData(BaseModel):
    """A webhook endpoint that something happened to."""

    endpoint_id: str
    url: str


class EndpointFailingData(EndpointEventData):
    """An endpoint that keeps failing."""

    percent: int = Field(description="50, 70 or 90: how far it is on its way to being disabled.")


class EndpointDisabledData(EndpointEventData):
    """An endpoint that nothing is sent to any more."""

    reason: str = Field(description="`gone_410`: it answered 410. `failing`: for five days nothing else.")


class EndpointTestData(EndpointEventData):
    """An endpoint that somebody tries out."""

    asked_by: str


PAYLOADS: dict[str, type[BaseModel]] = {
    **dict.fromkeys(EventType, JobEventData),
    SystemEvent.SCHEDULE_MISSED: ScheduleMissedData,
    SystemEvent.SCHEDULE_FAILING: ScheduleFailingData,
    SystemEvent.BATCH_COMPLETED: BatchEventData,
    SystemEvent.CHAIN_COMPLETED: ChainEventData,
    SystemEvent.CHAIN_FAILED: ChainEventData,
    SystemEvent.JOB_TYPE_FAILING: JobTypeEventData,
    SystemEvent.JOB_TYPE_RECOVERED: JobTypeEventData,
    SystemEvent.ENDPOINT_FAILING: EndpointFailingData,
    SystemEvent.ENDPOINT_DISABLED: EndpointDisabledData,
    SystemEvent.ENDPOINT_RECOVERED: EndpointEventData,
    SystemEvent.ENDPOINT_TEST: EndpointTestData,
}
"""The model of `data`, by event: of every event that is sent."""

_AT = "2026-01-01T12:00:05.000000Z"
_ENDED = {"finished_at": _AT, "result": None}
_JOB: dict[str, Any] = {
    "job_id": "019b7a5e-4c00-7000-8000-000000000001",
    "tenant_id": "019b7a5e-4c00-7000-8000-00000000000a",
    "created_by": "alice",
    "job_type": "report.render",
    "queue": "default",
    "priority": "normal",
    "title": "Quarterly report",
    "description": None,
    "tags": ["reports"],
    "metadata": {"order": 17},
    "status": "running",
    "status_reason": None,
    "progress": 40,
    "progress_message": "page 4 of 10",
    "progress_details": None,
    "result": None,
    "error": None,
    "attempt": 1,
    "retry_count": 0,
    "max_retries": 3,
    "retry_delay_seconds": 120.0,
    "retry_backoff": 2.0,
    "retry_max_delay_seconds": 3600.0,
    "retry_jitter": True,
    "timeout_seconds": 3600,
    "unique_key": None,
    "concurrency_key": None,
    "concurrency_limit": None,
    "webhook_url": "https://example.com/hooks/laneway",
    "webhook_events": None,
    "dead_letter_reason": None,
    "scheduled_job_id": None,
    "depends_on": [],
    "on_dependency_failure": "cancel",
    "batch_id": None,
    "chain_id": None,
    "chain_step": None,
    "cancelled_by": None,
    "cancelled_at": None,
    "created_at": "2026-01-01T12:00:00.000000Z",
    "updated_at": _AT,
    "scheduled_for": None,
    "expires_at": None,
    "queued_at": "2026-01-01T12:00:00.000000Z",
    "started_at": "2026-01-01T12:00:01.000000Z",
    "finished_at": None,
    "next_retry_at": None,
}
_ERROR = {"type": "ConnectionError", "message": "no route to host", "traceback": None}
_FAILED = {"status": "failed", "error": _ERROR | {"category": "transient"}, "dead_letter_reason": "exhausted"}
_LATE = _ERROR | {"type": "JobTimeout", "category": "timeout", "message": "the job ran longer than 3600 s"}
_WAITED = {"started_at": None, "attempt": 0, "progress": 0, "progress_message": None}
_ENDPOINT = {
    "endpoint_id": "019b7a5e-4c00-7000-8000-000000000002",
    "url": "https://example.com/hooks/laneway",
}
_JOB_TYPE = {"job_type": "report.render", "failed": 7, "ended": 20, "percent": 20.0, "within_seconds": 600}
_CHAIN = {
    "chain_id": "019b7a5e-4c00-7000-8000-000000000005",
    "run_id": "019b7a5e-4c00-7000-8000-000000000006",
    "name": "nightly import",
    "status": "completed",
    "error_message": None,
    "total_steps": 3,
    "started_at": "2026-01-01T12:00:00.000000Z",
    "finished_at": _AT,
}
_SLOT = "2026-01-01T12:00:00.000000Z"
_SCHEDULE = {
    "schedule_id": "019b7a5e-4c00-7000-8000-000000000003",
    "name": "nightly report",
    "job_type": "report.render",
}
_EXAMPLES: dict[str, dict[str, Any]] = {
    EventType.JOB_COMPLETED: _JOB
    | _ENDED
    | {"status": "completed", "progress": 100, "result": {"pages": 10}, "progress_message": None},
    EventType.JOB_FAILED: _JOB | _ENDED | _FAILED,
    EventType.JOB_TIMEOUT: _JOB
    | _ENDED
    | {"status": "timeout", "error": _LATE, "dead_letter_reason": "timeout"},
    EventType.JOB_CANCELLED: _JOB
    | _ENDED
    | _WAITED
    | {"status": "cancelled", "cancelled_by": "bob", "cancelled_at": _AT},
    EventType.JOB_EXPIRED: _JOB
    | _ENDED
    | _WAITED
    | {"status": "expired", "expires_at": "2026-01-01T12:00:04.000000Z"},
    EventType.JOB_RETRYING: _JOB
    | _FAILED
    | {
        "status": "retrying",
        "retry_count": 1,
        "dead_letter_reason": None,
        "next_retry_at": "2026-01-01T12:02:05.000000Z",
    },
    EventType.JOB_DEAD_LETTERED: _JOB | _ENDED | _FAILED,
    EventType.JOB_PROGRESS: _JOB,
    SystemEvent.SCHEDULE_MISSED: _SCHEDULE
    | {"slot": _SLOT, "last_slot": _SLOT, "slots": 1, "reason": "overlap"},
    SystemEvent.SCHEDULE_FAILING: _SCHEDULE
    | {"consecutive_failures": 3, "last_job_id": "019b7a5e-4c00-7000-8000-000000000001"},
    SystemEvent.BATCH_COMPLETED: {
        "batch_id": "019b7a5e-4c00-7000-8000-000000000004",
        "status": "failed",
        "total": 100,
        "enqueued": 100,
        "counts": dict.fromkeys((status.value for status in JobStatus), 0) | {"completed": 98, "failed": 2},
        "created_at": "2026-01-01T12:00:00.000000Z",
        "finished_at": _AT,
    },
    SystemEvent.CHAIN_COMPLETED: _CHAIN,
    SystemEvent.CHAIN_FAILED: _CHAIN
    | {"status": "failed", "error_message": "step 1: ConnectionError: no route to host"},
    SystemEvent.JOB_TYPE_FAILING: _JOB_TYPE,
    SystemEvent.JOB_TYPE_RECOVERED: _JOB_TYPE | {"failed": 2},
    SystemEvent.ENDPOINT_FAILING: _ENDPOINT | {"percent": 50},
    SystemEvent.ENDPOINT_DISABLED: _ENDPOINT | {"reason": "failing"},
    SystemEvent.ENDPOINT_RECOVERED: _ENDPOINT,
    SystemEvent.ENDPOINT_TEST: _ENDPOINT | {"asked_by": "alice"},
}


def example(event: str) -> dict[str, Any]:
    """A body that tells of `event`, in the standard format."""
    return {"type": str(event), "timestamp": _AT, "data": _EXAMPLES[event]}


def schemas() -> dict[str, Any]:
    """The JSON Schemas of all payloads and of what they name, under their names in OpenAPI."""
    models = dict.fromkeys(PAYLOADS.values())
    _, made = models_json_schema(
        [(model, "serialization") for model in models], ref_template="#/components/schemas/{model}"
    )
    return dict(made["$defs"])
