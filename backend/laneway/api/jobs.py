"""Jobs over HTTP: make, look, wait, cancel."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Header, Query, Request
from fastapi.exceptions import RequestValidationError
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field
from starlette.responses import Response

from laneway.api.gate import GatedRoute, access
from laneway.api.runtime import CallerDep, Runtime, RuntimeDep, in_thread
from laneway.api.schemas import JobPage, JobStatusView, JobView, ResultView, problems
from laneway.domain.spec import JobSpec, Priority
from laneway.domain.states import FINAL, JobStatus
from laneway.engine.callers import Caller
from laneway.engine.queries import JobFilter
from laneway.limits.rules import RateClass

LONGEST_WAIT_SECONDS = 30
POLL_HINT_SECONDS = 1
MAX_PAGE = 200

_ALIASES = {"pending": JobStatus.QUEUED, "processing": JobStatus.RUNNING, "success": JobStatus.COMPLETED}
_WAIT = re.compile(r"(?:^|,)\s*wait\s*=\s*\"?(\d{1,6})\"?\s*(?:,|;|$)", re.IGNORECASE)
_STATUS_FIELDS = tuple(JobStatusView.model_fields)

router = APIRouter(route_class=GatedRoute, tags=["jobs"])


def as_json(
    content: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """A response without a second validation: the engine's views are JSON already."""
    body = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    return Response(body, status, dict(headers or {}), media_type="application/json")


def wait_asked(prefer: str | None) -> int:
    """Seconds of a `Prefer: wait=N` (RFC 7240), at most 30; 0 when not asked for."""
    found = _WAIT.search(prefer or "")
    return min(int(found[1]), LONGEST_WAIT_SECONDS) if found else 0


def accepted(request: Request, job: dict[str, Any]) -> Response:
    """202 with where to look, and when."""
    where = f"{request.scope.get('root_path', '')}/api/v1/jobs/{job['id']}"
    return as_json(job, 202, {"Location": where, "Retry-After": str(POLL_HINT_SECONDS)})


@router.post(
    "/jobs",
    status_code=202,
    response_model=JobView,
    operation_id="createJob",
    responses={
        200: {"model": JobView, "description": "It ended within `Prefer: wait`."},
        **problems(400, 409, 413, 415),
    },
)
@access(RateClass.QUEUE)
async def create_job(
    request: Request,
    spec: JobSpec,
    caller: CallerDep,
    runtime: RuntimeDep,
    prefer: Annotated[str | None, Header()] = None,
) -> Response:
    """Queue a job. A 202 means that it is committed and will end in a final status."""
    prepared = runtime.service.prepare(spec, caller)
    seconds = wait_asked(prefer)
    if not seconds:
        return accepted(request, await runtime.new_jobs.add(prepared))
    with runtime.streams.open(caller), runtime.hub.watch(prepared.row.id):
        job = await runtime.new_jobs.add(prepared)
        ended = await _wait_for_end(runtime, caller, job["id"], seconds)
    if ended is None:
        return accepted(request, job)
    return as_json(ended, 200, {"Preference-Applied": f"wait={seconds}"})


@router.get("/jobs", response_model=JobPage, operation_id="listJobs", responses=problems(400))
@access(RateClass.DEFAULT)
async def list_jobs(
    request: Request,
    caller: CallerDep,
    runtime: RuntimeDep,
    status: Annotated[list[str] | None, Query(description="Repeatable.")] = None,
    job_type: str | None = None,
    queue: str | None = None,
    priority: Priority | None = None,
    created_after: AwareDatetime | None = None,
    created_before: AwareDatetime | None = None,
    scope: Annotated[str, Query(pattern="^(mine|tenant)$")] = "tenant",
    cursor: Annotated[str | None, Query(max_length=500)] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 50,
) -> Response:
    """Jobs, newest first. A user sees its own; operators and admins see their tenant's."""
    wanted = JobFilter(
        tuple(_status(text) for text in status or ()),
        job_type,
        queue,
        priority,
        created_after,
        created_before,
    )
    page, following = await in_thread(
        runtime.service.page, caller, wanted, limit=limit, cursor=cursor, mine=scope == "mine"
    )
    headers = {}
    if following:
        headers["Link"] = f'<{request.url.include_query_params(cursor=following)}>; rel="next"'
    return as_json({"data": page, "next_cursor": following, "has_more": following is not None}, 200, headers)


def _status(text: str) -> JobStatus:
    try:
        return _ALIASES.get(text) or JobStatus(text)
    except ValueError:
        message = f"not a status; one of {', '.join(JobStatus)}"
        raise RequestValidationError([{"loc": ("query", "status"), "msg": message, "type": "enum"}]) from None


