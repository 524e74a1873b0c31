"""Bulk replays for an endpoint that was away: rows of work that any scheduler carries on with.

A recovery walks through the tenant's messages in the order they happened, a batch a transaction, and
keeps its place in its row: whoever dies, the next one goes on from there. Replays wait behind live
messages and fall due one after the other, so that a receiver that just came back is not run over.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

import sqlalchemy as sa

from laneway.clock import new_id
from laneway.db import Database
from laneway.engine.queries import stamp
from laneway.engine.webhook_ledger import send_again
from laneway.errors import Conflict, NotFound
from laneway.models import jobs, webhook_deliveries, webhook_messages
from laneway.models import webhook_recoveries as recoveries
from laneway.webhooks.messages import GIVE_UP_AFTER
from laneway.webhooks.retries import DeliveryStatus
from laneway.webhooks.subscriptions import Subscriber, subscribers

BATCH_MESSAGES = 200
PER_SECOND = 10.0
RECOVERED = 1  # the priority: after live messages
MAX_COUNTED = 10_000

r = recoveries.c
m = webhook_messages.c
d = webhook_deliveries.c


class Mode(StrEnum):
    """Which of the endpoint's messages are sent again."""

    FAILED = "failed"  # tried in vain
    MISSING = "missing"  # never tried: skipped, cancelled, or from before the endpoint was there
    ALL = "all"  # both, and what was delivered


_MODES = {
    Mode.FAILED: {DeliveryStatus.DEAD},
    Mode.MISSING: {DeliveryStatus.SKIPPED, DeliveryStatus.CANCELLED},
    Mode.ALL: {
        DeliveryStatus.DEAD,
        DeliveryStatus.SKIPPED,
        DeliveryStatus.CANCELLED,
        DeliveryStatus.DELIVERED,
    },
}


def start(
    connection: sa.Connection,
    tenant_id: str,
    endpoint_id: str,
    *,
    mode: Mode,
    since: datetime,
    until: datetime,
    per_second: float,
    by: str,
    now: datetime,
) -> dict[str, Any]:
    """A recovery of the messages made from `since` to before `until`. Raises Conflict while one runs."""
    running = sa.select(r.id).where(r.endpoint_id == endpoint_id, r.status == "running")
    if (other := connection.execute(running).scalar()) is not None:
        raise Conflict(f"the recovery {other} of this endpoint still runs", recovery_id=other)
    recovery_id = new_id()
    connection.execute(
        sa.insert(recoveries).values(
            id=recovery_id,
            tenant_id=tenant_id,
            created_by=by,
            endpoint_id=endpoint_id,
            mode=mode.value,
            since=since,
            until=until,
            per_second=per_second,
            status="running",
            created_at=now,
            updated_at=now,
        )
    )
    return get(connection, tenant_id, recovery_id)


def count(
    connection: sa.Connection,
    tenant_id: str,
    endpoint_id: str,
    *,
    mode: Mode,
    since: datetime,
    until: datetime,
) -> int:
    """How many messages a recovery would send, counted up to 10,000. The dry run."""
    subscriber = _subscriber(connection, tenant_id, endpoint_id)
    found, place = 0, (since, "")
    while subscriber is not None and found < MAX_COUNTED:
        batch = _messages(connection, tenant_id, place, until)
        if not batch:
            break
        again, new = _choose(connection, subscriber, batch, mode)
        found += len(again) + len(new)
        place = (batch[-1]["created_at"], batch[-1]["id"])
    return min(found, MAX_COUNTED)


def get(connection: sa.Connection, tenant_id: str, recovery_id: str) -> dict[str, Any]:
    """How far it is. Raises NotFound."""
    row = (
        connection.execute(sa.select(recoveries).where(r.id == recovery_id, r.tenant_id == tenant_id))
        .mappings()
        .first()
    )
    if row is None:
        raise NotFound(f"there is no recovery {recovery_id}", recovery_id=recovery_id)
    names = ("id", "endpoint_id", "mode", "per_second", "status", "queued", "created_by")
    moments = ("since", "until", "created_at", "finished_at")
    return {name: row[name] for name in names} | {name: stamp(row[name]) for name in moments}


def sweep(database: Database, *, now: datetime) -> int:
    """Carry every running recovery on by one batch; how many deliveries were queued."""
    with database.read() as connection:
        ids = connection.execute(sa.select(r.id).where(r.status == "running").order_by(r.id)).scalars().all()
    return sum(_step(database, recovery_id, now=now) for recovery_id in ids)


