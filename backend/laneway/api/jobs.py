"""Jobs over HTTP: make, look, wait, cancel."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from datetime import UTC, datetime
from typing import Annotated, Any, Literal
from urllib.parse import urlencode
from uuid import UUID

from fastapi import APIRouter, Header, Query, Request
from fastapi.exceptions import RequestValidationError
from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
)
from starlette.responses import Response

from laneway.api.gate import GatedRoute, access
from laneway.api.idempotency import IdempotencyKey, key_of, once, replayed
from laneway.api.runtime import CallerDep, Runtime, RuntimeDep, in_thread, runtime_of
from laneway.api.schemas import JobPage, JobStatusView, JobView, ResultView, problems
from laneway.domain.spec import JOB_TYPE_PATTERN, QUEUE_PATTERN, JobChange, JobSpec, Priority
from laneway.domain.states import FINAL, JobStatus
from laneway.engine import changes
from laneway.engine.access.callers import Caller, Role
from laneway.engine.queries import MAX_SEARCHED, JobFilter
from laneway.errors import JobNotFound
from laneway.limits.rules import RateClass

LONGEST_WAIT_SECONDS = 30
POLL_HINT_SECONDS = 1
MAX_PAGE = 200
MAX_SEARCH = 200  # characters of `q`
NO_NUL = r"^[^\x00]*$"

_ALIASES = {"pending": JobStatus.QUEUED, "processing": JobStatus.RUNNING, "success": JobStatus.COMPLETED}
_WAIT = re.compile(r"(?:^|,)\s*wait\s*=\s*\"?(\d{1,6})\"?\s*(?:,|;|$)", re.IGNORECASE)
_TAG = re.compile(r'"(\d{1,9})(?:\.\w+){0,2}"')
_STATUS_FIELDS = tuple(JobStatusView.model_fields)

router = APIRouter(route_class=GatedRoute, tags=["jobs"])


def as_json(
    content: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """JSON without a second validation: the engine's views are what the response models describe."""
    body = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    return Response(body, status, dict(headers or {}), media_type="application/json")


def wait_asked(prefer: str | None) -> int:
    """Seconds of a `Prefer: wait=N` (RFC 7240), at most 30; 0 when not asked for."""
    found = _WAIT.search(prefer or "")
    return min(int(found[1]), LONGEST_WAIT_SECONDS) if found else 0


def accepted(request: Request, job: dict[str, Any]) -> Response:
    """202 with where to look, and when."""
    where = link_to(request, f"/api/v1/jobs/{job['id']}")
    return as_json(job, 202, {"Location": where, "Retry-After": str(POLL_HINT_SECONDS)})


def link_to(request: Request, path: str) -> str:
    """Where clients find `path`: below the setting `public_url`, else relative to the host they asked."""
    public = runtime_of(request).settings.public_url.rstrip("/")
    return f"{public or request.scope.get('root_path', '')}{path}"


def page_answer(request: Request, page: list[dict[str, Any]], following: str | None) -> Response:
    """A page of a list, and where its next one is."""
    headers = {}
    if following:
        others = [(name, value) for name, value in request.query_params.multi_items() if name != "cursor"]
        query = urlencode([*others, ("cursor", following)])
        headers["Link"] = f'<{link_to(request, request.url.path)}?{query}>; rel="next"'
    return as_json({"data": page, "next_cursor": following, "has_more": following is not None}, 200, headers)


def traced(request: Request, spec: JobSpec) -> JobSpec:
    """The spec with the request's `traceparent` in its metadata, unless that has one of its own."""
    trace = request.scope.get("laneway.traceparent")
    if trace is None or "traceparent" in spec.metadata:
        return spec
    return spec.model_copy(update={"metadata": {**spec.metadata, "traceparent": trace}})


