"""Bulk replays for an endpoint that was away: rows of work that any scheduler carries on with.

A recovery walks through the tenant's messages in the order they happened, a batch a transaction, and
keeps its place in its row: whoever dies, the next one goes on from there. Replays wait behind live
messages and fall due one after the other, so that a receiver that just came back is not run over. The
walk is never far ahead of the sending, so a recovery that runs is one that can still be cancelled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from laneway.clock import new_id
from laneway.db import Database
from laneway.domain.events import EventType, SystemEvent
from laneway.engine.queries import stamp
from laneway.engine.webhook_ledger import send_again
from laneway.errors import Conflict, EndpointNotFound, NotFound
from laneway.models import jobs, webhook_deliveries, webhook_endpoints, webhook_messages
from laneway.models import webhook_recoveries as recoveries
from laneway.webhooks.messages import GIVE_UP_AFTER
from laneway.webhooks.retries import DeliveryStatus
from laneway.webhooks.subscriptions import Subscriber, subscribers

BATCH_MESSAGES = 200
AHEAD = timedelta(seconds=30)  # so far the walk may be before the sending
PER_SECOND = 10.0
MAX_PER_SECOND = 100.0
RECOVERED = 1  # the priority: after live messages
MAX_COUNTED = 10_000
_PASSING = (EventType.JOB_PROGRESS.value, SystemEvent.ENDPOINT_TEST.value)  # of no use to anybody later

r = recoveries.c
m = webhook_messages.c
d = webhook_deliveries.c
e = webhook_endpoints.c


class Mode(StrEnum):
    """Which of the endpoint's messages are sent again."""

    FAILED = "failed"  # tried in vain
    MISSING = "missing"  # never tried: skipped, cancelled, or from before the endpoint was there
    ALL = "all"  # both, and what was delivered


@dataclass(frozen=True, slots=True)
class Wish:
    """What to recover: the messages made from `since` to before `until`."""

    mode: Mode
    since: datetime
    until: datetime


def start(
    connection: sa.Connection,
    tenant_id: str,
    endpoint_id: str,
    wish: Wish,
    *,
    per_second: float,
    by: str,
    now: datetime,
) -> dict[str, Any]:
    """A recovery that the schedulers carry out.

    Raises EndpointNotFound; Conflict when the endpoint is disabled and while another recovery of it runs.
    """
    locked = sa.select(e.status).where(e.id == endpoint_id, e.tenant_id == tenant_id).with_for_update()
    status = connection.execute(locked).scalar()
    if status is None:
        raise _no_endpoint(endpoint_id)
    if status == "disabled":
        raise Conflict("the endpoint is disabled; enable it first", current_status=status)
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
            mode=wish.mode.value,
            since=wish.since,
            until=wish.until,
            per_second=per_second,
            status="running",
            created_at=now,
            updated_at=now,
        )
    )
    return get(connection, tenant_id, recovery_id)


def count(connection: sa.Connection, tenant_id: str, endpoint_id: str, wish: Wish) -> int:
    """How many messages a recovery would send, counted up to 10,000. Raises EndpointNotFound."""
    subscriber = _subscriber(connection, tenant_id, endpoint_id)
    if subscriber is None:
        raise _no_endpoint(endpoint_id)
    found, place = 0, (wish.since, "")
    while found < MAX_COUNTED:
        batch = _messages(connection, tenant_id, place, wish.until)
        if not batch:
            break
        found += len(_choose(connection, subscriber, batch, wish.mode))
        place = (batch[-1]["created_at"], batch[-1]["id"])
    return min(found, MAX_COUNTED)


def get(connection: sa.Connection, tenant_id: str, recovery_id: str) -> dict[str, Any]:
    """How far it is. Raises NotFound."""
    row = _find(connection, tenant_id, recovery_id)
    names = ("id", "endpoint_id", "mode", "per_second", "status", "queued", "created_by")
    moments = ("since", "until", "created_at", "finished_at")
    return {name: row[name] for name in names} | {name: stamp(row[name]) for name in moments}


