"""Many jobs cancelled by one call, over HTTP."""

from __future__ import annotations

from typing import Annotated, Self
from uuid import UUID

from fastapi import APIRouter
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from starlette.responses import Response

from laneway.api.gate import GatedRoute, access
from laneway.api.jobs import CancelRequest, Moment, as_json, by_alias
from laneway.api.runtime import CallerDep, ServiceDep, in_thread
from laneway.api.schemas import problems
from laneway.domain.spec import JOB_TYPE_PATTERN, QUEUE_PATTERN, Priority
from laneway.domain.states import ACTIVE, JobStatus
from laneway.engine.access.callers import Role
from laneway.engine.cancels import MAX_CANCELLED, ActiveJobs, Manner, cancel_all
from laneway.engine.queries import MAX_COUNTED, JobFilter
from laneway.limits.rules import RateClass

MAX_IDS = 1_000

router = APIRouter(route_class=GatedRoute, tags=["jobs"])


def _active(status: JobStatus) -> JobStatus:
    if status not in ACTIVE:
        raise ValueError(f"{status} jobs have ended; name some of {', '.join(sorted(ACTIVE))}")
    return status


class CancelFilter(BaseModel):
    """Which active jobs: all of what is said must hold, and something must be said. Moments are exclusive."""

    model_config = ConfigDict(extra="forbid")

    status: (
        Annotated[
            list[Annotated[JobStatus, BeforeValidator(by_alias), AfterValidator(_active)]],
            Field(min_length=1),
        ]
        | None
    ) = None
    job_type: Annotated[str, Field(pattern=JOB_TYPE_PATTERN, max_length=100)] | None = None
    queue: Annotated[str, Field(pattern=QUEUE_PATTERN)] | None = None
    priority: Priority | None = None
    created_after: Moment | None = None
    created_before: Moment | None = None
    ids: Annotated[list[UUID], Field(min_length=1, max_length=MAX_IDS)] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if all(getattr(self, name) is None for name in type(self).model_fields):
            raise ValueError("an empty filter would cancel everything; say which jobs")
        return self

    @property
    def wanted(self) -> ActiveJobs:
        return ActiveJobs(
            JobFilter(
                tuple(self.status or ()),
                self.job_type,
                self.queue,
                self.priority,
                self.created_after,
                self.created_before,
            ),
            tuple(map(str, self.ids or ())),
        )


class CancelManyRequest(CancelRequest):
    """Which jobs to stop, and how."""

    filter: CancelFilter
    dry_run: bool = Field(False, description="Only say how many match.")
    limit: Annotated[int, Field(ge=1, le=MAX_CANCELLED)] = Field(MAX_CANCELLED, description="Of this call.")


class CancelledView(BaseModel):
    """What was done. A job that was asked to stop before does not count, unless it is now to be killed."""

    matched: int = Field(description="The sum of the others.")
    cancelled: int = Field(description="They waited, and will not run.")
    cancelling: int = Field(description="They run, and were asked to stop.")
    remaining: int = Field(
        description=f"They match, and are left to the next call; counted up to {MAX_COUNTED}."
    )


@router.post(
    "/jobs/cancel",
    response_model=CancelledView,
    operation_id="cancelJobs",
    responses=problems(400, 413, 415),
)
@access(RateClass.BATCH, Role.OPERATOR)
async def cancel_jobs(how: CancelManyRequest, caller: CallerDep, service: ServiceDep) -> Response:
    """Cancel the tenant's jobs that match, oldest first, at most 10,000 a call.

    Each ends or is asked to stop as by `POST /jobs/{job_id}/cancel`. What was done before a failure stays
    done: the same call again goes on with the rest. So does one that answers `remaining`.
    """
    done = await in_thread(
        cancel_all,
        service,
        caller,
        how.filter.wanted,
        Manner(how.reason, how.terminate, how.grace_seconds),
        limit=how.limit,
        dry_run=how.dry_run,
    )
    names = ("matched", "cancelled", "cancelling", "remaining")
    return as_json({name: getattr(done, name) for name in names})
