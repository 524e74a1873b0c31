"""Queues, workers' health and job types over HTTP."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.responses import Response

from laneway.api.gate import GatedRoute, access
from laneway.api.jobs import as_json
from laneway.api.runtime import CallerDep, RuntimeDep, ServiceDep, in_thread
from laneway.api.schemas import problems
from laneway.engine.registry import JobType
from laneway.errors import try_again_seconds
from laneway.limits.rules import RateClass

router = APIRouter(route_class=GatedRoute)


class LaneView(BaseModel):
    """One lane: `queued` rows (counted up to 10,000), `depth` ids in Redis (null while it is away)."""

    lane: str
    priority: str
    queued: int
    depth: int | None
    oldest_age_seconds: float | None


class QueueView(BaseModel):
    name: str
    queued: int
    lanes: list[LaneView]


class QueueStats(BaseModel):
    """The queues, and the caller's tenant's active jobs by status (each counted up to 10,000)."""

    queues: list[QueueView]
    jobs: dict[str, int]


class WorkerView(BaseModel):
    id: str
    name: str
    state: str
    lanes: list[str]
    held: int
    beat_age_seconds: float


class QueueHealth(BaseModel):
    """`healthy`: there are living workers, for each lane with queued jobs; `reasons` says what is not."""

    status: str
    reasons: list[str]
    redis: str
    workers: list[WorkerView]


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
    "/queues/stats",
    response_model=QueueStats,
    operation_id="getQueueStats",
    tags=["queues"],
    responses=problems(),
)
@access(RateClass.DEFAULT)
async def get_queue_stats(caller: CallerDep, service: ServiceDep) -> Response:
    """How many jobs wait, in which lanes, and for how long."""
    return as_json(await in_thread(service.queue_stats, caller))


@router.get(
    "/queues/health",
    response_model=QueueHealth,
    operation_id="getQueueHealth",
    tags=["queues"],
    responses={**problems(), 503: _UNHEALTHY},
)
@access(RateClass.DEFAULT)
async def get_queue_health(runtime: RuntimeDep) -> Response:
    """Whether somebody works: 200 healthy, 503 not."""
    health = await in_thread(runtime.service.queue_health)
    if health["status"] == "healthy":
        return as_json(health)
    return as_json(health, 503, {"Retry-After": str(try_again_seconds())})


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