def cancel(connection: sa.Connection, tenant_id: str, recovery_id: str, *, now: datetime) -> dict[str, Any]:
    """Stop it, and what it queued and nobody has begun to send.

    A second time changes nothing. Raises NotFound; Conflict when it is done.
    """
    row = _find(connection, tenant_id, recovery_id, lock=True)
    if row["status"] == "done":
        raise Conflict("the recovery is done: all of it is on its way", current_status="done")
    if row["status"] == "running":
        _end(connection, recovery_id, "cancelled", now=now)
        connection.execute(
            sa.update(webhook_deliveries)
            .where(_waiting(row["endpoint_id"]))
            .values(status=DeliveryStatus.CANCELLED.value, version=d.version + 1, updated_at=now)
        )
    return get(connection, tenant_id, recovery_id)


def sweep(database: Database, *, now: datetime) -> tuple[int, bool]:
    """Carry every running recovery on by a batch.

    Returns how many deliveries were queued, and whether another batch would do more at this moment.
    """
    with database.read() as connection:
        running = connection.execute(sa.select(recoveries).where(r.status == "running").order_by(r.id))
        ids = [row["id"] for row in running.mappings().all() if _may_go_on(connection, row, now=now)]
    return sum(_step(database, recovery_id, now=now) for recovery_id in ids), bool(ids)


def _may_go_on(connection: sa.Connection, row: sa.RowMapping, *, now: datetime) -> bool:
    """Also true when its endpoint is gone: then it is to be ended."""
    status = connection.execute(sa.select(e.status).where(e.id == row["endpoint_id"])).scalar()
    if status == "paused":
        return False
    last = _last_due(connection, row["endpoint_id"])
    return last is None or last <= now + AHEAD


def _step(database: Database, recovery_id: str, *, now: datetime) -> int:
    with database.write() as connection:
        running = sa.select(recoveries).where(r.id == recovery_id, r.status == "running")
        row = connection.execute(running.with_for_update(skip_locked=True)).mappings().first()
        if row is None or not _may_go_on(connection, row, now=now):
            return 0  # another scheduler has it in hand, or had it just now
        subscriber = _subscriber(connection, row["tenant_id"], row["endpoint_id"])
        if subscriber is None or subscriber.status == "disabled":
            _end(connection, recovery_id, "cancelled", now=now)
            return 0
        place = (row["place_at"] or row["since"], row["place"] or "")
        batch = _messages(connection, row["tenant_id"], place, row["until"])
        if not batch:
            _end(connection, recovery_id, "done", now=now)
            return 0
        pause = timedelta(seconds=1 / row["per_second"])
        last = _last_due(connection, row["endpoint_id"])
        due = now if last is None else max(now, last + pause)
        queued = 0
        for message, delivery in _choose(connection, subscriber, batch, Mode(row["mode"])):
            if _queue(connection, subscriber, message, delivery, due=due, now=now):
                queued += 1
                due += pause
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


def _queue(
    connection: sa.Connection,
    subscriber: Subscriber,
    message: sa.RowMapping,
    delivery: sa.RowMapping | None,
    *,
    due: datetime,
    now: datetime,
) -> bool:
    if delivery is not None:
        return send_again(
            connection, delivery, trigger="recover", url=subscriber.url, due=due, now=now, priority=RECOVERED
        )
    schedule = list(subscriber.retry_schedule)
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    made = connection.execute(
        insert(webhook_deliveries)
        .values(
            id=new_id(),
            tenant_id=message["tenant_id"],
            created_by=message["created_by"],
            message_id=message["id"],
            job_id=message["job_id"],
            endpoint_id=subscriber.id,
            target_id=subscriber.id,
            url=subscriber.url,
            trigger="recover",
            priority=RECOVERED,
            status=DeliveryStatus.PENDING.value,
            max_attempts=len(schedule) + 1,
            retry_schedule=schedule,
            next_at=due,
            give_up_at=due + timedelta(seconds=sum(schedule)) + GIVE_UP_AFTER,
            created_at=now,
            updated_at=now,
        )
        .on_conflict_do_nothing()
    )
    return bool(made.rowcount)