def _step(database: Database, recovery_id: str, *, now: datetime) -> int:
    with database.write() as connection:
        running = sa.select(recoveries).where(r.id == recovery_id, r.status == "running")
        row = connection.execute(running.with_for_update(skip_locked=True)).mappings().first()
        if row is None:
            return 0  # another scheduler has it in hand
        subscriber = _subscriber(connection, row["tenant_id"], row["endpoint_id"])
        if subscriber is None or subscriber.status == "disabled":
            _end(connection, recovery_id, "cancelled", now=now)
            return 0
        place = (row["place_at"] or row["since"], row["place"] or "")
        batch = _messages(connection, row["tenant_id"], place, row["until"])
        if not batch:
            _end(connection, recovery_id, "done", now=now)
            return 0
        again, new = _choose(connection, subscriber, batch, Mode(row["mode"]))
        start_at = max(now, row["created_at"] + timedelta(seconds=row["queued"] / row["per_second"]))
        queued = send_again(
            connection,
            again,
            trigger="recover",
            now=start_at,
            per_second=row["per_second"],
            priority=RECOVERED,
        )
        queued += _add(
            connection, subscriber, new, row, start_at + timedelta(seconds=queued / row["per_second"])
        )
        connection.execute(
            sa.update(recoveries)
            .where(r.id == recovery_id)
            .values(
                place=batch[-1]["id"],
                place_at=batch[-1]["created_at"],
                queued=r.queued + queued,
                version=r.version + 1,
                updated_at=now,
            )
        )
        return queued


def _end(connection: sa.Connection, recovery_id: str, status: str, *, now: datetime) -> None:
    connection.execute(
        sa.update(recoveries)
        .where(r.id == recovery_id)
        .values(status=status, finished_at=now, version=r.version + 1, updated_at=now)
    )


def _subscriber(connection: sa.Connection, tenant_id: str, endpoint_id: str) -> Subscriber | None:
    them = subscribers(connection, [tenant_id]).get(tenant_id, ())
    return next((each for each in them if each.id == endpoint_id), None)


def _messages(
    connection: sa.Connection, tenant_id: str, place: tuple[datetime, str], until: datetime
) -> Sequence[sa.RowMapping]:
    at, after = place
    query = (
        sa.select(m.id, m.created_at, m.created_by, m.event_type, m.job_id)
        .where(
            m.tenant_id == tenant_id,
            sa.or_(m.created_at > at, sa.and_(m.created_at == at, m.id > after)),
            m.created_at < until,
            m.payload.is_not(None),
        )
        .order_by(m.created_at, m.id)
        .limit(BATCH_MESSAGES)
    )
    return connection.execute(query).mappings().all()


def _choose(
    connection: sa.Connection, subscriber: Subscriber, batch: Sequence[sa.RowMapping], mode: Mode
) -> tuple[list[sa.RowMapping], list[sa.RowMapping]]:
    """Of these messages: the deliveries to send again, and the messages the endpoint was never told."""
    ids = [message["id"] for message in batch]
    of_endpoint = sa.select(webhook_deliveries).where(d.message_id.in_(ids), d.target_id == subscriber.id)
    there = {row["message_id"]: row for row in connection.execute(of_endpoint).mappings()}
    again = [row for row in there.values() if DeliveryStatus(row["status"]) in _MODES[mode]]
    untold = [message for message in batch if message["id"] not in there and mode is not Mode.FAILED]
    job_ids = {message["job_id"] for message in untold if message["job_id"]}
    known = {}
    if job_ids:
        rows = connection.execute(
            sa.select(jobs.c.id, jobs.c.queue, jobs.c.job_type, jobs.c.tags).where(jobs.c.id.in_(job_ids))
        ).mappings()
        known = {row["id"]: row for row in rows}
    new = [
        message
        for message in untold
        if (message["job_id"] is None or message["job_id"] in known)
        and subscriber.wants(message["event_type"], known.get(message["job_id"]))
    ]
    return sorted(again, key=lambda row: row["id"]), new


def _add(
    connection: sa.Connection,
    subscriber: Subscriber,
    messages: Sequence[sa.RowMapping],
    recovery: sa.RowMapping,
    first_at: datetime,
) -> int:
    if not messages:
        return 0
    schedule = list(subscriber.retry_schedule)
    rows = []
    for place, message in enumerate(messages):
        due = first_at + timedelta(seconds=place / recovery["per_second"])
        rows.append(
            {
                "id": new_id(),
                "tenant_id": recovery["tenant_id"],
                "created_by": message["created_by"],
                "message_id": message["id"],
                "job_id": message["job_id"],
                "endpoint_id": subscriber.id,
                "target_id": subscriber.id,
                "url": subscriber.url,
                "trigger": "recover",
                "priority": RECOVERED,
                "status": DeliveryStatus.PENDING.value,
                "max_attempts": len(schedule) + 1,
                "retry_schedule": schedule,
                "next_at": due,
                "give_up_at": due + timedelta(seconds=sum(schedule)) + GIVE_UP_AFTER,
            }
        )
    connection.execute(sa.insert(webhook_deliveries), rows)
    return len(rows)
