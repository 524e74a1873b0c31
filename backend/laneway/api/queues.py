"""Queues and job types over HTTP: what waits, who works, and for admins pause, resume and purge."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from laneway.api.gate import GatedRoute, access
from laneway.api.jobs import as_json
from laneway.api.runtime import CallerDep, ServiceDep, in_thread
from laneway.api.schemas import problems
from laneway.engine import queues
from laneway.engine.access.callers import Role
from laneway.engine.queries import MAX_COUNTED
from laneway.engine.queues import RECENT
from laneway.engine.registry import JobType
from laneway.errors import FieldError, Unprocessable, try_again_seconds
from laneway.limits.rules import RateClass

router = APIRouter(route_class=GatedRoute)


class LaneView(BaseModel):
    """One lane of a queue."""

    lane: str
    priority: str
    queued: int = Field(
        description=f"Rows, counted up to {MAX_COUNTED:,}: an admin's all, others' their own."
    )
    depth: int | None = Field(description="Ids in Redis, for admins; null while it is away.")
    oldest_age_seconds: float | None


class QueueLanes(BaseModel):
    name: str
    queued: int
    lanes: list[LaneView]


class QueueStats(BaseModel):
    """The queues, and active jobs by status: an admin's of all tenants, others' of their own.

    Each number is counted up to 10,000.
    """

    queues: list[QueueLanes]
    jobs: dict[str, int]


class QueueView(QueueLanes):
    """A queue. An admin sees the jobs of all tenants, everybody else those of its own."""

    paused: bool = Field(description="Its jobs are accepted, and wait until it is resumed.")
    paused_at: datetime | None
    paused_by: str | None = Field(description="For admins, like `pause_reason`.")
    pause_reason: str | None
    oldest_age_seconds: float | None = Field(description="How long the oldest queued job has been due.")
    wait_p50_seconds: float | None = Field(
        description=f"From due to started, of the newest jobs that ended within {RECENT.seconds} s."
    )
    wait_p95_seconds: float | None
    ended_per_minute: float = Field(description="Jobs that ran to an end, over the same time.")


class QueueList(BaseModel):
    data: list[QueueView]


class WorkerView(BaseModel):
    id: str
    name: str
    state: str
    lanes: list[str]
    held: int
    beat_age_seconds: float


class QueueHealth(BaseModel):
    """`healthy`: there are living workers, for each lane with queued jobs; `reasons` says what is not.

    A paused queue's lanes need none.
    """

    status: str
    reasons: list[str]
    redis: str
    workers: list[WorkerView] | None = Field(description="Those that live; null for users.")


class PauseRequest(BaseModel):
    """Why."""

    model_config = ConfigDict(extra="forbid")

    reason: Annotated[str, Field(max_length=200)] | None = None


class QueuePurgeRequest(BaseModel):
    """What to purge, said twice."""

    model_config = ConfigDict(extra="forbid")

    confirm: str = Field(description="The queue's name.", max_length=50)
    dry_run: bool = Field(False, description="Only say how many wait.")


class QueuePurged(BaseModel):
    """What was done."""

    queue: str
    dry_run: bool
    cancelled: int = Field(description="Jobs that waited, of all tenants, and will not run.")
    remaining: int = Field(description=f"Jobs that wait still; counted up to {MAX_COUNTED:,}.")


_UNHEALTHY: dict[str, Any] = {
    "model": QueueHealth,
    "description": "Not healthy; a problem when that cannot be found out.",
    "content": problems(503)[503]["content"],
}


class JobTypeView(BaseModel):
    """A job type: the JSON Schema of its parameters, and the defaults of its jobs."""

    name: str
    description: str | None
    parameters_schema: dict[str, Any]
    defaults: dict[str, Any]


class JobTypes(BaseModel):
    data: list[JobTypeView]


@router.get(
    "/queues", response_model=QueueList, operation_id="listQueues", tags=["queues"], responses=problems()
)
@access(RateClass.DEFAULT)
async def list_queues(caller: CallerDep, service: ServiceDep) -> Response:
    """The queues that workers serve or where the caller's jobs wait; an admin's: all that are in use."""
    return as_json({"data": await in_thread(queues.page, service, caller)})


@router.get(
    "/queues/stats",
    response_model=QueueStats,
    operation_id="getQueueStats",
    tags=["queues"],
    responses=problems(),
)
@access(RateClass.DEFAULT)
async def get_queue_stats(caller: CallerDep, service: ServiceDep) -> Response:
    """How many jobs wait, in which lanes, and for how long."""
    return as_json(await in_thread(queues.stats, service, caller))


@router.get(
    "/queues/health",
    response_model=QueueHealth,
    operation_id="getQueueHealth",
    tags=["queues"],
    responses={**problems(), 503: _UNHEALTHY},
)
@access(RateClass.DEFAULT)
async def get_queue_health(caller: CallerDep, service: ServiceDep) -> Response:
    """Whether somebody works: 200 healthy, 503 not."""
    health = await in_thread(queues.health, service, caller)
    if health["status"] == "healthy":
        return as_json(health)
    return as_json(health, 503, {"Retry-After": str(try_again_seconds())})


@router.get(
    "/queues/{name}",
    response_model=QueueView,
    operation_id="getQueue",
    tags=["queues"],
    responses=problems(404),
)
@access(RateClass.DEFAULT)
async def get_queue(name: str, caller: CallerDep, service: ServiceDep) -> Response:
    """One queue: what waits in its lanes, and whether it is paused."""
    return as_json(await in_thread(queues.get, service, name, caller))


@router.post(
    "/queues/{name}/pause",
    response_model=QueueView,
    operation_id="pauseQueue",
    tags=["queues"],
    responses=problems(400, 404, 409, 413, 415),
)
@access(RateClass.DEFAULT, Role.ADMIN)
async def pause_queue(
    name: str, caller: CallerDep, service: ServiceDep, how: PauseRequest | None = None
) -> Response:
    """Let the queue's jobs wait. They are accepted all the same; those that run go on.

    No job of the queue is claimed by what begins after this answer. Pausing twice is no error; so is
    pausing a queue ahead of its first job.
    """
    return as_json(await in_thread(queues.pause, service, name, caller, reason=how.reason if how else None))


@router.post(
    "/queues/{name}/resume",
    response_model=QueueView,
    operation_id="resumeQueue",
    tags=["queues"],
    responses=problems(400, 404, 413, 415),
)
@access(RateClass.DEFAULT, Role.ADMIN)
async def resume_queue(name: str, caller: CallerDep, service: ServiceDep) -> Response:
    """Let the queue's jobs run again, in their order."""
    return as_json(await in_thread(queues.resume, service, name, caller))


