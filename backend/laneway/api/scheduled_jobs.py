"""Schedules over HTTP."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from laneway.api.gate import GatedRoute, access
from laneway.api.idempotency import IdempotencyKey, key_of, once, replayed
from laneway.api.jobs import PageQuery, accepted, as_json, link_to, page_answer
from laneway.api.runtime import CallerDep, RuntimeDep, ServiceDep, in_thread
from laneway.api.schemas import JobView, problems
from laneway.domain.spec import JOB_TYPE_PATTERN, Priority
from laneway.domain.states import JobStatus
from laneway.engine.schedules import (
    NewSchedule,
    Preview,
    ScheduleChange,
    ScheduleFilter,
    Schedules,
)
from laneway.engine.slot_plan import Misfire, Overlap, Skipped
from laneway.limits.rules import RateClass

router = APIRouter(route_class=GatedRoute, tags=["schedules"])


class ScheduleView(BaseModel):
    """A schedule, and how its runs have been ending."""

    id: str
    tenant_id: str
    created_by: str
    name: str | None
    description: str | None
    job_type: str
    parameters: dict[str, Any]
    queue: str
    priority: Priority
    timeout_seconds: int
    max_retries: int
    retry_delay_seconds: float
    retry_backoff: float
    retry_max_delay_seconds: float
    retry_jitter: bool
    cron_expression: str | None
    interval_seconds: int | None
    cron_description: str = Field(description="When it is due, in words.")
    timezone: str
    starts_at: datetime | None
    ends_at: datetime | None
    jitter_seconds: int
    is_active: bool
    max_concurrent_runs: int
    overlap: Overlap
    misfire: Misfire
    next_run_at: datetime | None = Field(
        description="With its jitter. Null: it is switched off, or never due again."
    )
    last_run_at: datetime | None
    total_runs: int = Field(description="Started.")
    successful_runs: int = Field(
        description="Ends, by `completed`. A run that is retried ends, and counts, again."
    )
    failed_runs: int = Field(description="Ends, by `failed` or `timeout`.")
    skipped_runs: int = Field(description="Slots that did not run.")
    consecutive_failures: int
    success_rate: float | None = Field(
        description="Successes of a hundred successes and failures; null before the first."
    )
    created_at: datetime
    updated_at: datetime


class SchedulePage(BaseModel):
    data: list[ScheduleView]
    next_cursor: str | None
    has_more: bool


class ScheduleRunView(BaseModel):
    """What was decided about a slot, or about several in a row that were skipped for one reason."""

    id: str
    scheduled_job_id: str
    slot: datetime = Field(description="When it was due, before jitter.")
    last_slot: datetime
    slots: int
    trigger: Literal["slot", "manual"]
    status: Literal["started", "waiting", "skipped"]
    reason: Skipped | None = Field(
        description="Why it did not run. `misfire`: nobody was there in time. `overlap`: earlier runs were "
        "active. `max_concurrent_runs`: 100 were, in spite of `allow`. `quota`, `overloaded`: too many jobs "
        "waited. `paused`: switched off while it waited."
    )
    job_id: str | None
    job_status: JobStatus | None = Field(description="Null: there is no job, or none any more.")
    started_at: datetime | None
    finished_at: datetime | None
    created_at: datetime


class ScheduleRunPage(BaseModel):
    data: list[ScheduleRunView]
    next_cursor: str | None
    has_more: bool


class PreviewTime(BaseModel):
    """A time at which it would be due."""

    at: datetime
    local: str = Field(description="On the clocks of its time zone.")
    note: str | None = Field(description="What changing clocks do to it, if anything.")


class PreviewView(BaseModel):
    """What a timing means."""

    cron_description: str
    timezone: str
    times: list[PreviewTime]


class ScheduleQuery(PageQuery):
    """What `GET /scheduled-jobs` may be asked."""

    is_active: bool | None = None
    job_type: Annotated[str, Field(pattern=JOB_TYPE_PATTERN, max_length=100)] | None = None


@router.post(
    "/scheduled-jobs",
    status_code=201,
    response_model=ScheduleView,
    operation_id="createScheduledJob",
    responses=problems(400, 409, 413, 415),
)
@access(RateClass.DEFAULT)
async def create_scheduled_job(
    request: Request,
    wanted: NewSchedule,
    caller: CallerDep,
    service: ServiceDep,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Make a schedule. Its runs are jobs of whoever made it."""
    key = key_of(request, caller, "createScheduledJob", await request.body())
    made = await once(lambda: in_thread(Schedules(service).create, wanted, caller, key=key))
    where = link_to(request, f"/api/v1/scheduled-jobs/{made['id']}")
    return replayed(as_json(made, 201, {"Location": where}), made)


