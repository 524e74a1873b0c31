"""What became of a job, over HTTP: its attempts, and all that happened to it."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal
from uuid import UUID

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from laneway.api.gate import GatedRoute, access
from laneway.api.jobs import PageQuery, page_answer
from laneway.api.runtime import CallerDep, ServiceDep, in_thread
from laneway.api.schemas import ErrorView, problems
from laneway.domain.events import EventType
from laneway.domain.states import JobStatus
from laneway.engine import history
from laneway.limits.rules import RateClass
from laneway.webhooks.retries import ErrorClass

router = APIRouter(route_class=GatedRoute, tags=["jobs"])


class AttemptView(BaseModel):
    """One run of the job's handler."""

    attempt: int
    outcome: history.Outcome = Field(description="`released`: given back unfinished, by a drain or deploy.")
    worker: str
    started_at: datetime
    finished_at: datetime | None
    reason: str | None
    error: ErrorView | None


class AttemptPage(BaseModel):
    data: list[AttemptView]
    next_cursor: str | None
    has_more: bool


class JobEntry(BaseModel):
    """A change of the job's status."""

    kind: Literal["job"]
    at: datetime
    seq: int = Field(
        description="Grows with each change of the job; `at` is of the clock of whoever made it."
    )
    action: str
    status: JobStatus = Field(description="What the job became.")
    attempt: int
    actor: str = Field(description="A caller, `worker:` and its id, or `scheduler`.")
    reason: str | None
    error: ErrorView | None = Field(description="Without traceback, which the attempt has.")


class WebhookEntry(BaseModel):
    """A try to deliver a webhook, or one that is still to come: `pending`, `sending`, `retrying`."""

    kind: Literal["webhook"]
    at: datetime
    status: Literal["pending", "sending", "retrying", "failed", "delivered"]
    attempt: int = Field(description="Of this delivery, counted from 1.")
    event_type: EventType
    delivery_id: str
    url: str
    status_code: int | None
    error_class: ErrorClass | None
    error: str | None
    total_ms: int | None


class TimelinePage(BaseModel):
    data: list[JobEntry | WebhookEntry]
    next_cursor: str | None
    has_more: bool


@router.get(
    "/jobs/{job_id}/attempts",
    response_model=AttemptPage,
    operation_id="listJobAttempts",
    responses=problems(400, 404),
)
@access(RateClass.DEFAULT)
async def list_job_attempts(
    request: Request,
    job_id: UUID,
    caller: CallerDep,
    service: ServiceDep,
    asked: Annotated[PageQuery, Query()],
) -> Response:
    """The job's attempts, first to last: who ran it, from when to when, and how each ended."""
    page, following = await in_thread(
        history.attempts, service, str(job_id), caller, limit=asked.limit, cursor=asked.cursor
    )
    return page_answer(request, page, following)


@router.get(
    "/jobs/{job_id}/timeline",
    response_model=TimelinePage,
    operation_id="getJobTimeline",
    responses=problems(400, 404),
)
@access(RateClass.DEFAULT)
async def get_job_timeline(
    request: Request,
    job_id: UUID,
    caller: CallerDep,
    service: ServiceDep,
    asked: Annotated[PageQuery, Query()],
) -> Response:
    """All that happened to the job, oldest first: each change of its status, each try to tell of it.

    `limit` counts the changes. Webhooks are on the page of the change that they tell of.
    """
    page, following = await in_thread(
        history.timeline, service, str(job_id), caller, limit=asked.limit, cursor=asked.cursor
    )
    return page_answer(request, page, following)
