"""The outbox: what an event has to tell, written in the transaction that makes it happen.

Either both are committed or neither is, so no end of a job goes untold whatever dies next; after the
commit a courier has it. The id is derived from what happened, so that writing the same event a second
time changes nothing.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from laneway.clock import new_id
from laneway.domain.events import EventType
from laneway.models import jobs, webhook_deliveries, webhook_messages
from laneway.webhooks.health import target_of
from laneway.webhooks.retries import QUICK_SECONDS, STANDARD_SECONDS, DeliveryStatus
from laneway.webhooks.subscriptions import Subscriber

WAKE_CHANNEL = "laneway:courier"
"""Publish anything here after the commit, best effort: couriers that slept look for work."""

TEST = "test"  # this trigger reaches paused endpoints and blocked targets: somebody wants to know
MAX_PAYLOAD_BYTES = 256 * 1024

d = webhook_deliveries.c


GIVE_UP_AFTER = timedelta(hours=72)  # beyond its schedule: how long pauses may hold a delivery up
PROGRESS_TTL = timedelta(seconds=60)
PROGRESS_SCHEDULE = (5.0,)


@dataclass(frozen=True, slots=True)
class Target:
    """Where a message goes: an endpoint, or a job's own `webhook_url` in its canonical spelling."""

    id: str  # whose health counts (webhooks/health.py)
    url: str
    retry_schedule: Sequence[float]
    endpoint_id: str | None = None
    skipped: bool = False  # the endpoint is disabled: noted for a replay, not sent
    channel: str = "webhook"

    @classmethod
    def own(cls, tenant_id: str, url: str) -> Target:
        """A job's own URL."""
        return cls(target_of(tenant_id, url), url, QUICK_SECONDS)

    @classmethod
    def endpoint(cls, subscriber: Subscriber) -> Target:
        return cls(
            subscriber.id,
            subscriber.url,
            subscriber.retry_schedule,
            subscriber.id,
            skipped=subscriber.status == "disabled",
        )

    @classmethod
    def notified(cls, tenant_id: str, address: str) -> Target:
        """A channel of the operator's, as `notify.rules` addresses it: `kind:name`."""
        kind = address.partition(":")[0]
        return cls(target_of(tenant_id, address), address, STANDARD_SECONDS, channel=kind)


@dataclass(frozen=True, slots=True)
class Told:
    """Something that happened, and whom it is told. `data` is the payload's, ready for JSON.

    Its `result`, when it has one, may be of any size, the rest is taken to be small. What is told of a
    job names the transition: `job_seq` is its `job_events.seq`, None for progress.
    """

    id: str
    tenant_id: str
    event_type: str
    data: dict[str, Any]
    created_by: str
    targets: Sequence[Target]
    job_id: str | None = None
    job_seq: int | None = None


def record(connection: sa.Connection, told: Sequence[Told], *, now: datetime, trigger: str = "auto") -> int:
    """How many messages are new: each is written with the deliveries that will carry it.

    Runs inside the caller's transaction. What was recorded before is passed over.
    """
    messages: list[dict[str, Any]] = []
    deliveries: list[dict[str, Any]] = []
    for each in told:
        if not each.targets:
            continue
        owned = {"tenant_id": each.tenant_id, "created_by": each.created_by, "job_id": each.job_id}
        messages.append(
            owned
            | {
                "id": each.id,
                "job_seq": each.job_seq,
                "event_type": each.event_type,
                "payload": payload(each.event_type, each.data, at=now),
                "created_at": now,
            }
        )
        deliveries += [
            owned | _delivery(each, target, now=now) | {"trigger": trigger} for target in each.targets
        ]
    if not messages:
        return 0
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    new = connection.execute(
        insert(webhook_messages).on_conflict_do_nothing(),
        messages,
        execution_options={"preserve_rowcount": True},
    )
    connection.execute(insert(webhook_deliveries).on_conflict_do_nothing(), deliveries)
    return new.rowcount


