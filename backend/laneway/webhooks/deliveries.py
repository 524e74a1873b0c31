"""The rows of deliveries, for couriers: claim what is due, write down what came of it.

Any number of couriers may run. A claim leases rows to one of them (`lease_owner`, `lease_until`), and
every later write names that owner, so that a courier that was taken for dead changes nothing. Settling
may be repeated: after a lost reply to the commit, the second time changes nothing either.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from laneway.clock import new_id
from laneway.db import Database, Moment, Rows
from laneway.domain.events import EventType
from laneway.models import open_delivery, tenants, webhook_messages
from laneway.models import webhook_deliveries as d
from laneway.models import webhook_endpoints as e
from laneway.models import webhook_health as h
from laneway.webhooks import endpoint_health
from laneway.webhooks.formats import Format
from laneway.webhooks.health import SUSPECT_FAILURES, BlockedReason, Health
from laneway.webhooks.messages import TEST, supersede_overtaken
from laneway.webhooks.retries import UNDONE, Answer, DeliveryStatus, Verdict
from laneway.webhooks.secrets import live_secrets

CLAIM_ROWS = 64
LOOKS = 4
PRIORITIES = (0, 1)  # live, recovered
# Written out, not bound: only so do both stores see that the partial index serves.
_SENDING: sa.ColumnElement[bool] = sa.literal_column("webhook_deliveries.status = 'sending'")

_NO_ENDS = frozenset({EventType.JOB_PROGRESS, EventType.JOB_RETRYING})

_ATTEMPTS = Rows(
    id="id",
    delivery_id="id",
    number="int",
    trigger="text",
    started_at="moment",
    remote_ip="text",
    status_code="int",
    error_class="text",
    error="text",
    dns_ms="int",
    connect_ms="int",
    first_byte_ms="int",
    total_ms="int",
    request_bytes="int",
    response_headers="text",
    response_body="text",
    response_truncated="bool",
)
_INSERT_ATTEMPTS = """
    INSERT INTO webhook_attempts ({columns}, tenant_id, created_by)
    SELECT {values}, d.tenant_id, d.created_by
    FROM {rows} JOIN webhook_deliveries AS d ON d.id = u.delivery_id
    WHERE true
    ON CONFLICT (delivery_id, number) DO NOTHING
    RETURNING delivery_id"""

_OUTCOMES = Rows(
    id="id",
    status="text",
    next_at="moment",
    uncharged="int",
    status_code="int",
    error="text",
    delivered_at="moment",
)
_UPDATE_DELIVERIES = """
    UPDATE webhook_deliveries
    SET status = u.status, next_at = coalesce(u.next_at, webhook_deliveries.next_at),
        max_attempts = webhook_deliveries.max_attempts + u.uncharged,
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
class Manner:
    """How one endpoint wants to be sent to, sealed parts still sealed; the default is a job's own URL's."""

    id: str | None = None
    version: int = 0
    form: Format = Format.STANDARD
    sign_with: str = "v1"
    sealed_secrets: Sequence[str] = ()  # newest first, without those whose grace is over
    sealed_headers: str | None = None
    sealed_certificate: str | None = None
    ca_certificate: str | None = None
    timeout_seconds: float | None = None  # None: the setting
    max_in_flight: int | None = None  # None: the courier's own
    max_per_second: float | None = None


@dataclass(frozen=True, slots=True)
class Claimed:
    """A delivery that this courier holds, with all that one attempt needs."""

    id: str
    tenant_id: str
    message_id: str
    event_type: str
    job_id: str | None
    target_id: str
    url: str
    payload: bytes
    trigger: str
    attempt: int  # the number of the attempt now to be made, counted from 1
    max_attempts: int
    retry_schedule: Sequence[float]
    give_up_at: datetime | None
    manner: Manner
    sealed_tenant_secrets: Sequence[str]  # as of Manner; empty when there is no such tenant
    sealed_signing_key: str | None  # of the tenant, for v1a
    health: Health

    @property
    def notifies(self) -> bool:
        """Whether `url` is the address of a channel of the operator's (laneway/notify): `kind:name`."""
        return "://" not in self.url


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
class Candidate:
    """A delivery that is due, with what decides whether there is room for it."""

    id: str
    tenant_id: str
    target_id: str
    url: str
    max_in_flight: int | None  # None: the courier's own
    max_per_second: float | None
    health: Health


@dataclass(frozen=True, slots=True)
class Turn:
    """What a turn gave: deliveries to send, and when to look again."""

    claimed: Sequence[Claimed] = ()
    more: bool = False  # more may be due already than one claim looks at
    next_at: datetime | None = None  # the earliest moment at which something else will be due