@router.get("/jobs/{job_id}", response_model=JobView, operation_id="getJob", responses=problems(404))
@access(RateClass.DEFAULT)
async def get_job(
    job_id: UUID,
    caller: CallerDep,
    runtime: RuntimeDep,
    prefer: Annotated[str | None, Header()] = None,
    if_none_match: Annotated[str | None, Header()] = None,
) -> Response:
    """The whole job. With `If-None-Match` 304 while unchanged; with `Prefer: wait=N` too, a long poll."""
    return await _read(runtime, caller, str(job_id), prefer, if_none_match, fields=None)


@router.get(
    "/jobs/{job_id}/status",
    response_model=JobStatusView,
    operation_id="getJobStatus",
    responses=problems(404),
)
@access(RateClass.DEFAULT)
async def get_job_status(
    job_id: UUID,
    caller: CallerDep,
    runtime: RuntimeDep,
    prefer: Annotated[str | None, Header()] = None,
    if_none_match: Annotated[str | None, Header()] = None,
) -> Response:
    """Where the job is, without its parameters and result."""
    return await _read(runtime, caller, str(job_id), prefer, if_none_match, fields=_STATUS_FIELDS)


async def _read(
    runtime: Runtime,
    caller: Caller,
    job_id: str,
    prefer: str | None,
    if_none_match: str | None,
    *,
    fields: tuple[str, ...] | None,
) -> Response:
    known = {tag.strip().removeprefix("W/").strip('"') for tag in (if_none_match or "").split(",")}
    seconds = wait_asked(prefer)
    deadline = time.monotonic() + seconds
    headers = {"Cache-Control": "private, no-cache"}
    if seconds:
        headers["Preference-Applied"] = f"wait={seconds}"
    with runtime.hub.watch(job_id) as watch:
        while True:
            job, version = await in_thread(runtime.service.get_versioned, job_id, caller)
            settled = str(version) not in known if if_none_match else job["status"] in FINAL
            left = deadline - time.monotonic()
            if settled or left <= 0:
                break
            await watch.changed(left)
    headers["ETag"] = f'"{version}"'
    if str(version) in known:
        return Response(status_code=304, headers=headers)
    return as_json(job if fields is None else {name: job[name] for name in fields}, 200, headers)


async def _wait_for_end(
    runtime: Runtime, caller: Caller, job_id: str, seconds: float
) -> dict[str, Any] | None:
    deadline = time.monotonic() + seconds
    with runtime.hub.watch(job_id) as watch:
        while True:
            job = await in_thread(runtime.service.get, job_id, caller)
            if job["status"] in FINAL:
                return job
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            await watch.changed(left)


@router.get(
    "/jobs/{job_id}/result",
    response_model=ResultView,
    operation_id="getJobResult",
    responses=problems(404, 409),
)
@access(RateClass.DEFAULT)
async def get_job_result(job_id: UUID, caller: CallerDep, runtime: RuntimeDep) -> Response:
    """What an ended job returned, or why it failed. 409 `not_finished` before."""
    return as_json(await in_thread(runtime.service.result, str(job_id), caller))


class CancelRequest(BaseModel):
    """How to stop a job."""

    model_config = ConfigDict(extra="forbid")

    reason: Annotated[str, Field(max_length=200)] | None = None
    terminate: bool = Field(False, description="Kill a running handler at once.")
    grace_seconds: Annotated[float, Field(ge=0, le=3600, allow_inf_nan=False)] | None = Field(
        None, description="What a running handler gets to stop by itself before it is killed."
    )


@router.post(
    "/jobs/{job_id}/cancel",
    response_model=JobView,
    operation_id="cancelJob",
    responses={
        202: {"model": JobView, "description": "It runs, and was asked to stop."},
        **problems(400, 404, 409, 413, 415),
    },
)
@access(RateClass.DEFAULT)
async def cancel_job(
    request: Request, job_id: UUID, caller: CallerDep, runtime: RuntimeDep, how: CancelRequest | None = None
) -> Response:
    """Cancel a job: 200 when it is cancelled, 202 when it runs and was asked to stop, 409 when it has ended."""
    how = how or CancelRequest()
    answer = await in_thread(
        runtime.service.cancel,
        str(job_id),
        caller,
        reason=how.reason,
        terminate=how.terminate,
        grace_seconds=how.grace_seconds,
    )
    return as_json(answer.job) if answer.done else accepted(request, answer.job)
