"""Dead letters over HTTP: look, retry, delete, one or many."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from laneway.api.gate import GatedRoute, access
from laneway.api.idempotency import IdempotencyKey, key_of, once, replayed
from laneway.api.jobs import (
    MAX_PAGE,
    POLL_HINT_SECONDS,
    Moment,
    RetryRequest,
    accepted,
    as_json,
    link_to,
    page_answer,
)
from laneway.api.runtime import CallerDep, RuntimeDep, ServiceDep, in_thread
from laneway.api.schemas import JobPage, JobView, problems
from laneway.domain.retry import DeadLetterReason
from laneway.domain.spec import JOB_TYPE_PATTERN, QUEUE_PATTERN
from laneway.engine import dead_letters, idempotency
from laneway.engine.access.callers import Role
from laneway.engine.dead_letters import MAX_BULK, MAX_SAMPLE, Bulk, DeadLetterFilter
from laneway.engine.queries import MAX_COUNTED, stamp
from laneway.limits.rules import RateClass

MIN_RATE = 0.001
MAX_RATE = 1_000.0

router = APIRouter(route_class=GatedRoute, tags=["dead letters"])


class DeadLetterChoice(BaseModel):
    """Which dead letters: all of what is said must hold, nothing said is every one. Moments are exclusive."""

    model_config = ConfigDict(extra="forbid")

    job_type: Annotated[str, Field(pattern=JOB_TYPE_PATTERN, max_length=100)] | None = None
    queue: Annotated[str, Field(pattern=QUEUE_PATTERN)] | None = None
    reason: DeadLetterReason | None = None
    created_after: Moment | None = None
    created_before: Moment | None = None
    finished_after: Moment | None = None
    finished_before: Moment | None = None

    @property
    def filter(self) -> DeadLetterFilter:
        return DeadLetterFilter(
            self.job_type,
            self.queue,
            self.reason,
            self.created_after,
            self.created_before,
            self.finished_after,
            self.finished_before,
        )


class DeadLetterQuery(DeadLetterChoice):
    """What `GET /dead-letters` may be asked."""

    cursor: Annotated[str, Field(max_length=100)] | None = None
    limit: Annotated[int, Field(ge=1, le=MAX_PAGE)] = 50


class PurgeRequest(BaseModel):
    """Which dead letters to delete. The filter must be said; `{}` is all."""

    model_config = ConfigDict(extra="forbid")

    filter: DeadLetterChoice
    dry_run: bool = Field(False, description="Only say what would be done.")
    limit: Annotated[int, Field(ge=1, le=MAX_BULK)] = Field(MAX_BULK, description="Of this call.")


class RetryManyRequest(PurgeRequest):
    """Which dead letters to retry, and how fast. The filter must be said; `{}` is all."""

    rate: Annotated[float, Field(ge=MIN_RATE, le=MAX_RATE, allow_inf_nan=False)] | None = Field(
        None, description="So many jobs a second: the i-th of this call waits i / rate seconds."
    )


class BulkView(BaseModel):
    """What was done, or with `dry_run` would be."""

    dry_run: bool
    count: int = Field(description="Dead letters retried or deleted.")
    sample_ids: list[str] = Field(description="The oldest of them.", max_length=MAX_SAMPLE)
    skipped: int = Field(
        description="Left alone: an active job holds their unique key, or a webhook is still to be delivered."
    )
    remaining: int = Field(
        description=f"They match, and are left to the next call; counted up to {MAX_COUNTED}."
    )
    last_due_at: datetime | None = Field(description="With `rate`: when the last of them is tried.")


@router.get("/dead-letters", response_model=JobPage, operation_id="listDeadLetters", responses=problems(400))
@access(RateClass.DEFAULT)
async def list_dead_letters(
    request: Request, caller: CallerDep, service: ServiceDep, asked: Annotated[DeadLetterQuery, Query()]
) -> Response:
    """Jobs that failed for good, newest first. A user sees its own; others see their tenant's."""
    page, following = await in_thread(
        service.page, caller, asked.filter, limit=asked.limit, cursor=asked.cursor, mine=False
    )
    return page_answer(request, page, following)


