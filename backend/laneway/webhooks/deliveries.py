"""The rows of deliveries, for couriers: claim what is due, write down what came of it.

Any number of couriers may run. A claim leases rows to one of them (`lease_owner`, `lease_until`), and
every later write names that owner, so that a courier that was taken for dead changes nothing. Settling
may be repeated: after a lost reply to the commit, the second time changes nothing either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import sqlalchemy as sa

from laneway.clock import new_id
from laneway.db import Database, Moment, Rows
from laneway.models import tenants, webhook_messages
from laneway.models import webhook_deliveries as d
from laneway.webhooks.retries import Answer, DeliveryStatus, Verdict

CLAIM_ROWS = 64
# Written out, not bound: only so do both stores see that the partial index serves.
_DUE: sa.ColumnElement[bool] = sa.literal_column("webhook_deliveries.status IN ('pending', 'retrying')")
_SENDING: sa.ColumnElement[bool] = sa.literal_column("webhook_deliveries.status = 'sending'")

_ATTEMPTS = Rows(
    id="id",
    delivery_id="id",
    number="int",
    started_at="moment",
    status_code="int",
    error_class="text",
    error="text",
    total_ms="int",
    response_body="text",
)
_INSERT_ATTEMPTS = """
    INSERT INTO webhook_attempts (id, delivery_id, number, started_at, status_code, error_class, error,
                                  total_ms, response_body, tenant_id, created_by)
    SELECT u.id, u.delivery_id, u.number, u.started_at, u.status_code, u.error_class, u.error,
           u.total_ms, u.response_body, d.tenant_id, d.created_by
    FROM {rows} JOIN webhook_deliveries AS d ON d.id = u.delivery_id
    WHERE true
    ON CONFLICT (delivery_id, number) DO NOTHING
    RETURNING delivery_id"""

_OUTCOMES = Rows(
    id="id", status="text", next_at="moment", status_code="int", error="text", delivered_at="moment"
)
_UPDATE_DELIVERIES = """
    UPDATE webhook_deliveries
    SET status = u.status, next_at = coalesce(u.next_at, webhook_deliveries.next_at),
        last_status_code = u.status_code, last_error = u.error, delivered_at = u.delivered_at,
        lease_owner = NULL, lease_until = NULL, version = version + 1, updated_at = :now
    FROM {rows}
    WHERE {match} AND COALESCE(webhook_deliveries.status, '') = 'sending'
      AND webhook_deliveries.lease_owner = :owner
    RETURNING webhook_deliveries.id"""

_COUNTS = Rows(id="id", attempts="int", delivered="bool")
_UPDATE_JOBS = """
    UPDATE jobs
    SET webhook_attempts = webhook_attempts + u.attempts,
        webhook_delivered = webhook_delivered OR u.delivered,
        version = version + 1, updated_at = :now
    FROM {rows}
    WHERE {match}"""


@dataclass(frozen=True, slots=True)
class Claimed:
    """A delivery that this courier holds, with all that one attempt needs."""

    id: str
    tenant_id: str
    job_id: str
    message_id: str
    event_type: str
    url: str
    payload: bytes
    attempt: int  # the number of the attempt now to be made, counted from 1
    max_attempts: int
    sealed_secret: str | None  # of the tenant; None when there is no such tenant


@dataclass(frozen=True, slots=True)
class Finished:
    """An attempt that was made."""

    delivery: Claimed
    answer: Answer
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Postponed:
    """A claimed delivery that was not sent: it goes back, and no attempt is charged."""

    delivery: Claimed
    until: datetime


@dataclass(frozen=True, slots=True)
class Room:
    """How much may be claimed: `rows` in all, and per origin what is missing to `per_origin`."""

    rows: int
    per_origin: int
    busy: Mapping[str, int]  # origin → attempts now in flight

    @property
    def full(self) -> list[str]:
        return sorted(origin for origin, count in self.busy.items() if count >= self.per_origin)


def origin(url: str) -> str:
    """What one receiver's URLs have in common: `https://host:port/` of a canonical URL."""
    end = url.find("/", len("https://"))
    return url if end < 0 else url[: end + 1]


