"""Batches over HTTP: make, look, follow, cancel, try again."""

from __future__ import annotations

import hashlib
import json
from datetime import datetime
from typing import Annotated, Any, Self
from uuid import UUID

from fastapi import APIRouter, Depends, Header, Query, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator
from starlette.responses import Response

from laneway.api import batch_body, body_gate
from laneway.api.events import stream_place
from laneway.api.following import STREAMED, follow
from laneway.api.gate import GatedRoute, access, charge_jobs
from laneway.api.idempotency import IdempotencyKey, answered, key_of, once, replayed
from laneway.api.jobs import (
    POLL_HINT_SECONDS,
    CancelRequest,
    PageQuery,
    as_json,
    by_alias,
    link_to,
    page_answer,
)
from laneway.api.runtime import CallerDep, Runtime, RuntimeDep, ServiceDep, in_thread
from laneway.api.schemas import JobPage, problems
from laneway.domain.spec import JobSpec
from laneway.domain.states import JobStatus
from laneway.engine import batches
from laneway.engine.access.callers import Caller
from laneway.engine.batches import MAX_JOBS, BatchSpec
from laneway.engine.cancels import Manner
from laneway.limits.rules import RateClass

router = APIRouter(route_class=GatedRoute, tags=["batches"])

View = dict[str, Any]


class BatchRequest(BatchSpec):
    """Many jobs. `items` are parameters of `job_type`, `jobs` are whole jobs: give one of the two."""

    items: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MAX_JOBS)] | None = None
    jobs: Annotated[list[JobSpec], Field(min_length=1, max_length=MAX_JOBS)] | None = None

    @model_validator(mode="after")
    def _has_jobs(self) -> Self:
        if (self.items is None) == (self.jobs is None):
            raise ValueError("give items or jobs")
        return self


class CallbackView(BaseModel):
    job_type: str
    job_id: str | None = Field(description="The job that the batch's last end made.")


class BatchView(BaseModel):
    """A batch. Its jobs are counted by status."""

    id: str
    tenant_id: str
    created_by: str
    status: str = Field(description="`running`, `completed`, or `failed` when not all jobs completed.")
    total: int = Field(description="Jobs that the request held.")
    enqueued: int = Field(description="Of them accepted.")
    counts: dict[JobStatus, int]
    progress_percent: Annotated[int, Field(ge=0, le=100)]
    callbacks: dict[str, CallbackView]
    created_at: datetime
    updated_at: datetime
    finished_at: datetime | None


class RejectedView(BaseModel):
    """A job that was left out."""

    index: int = Field(description="Its place in the request, from 0.")
    code: str
    detail: str
    errors: list[dict[str, str]]


class NewBatchView(BatchView):
    """A batch, and what is not in it."""

    rejected: list[RejectedView]


class RetriedBatchView(BatchView):
    """A batch, some of whose jobs are tried again."""

    retried: int


class BatchPage(BaseModel):
    data: list[BatchView]
    next_cursor: str | None
    has_more: bool


def accepted(request: Request, batch: View, status: int = 202) -> Response:
    """202 with where to look, and when."""
    where = link_to(request, f"/api/v1/batches/{batch['id']}")
    return as_json(batch, status, {"Location": where, "Retry-After": str(POLL_HINT_SECONDS)})


async def _read_and_create(request: Request, runtime: Runtime, caller: Caller) -> Response:
    """`create_batch`: the jobs are read from the text one by one."""
    body_gate.check_media_type(request)
    request_ = body_gate.bounded(request, runtime.settings.max_batch_body_bytes)
    body = await request_.body()
    digest = json.dumps(hashlib.sha256(body).hexdigest()).encode()
    key = key_of(request, caller, "createBatch", digest)
    if (first := await answered(runtime, key)) is not None:
        await charge_jobs(request, 0)
        return replayed(accepted(request, first), first)
    outline = await in_thread(batch_body.read, body)
    del body
    try:
        spec = BatchSpec.model_validate(outline.head)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        raise RequestValidationError([e | {"loc": ("body", *e["loc"])} for e in found]) from None
    draft = await in_thread(batches.check, runtime.service, spec, outline.jobs(), caller)
    await charge_jobs(request, len(draft.jobs))
    batch = await once(lambda: in_thread(batches.make, runtime.service, draft, caller, key=key))
    return replayed(accepted(request, batch), batch)


