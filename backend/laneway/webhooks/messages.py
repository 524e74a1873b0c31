"""The outbox: what a job's end has to tell, written in the transaction that ends it.

Either both are committed or neither is, so no end of a job goes untold whatever dies next; after the
commit a courier has it. The id is derived from what happened, and UNIQUE makes a second writing of the
same end change nothing.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from laneway.clock import new_id
from laneway.models import webhook_deliveries, webhook_messages
from laneway.webhooks.retries import MAX_ATTEMPTS, DeliveryStatus

WAKE_CHANNEL = "laneway:courier"
"""Publish anything here after the commit, best effort: couriers that slept look for work."""

MAX_PAYLOAD_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class EndedJob:
    """One end of one job that somebody wants to hear of.

    `url` is the canonical spelling (`guard.Target.url`). `data` is the payload's `data`, ready for JSON;
    its `result`, when it has one, may be of any size, the rest is taken to be small.
    """

    tenant_id: str
    job_id: str
    job_seq: int  # job_events.seq of the transition
    event_type: str
    url: str
    data: dict[str, Any]
    created_by: str


def record(connection: sa.Connection, ended: Sequence[EndedJob], *, now: datetime) -> int:
    """How many messages are new: each is written with the delivery that will carry it to its URL.

    Runs inside the caller's transaction. Ends that were recorded before are passed over.
    """
    if not ended:
        return 0
    messages, deliveries = [], []
    for each in ended:
        owned = {"tenant_id": each.tenant_id, "created_by": each.created_by, "job_id": each.job_id}
        identity = message_id(each.job_id, each.job_seq, each.event_type)
        messages.append(
            owned
            | {
                "id": identity,
                "job_seq": each.job_seq,
                "event_type": each.event_type,
                "payload": payload(each.event_type, each.data, at=now),
            }
        )
        deliveries.append(
            owned
            | {
                "id": new_id(),
                "message_id": identity,
                "url": each.url,
                "status": DeliveryStatus.PENDING.value,
                "max_attempts": MAX_ATTEMPTS,
                "next_at": now,
            }
        )
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    new = connection.execute(
        insert(webhook_messages).on_conflict_do_nothing(),
        messages,
        execution_options={"preserve_rowcount": True},
    )
    connection.execute(insert(webhook_deliveries).on_conflict_do_nothing(), deliveries)
    return new.rowcount


def message_id(job_id: str, job_seq: int, event_type: str) -> str:
    """`msg_` and 26 characters: the same for the same end of the same job, and without a dot."""
    digest = hashlib.sha256(f"{job_id}|{job_seq}|{event_type}".encode()).digest()
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