@router.get(
    "/scheduled-jobs",
    response_model=SchedulePage,
    operation_id="listScheduledJobs",
    responses=problems(400),
)
@access(RateClass.DEFAULT)
async def list_scheduled_jobs(
    request: Request, caller: CallerDep, service: ServiceDep, asked: Annotated[ScheduleQuery, Query()]
) -> Response:
    """Schedules, newest first. A user sees its own; others see their tenant's."""
    wanted = ScheduleFilter(asked.is_active, asked.job_type)
    page, following = await in_thread(
        Schedules(service).page, caller, wanted, limit=asked.limit, cursor=asked.cursor
    )
    return page_answer(request, page, following)


@router.post(
    "/scheduled-jobs/preview",
    response_model=PreviewView,
    operation_id="previewScheduledJob",
    responses=problems(400, 413, 415),
)
@access(RateClass.DEFAULT)
async def preview_scheduled_job(wanted: Preview, caller: CallerDep, service: ServiceDep) -> Response:
    """The next times of a timing, in words and as moments, before anything is made."""
    return as_json(await in_thread(Schedules(service).preview, wanted))


@router.get(
    "/scheduled-jobs/{schedule_id}",
    response_model=ScheduleView,
    operation_id="getScheduledJob",
    responses=problems(404),
)
@access(RateClass.DEFAULT)
async def get_scheduled_job(schedule_id: UUID, caller: CallerDep, service: ServiceDep) -> Response:
    """One schedule: when it runs next, and how it went."""
    return as_json(await in_thread(Schedules(service).get, str(schedule_id), caller))


@router.patch(
    "/scheduled-jobs/{schedule_id}",
    response_model=ScheduleView,
    operation_id="changeScheduledJob",
    responses=problems(400, 404, 409, 413, 415),
)
@access(RateClass.DEFAULT)
async def change_scheduled_job(
    schedule_id: UUID, wanted: ScheduleChange, caller: CallerDep, service: ServiceDep
) -> Response:
    """Change what is given. Another timing counts from now on; jobs that were made stay as they are."""
    return as_json(await in_thread(Schedules(service).change, str(schedule_id), wanted, caller))


@router.delete(
    "/scheduled-jobs/{schedule_id}",
    status_code=204,
    operation_id="deleteScheduledJob",
    responses=problems(404),
)
@access(RateClass.DEFAULT)
async def delete_scheduled_job(schedule_id: UUID, caller: CallerDep, service: ServiceDep) -> Response:
    """Forget a schedule. Jobs that it has made stay, and run."""
    await in_thread(Schedules(service).delete, str(schedule_id), caller)
    return Response(status_code=204)


@router.post(
    "/scheduled-jobs/{schedule_id}/toggle",
    response_model=ScheduleView,
    operation_id="toggleScheduledJob",
    responses=problems(404),
)
@access(RateClass.DEFAULT)
async def toggle_scheduled_job(
    schedule_id: UUID, is_active: bool, caller: CallerDep, service: ServiceDep
) -> Response:
    """Switch a schedule on or off. What is due while it is off is not missed."""
    wanted = ScheduleChange(is_active=is_active)
    return as_json(await in_thread(Schedules(service).change, str(schedule_id), wanted, caller))


@router.post(
    "/scheduled-jobs/{schedule_id}/run",
    status_code=202,
    response_model=JobView,
    operation_id="runScheduledJob",
    responses=problems(400, 404, 409),
)
@access(RateClass.QUEUE, jobs=1)
async def run_scheduled_job(
    request: Request,
    schedule_id: UUID,
    caller: CallerDep,
    runtime: RuntimeDep,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Run it now, beside its slots: whatever is active, and also when it is switched off."""
    key = key_of(request, caller, "runScheduledJob", await request.body(), of=schedule_id)
    schedules = Schedules(runtime.service)
    job = await once(lambda: in_thread(schedules.run, str(schedule_id), caller, key=key))
    return replayed(accepted(request, job), job)


@router.get(
    "/scheduled-jobs/{schedule_id}/runs",
    response_model=ScheduleRunPage,
    operation_id="listScheduledJobRuns",
    responses=problems(400, 404),
)
@access(RateClass.DEFAULT)
async def list_scheduled_job_runs(
    request: Request,
    schedule_id: UUID,
    caller: CallerDep,
    service: ServiceDep,
    asked: Annotated[PageQuery, Query()],
) -> Response:
    """What became of its slots, newest first, for 30 days: a job each, or the reason why not."""
    page, following = await in_thread(
        Schedules(service).runs, str(schedule_id), caller, limit=asked.limit, cursor=asked.cursor
    )
    return page_answer(request, page, following)