@router.get(
    "/dead-letters/{job_id}", response_model=JobView, operation_id="getDeadLetter", responses=problems(404)
)
@access(RateClass.DEFAULT)
async def get_dead_letter(job_id: UUID, caller: CallerDep, service: ServiceDep) -> Response:
    """The whole job, with its last error."""
    return as_json(await in_thread(dead_letters.get, service, str(job_id), caller))


@router.post(
    "/dead-letters/{job_id}/retry",
    status_code=202,
    response_model=JobView,
    operation_id="retryDeadLetter",
    responses=problems(400, 404, 409, 413, 415),
)
@access(RateClass.QUEUE, jobs=1)
async def retry_dead_letter(
    request: Request,
    job_id: UUID,
    caller: CallerDep,
    runtime: RuntimeDep,
    how: RetryRequest | None = None,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Queue a dead letter again, with other parameters where they are given."""
    parameters = how.parameters if how else None
    key = key_of(request, caller, "retryDeadLetter", await request.body(), of=job_id)
    retry = runtime.service.retry
    job = await once(
        lambda: in_thread(retry, str(job_id), caller, parameters=parameters, dead_letter=True, key=key)
    )
    return replayed(accepted(request, job), job)


@router.post(
    "/dead-letters/retry",
    status_code=202,
    response_model=BulkView,
    operation_id="retryDeadLetters",
    responses={
        200: {"model": BulkView, "description": "What would be retried: `dry_run`."},
        **problems(400, 413, 415),
    },
)
@access(RateClass.BATCH, Role.OPERATOR)
async def retry_dead_letters(
    request: Request,
    how: RetryManyRequest,
    caller: CallerDep,
    service: ServiceDep,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Retry the tenant's dead letters that match, oldest first, at most 10,000 a call.

    What was done before a failure stays done: the same call again goes on with the rest. So does one that
    answers `remaining`.
    """
    key = key_of(request, caller, "retryDeadLetters", await request.body())

    def retry() -> dict[str, Any]:
        wanted = how.filter.filter
        return _view(
            dead_letters.retry_all(
                service, caller, wanted, rate=how.rate, limit=how.limit, dry_run=how.dry_run
            )
        )

    if how.dry_run:
        return as_json(await in_thread(retry))
    done = await in_thread(idempotency.around, service.database, key, retry, now=service.clock.now())
    where = link_to(request, "/api/v1/dead-letters")
    headers = {"Location": where, "Retry-After": str(POLL_HINT_SECONDS)}
    return replayed(as_json(done, 202, headers), done)


@router.delete(
    "/dead-letters/{job_id}",
    status_code=204,
    operation_id="deleteDeadLetter",
    responses=problems(404, 409),
)
@access(RateClass.DEFAULT, Role.OPERATOR)
async def delete_dead_letter(job_id: UUID, caller: CallerDep, service: ServiceDep) -> Response:
    """Delete a dead letter with its events and webhooks; 409 while a webhook is still to be delivered."""
    await in_thread(dead_letters.delete, service, str(job_id), caller)
    return Response(status_code=204)


@router.post(
    "/dead-letters/purge",
    response_model=BulkView,
    operation_id="purgeDeadLetters",
    responses=problems(400, 413, 415),
)
@access(RateClass.BATCH, Role.OPERATOR)
async def purge_dead_letters(how: PurgeRequest, caller: CallerDep, service: ServiceDep) -> Response:
    """Delete the tenant's dead letters that match, oldest first, at most 10,000 a call."""
    done = await in_thread(
        dead_letters.purge, service, caller, how.filter.filter, limit=how.limit, dry_run=how.dry_run
    )
    return as_json(_view(done))


def _view(done: Bulk) -> dict[str, Any]:
    return asdict(done) | {"last_due_at": stamp(done.last_due_at)}
