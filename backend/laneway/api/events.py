"""Following a job by server-sent events (WHATWG HTML, section 9.2)."""

from __future__ import annotations

import json
import re
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Depends, Header
from sqlalchemy import RowMapping
from starlette.responses import Response, StreamingResponse

from laneway.api.gate import GatedRoute, access
from laneway.api.runtime import CallerDep, Runtime, RuntimeDep, in_thread
from laneway.api.schemas import problems
from laneway.domain.states import FINAL, JobStatus
from laneway.engine.callers import Caller
from laneway.engine.queries import stamp
from laneway.engine.service import Following
from laneway.errors import LanewayError
from laneway.limits.rules import RateClass

STREAM_SECONDS = 15 * 60
PING_SECONDS = 15.0
RECONNECT_MS = 2000

router = APIRouter(route_class=GatedRoute, tags=["jobs"])


async def _place(caller: CallerDep, runtime: RuntimeDep) -> AsyncIterator[None]:
    """One of the caller's streams, held until the answer has ended, however it ends."""
    with runtime.streams.open(caller):
        yield


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
    dependencies=[Depends(_place)],
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
    first = await in_thread(runtime.service.follow, str(job_id), caller, after=seen)
    if first.ended and not first.events:
        return Response(status_code=204)
    frames = _frames(runtime, caller, str(job_id), seen)
    return StreamingResponse(frames, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})


async def _frames(runtime: Runtime, caller: Caller, job_id: str, seen: int) -> AsyncIterator[bytes]:
    spoke_at = time.monotonic()
    until = spoke_at + STREAM_SECONDS
    last_progress: tuple[Any, ...] | None = None
    yield b"retry: %d\n\n" % RECONNECT_MS
    with runtime.hub.watch(job_id) as watch:
        while time.monotonic() < until and not runtime.leaving.closing:
            try:
                now = await in_thread(runtime.service.follow, job_id, caller, after=seen)
            except LanewayError:
                return  # the database or the job is gone: the client comes back and is told so
            frames = []
            for event in now.events:
                seen = event["seq"]
                frames.append(_frame(str(seen), f"job.{event['status']}", _news_of(event, now)))
            job = now.job
            progress = (job["attempt"], job["progress"], job["progress_message"])
            newer = progress != last_progress and progress[:2] >= (last_progress or (0, 0))[:2]
            if job["status"] == JobStatus.RUNNING and job["progress"] and newer:
                last_progress = progress
                frames.append(_frame(f"{seen}.{job['progress']}", "job.progress", _news(job)))
            if not frames and time.monotonic() - spoke_at > PING_SECONDS:
                frames.append(b": ping\n\n")
            for frame in frames:
                yield frame
                spoke_at = time.monotonic()
            if now.ended:
                return
            while (step := await watch.changed(PING_SECONDS)) is not None:
                if step.attempt == job["attempt"] and step.percent >= job["progress"]:
                    job |= {
                        "progress": step.percent,
                        "progress_message": step.message,
                        "progress_details": step.details,
                    }
                    last_progress = (step.attempt, step.percent, step.message)
                    yield _frame(f"{seen}.{step.percent}", "job.progress", _news(job))
                    spoke_at = time.monotonic()


def _news(job: dict[str, Any]) -> dict[str, Any]:
    """Where the job is."""
    names = ("id", "job_type", "status", "attempt", "progress", "progress_message", "progress_details")
    return {name: job[name] for name in names}


def _news_of(event: RowMapping, now: Following) -> dict[str, Any]:
    """What an event tells. The job's end has result and `finished_at`, an end that a retry undid neither."""
    moment = stamp(event["at"])
    news = _news(now.job) | {"status": event["status"], "attempt": event["attempt"], "at": moment}
    if event["status"] in FINAL:
        last = now.ended and event is now.events[-1]
        news["result"] = now.job["result"] if last else None
        news["error"] = now.job["error"] if last else event["error"]
        news["finished_at"] = moment if last else None
    return news


def _frame(event_id: str, event: str, data: dict[str, Any]) -> bytes:
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"id: {event_id}\nevent: {event}\ndata: {text}\n\n".encode("utf-8", "replace")
