"""The ledger of deliveries: what was sent where, how it went, and sending it again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from laneway.db import Database
from laneway.engine.queries import Clauses, Scope, equal_to, find_job, made_between, newest_first, stamp
from laneway.errors import Conflict, DeliveryNotFound, JobNotFound
from laneway.models import webhook_attempts, webhook_endpoints, webhook_messages
from laneway.models import webhook_deliveries as deliveries
from laneway.webhooks.messages import GIVE_UP_AFTER
from laneway.webhooks.retries import UNDONE, DeliveryStatus

MAX_ATTEMPTS_SHOWN = 100

d = deliveries.c
m = webhook_messages.c
a = webhook_attempts.c
e = webhook_endpoints.c

ENDED = tuple(sorted(frozenset(DeliveryStatus) - UNDONE))
_DELIVERY = (
    "id",
    "message_id",
    "event_type",
    "job_id",
    "endpoint_id",
    "channel",
    "url",
    "trigger",
    "status",
    "attempt_count",
    "max_attempts",
    "last_status_code",
    "last_error",
)
_DELIVERY_MOMENTS = ("created_at", "next_at", "give_up_at", "delivered_at", "updated_at")
_ATTEMPT = (
    "number",
    "trigger",
    "remote_ip",
    "status_code",
    "error_class",
    "error",
    "dns_ms",
    "connect_ms",
    "first_byte_ms",
    "total_ms",
    "request_bytes",
    "response_headers",
    "response_body",
    "response_truncated",
)


@dataclass(frozen=True, slots=True)
class DeliveryFilter:
    """Which deliveries; None means any. Moments are exclusive."""

    statuses: tuple[DeliveryStatus, ...] = ()
    event_type: str | None = None
    endpoint_id: str | None = None
    job_id: str | None = None
    created_after: datetime | None = None
    created_before: datetime | None = None

    def clauses(self) -> Clauses:
        return [
            *([d.status.in_(self.statuses)] if self.statuses else []),
            *equal_to(
                (m.event_type, self.event_type), (d.endpoint_id, self.endpoint_id), (d.job_id, self.job_id)
            ),
            *made_between(deliveries, self.created_after, self.created_before),
        ]


def page(
    database: Database, scope: Scope, wanted: DeliveryFilter, *, limit: int, cursor: str | None
) -> tuple[list[dict[str, Any]], str | None]:
    """Deliveries, newest first, and the cursor of the next page. Raises InvalidCursor."""
    with database.read() as connection:
        return _page(connection, scope, wanted, limit=limit, cursor=cursor)


def page_of_job(
    database: Database, scope: Scope, job_id: str, *, limit: int, cursor: str | None
) -> tuple[list[dict[str, Any]], str | None]:
    """A page of the deliveries that tell of one job. Raises JobNotFound, InvalidCursor."""
    with database.read() as connection:
        if find_job(connection, job_id, scope) is None:
            raise JobNotFound(f"there is no job {job_id}", job_id=job_id)
        return _page(connection, scope, DeliveryFilter(job_id=job_id), limit=limit, cursor=cursor)


def _page(
    connection: sa.Connection, scope: Scope, wanted: DeliveryFilter, *, limit: int, cursor: str | None
) -> tuple[list[dict[str, Any]], str | None]:
    query = _select(scope).where(*wanted.clauses())
    rows, following = newest_first(connection, query, d.id, bound=(scope, wanted), limit=limit, cursor=cursor)
    return [_view(row) for row in rows], following


def get(connection: sa.Connection, scope: Scope, delivery_id: str) -> dict[str, Any]:
    """A delivery, what is sent, and its newest attempts, oldest first. Raises DeliveryNotFound."""
    row = _find(connection, scope, delivery_id)
    newest = (
        sa.select(webhook_attempts)
        .where(a.delivery_id == delivery_id)
        .order_by(a.number.desc())
        .limit(MAX_ATTEMPTS_SHOWN)
    )
    attempts = [_attempt(each) for each in connection.execute(newest).mappings()][::-1]
    payload = row["payload"]
    return {**_view(row), "payload": payload and payload.decode(), "attempts": attempts}


def redeliver(connection: sa.Connection, scope: Scope, delivery_id: str, *, now: datetime) -> dict[str, Any]:
    """Send it again, from the first byte to the last as it was, with its whole schedule before it.

    What goes to an endpoint goes to the URL that it has now. Raises DeliveryNotFound; Conflict while it is
    on its way, when its endpoint is disabled or gone, and once its payload was pruned.
    """
    row = _find(connection, scope, delivery_id, lock=True)
    if row["status"] not in ENDED:
        raise Conflict(
            f"the delivery is on its way already: it is {row['status']}", current_status=row["status"]
        )
    if row["payload"] is None:
        raise Conflict("what it said was pruned: nothing is left to send", current_status=row["status"])
    url = row["url"]
    if row["endpoint_id"] is not None:
        endpoint = connection.execute(sa.select(e.status, e.url).where(e.id == row["endpoint_id"])).first()
        if endpoint is None or endpoint.status == "disabled":
            said = "deleted" if endpoint is None else "disabled; enable it first"
            raise Conflict(f"its endpoint is {said}", current_status=row["status"])
        url = endpoint.url
    send_again(connection, row, trigger="manual", url=url, due=now, now=now)
    return get(connection, scope, delivery_id)


def send_again(
    connection: sa.Connection,
    row: Mapping[Any, Any],
    *,
    trigger: str,
    url: str,
    due: datetime,
    now: datetime,
    priority: int = 0,
) -> bool:
    """Put an ended delivery back, to be sent at `due`; False when somebody else just did."""
    schedule = row["retry_schedule"]
    changed = connection.execute(
        sa.update(deliveries)
        .where(d.id == row["id"], d.status.in_(ENDED))
        .values(
            status=DeliveryStatus.PENDING.value,
            trigger=trigger,
            priority=priority,
            url=url,
            max_attempts=d.attempt_count + len(schedule) + 1,
            next_at=due,
            give_up_at=due + timedelta(seconds=sum(schedule)) + GIVE_UP_AFTER,
            delivered_at=None,
            version=d.version + 1,
            updated_at=now,
        )
    )
    return bool(changed.rowcount)


def _find(connection: sa.Connection, scope: Scope, delivery_id: str, *, lock: bool = False) -> sa.RowMapping:
    query = _select(scope).add_columns(m.payload).where(d.id == delivery_id)
    row = connection.execute(query.with_for_update(of=deliveries) if lock else query).mappings().first()
    if row is None:
        raise DeliveryNotFound(f"there is no webhook delivery {delivery_id}", delivery_id=delivery_id)
    return row


def _select(scope: Scope) -> sa.Select[Any]:
    mine = [d.tenant_id == scope.tenant_id]
    if scope.subject is not None:
        mine.append(d.created_by == scope.subject)
    return sa.select(deliveries, m.event_type).join(webhook_messages, m.id == d.message_id).where(*mine)


def _view(row: Mapping[Any, Any]) -> dict[str, Any]:
    return {name: row[name] for name in _DELIVERY} | {name: stamp(row[name]) for name in _DELIVERY_MOMENTS}


def _attempt(row: Mapping[Any, Any]) -> dict[str, Any]:
    return {name: row[name] for name in _ATTEMPT} | {"started_at": stamp(row["started_at"])}
