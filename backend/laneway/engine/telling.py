"""What is told of jobs: webhook messages, written in the transaction that changes the job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from laneway import models
from laneway.domain.events import DEFAULT_WEBHOOK_EVENTS, EVENT_OF, EventType
from laneway.domain.states import FINAL, JobStatus
from laneway.engine.queries import view
from laneway.engine.transitions import Applied
from laneway.webhooks.messages import Target, Told, message_id, record, supersede_progress
from laneway.webhooks.subscriptions import Subscribers, subscribers

PROGRESS = EventType.JOB_PROGRESS


def tell(connection: sa.Connection, applied: Sequence[Applied], *, now: datetime) -> set[str]:
    """Write the messages about these moves; the ids of the jobs that somebody hears of."""
    moved = {a.row["id"]: a for a in applied if a.status in EVENT_OF}
    if not moved:
        return set()
    listening = subscribers(connection, {a.row["tenant_id"] for a in moved.values()})
    heard = [i for i, a in moved.items() if a.row["webhook_url"] or a.row["tenant_id"] in listening]
    if not heard:
        return set()
    rows = connection.execute(sa.select(models.jobs).where(models.jobs.c.id.in_(heard))).mappings().all()
    told = [
        message
        for row in rows
        for event in _events(moved[row["id"]].status, row)
        if (message := about(event, row, listening, happening=moved[row["id"]].row["event_seq"]))
    ]
    record(connection, told, now=now)
    ended = [row for row in rows if moved[row["id"]].status in FINAL]
    overtaken = [row["id"] for row in ended if _targets(PROGRESS, row, listening)]
    if overtaken:
        supersede_progress(connection, overtaken, now=now)
    return {message.job_id for message in told if message.job_id}


def about(event: EventType, row: Mapping[Any, Any], listening: Subscribers, *, happening: int) -> Told | None:
    """The message about a job, or None when nobody wants it. `happening` numbers it within the job."""
    targets = _targets(event, row, listening)
    if not targets:
        return None
    return Told(
        id=message_id(row["id"], happening, event),
        tenant_id=row["tenant_id"],
        event_type=event.value,
        data=webhook_data(row),
        created_by=row["created_by"],
        targets=targets,
        job_id=row["id"],
        job_seq=None if event is PROGRESS else happening,
    )


def _events(status: JobStatus, row: Mapping[Any, Any]) -> list[EventType]:
    return [EVENT_OF[status]] + ([EventType.JOB_DEAD_LETTERED] if row["dead_letter_reason"] else [])


def _targets(event: EventType, row: Mapping[Any, Any], listening: Subscribers) -> list[Target]:
    tenant_id = row["tenant_id"]
    targets = [Target.endpoint(each) for each in listening.get(tenant_id, ()) if each.wants(event, row)]
    if row["webhook_url"] and event in (row["webhook_events"] or DEFAULT_WEBHOOK_EVENTS):
        targets.append(Target.own(tenant_id, row["webhook_url"]))
    return targets


def webhook_data(row: Mapping[Any, Any]) -> dict[str, Any]:
    """What a receiver learns of a job: its answer from `GET /jobs/{id}`, without parameters and traceback."""
    data = view(row)
    job_id = data.pop("id")
    for name in ("parameters", "webhook_delivered", "webhook_attempts", "cancelling", "worker"):
        data.pop(name)
    if data["error"]:
        data["error"] = data["error"] | {"traceback": None}
    return {"job_id": job_id, **data}