@router.post(
    "/queues/{name}/purge",
    response_model=QueuePurged,
    operation_id="purgeQueue",
    tags=["queues"],
    responses=problems(400, 404, 413, 415),
)
@access(RateClass.DEFAULT, Role.ADMIN)
async def purge_queue(name: str, how: QueuePurgeRequest, caller: CallerDep, service: ServiceDep) -> Response:
    """Cancel what waits in the queue (queued, scheduled, retrying, blocked), at most 10,000 jobs a call.

    The jobs end `cancelled` and stay to be looked at; their webhooks are sent. What was done before a
    failure stays done: the same call again goes on with the rest.
    """
    if how.confirm != name:
        detail = f"`confirm` must be the queue's name, {name!r}"
        raise Unprocessable(detail, errors=(FieldError("/confirm", detail, "not_confirmed"),))
    done = await in_thread(queues.purge, service, name, caller, dry_run=how.dry_run)
    return as_json(
        {"queue": name, "dry_run": how.dry_run, "cancelled": done.cancelled, "remaining": done.remaining}
    )


@router.get(
    "/job-types",
    response_model=JobTypes,
    operation_id="listJobTypes",
    tags=["job types"],
    responses=problems(),
)
@access(RateClass.DEFAULT)
async def list_job_types(service: ServiceDep) -> Response:
    """The job types that may be asked for."""
    return as_json({"data": [_job_type(known) for known in service.registry]})


@router.get(
    "/job-types/{name}",
    response_model=JobTypeView,
    operation_id="getJobType",
    tags=["job types"],
    responses=problems(404),
)
@access(RateClass.DEFAULT)
async def get_job_type(name: str, service: ServiceDep) -> Response:
    """What one job type takes: the schema of its parameters, and its defaults."""
    return as_json(_job_type(service.registry.need(name)))


def _job_type(known: JobType) -> dict[str, Any]:
    return {
        "name": known.name,
        "description": (known.function.__doc__ or "").strip().partition("\n")[0] or None,
        "parameters_schema": known.schema,
        "defaults": {name: getattr(known, name) for name in JobType.DEFAULTED},
    }
