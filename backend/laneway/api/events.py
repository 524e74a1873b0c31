"""Following one job, or all of a tenant's, by server-sent events (WHATWG HTML, section 9.2)."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator
from enum import StrEnum
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Depends, Header, Query
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import RowMapping
from starlette.responses import Response, StreamingResponse

from laneway.api.gate import GatedRoute, access
from laneway.api.hub import Step
from laneway.api.runtime import CallerDep, Runtime, RuntimeDep, in_thread
from laneway.api.schemas import problems
from laneway.domain.states import FINAL, JobStatus
from laneway.engine import happenings
from laneway.engine.access.callers import Caller
from laneway.engine.changes import CHANGE
from laneway.engine.happenings import Happened, Place
from laneway.engine.queries import stamp
from laneway.engine.service import Following, scope_of
from laneway.errors import LanewayError
from laneway.limits.rules import RateClass

STREAM_SECONDS = 15 * 60
PING_SECONDS = 15.0
RECONNECT_MS = 2000
RETRY = b"retry: %d\n\n" % RECONNECT_MS
LOOK_SECONDS = 0.1  # between looks at all of a tenant's events

router = APIRouter(route_class=GatedRoute, tags=["jobs"])


async def stream_place(caller: CallerDep, runtime: RuntimeDep) -> AsyncIterator[None]:
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
    dependencies=[Depends(stream_place)],
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
    yield RETRY
    with runtime.hub.watch(job_id) as watch:
        while time.monotonic() < until and not runtime.leaving.closing:
            try:
                now = await in_thread(runtime.service.follow, job_id, caller, after=seen)
            except LanewayError:
                return  # the database or the job is gone: the client comes back and is told so
            frames = []
            for event in now.events:
                seen = event["seq"]
                frames.append(sse_frame(str(seen), _name_of(event), _news_of(event, now)))
            job = now.job
            progress = (job["attempt"], job["progress"], job["progress_message"])
            newer = progress != last_progress and progress[:2] >= (last_progress or (0, 0))[:2]
            if job["status"] == JobStatus.RUNNING and job["progress"] and newer:
                last_progress = progress
                frames.append(sse_frame(f"{seen}.{job['progress']}", "job.progress", _news(job)))
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
                    yield sse_frame(f"{seen}.{step.percent}", "job.progress", _news(job))
                    spoke_at = time.monotonic()


class StreamEvent(StrEnum):
    """What a stream tells of: the status that a job has now, or what else became of it."""

    SCHEDULED = "job.scheduled"
    BLOCKED = "job.blocked"
    QUEUED = "job.queued"
    RUNNING = "job.running"
    RETRYING = "job.retrying"
    COMPLETED = "job.completed"
    FAILED = "job.failed"
    TIMEOUT = "job.timeout"
    CANCELLED = "job.cancelled"
    EXPIRED = "job.expired"
    CHANGED = "job.changed"
    PROGRESS = "job.progress"


class EventsQuery(BaseModel):
    """What `GET /events` may be asked."""

    model_config = ConfigDict(extra="forbid")

    types: list[StreamEvent] = Field([], description="Only these events. Repeatable; none: all.")


@router.get(
    "/events",
    operation_id="streamEvents",
    response_class=Response,
    responses={
        200: {
            "description": "Server-sent events",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        },
        **problems(400),
    },
    dependencies=[Depends(stream_place)],
)
@access(RateClass.STREAM)
async def stream_events(
    caller: CallerDep,
    runtime: RuntimeDep,
    asked: Annotated[EventsQuery, Query()],
    last_event_id: Annotated[str | None, Header()] = None,
) -> Response:
    """Follow all jobs: a user its own, others their tenant's. One stream in place of one for each job.

    With `Last-Event-ID` from there, for an hour back; `reset` says that events are left out. The stream is
    closed after 15 minutes, and goes on where it was when the client comes back.
    """
    place, gap = await in_thread(_begin, runtime, caller, last_event_id or None)
    frames = _frames_of_all(runtime, caller, place, gap, frozenset(asked.types) or frozenset(StreamEvent))
    return StreamingResponse(frames, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})


async def _frames_of_all(
    runtime: Runtime, caller: Caller, place: Place, gap: bool, types: frozenset[StreamEvent]
) -> AsyncIterator[bytes]:
    spoke_at = time.monotonic()
    until = spoke_at + STREAM_SECONDS
    # An id without data is no event, and still what a client comes back with.
    yield RETRY + (sse_frame(str(place), "reset", {}) if gap else _id_frame(place))
    steps: dict[str, Step] = {}
    with runtime.hub.watch_all() as watch:
        while time.monotonic() < until and not runtime.leaving.closing:
            try:
                now, moved = await in_thread(_look, runtime, caller, place, steps)
            except LanewayError:
                return  # the database is gone: the client comes back and is told so
            told = [event for event in now.events if _name_of(event) in types]
            for event in told:
                yield sse_frame(str(happenings.place_of(event)), _name_of(event), _happening(event))
            for job in moved:
                yield sse_frame(None, StreamEvent.PROGRESS, job)
            place, steps = now.place, {}
            if told or moved:
                spoke_at = time.monotonic()
            if now.more:
                continue
            if time.monotonic() - spoke_at > PING_SECONDS:
                yield b": ping\n" + _id_frame(place)
                spoke_at = time.monotonic()
            await asyncio.sleep(LOOK_SECONDS)
            steps = await watch.changed(PING_SECONDS)
            if StreamEvent.PROGRESS not in types:
                steps = {}


def _begin(runtime: Runtime, caller: Caller, last_event_id: str | None) -> tuple[Place, bool]:
    with runtime.database.read() as connection:
        return happenings.begin(connection, scope_of(caller), last_event_id, now=runtime.clock.now())


def _look(
    runtime: Runtime, caller: Caller, place: Place, steps: dict[str, Step]
) -> tuple[Happened, list[dict[str, Any]]]:
    """What happened, and those of the steps whose jobs still run after that."""
    scope = scope_of(caller)
    with runtime.database.read() as connection:
        now = happenings.after(connection, scope, place)
        jobs = happenings.running(connection, scope, steps) if steps else ()
    moved = [
        dict(job)
        | {
            "status": JobStatus.RUNNING,
            "progress": step.percent,
            "progress_message": step.message,
            "progress_details": step.details,
        }
        for job in jobs
        if (step := steps[job["id"]]).attempt == job["attempt"]
    ]
    return now, moved


def _happening(event: RowMapping) -> dict[str, Any]:
    names = ("job_type", "queue", "title", "status", "attempt", "seq", "action", "actor", "reason")
    return {"id": event["job_id"]} | {name: event[name] for name in names} | {"at": stamp(event["at"])}


def _name_of(event: RowMapping) -> StreamEvent:
    """A change of what the job is to do leads to no other status, and is told under a name of its own."""
    return StreamEvent.CHANGED if event["action"] == CHANGE else StreamEvent(f"job.{event['status']}")


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


def sse_frame(event_id: str | None, event: str, data: dict[str, Any]) -> bytes:
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    place = "" if event_id is None else f"id: {event_id}\n"
    return f"{place}event: {event}\ndata: {text}\n\n".encode("utf-8", "replace")


def _id_frame(place: Place) -> bytes:
    return f"id: {place}\n\n".encode()