def _delivery(told: Told, target: Target, *, now: datetime) -> dict[str, Any]:
    schedule = list(target.retry_schedule)
    give_up_at = now + timedelta(seconds=sum(schedule)) + GIVE_UP_AFTER
    if told.event_type == EventType.JOB_PROGRESS:
        schedule, give_up_at = list(PROGRESS_SCHEDULE), now + PROGRESS_TTL
    return {
        "id": new_id(),
        "message_id": told.id,
        "endpoint_id": target.endpoint_id,
        "target_id": target.id,
        "channel": target.channel,
        "url": target.url,
        "status": (DeliveryStatus.SKIPPED if target.skipped else DeliveryStatus.PENDING).value,
        "max_attempts": len(schedule) + 1,
        "retry_schedule": schedule,
        "next_at": now,
        "give_up_at": give_up_at,
        "created_at": now,
    }


def supersede_progress(connection: sa.Connection, job_ids: Collection[str], *, now: datetime) -> None:
    """Progress that still waits to be told is not: the job has ended, or got further."""
    m = webhook_messages.c
    of_progress = sa.select(m.id).where(m.job_id.in_(job_ids), m.event_type == EventType.JOB_PROGRESS)
    connection.execute(
        sa.update(webhook_deliveries)
        .where(
            d.job_id.in_(job_ids),
            d.status.in_((DeliveryStatus.PENDING, DeliveryStatus.RETRYING)),
            d.message_id.in_(of_progress),
        )
        .values(_superseded(now))
    )


def supersede_overtaken(connection: sa.Connection, delivery_ids: Collection[str], *, now: datetime) -> None:
    """Of failed attempts to tell progress: those are not tried again whose job got further meanwhile.

    A job whose row somebody else has locked is ending, or got further, at this moment.
    """
    job, told, newer = jobs.c, webhook_messages.alias("told"), webhook_messages.alias("newer")
    about = sa.select(d.job_id).where(d.id.in_(delivery_ids))
    running = sa.select(job.id).where(job.id.in_(about), job.finished_at.is_(None))
    free = connection.execute(running.with_for_update(skip_locked=True)).scalars().all()
    further = sa.exists().where(
        told.c.id == d.message_id,
        newer.c.job_id == d.job_id,
        newer.c.event_type == EventType.JOB_PROGRESS,
        newer.c.created_at > told.c.created_at,
    )
    connection.execute(
        sa.update(webhook_deliveries)
        .where(
            d.id.in_(delivery_ids),
            d.status == DeliveryStatus.RETRYING,
            sa.or_(d.job_id.not_in(free), further),
        )
        .values(_superseded(now))
    )


def _superseded(now: datetime) -> dict[str, Any]:
    return {"status": DeliveryStatus.SUPERSEDED.value, "version": d.version + 1, "updated_at": now}


def message_id(subject: str, happening: int | str, event_type: str) -> str:
    """`msg_` and 26 characters: the same for the same happening of the same subject, and without a dot."""
    digest = hashlib.sha256(f"{subject}|{happening}|{event_type}".encode()).digest()
    return "msg_" + base64.b32encode(digest).decode("ascii")[:26].lower()


def payload(event_type: str, data: dict[str, Any], *, at: datetime) -> bytes:
    """The bytes that are stored, signed and sent: `{"type", "timestamp", "data"}`, the time in UTC.

    Past 256 KiB the `result` is replaced by null and `result_truncated` is true; the job has it.
    """
    body = _encode(event_type, data, at)
    if len(body) > MAX_PAYLOAD_BYTES:
        body = _encode(event_type, {**data, "result": None, "result_truncated": True}, at)
    return body


def _encode(event_type: str, data: dict[str, Any], at: datetime) -> bytes:
    timestamp = at.astimezone(UTC).isoformat(timespec="microseconds").removesuffix("+00:00") + "Z"
    envelope = {"type": event_type, "timestamp": timestamp, "data": data}
    # "replace": a lone surrogate in a message must not keep a job from ending.
    return json.dumps(envelope, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
