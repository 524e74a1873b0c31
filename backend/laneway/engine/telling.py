"""What is told of jobs: webhook messages, written in the transaction that changes the job."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from laneway import models
from laneway.domain.events import DEFAULT_WEBHOOK_EVENTS, EVENT_OF, EventType, SystemEvent
from laneway.domain.states import FINAL, JobStatus
from laneway.engine.queries import view
from laneway.engine.transitions import Applied
from laneway.notify.rules import current as notifications
from laneway.webhooks.messages import Target, Told, message_id, record, supersede_progress
from laneway.webhooks.subscriptions import Subscribers, subscribers

PROGRESS = EventType.JOB_PROGRESS
LEFT_OUT = ("id", "parameters", "webhook_delivered", "webhook_attempts", "cancelling", "worker", "position")
"""The fields of a job's answer that its events have not; the id is their `job_id`."""


def tell(connection: sa.Connection, applied: Sequence[Applied], *, now: datetime) -> set[str]:
    """Write the messages about these moves; the ids of the jobs that somebody hears of."""
    moved = {a.row["id"]: a for a in applied if a.status in EVENT_OF}
    if not moved:
        return set()
    listening = subscribers(connection, {a.row["tenant_id"] for a in moved.values()})
    heard = [
        i
        for i, a in moved.items()
        if a.row["webhook_url"]
        or a.row["tenant_id"] in listening
        or notifications().concerns((EVENT_OF[a.status], EventType.JOB_DEAD_LETTERED))
    ]
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


def tell_of(
    connection: sa.Connection,
    event: SystemEvent,
    told: Sequence[tuple[Mapping[Any, Any], int | str, dict[str, Any]]],
    *,
    now: datetime,
) -> bool:
    """Write the messages about things that are no jobs; whether anybody hears of one.

    Each is a row with id, tenant_id and created_by, what tells this happening from others of it, and what
    there is to say.
    """
    listening = subscribers(connection, {row["tenant_id"] for row, _, _ in told})
    notified = notifications().addresses(event)
    messages = [
        Told(
            id=message_id(row["id"], happening, event),
            tenant_id=row["tenant_id"],
            event_type=event.value,
            data=data,
            created_by=row["created_by"],
            targets=[
                *(Target.endpoint(e) for e in listening.get(row["tenant_id"], ()) if e.wants(event)),
                *(Target.notified(row["tenant_id"], address) for address in notified),
            ],
        )
        for row, happening, data in told
    ]
    return record(connection, messages, now=now) > 0


def tell_progress(connection: sa.Connection, job_ids: Collection[str], *, now: datetime) -> bool:
    """Write the messages about how far these jobs are now; whether there are any.

    Of what a target was to hear of one job's progress only the newest waits.
    """
    rows = connection.execute(sa.select(models.jobs).where(models.jobs.c.id.in_(job_ids))).mappings().all()
    listening = subscribers(connection, {row["tenant_id"] for row in rows})
    told = [
        message
        for row in rows
        if (message := about(PROGRESS, row, listening, happening=f"version {row['version']}"))
    ]
    if told:
        supersede_progress(connection, [row["id"] for row in rows], now=now)
        record(connection, told, now=now)
    return bool(told)


def about(
    event: EventType, row: Mapping[Any, Any], listening: Subscribers, *, happening: int | str
) -> Told | None:
    """The message about a job, or None when nobody wants it.

    `happening` tells it from what else happens to the job: the number of the transition, if it is one.
    """
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
        job_seq=happening if isinstance(happening, int) else None,
    )


def _events(status: JobStatus, row: Mapping[Any, Any]) -> list[EventType]:
    return [EVENT_OF[status]] + ([EventType.JOB_DEAD_LETTERED] if row["dead_letter_reason"] else [])


def _targets(event: EventType, row: Mapping[Any, Any], listening: Subscribers) -> list[Target]:
    tenant_id = row["tenant_id"]
    targets = [Target.endpoint(each) for each in listening.get(tenant_id, ()) if each.wants(event, row)]
    if event is PROGRESS:  # no replay asks for what was overtaken long ago
        targets = [target for target in targets if not target.skipped]
    if row["webhook_url"] and event in (row["webhook_events"] or DEFAULT_WEBHOOK_EVENTS):
        targets.append(Target.own(tenant_id, row["webhook_url"]))
    notified = notifications().addresses(event, row["job_type"])
    return targets + [Target.notified(tenant_id, address) for address in notified]


def webhook_data(row: Mapping[Any, Any]) -> dict[str, Any]:
    """What a receiver learns of a job: its answer from `GET /jobs/{id}`, without parameters and traceback."""
    data = {name: value for name, value in view(row).items() if name not in LEFT_OUT}
    if data["error"]:
        data["error"] = data["error"] | {"traceback": None}
    return {"job_id": row["id"], **data}