class Room:
    """How much may be claimed.

    What is full is not looked at: targets, tenants and origins (as of health.origin). `admit` answers for
    each row, in order. Whatever it would refuse at once must be named as full, or claims find no others.
    """

    def __init__(
        self,
        rows: int,
        *,
        full: Sequence[str] = (),
        full_tenants: Sequence[str] = (),
        full_origins: Sequence[str] = (),
        suspects: bool = True,
    ) -> None:
        self.rows = rows
        self.full = list(full)
        self.full_tenants = list(full_tenants)
        self.full_origins = list(full_origins)
        self.suspects = suspects  # whether targets that keep failing may have any more

    def admit(self, candidate: Candidate) -> bool:
        """Whether this one may be claimed beside those admitted before it."""
        return True


class Deliveries:
    """The deliveries as one courier sees them. Blocking: call it from a thread."""

    def __init__(self, database: Database, *, owner: str, lease_seconds: float) -> None:
        self._database = database
        self._owner = owner
        self._lease = timedelta(seconds=lease_seconds)

    def turn(
        self, finished: Sequence[Finished], postponed: Sequence[Postponed], room: Room, *, now: datetime
    ) -> Turn:
        """Settle what is done and claim what is due, in one transaction."""
        if not (finished or postponed):
            found = self._look(room, now=now)
            if found is not None:
                return found
        with self._database.write() as connection:
            if finished:
                self._settle(connection, finished, now=now)
            for each in postponed:
                self._give_back(connection, each, now=now)
            return self._claim(connection, room, now=now) if room.rows > 0 else Turn()

    def reclaim(self, *, now: datetime) -> int:
        """How many deliveries were taken back from couriers whose lease ran out.

        Whether they were sent is unknown, so they are sent again, with the same id. What kills its courier
        each time ends at `give_up_at`, with what was blocked until then.
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
            taken = connection.execute(
                sa.update(d).where(_SENDING, d.c.lease_until < now).values(values)
            ).rowcount
            self._give_up(connection, now=now)
        return taken

    def _give_up(self, connection: sa.Connection, *, now: datetime) -> None:
        """End what waited, blocked, until its time was over."""
        late = sa.select(d.c.id).where(open_delivery, d.c.give_up_at < now).limit(CLAIM_ROWS)
        connection.execute(
            sa.update(d)
            .where(d.c.id.in_(late.scalar_subquery()), open_delivery)
            .values(
                status=DeliveryStatus.DEAD.value,
                last_error=sa.func.coalesce(d.c.last_error, "the receiver could not be reached in time"),
                version=d.c.version + 1,
                updated_at=now,
            )
        )

    def _look(self, room: Room, *, now: datetime) -> Turn | None:
        """The turn when nothing is due; None when something may be.

        A read first: on SQLite, an idle courier must not take the write lock twice a second.
        """
        if room.rows <= 0:
            return Turn()
        if self._database.dialect == "postgresql":
            return None
        with self._database.read() as connection:
            if connection.execute(_due(sa.select(d.c.id), room, now=now).limit(1)).first() is not None:
                return None
            return Turn(next_at=_next_at(connection, now=now))

    def _claim(self, connection: sa.Connection, room: Room, *, now: datetime) -> Turn:
        limit = min(room.rows, CLAIM_ROWS)
        if self._database.dialect == "postgresql":
            connection.execute(_WALK_THE_INDEX)
        picked: Sequence[Candidate] = ()
        refused: set[str] = set()
        more, looks = True, 0
        while more and not picked and looks < LOOKS:
            query = (
                _due(sa.select(*_CANDIDATE), room, now=now, passed_over=refused)
                .outerjoin(h, h.c.target_id == d.c.target_id)
                .order_by(d.c.priority, d.c.next_at, d.c.id)
                .limit(limit)
                .with_for_update(of=d, skip_locked=True)
            )
            rows = [_candidate(row) for row in connection.execute(query).mappings()]
            picked = self._probe(connection, [row for row in rows if room.admit(row)], now=now)
            more, looks = len(rows) == limit, looks + 1
            refused |= {row.target_id for row in rows}  # when there is no room for any: look behind them
        if not picked:
            return Turn(next_at=_next_at(connection, now=now))
        ids = [row.id for row in picked]
        connection.execute(
            sa.update(d)
            .where(d.c.id.in_(ids))
            .values(
                status=DeliveryStatus.SENDING.value,
                attempt_count=d.c.attempt_count + 1,
                lease_owner=self._owner,
                lease_until=now + self._lease,
                version=d.c.version + 1,
                updated_at=now,
            )
        )
        health = {row.id: row.health for row in picked}
        found = connection.execute(_CLAIMED.where(d.c.id.in_(ids))).mappings()
        claimed = {row["id"]: _claimed(row, health[row["id"]], now=now) for row in found}
        return Turn([claimed[id_] for id_ in ids], more, None if more else _next_at(connection, now=now))

    def _probe(
        self, connection: sa.Connection, picked: Sequence[Candidate], *, now: datetime
    ) -> Sequence[Candidate]:
        """Without those whose target was paused and is being tried by another courier."""
        paused = {
            row.target_id
            for row in picked
            if row.health.blocked_until is not None and row.health.blocked_until <= now
        }
        if not paused:
            return picked
        ours = endpoint_health.probe(connection, sorted(paused), until=now + self._lease, now=now)
        return [row for row in picked if row.target_id in ours or row.target_id not in paused]

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
        made = self._execute(connection, _INSERT_ATTEMPTS, _ATTEMPTS, [_attempt(each) for each in finished])
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
                    int(not each.verdict.charged),
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
            if each.delivery.job_id is None or each.delivery.manner.id is not None or each.delivery.notifies:
                continue  # jobs count what went to their own webhook_url
            attempts, delivered = counts.get(each.delivery.job_id, (0, False))
            is_delivered = (
                each.delivery.id in settled
                and each.verdict.status is DeliveryStatus.DELIVERED
                and each.delivery.event_type not in _NO_ENDS
            )
            counts[each.delivery.job_id] = (
                attempts + (each.delivery.id in written),
                delivered or is_delivered,
            )
        rows = [(job_id, *count) for job_id, count in sorted(counts.items()) if any(count)]
        if rows:
            self._execute(connection, _UPDATE_JOBS, _COUNTS, rows, key="jobs.id", now=now)
        overtaken = [
            each.delivery.id
            for each in finished
            if each.delivery.event_type == EventType.JOB_PROGRESS
            and each.verdict.status is DeliveryStatus.RETRYING
        ]
        if overtaken:
            supersede_overtaken(connection, overtaken, now=now)
        seen = [each for each in finished if each.delivery.id in settled]
        endpoint_health.save(connection, [(each.delivery, each.answer) for each in seen], now=now)

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
        names = {
            "columns": ", ".join(rows.columns),
            "values": ", ".join(f"u.{name}" for name in rows.columns),
        }
        statement = sa.text(sql.format(rows=rows.sql(dialect), match=rows.match(dialect, key), **names))
        if now is not None:
            statement = statement.bindparams(sa.bindparam("now", now, Moment))
        return connection.execute(statement, rows.bind(dialect, values) | parameters)


# A planner whose statistics are older than the backlog expects a row or two, and would sort all that wait to
# find the first of them: 7 ms of each claim among 15,000, against 0.7 ms.
_WALK_THE_INDEX = sa.text("SET LOCAL enable_sort = off")

_CANDIDATE: tuple[sa.ColumnElement[Any], ...] = (
    d.c.id,
    d.c.tenant_id,
    d.c.target_id,
    d.c.url,
    e.c.max_in_flight,
    e.c.max_per_second,
    h.c.consecutive_failures,
    h.c.opened,
    h.c.blocked_until,
    h.c.blocked_reason,
)
_CLAIMED = (
    sa.select(
        d.c.id,
        d.c.tenant_id,
        d.c.message_id,
        webhook_messages.c.event_type,
        d.c.job_id,
        d.c.target_id,
        d.c.url,
        webhook_messages.c.payload,
        d.c.trigger,
        d.c.attempt_count,
        d.c.max_attempts,
        d.c.retry_schedule,
        d.c.give_up_at,
        tenants.c.webhook_secret,
        tenants.c.old_webhook_secrets,
        tenants.c.webhook_signing_key,
        e.c.id.label("endpoint_id"),
        e.c.version.label("endpoint_version"),
        e.c.format,
        e.c.sign_with,
        e.c.secret,
        e.c.old_secrets,
        e.c.headers,
        e.c.client_certificate,
        e.c.ca_certificate,
        e.c.timeout_seconds,
        e.c.max_in_flight,
        e.c.max_per_second,
    )
    .select_from(d)
    .join(webhook_messages, webhook_messages.c.id == d.c.message_id)
    .outerjoin(tenants, tenants.c.id == d.c.tenant_id)
    .outerjoin(e, e.c.id == d.c.endpoint_id)
)


def _due(
    query: sa.Select[Any], room: Room, *, now: datetime, passed_over: Collection[str] = ()
) -> sa.Select[Any]:
    """Narrow a query over deliveries to what this courier may claim now.

    Thousands that may not be claimed can stand before the first that may. So what decides is a column of
    the delivery, or a small set that the store reads once (`NOT IN (SELECT …)`, hashed), not a join a row.
    """
    earlier = d.alias("earlier")
    in_turn = ~sa.exists().where(
        earlier.c.job_id == d.c.job_id,
        earlier.c.target_id == d.c.target_id,
        earlier.c.id < d.c.id,
        earlier.c.status.in_(sorted(UNDONE)),
    )
    blocked = sa.select(h.c.target_id).where(h.c.blocked_until > now)
    query = (
        query.select_from(d)
        .outerjoin(e, e.c.id == d.c.endpoint_id)
        .where(
            open_delivery,
            d.c.next_at <= now,
            sa.or_(d.c.give_up_at.is_(None), d.c.give_up_at > now),
            sa.or_(d.c.target_id.not_in(blocked), d.c.trigger == TEST),
            sa.or_(
                d.c.endpoint_id.is_(None),
                e.c.status == "enabled",
                sa.and_(e.c.status == "paused", d.c.trigger == TEST),
            ),
            sa.or_(e.c.in_order.is_(None), ~e.c.in_order, in_turn),
        )
    )
    if full := {*room.full, *passed_over}:
        query = query.where(d.c.target_id.not_in(sorted(full)))
    if room.full_tenants:
        query = query.where(d.c.tenant_id.not_in(room.full_tenants))
    for origin in room.full_origins:  # few: each of them takes up an eighth of the courier
        query = query.where(sa.func.substr(d.c.url, 1, len(origin)) != origin)
    if not room.suspects:
        suspects = sa.select(h.c.target_id).where(h.c.consecutive_failures >= SUSPECT_FAILURES)
        query = query.where(d.c.target_id.not_in(suspects))
    return query


def _next_at(connection: sa.Connection, *, now: datetime) -> datetime | None:
    """When the next delivery falls due, or the next pause ends: three probes of indexes."""
    moments = [
        sa.select(d.c.next_at)
        .where(open_delivery, d.c.priority == priority, d.c.next_at > now)
        .order_by(d.c.next_at)
        .limit(1)
        .scalar_subquery()
        for priority in PRIORITIES
    ]
    unpaused = sa.select(sa.func.min(h.c.blocked_until)).where(h.c.blocked_until > now).scalar_subquery()
    row = connection.execute(sa.select(*moments, unpaused)).one()
    return min((moment for moment in row if moment is not None), default=None)


def _candidate(row: sa.RowMapping) -> Candidate:
    reason = row["blocked_reason"]
    return Candidate(
        row["id"],
        row["tenant_id"],
        row["target_id"],
        row["url"],
        row["max_in_flight"],
        row["max_per_second"],
        Health(
            row["consecutive_failures"] or 0,
            opened=row["opened"] or 0,
            blocked_until=row["blocked_until"],
            blocked_reason=BlockedReason(reason) if reason is not None else None,
        ),
    )


def _claimed(row: sa.RowMapping, health: Health, *, now: datetime) -> Claimed:
    manner = Manner()
    if row["endpoint_id"] is not None:
        manner = Manner(
            row["endpoint_id"],
            row["endpoint_version"],
            Format(row["format"]),
            row["sign_with"],
            live_secrets(row["secret"], row["old_secrets"], now=now),
            row["headers"],
            row["client_certificate"],
            row["ca_certificate"],
            row["timeout_seconds"],
            row["max_in_flight"],
            row["max_per_second"],
        )
    secrets = live_secrets(row["webhook_secret"], row["old_webhook_secrets"] or (), now=now)
    return Claimed(
        row["id"],
        row["tenant_id"],
        row["message_id"],
        row["event_type"],
        row["job_id"],
        row["target_id"],
        row["url"],
        row["payload"],
        row["trigger"],
        row["attempt_count"],
        row["max_attempts"],
        row["retry_schedule"],
        row["give_up_at"],
        manner,
        secrets if row["webhook_secret"] is not None else (),
        row["webhook_signing_key"],
        health,
    )


def _attempt(each: Finished) -> tuple[object, ...]:
    answer, timings = each.answer, each.answer.timings
    return (
        new_id(),
        each.delivery.id,
        each.delivery.attempt,
        each.delivery.trigger,
        answer.started_at,
        answer.remote_ip,
        answer.status_code,
        answer.error_class and answer.error_class.value,
        answer.error,
        timings.dns_ms,
        timings.connect_ms,
        timings.first_byte_ms,
        timings.total_ms,
        answer.request_bytes,
        json.dumps(dict(answer.headers)) if answer.headers else None,
        answer.body,
        answer.truncated,
    )