@router.post(
    "/batches",
    status_code=202,
    response_model=NewBatchView,
    operation_id="createBatch",
    responses=problems(400, 409, 413, 415),
)
@access(RateClass.BATCH, jobs=None, direct=_read_and_create, reads_body=True)
async def create_batch(
    request: Request,
    spec: BatchRequest,
    caller: CallerDep,
    runtime: RuntimeDep,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Queue up to 10,000 jobs: all of them or none, or with `on_invalid: skip` those that are valid.

    Its body may be larger than others: `LANEWAY_MAX_BATCH_BODY_BYTES`. A callback is made once all jobs have
    ended, in the transaction that ends the last; its parameters may hold `{"$result": "batch.failed"}` and
    the like: `id`, `total`, `enqueued`, and the final statuses.
    """
    return await _read_and_create(request, runtime, caller)


class BatchJobsQuery(PageQuery):
    status: list[Annotated[JobStatus, BeforeValidator(by_alias)]] = Field([], description="Repeatable.")


@router.get("/batches", response_model=BatchPage, operation_id="listBatches", responses=problems(400))
@access(RateClass.DEFAULT)
async def list_batches(
    request: Request, caller: CallerDep, service: ServiceDep, asked: Annotated[PageQuery, Query()]
) -> Response:
    """Batches, newest first. A user sees its own; others see their tenant's."""
    page, following = await in_thread(batches.page, service, caller, limit=asked.limit, cursor=asked.cursor)
    return page_answer(request, page, following)


@router.get("/batches/{batch_id}", response_model=BatchView, operation_id="getBatch", responses=problems(404))
@access(RateClass.DEFAULT)
async def get_batch(batch_id: UUID, caller: CallerDep, service: ServiceDep) -> Response:
    """The batch, its jobs counted by status."""
    return as_json(await in_thread(batches.get, service, str(batch_id), caller))


@router.get(
    "/batches/{batch_id}/jobs",
    response_model=JobPage,
    operation_id="listBatchJobs",
    responses=problems(400, 404),
)
@access(RateClass.DEFAULT)
async def list_batch_jobs(
    request: Request,
    batch_id: UUID,
    caller: CallerDep,
    service: ServiceDep,
    asked: Annotated[BatchJobsQuery, Query()],
) -> Response:
    """The batch's jobs, newest first."""
    page, following = await in_thread(
        batches.jobs,
        service,
        str(batch_id),
        caller,
        statuses=asked.status,
        limit=asked.limit,
        cursor=asked.cursor,
    )
    return page_answer(request, page, following)


@router.get(
    "/batches/{batch_id}/events",
    operation_id="streamBatchEvents",
    response_class=Response,
    responses={**STREAMED, **problems(404)},
    dependencies=[Depends(stream_place)],
)
@access(RateClass.STREAM)
async def stream_batch_events(
    batch_id: UUID,
    caller: CallerDep,
    runtime: RuntimeDep,
    last_event_id: Annotated[str | None, Header()] = None,
) -> Response:
    """Follow a batch: where it is as often as that changes, at most once a second, until all has ended."""

    def look() -> View:
        return batches.get(runtime.service, str(batch_id), caller)

    def told(view: View) -> tuple[str, ...]:
        return (view["finished_at"] or "open", *map(str, view["counts"].values()))

    return await follow(runtime, look, noun="batch", told=told, last_event_id=last_event_id)


@router.post(
    "/batches/{batch_id}/cancel",
    response_model=BatchView,
    operation_id="cancelBatch",
    responses={
        202: {"model": BatchView, "description": "Jobs of it run, and were asked to stop."},
        **problems(400, 404, 413, 415),
    },
)
@access(RateClass.BATCH)
async def cancel_batch(
    request: Request, batch_id: UUID, caller: CallerDep, runtime: RuntimeDep, how: CancelRequest | None = None
) -> Response:
    """Cancel the jobs that are still active: 200 all have ended, 202 some run and were asked to stop.

    What was done before a failure stays done: the same call again goes on with the rest.
    """
    how = how or CancelRequest()
    manner = Manner(how.reason, how.terminate, how.grace_seconds)
    batch, _ = await in_thread(batches.cancel, runtime.service, str(batch_id), caller, manner)
    return as_json(batch) if batch["finished_at"] is not None else accepted(request, batch)


@router.post(
    "/batches/{batch_id}/retry-failed",
    status_code=202,
    response_model=RetriedBatchView,
    operation_id="retryFailedOfBatch",
    responses=problems(400, 404, 409),
)
@access(RateClass.BATCH, jobs=None)
async def retry_failed_of_batch(
    request: Request,
    batch_id: UUID,
    caller: CallerDep,
    runtime: RuntimeDep,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Queue the batch's failed and timed-out jobs again: all of them, or none.

    The batch is open again; when it ends, its callbacks follow again.
    """
    key = key_of(request, caller, "retryFailedOfBatch", b"", of=batch_id)
    service, first = runtime.service, await answered(runtime, key)
    jobs = 0 if first else await in_thread(batches.count_failed, service, str(batch_id), caller)
    await charge_jobs(request, jobs)
    batch = await once(lambda: in_thread(batches.retry_failed, service, str(batch_id), caller, key=key))
    return replayed(accepted(request, batch), batch)
