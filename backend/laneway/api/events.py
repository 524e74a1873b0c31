"""Following a job by server-sent events (WHATWG HTML, section 9.2)."""

from __future__ import annotations

import json
import re
import time
from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Header
from starlette.responses import Response, StreamingResponse

from laneway.api.gate import GatedRoute, access
from laneway.api.runtime import CallerDep, Runtime, RuntimeDep, in_thread
from laneway.api.schemas import problems
from laneway.domain.states import FINAL, JobStatus
from laneway.engine.callers import Caller
from laneway.engine.queries import stamp
from laneway.limits.rules import RateClass

STREAM_SECONDS = 15 * 60
PING_SECONDS = 15.0

router = APIRouter(route_class=GatedRoute, tags=["jobs"])


@router.get(
    "/jobs/{job_id}/events",
    operation_id="streamJobEvents",
    response_class=Response,
    responses={
        200: {
            "description": "Server-sent events",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        },
        204: {"description": "The job has ended and all its events were seen: stop reconnecting."},
        **problems(404),
    },
)
@access(RateClass.STREAM)
async def stream_job_events(
    job_id: UUID,
    caller: CallerDep,
    runtime: RuntimeDep,
    last_event_id: Annotated[str | None, Header()] = None,
) -> Response:
    """Follow a job: its events so far, then each one as it happens, until the final one."""
    seen = int(found[0]) if (found := re.match(r"\d{1,9}", last_event_id or "")) else 0
    job = await in_thread(runtime.service.get, str(job_id), caller)
    events = await in_thread(runtime.service.events, str(job_id), caller, after=seen)
    if job["status"] in FINAL and not events:
        return Response(status_code=204)
    place = runtime.streams.open(caller)
    place.__enter__()  # refused before the answer starts, held until the stream ends

    async def follow() -> AsyncIterator[bytes]:
        try:
            async for frame in _frames(runtime, caller, str(job_id), seen):
                yield frame
        finally:
            place.__exit__(None, None, None)

    return StreamingResponse(follow(), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})


async def _frames(runtime: Runtime, caller: Caller, job_id: str, seen: int) -> AsyncIterator[bytes]:
    until = time.monotonic() + STREAM_SECONDS
    last_progress: tuple[Any, ...] | None = None
    spoke_at = time.monotonic()
    yield b"retry: 2000\n\n"
    with runtime.hub.watch(job_id) as watch:
        while time.monotonic() < until:
            job = await in_thread(runtime.service.get, job_id, caller)
            for event in await in_thread(runtime.service.events, job_id, caller, after=seen):
                seen = event["seq"]
                yield _frame(str(seen), f"job.{event['status']}", _news(job, event))
                spoke_at = time.monotonic()
            if job["status"] in FINAL and seen:
                return
            progress = (job["attempt"], job["progress"], job["progress_message"])
            if job["status"] == JobStatus.RUNNING and job["progress"] and progress != last_progress:
                last_progress = progress
                yield _frame(f"{seen}.{job['progress']}", "job.progress", _news(job, None))
                spoke_at = time.monotonic()
            elif time.monotonic() - spoke_at > PING_SECONDS:
                yield b": ping\n\n"
                spoke_at = time.monotonic()
            await watch.changed(PING_SECONDS)


def _news(job: dict[str, Any], event: Mapping[str, Any] | None) -> dict[str, Any]:
    """What an event tells: where the job is; a final one also how it ended."""
    names = ("id", "job_type", "status", "attempt", "progress", "progress_message", "progress_details")
    news = {name: job[name] for name in names}
    if event is not None:
        news |= {"status": event["status"], "attempt": event["attempt"], "at": stamp(event["at"])}
        if event["status"] in FINAL:
            news |= {name: job[name] for name in ("result", "error", "finished_at")}
    return news


def _frame(event_id: str, event: str, data: dict[str, Any]) -> bytes:
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"id: {event_id}\nevent: {event}\ndata: {text}\n\n".encode("utf-8", "replace")