async def _read_and_create(request: Request, runtime: Runtime, caller: Caller) -> Response:
    """`create_job` with its arguments taken from the request at the least cost."""
    try:
        spec = JobSpec.model_validate_json(await request.body())
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        raise RequestValidationError([e | {"loc": ("body", *e["loc"])} for e in found]) from None
    return await create_job(request, spec, caller, runtime, request.headers.get("prefer"), None)


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
@access(RateClass.QUEUE, jobs=1, direct=_read_and_create)
async def create_job(
    request: Request,
    spec: JobSpec,
    caller: CallerDep,
    runtime: RuntimeDep,
    prefer: Annotated[str | None, Header()] = None,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Queue a job. A 202 means that it is committed and will end in a final status."""
    key = key_of(request, caller, "createJob", await request.body())
    prepared = runtime.service.prepare(traced(request, spec), caller, key=key)
    seconds = wait_asked(prefer)
    if not seconds:
        job = await once(lambda: runtime.new_jobs.add(prepared))
        return replayed(accepted(request, job), job)
    with runtime.streams.open(caller):
        job = await once(lambda: runtime.new_jobs.add(prepared))
        ended = await _wait_for_end(runtime, caller, job["id"], seconds)
    if ended is None:
        return replayed(accepted(request, job), job)
    return replayed(as_json(ended, 200, {"Preference-Applied": f"wait={seconds}"}), job)


def by_alias(value: object) -> object:
    """A status, also under the name that other systems have for it."""
    return _ALIASES.get(value, value) if isinstance(value, str) else value


def _utc(moment: datetime) -> datetime:
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        raise ValueError("the moment is outside of the years 1 to 9999 in UTC") from None


Moment = Annotated[AwareDatetime, AfterValidator(_utc)]


class PageQuery(BaseModel):
    """Which page of a list."""

    model_config = ConfigDict(extra="forbid")

    cursor: Annotated[str, Field(max_length=100)] | None = None
    limit: Annotated[int, Field(ge=1, le=MAX_PAGE)] = 50


class JobQuery(BaseModel):
    """What `GET /jobs` may be asked. Unknown names are refused: a filter that is ignored finds too much."""

    model_config = ConfigDict(extra="forbid")

    status: list[Annotated[JobStatus, BeforeValidator(by_alias)]] = Field([], description="Repeatable.")
    job_type: Annotated[str, Field(pattern=JOB_TYPE_PATTERN, max_length=100)] | None = None
    queue: Annotated[str, Field(pattern=QUEUE_PATTERN)] | None = None
    priority: Priority | None = None
    created_after: Moment | None = None
    created_before: Moment | None = None
    tag: Annotated[str, Field(min_length=1, max_length=100, pattern=NO_NUL)] | None = Field(
        None, description="Exactly this tag."
    )
    q: Annotated[str, Field(min_length=1, max_length=MAX_SEARCH, pattern=NO_NUL)] | None = Field(
        None,
        description="Jobs whose title or one of whose tags holds this, or whose id begins with it; case does "
        f"not count. A page looks at {MAX_SEARCHED:,} jobs at most: it may be short, or empty, and still say "
        "`has_more`.",
    )
    batch_id: UUID | None = None
    chain_id: UUID | None = None
    scheduled_job_id: UUID | None = None
    scope: Literal["mine", "tenant"] = "tenant"
    cursor: Annotated[str, Field(max_length=100)] | None = None
    limit: Annotated[int, Field(ge=1, le=MAX_PAGE)] = 50

    @property
    def filter(self) -> JobFilter:
        return JobFilter(
            tuple(self.status),
            self.job_type,
            self.queue,
            self.priority,
            self.created_after,
            self.created_before,
            self.tag,
            None if self.batch_id is None else str(self.batch_id),
            None if self.chain_id is None else str(self.chain_id),
            None if self.scheduled_job_id is None else str(self.scheduled_job_id),
        )


@router.get("/jobs", response_model=JobPage, operation_id="listJobs", responses=problems(400))
@access(RateClass.DEFAULT)
async def list_jobs(
    request: Request, caller: CallerDep, runtime: RuntimeDep, asked: Annotated[JobQuery, Query()]
) -> Response:
    """Jobs, newest first. A user sees its own; operators and admins see their tenant's."""
    page, following = await in_thread(
        runtime.service.page,
        caller,
        asked.filter,
        limit=asked.limit,
        cursor=asked.cursor,
        mine=asked.scope == "mine",
        q=asked.q,
    )
    return page_answer(request, page, following)


_UNCHANGED: dict[int | str, dict[str, Any]] = {304: {"description": "As `If-None-Match` knows it."}}


@router.get(
    "/jobs/{job_id}",
    response_model=JobView,
    operation_id="getJob",
    responses={**_UNCHANGED, **problems(404)},
)
@access(RateClass.POLL)
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
    responses={**_UNCHANGED, **problems(404)},
)
@access(RateClass.POLL)
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
    known = {tag.strip().removeprefix("W/") for tag in (if_none_match or "").split(",")}
    seconds = wait_asked(prefer)
    deadline = time.monotonic() + seconds
    headers = {"Cache-Control": "private, no-cache"}
    if seconds:
        headers["Preference-Applied"] = f"wait={seconds}"
    place = runtime.streams.open(caller) if seconds else nullcontext()
    with place, runtime.hub.watch(job_id) as watch:
        while True:
            job, version = await in_thread(runtime.service.get_versioned, job_id, caller)
            tag = _tag_of(job, version)
            is_known = not known.isdisjoint((tag, "*"))
            settled = not is_known if if_none_match else job["status"] in FINAL
            left = deadline - time.monotonic()
            if settled or left <= 0 or runtime.leaving.closing:
                break
            await watch.changed(left)
    headers["ETag"] = tag
    if is_known:
        return Response(status_code=304, headers=headers)
    return as_json(job if fields is None else {name: job[name] for name in fields}, 200, headers)