def _messages(
    connection: sa.Connection, tenant_id: str, place: tuple[datetime, str], until: datetime
) -> Sequence[sa.RowMapping]:
    at, after = place
    query = (
        sa.select(m.id, m.tenant_id, m.created_at, m.created_by, m.event_type, m.job_id)
        .where(
            m.tenant_id == tenant_id,
            m.created_at >= at,
            sa.or_(m.created_at > at, m.id > after),
            m.created_at < until,
            m.payload.is_not(None),
        )
        .order_by(m.created_at, m.id)
        .limit(BATCH_MESSAGES)
    )
    return connection.execute(query).mappings().all()


def _choose(
    connection: sa.Connection, subscriber: Subscriber, batch: Sequence[sa.RowMapping], mode: Mode
) -> list[tuple[sa.RowMapping, sa.RowMapping | None]]:
    """Of these messages those to be sent, each with its delivery to the endpoint if it has one."""
    messages = [message for message in batch if message["event_type"] not in _PASSING]
    ids = [message["id"] for message in messages]
    of_endpoint = sa.select(webhook_deliveries).where(d.message_id.in_(ids), d.target_id == subscriber.id)
    there = {row["message_id"]: row for row in connection.execute(of_endpoint).mappings()}
    known = {}
    if mode is not Mode.FAILED:
        untold = {each["job_id"] for each in messages if each["id"] not in there and each["job_id"]}
        rows = connection.execute(
            sa.select(jobs.c.id, jobs.c.queue, jobs.c.job_type, jobs.c.tags).where(jobs.c.id.in_(untold))
        )
        known = {row["id"]: row for row in rows.mappings()}

    def wanted(message: sa.RowMapping) -> bool:
        if (delivery := there.get(message["id"])) is not None:
            return _fits(delivery, mode)
        job_id = message["job_id"]
        return (
            mode is not Mode.FAILED
            and (job_id is None or job_id in known)
            and subscriber.wants(message["event_type"], known.get(job_id))
        )

    return [(message, there.get(message["id"])) for message in messages if wanted(message)]


def _fits(delivery: sa.RowMapping, mode: Mode) -> bool:
    match DeliveryStatus(delivery["status"]):
        case DeliveryStatus.DEAD:
            return mode is not Mode.MISSING
        case DeliveryStatus.SKIPPED | DeliveryStatus.CANCELLED:
            tried = delivery["attempt_count"] > 0
            return mode is Mode.ALL or tried == (mode is Mode.FAILED)
        case DeliveryStatus.DELIVERED:
            return mode is Mode.ALL
        case _:
            return False


def _waiting(endpoint_id: str) -> sa.ColumnElement[bool]:
    """What a recovery of the endpoint queued, and nobody has begun to send."""
    # Written out, not bound: only so do both stores see that the partial index serves.
    pending: sa.ColumnElement[bool] = sa.literal_column("webhook_deliveries.status = 'pending'")
    return sa.and_(d.target_id == endpoint_id, pending, d.trigger == "recover")


def _last_due(connection: sa.Connection, endpoint_id: str) -> datetime | None:
    last: datetime | None = connection.execute(
        sa.select(d.next_at).where(_waiting(endpoint_id)).order_by(d.next_at.desc()).limit(1)
    ).scalar()
    return last


def _subscriber(connection: sa.Connection, tenant_id: str, endpoint_id: str) -> Subscriber | None:
    them = subscribers(connection, [tenant_id]).get(tenant_id, ())
    return next((each for each in them if each.id == endpoint_id), None)


def _find(
    connection: sa.Connection, tenant_id: str, recovery_id: str, *, lock: bool = False
) -> sa.RowMapping:
    query = sa.select(recoveries).where(r.id == recovery_id, r.tenant_id == tenant_id)
    row = connection.execute(query.with_for_update() if lock else query).mappings().first()
    if row is None:
        raise NotFound(f"there is no recovery {recovery_id}", recovery_id=recovery_id)
    return row


def _end(connection: sa.Connection, recovery_id: str, status: str, *, now: datetime) -> None:
    connection.execute(
        sa.update(recoveries)
        .where(r.id == recovery_id)
        .values(status=status, finished_at=now, version=r.version + 1, updated_at=now)
    )


def _no_endpoint(endpoint_id: str) -> EndpointNotFound:
    return EndpointNotFound(f"there is no webhook endpoint {endpoint_id}", endpoint_id=endpoint_id)