class Deliveries:
    """The deliveries as one courier sees them. Blocking: call it from a thread."""

    def __init__(self, database: Database, *, owner: str, lease_seconds: float) -> None:
        self._database = database
        self._owner = owner
        self._lease = timedelta(seconds=lease_seconds)

    def turn(
        self, finished: Sequence[Finished], postponed: Sequence[Postponed], room: Room, *, now: datetime
    ) -> tuple[list[Claimed], bool]:
        """Settle what is done and claim what is due, in one transaction.

        Returns the claimed deliveries, and whether more may be due than one claim looks at.
        """
        if not (finished or postponed or self._anything_due(room, now=now)):
            return [], False
        with self._database.write() as connection:
            if finished:
                self._settle(connection, finished, now=now)
            for each in postponed:
                self._give_back(connection, each, now=now)
            return self._claim(connection, room, now=now) if room.rows > 0 else ([], False)

    def reclaim(self, *, now: datetime) -> int:
        """How many deliveries were taken back from couriers whose lease ran out.

        Whether they were sent is unknown, so they are sent again, with the same id.
        """
        values = {
            "status": DeliveryStatus.RETRYING.value,
            "next_at": now,
            "lease_owner": None,
            "lease_until": None,
            "version": d.c.version + 1,
            "updated_at": now,
        }
        with self._database.write() as connection:
            return connection.execute(
                sa.update(d).where(_SENDING, d.c.lease_until < now).values(values)
            ).rowcount

    def _anything_due(self, room: Room, *, now: datetime) -> bool:
        # A read first: on SQLite, an idle courier must not take the write lock twice a second.
        if room.rows <= 0:
            return False
        with self._database.read() as connection:
            return (
                connection.execute(sa.select(d.c.id).where(*_due(room, now=now)).limit(1)).first() is not None
            )

    def _claim(self, connection: sa.Connection, room: Room, *, now: datetime) -> tuple[list[Claimed], bool]:
        limit = min(room.rows, CLAIM_ROWS)
        query = (
            sa.select(
                d.c.id,
                d.c.tenant_id,
                d.c.job_id,
                d.c.message_id,
                webhook_messages.c.event_type,
                d.c.url,
                webhook_messages.c.payload,
                (d.c.attempt_count + 1).label("attempt"),
                d.c.max_attempts,
                tenants.c.webhook_secret.label("sealed_secret"),
            )
            .join(webhook_messages, webhook_messages.c.id == d.c.message_id)
            .outerjoin(tenants, tenants.c.id == d.c.tenant_id)
            .where(*_due(room, now=now))
            .order_by(d.c.next_at, d.c.id)
            .limit(limit)
            .with_for_update(of=d, skip_locked=True)
        )
        rows = [Claimed(**row) for row in connection.execute(query).mappings()]
        busy = dict(room.busy)
        picked = []
        for row in rows:
            key = origin(row.url)
            if busy.get(key, 0) < room.per_origin:
                busy[key] = busy.get(key, 0) + 1
                picked.append(row)
        if picked:
            connection.execute(
                sa.update(d)
                .where(d.c.id.in_([row.id for row in picked]))
                .values(
                    status=DeliveryStatus.SENDING.value,
                    attempt_count=d.c.attempt_count + 1,
                    lease_owner=self._owner,
                    lease_until=now + self._lease,
                    version=d.c.version + 1,
                    updated_at=now,
                )
            )
        return picked, len(rows) == limit

    def _give_back(self, connection: sa.Connection, postponed: Postponed, *, now: datetime) -> None:
        connection.execute(
            sa.update(d)
            .where(d.c.id == postponed.delivery.id, _SENDING, d.c.lease_owner == self._owner)
            .values(
                status=DeliveryStatus.PENDING.value,
                attempt_count=d.c.attempt_count - 1,
                next_at=postponed.until,
                lease_owner=None,
                lease_until=None,
                version=d.c.version + 1,
                updated_at=now,
            )
        )

    def _settle(self, connection: sa.Connection, finished: Sequence[Finished], *, now: datetime) -> None:
        made = self._execute(
            connection,
            _INSERT_ATTEMPTS,
            _ATTEMPTS,
            [
                (
                    new_id(),
                    each.delivery.id,
                    each.delivery.attempt,
                    each.answer.started_at,
                    each.answer.status_code,
                    each.answer.error_class and each.answer.error_class.value,
                    each.answer.error,
                    each.answer.total_ms,
                    each.answer.body,
                )
                for each in finished
            ],
        )
        written = {str(row[0]) for row in made}
        changed = self._execute(
            connection,
            _UPDATE_DELIVERIES,
            _OUTCOMES,
            [
                (
                    each.delivery.id,
                    each.verdict.status.value,
                    each.verdict.next_at,
                    each.answer.status_code,
                    each.answer.error,
                    now if each.verdict.status is DeliveryStatus.DELIVERED else None,
                )
                for each in finished
            ],
            key="webhook_deliveries.id",
            now=now,
            owner=self._owner,
        )
        settled = {str(row[0]) for row in changed}
        counts: dict[str, tuple[int, bool]] = {}
        for each in finished:
            attempts, delivered = counts.get(each.delivery.job_id, (0, False))
            is_delivered = each.delivery.id in settled and each.verdict.status is DeliveryStatus.DELIVERED
            counts[each.delivery.job_id] = (
                attempts + (each.delivery.id in written),
                delivered or is_delivered,
            )
        rows = [(job_id, *count) for job_id, count in sorted(counts.items()) if any(count)]
        if rows:
            self._execute(connection, _UPDATE_JOBS, _COUNTS, rows, key="jobs.id", now=now)

    def _execute(
        self,
        connection: sa.Connection,
        sql: str,
        rows: Rows,
        values: Sequence[Sequence[object]],
        *,
        key: str = "",
        now: datetime | None = None,
        **parameters: object,
    ) -> sa.CursorResult[sa.Row[tuple[object, ...]]]:
        dialect = self._database.dialect
        statement = sa.text(sql.format(rows=rows.sql(dialect), match=rows.match(dialect, key)))
        if now is not None:
            statement = statement.bindparams(sa.bindparam("now", now, Moment))
        return connection.execute(statement, rows.bind(dialect, values) | parameters)


def _due(room: Room, *, now: datetime) -> list[sa.ColumnElement[bool]]:
    others = [sa.func.substr(d.c.url, 1, len(full)) != full for full in room.full]
    return [_DUE, d.c.next_at <= now, *others]
