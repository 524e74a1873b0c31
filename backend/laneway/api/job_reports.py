"""Reports of HTTP jobs: the target that answered 202 says how far the work is, and how it ended.

They are authorised by the token that came with the call, in `Laneway-Job-Token`, and by nothing else.
"""

from __future__ import annotations

from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from laneway.api.gate import GatedRoute, access
from laneway.api.jobs import as_json
from laneway.api.runtime import CallerDep, RuntimeDep, in_thread
from laneway.api.schemas import JobStatusView, problems
from laneway.domain.payload import check_storable, to_json
from laneway.domain.spec import MAX_SECONDS
from laneway.engine import job_reports
from laneway.engine.context import MAX_DETAILS_BYTES, MAX_MESSAGE, Progress
from laneway.engine.endings import MAX_ERROR_MESSAGE, Raised, Returned
from laneway.limits.rules import RateClass

JOB_TOKEN_SCHEME = "job_token"  # noqa: S105 - a name in the document

_FIELDS = tuple(JobStatusView.model_fields)
_HOW: dict[str, Any] = {
    "response_model": JobStatusView,
    "responses": problems(404, 409),
    "openapi_extra": {"security": [{JOB_TOKEN_SCHEME: []}]},
}

router = APIRouter(route_class=GatedRoute, tags=["jobs"])


class ProgressReport(BaseModel):
    """How far the work is."""

    model_config = ConfigDict(extra="forbid")

    percent: Annotated[int, Field(ge=0, le=100)] = Field(description="It never falls within an attempt.")
    message: Annotated[str, Field(max_length=MAX_MESSAGE)] | None = None
    details: dict[str, Any] | None = Field(None, description="At most 8 KiB of JSON.")


class CompleteReport(BaseModel):
    """What came of it."""

    model_config = ConfigDict(extra="forbid")

    result: Any = Field(None, description="The job's result: at most 256 KiB of JSON.")


class FailReport(BaseModel):
    """Why the attempt failed."""

    model_config = ConfigDict(extra="forbid")

    message: Annotated[str, Field(max_length=MAX_ERROR_MESSAGE)] = "the target reported a failure"
    permanent: bool = Field(False, description="No further attempt would help.")
    retry_after_seconds: Annotated[float, Field(ge=0, le=MAX_SECONDS, allow_inf_nan=False)] | None = Field(
        None, description="The wait before the next attempt, in place of the job's own."
    )


@router.post("/jobs/{job_id}/progress", operation_id="reportJobProgress", **_HOW)
@access(RateClass.DEFAULT)
async def report_progress(
    job_id: UUID, report: ProgressReport, caller: CallerDep, runtime: RuntimeDep
) -> Response:
    """Say how far an HTTP job is. `cancelling` in the answer: somebody wants it to stop.

    409 once the attempt of the token is over: stop working.
    """
    check_storable(report.message, what="message")
    details = to_json(report.details, what="details", max_bytes=MAX_DETAILS_BYTES) if report.details else None
    news = Progress(report.percent, report.message, details)
    return _answer(await in_thread(job_reports.report_progress, runtime.service, caller, news))


@router.post("/jobs/{job_id}/complete", operation_id="reportJobComplete", **_HOW)
@access(RateClass.DEFAULT)
async def report_complete(
    job_id: UUID, report: CompleteReport, caller: CallerDep, runtime: RuntimeDep
) -> Response:
    """Complete an HTTP job. 409 once the attempt of the token is over: the first end counts."""
    result = None if report.result is None else to_json(report.result, what="result")
    return _answer(await in_thread(job_reports.report_end, runtime.service, caller, Returned(result)))


@router.post("/jobs/{job_id}/fail", operation_id="reportJobFailure", **_HOW)
@access(RateClass.DEFAULT)
async def report_failure(
    job_id: UUID, report: FailReport, caller: CallerDep, runtime: RuntimeDep
) -> Response:
    """Fail the attempt of an HTTP job: another follows while retries are left, unless it is `permanent`.

    409 once the attempt of the token is over.
    """
    check_storable(report.message, what="message")
    ending = Raised(
        "ReportedFailure",
        report.message,
        permanent=report.permanent,
        in_seconds=report.retry_after_seconds,
    )
    return _answer(await in_thread(job_reports.report_end, runtime.service, caller, ending))


def _answer(job: dict[str, Any]) -> Response:
    return as_json({name: job[name] for name in _FIELDS})