def _tag_of(job: dict[str, Any], version: int) -> str:
    """The strong entity tag of an answer: the row's version, and what is told of the moment only."""
    reason = job["status_reason"] if job["status"] == JobStatus.QUEUED else None
    told = [str(each) for each in (version, reason, job["position"]) if each is not None]
    return f'"{".".join(told)}"'


def _versions_of(if_match: str) -> Callable[[int], bool]:
    """Which versions an `If-Match` takes: by strong comparison (RFC 9110 section 13.1.1)."""
    tags = [tag.strip() for tag in if_match.split(",")]
    known = {int(found[1]) for tag in tags if (found := _TAG.fullmatch(tag))}
    return lambda version: tags == ["*"] or version in known


async def _wait_for_end(
    runtime: Runtime, caller: Caller, job_id: str, seconds: float
) -> dict[str, Any] | None:
    deadline = time.monotonic() + seconds
    with runtime.hub.watch(job_id) as watch:
        while True:
            try:
                job = await in_thread(runtime.service.get, job_id, caller)
            except JobNotFound:
                return None  # a request that was sent again, about a job that is deleted
            if job["status"] in FINAL:
                return job
            left = deadline - time.monotonic()
            if left <= 0 or runtime.leaving.closing:
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


@router.patch(
    "/jobs/{job_id}",
    response_model=JobView,
    operation_id="changeJob",
    responses=problems(400, 404, 409, 412, 413, 415),
)
@access(RateClass.DEFAULT)
async def change_job(
    job_id: UUID,
    wanted: JobChange,
    caller: CallerDep,
    runtime: RuntimeDep,
    if_match: Annotated[str | None, Header(description="The `ETag` that the job must still have.")] = None,
) -> Response:
    """Change a job that waits; 409 for one that runs or has ended, 412 when `If-Match` is not its tag."""
    expected = (lambda _: True) if if_match is None else _versions_of(if_match)
    job, version = await in_thread(
        changes.change, runtime.service, str(job_id), caller, wanted, expected=expected
    )
    return as_json(job, 200, {"ETag": _tag_of(job, version), "Cache-Control": "private, no-cache"})


@router.delete("/jobs/{job_id}", status_code=204, operation_id="deleteJob", responses=problems(404, 409))
@access(RateClass.DEFAULT, Role.OPERATOR)
async def delete_job(job_id: UUID, caller: CallerDep, runtime: RuntimeDep) -> Response:
    """Delete an ended job, its history and its webhooks.

    409 while it is active, or a webhook is still to be delivered.
    """
    await in_thread(runtime.service.delete, str(job_id), caller)
    return Response(status_code=204)


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
    """Cancel a job: 200 it is cancelled, 202 it runs and was asked to stop, 409 it has ended otherwise."""
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


class RetryRequest(BaseModel):
    """What the job shall run with."""

    model_config = ConfigDict(extra="forbid")

    parameters: dict[str, Any] | None = Field(
        None, description="In place of the job's own; checked as in `POST /jobs`."
    )


@router.post(
    "/jobs/{job_id}/retry",
    status_code=202,
    response_model=JobView,
    operation_id="retryJob",
    responses=problems(400, 404, 409, 413, 415),
)
@access(RateClass.QUEUE, jobs=1)
async def retry_job(
    request: Request,
    job_id: UUID,
    caller: CallerDep,
    runtime: RuntimeDep,
    how: RetryRequest | None = None,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Queue a job again that failed, timed out, expired or was cancelled; 409 for any other.

    Its `attempt` counts on, `retry_count` starts from 0, and `expires_at` holds no more. Also 409 while an
    active job holds its unique key.
    """
    parameters = how.parameters if how else None
    key = key_of(request, caller, "retryJob", await request.body(), of=job_id)
    job = await once(
        lambda: in_thread(runtime.service.retry, str(job_id), caller, parameters=parameters, key=key)
    )
    return replayed(accepted(request, job), job)
