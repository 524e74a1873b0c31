"""Routes of the example: ask for summaries in the words of a school, on Laneway's own operations."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from feedback_summaries import store
from laneway.api import compat, jobs, queues, scheduled_jobs
from laneway.api.gate import GatedRoute, access, charge_jobs
from laneway.api.idempotency import IdempotencyKey, key_of, once, replayed
from laneway.api.jobs import accepted, as_json
from laneway.api.runtime import CallerDep, RuntimeDep, in_thread
from laneway.api.schemas import JobView, problems
from laneway.domain.spec import JobSpec, Priority
from laneway.engine import idempotency
from laneway.engine.service import Prepared
from laneway.limits.rules import RateClass

MAX_STUDENTS = 1000

router = APIRouter(prefix="/feedback-summaries", route_class=GatedRoute, tags=["feedback summaries"])


class SummaryRequest(BaseModel):
    """How the summaries are to be made."""

    model_config = ConfigDict(extra="forbid")

    priority: Priority = Priority.NORMAL
    webhook_url: Annotated[str, Field(min_length=1, max_length=2048)] | None = None
    max_retries: Annotated[int, Field(ge=0, le=100)] = 3

    def spec(self, evaluation_id: int, student_id: int) -> JobSpec:
        """The job for one student. Its unique key makes asking twice return the active one."""
        return JobSpec(
            job_type="feedback.summary",
            parameters={"evaluation_id": evaluation_id, "student_id": student_id},
            priority=self.priority,
            webhook_url=self.webhook_url,
            max_retries=self.max_retries,
            unique_key=f"feedback.summary:{evaluation_id}:{student_id}",
            tags=(f"evaluation:{evaluation_id}", f"student:{student_id}"),
        )


class BatchRequest(SummaryRequest):
    """The same for many students: those named, or all of the evaluation."""

    student_ids: Annotated[list[int], Field(min_length=1, max_length=MAX_STUDENTS)] | None = None


class QueuedSummary(BaseModel):
    student_id: int
    id: str
    status: str


class BatchAnswer(BaseModel):
    """`total` students asked for, `enqueued` new jobs; the others had an active one already."""

    total: int
    enqueued: int
    jobs: list[QueuedSummary]


@router.post(
    "/evaluation/{evaluation_id}/student/{student_id}/queue",
    status_code=202,
    response_model=JobView,
    operation_id="queueFeedbackSummary",
    responses=problems(400, 404, 409, 413, 415),
)
@access(RateClass.QUEUE, jobs=1)
async def queue_summary(
    request: Request,
    evaluation_id: int,
    student_id: int,
    caller: CallerDep,
    runtime: RuntimeDep,
    body: SummaryRequest | None = None,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Queue the summary of one student's feedback; the active job when there is one."""
    store.comments(evaluation_id, student_id)  # 404 for what is not there
    about = (evaluation_id, student_id)
    key = key_of(request, caller, "queueFeedbackSummary", await request.body(), of=about)
    prepared = runtime.service.prepare((body or SummaryRequest()).spec(*about), caller, key=key)
    job = await once(lambda: runtime.new_jobs.add(prepared))
    return replayed(accepted(request, job), job)


@router.post(
    "/evaluation/{evaluation_id}/batch-queue",
    status_code=202,
    response_model=BatchAnswer,
    operation_id="queueFeedbackSummaries",
    responses=problems(400, 404, 413, 415),
)
@access(RateClass.BATCH, jobs=None)
async def queue_summaries(
    request: Request,
    evaluation_id: int,
    caller: CallerDep,
    runtime: RuntimeDep,
    body: BatchRequest | None = None,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Queue the summaries of an evaluation in one transaction."""
    key = key_of(request, caller, "queueFeedbackSummaries", await request.body(), of=evaluation_id)
    body = body or BatchRequest()
    students = list(dict.fromkeys(body.student_ids or store.student_ids(evaluation_id)))
    for student_id in students:
        store.comments(evaluation_id, student_id)
    prepared = [
        runtime.service.prepare(body.spec(evaluation_id, student_id), caller) for student_id in students
    ]
    await charge_jobs(request, len(prepared))

    def make() -> dict[str, Any]:
        answers = runtime.service.enqueue(prepared)
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return _answer(students, prepared, [answer for answer in answers if isinstance(answer, dict)])

    queued = await in_thread(idempotency.around, runtime.database, key, make, now=runtime.clock.now())
    return replayed(as_json(queued, 202), queued)


def _answer(students: list[int], prepared: list[Prepared], made: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "total": len(students),
        "enqueued": sum(job["id"] == p.row.id for p, job in zip(prepared, made, strict=True)),
        "jobs": [
            {"student_id": student_id, "id": job["id"], "status": job["status"]}
            for student_id, job in zip(students, made, strict=True)
        ],
    }


# Laneway's own operations, under the names of the example
router.add_api_route(
    "/jobs/{job_id}/status", jobs.get_job_status, operation_id="getFeedbackJobStatus", responses=problems(404)
)
router.add_api_route(
    "/jobs/{job_id}/cancel",
    jobs.cancel_job,
    methods=["POST"],
    operation_id="cancelFeedbackJob",
    responses=problems(400, 404, 409, 413, 415),
)
router.add_api_route(
    "/queue/stats", queues.get_queue_stats, operation_id="getFeedbackQueueStats", responses=problems()
)
router.add_api_route(
    "/queue/health", queues.get_queue_health, operation_id="getFeedbackQueueHealth", responses=problems()
)
for _route in scheduled_jobs.router.routes:
    if isinstance(_route, APIRoute):
        compat.add_alias(router, _route.path, _route, suffix="OfFeedback", tag="feedback summaries")
