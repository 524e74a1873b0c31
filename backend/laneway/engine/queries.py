"""Reads: a job as callers see it, pages of jobs, what the queues look like."""

from __future__ import annotations

import base64
import hmac
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol
from uuid import UUID

import sqlalchemy as sa

from laneway import models
from laneway.clock import first_id
from laneway.db import utc_now
from laneway.domain.http_target import HTTP_REQUEST, REMOTE_WORKER, WAITS_FOR_REPORT, shown
from laneway.domain.spec import DEFAULT_QUEUE, Priority, queue_of
from laneway.domain.states import FINAL, JobStatus
from laneway.errors import InvalidCursor

j = models.jobs.c
w = models.workers.c
t = models.job_tags.c
MAX_COUNTED = 10_000
ID_SLACK_SECONDS = 10.0  # ids are made in order, a moment before their row: lists are walked by them
MAX_SEARCHED = 5_000  # newest rows of a list that one request with `q` looks at
SEARCH_ROWS = 1_000  # of them in one statement
MIN_ID_PREFIX = 13  # characters: `019b7a5e-4c00`, the millisecond; what is shorter may be a word of a title
_CURSOR_BYTES = 16 + 11  # an id, and the start of a MAC of it and the filters; no padding in base64

_PLAIN = (
    "id",
    "tenant_id",
    "created_by",
    "job_type",
    "parameters",
    "queue",
    "priority",
    "title",
    "description",
    "tags",
    "metadata",
    "status",
    "status_reason",
    "progress",
    "progress_message",
    "progress_details",
    "result",
    "error",
    "attempt",
    "retry_count",
    "max_retries",
    "retry_delay_seconds",
    "retry_backoff",
    "retry_max_delay_seconds",
    "retry_jitter",
    "timeout_seconds",
    "unique_key",
    "concurrency_key",
    "concurrency_limit",
    "webhook_url",
    "webhook_events",
    "webhook_delivered",
    "webhook_attempts",
    "dead_letter_reason",
    "scheduled_job_id",
    "cancelled_by",
    "on_dependency_failure",
    "batch_id",
    "chain_id",
    "chain_step",
)
_MOMENTS = (
    "created_at",
    "updated_at",
    "scheduled_for",
    "expires_at",
    "queued_at",
    "started_at",
    "finished_at",
    "next_retry_at",
)


def stamp(moment: datetime | None) -> str | None:
    """RFC 3339, UTC, microseconds, `Z`."""
    if moment is None:
        return None
    return moment.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"


def view(row: Mapping[Any, Any]) -> dict[str, Any]:
    """A job as the API answers it (docs/reference/http.md), from a row of `jobs`."""
    seen = {name: row[name] for name in _PLAIN}
    for name in _MOMENTS:
        seen[name] = stamp(row[name])
    cancelled = row["status"] == JobStatus.CANCELLED
    seen["cancelled_at"] = seen["finished_at"] if cancelled else None
    seen["cancelling"] = row["cancel_requested_at"] is not None and row["finished_at"] is None
    seen["worker"] = row["worker_id"]
    seen["depends_on"] = row["depends_on"] or []
    seen["position"] = None  # told of a single job only (engine/positions.py)
    if row["job_type"] == HTTP_REQUEST:
        seen["parameters"] = shown(row["parameters"])
        if row["worker_id"] == REMOTE_WORKER:
            seen["worker"], seen["status_reason"] = None, WAITS_FOR_REPORT
    return seen


@dataclass(frozen=True, slots=True)
class Scope:
    """Whose rows a read may see: a tenant's, or one subject's of that tenant."""

    tenant_id: str
    subject: str | None = None

    def clauses(self) -> list[sa.ColumnElement[bool]]:
        mine = [j.tenant_id == self.tenant_id]
        return mine if self.subject is None else [*mine, j.created_by == self.subject]


def find_job(
    connection: sa.Connection, job_id: str, scope: Scope, *, lock: bool = False
) -> sa.RowMapping | None:
    """The row, or None when it does not exist for this scope.

    With `lock` nobody else changes it before the transaction ends (SQLite's write transactions are alone).
    """
    query = sa.select(models.jobs).where(j.id == job_id, *scope.clauses())
    return connection.execute(query.with_for_update() if lock else query).mappings().first()


def find_active(connection: sa.Connection, scope: Scope, unique_key: str) -> sa.RowMapping | None:
    """The active job that holds `unique_key`, if it is one that this scope may see."""
    active = sa.select(models.jobs).where(
        *scope.clauses(), j.unique_key == unique_key, j.finished_at.is_(None)
    )
    return connection.execute(active).mappings().first()


Clauses = list[sa.ColumnElement[bool]]


class Filter(Protocol):
    """Which jobs a list holds. Its `repr` tells it from every other."""

    def clauses(self) -> Clauses: ...


def _in_statuses(statuses: Sequence[JobStatus]) -> sa.ColumnElement[bool]:
    """Written out, not bound: a plan that fits every status walks all of a tenant's jobs to find a few.

    Each active status has a partial index; the final ones share `ix_jobs_ended`.
    """
    wanted = sa.or_(*(sa.literal_column(f"jobs.status = '{status.value}'") for status in statuses))
    return sa.and_(wanted, j.finished_at.is_not(None)) if FINAL.issuperset(statuses) else wanted


def equal_to(*wanted: tuple[sa.ColumnElement[Any], object]) -> Clauses:
    """The columns that shall have a value; None means any."""
    return [column == str(value) for column, value in wanted if value is not None]


def between(column: sa.ColumnElement[Any], after: datetime | None, before: datetime | None) -> Clauses:
    """A range of moments, without its ends; None is open."""
    return [
        *([column > after] if after is not None else []),
        *([column < before] if before is not None else []),
    ]


def made_between(table: sa.Table, after: datetime | None, before: datetime | None) -> Clauses:
    """A range of `created_at`. Lists are walked by id: the bounds of the ids spare them the rest."""
    ids = table.c.id
    return [
        *between(table.c.created_at, after, before),
        *([ids > first_id(after, seconds=-ID_SLACK_SECONDS)] if after is not None else []),
        *([ids < first_id(before, seconds=ID_SLACK_SECONDS)] if before is not None else []),
    ]


@dataclass(frozen=True, slots=True)
class JobFilter:
    """Equality filters of `GET /jobs`; None means any."""

    statuses: tuple[JobStatus, ...] = ()
    job_type: str | None = None
    queue: str | None = None
    priority: Priority | None = None
    created_after: datetime | None = None
    created_before: datetime | None = None
    tag: str | None = None
    batch_id: str | None = None
    chain_id: str | None = None
    scheduled_job_id: str | None = None

    def clauses(self) -> Clauses:
        return [
            *([_in_statuses(self.statuses)] if self.statuses else []),
            *equal_to((j.job_type, self.job_type), (j.queue, self.queue), (j.priority, self.priority)),
            *equal_to((j.batch_id, self.batch_id), (j.chain_id, self.chain_id)),
            *equal_to((j.scheduled_job_id, self.scheduled_job_id)),
            *made_between(models.jobs, self.created_after, self.created_before),
            *(_tagged(self.tag) if self.tag is not None else []),
        ]


def _tagged(tag: str) -> Clauses:
    """Joined, not asked for each job: the list is walked along the index on tenant, tag and job."""
    return [t.job_id == j.id, t.tenant_id == j.tenant_id, t.tag == tag]


def page_of_jobs(
    connection: sa.Connection, scope: Scope, wanted: Filter, *, limit: int, before: str | None
) -> tuple[list[sa.RowMapping], bool]:
    """At most `limit` jobs, newest first, and whether more follow.

    `before` is the last id of the page before.
    """
    query = (
        sa.select(models.jobs)
        .where(*scope.clauses(), *wanted.clauses())
        .order_by(j.id.desc())
        .limit(limit + 1)
    )
    if before is not None:
        query = query.where(j.id < before)
    rows = list(connection.execute(query).mappings())
    return rows[:limit], len(rows) > limit


def search_jobs(
    connection: sa.Connection, scope: Scope, wanted: Filter, text: str, *, limit: int, before: str | None
) -> tuple[list[sa.RowMapping], str | None]:
    """At most `limit` jobs whose title, one of whose tags, or whose id's start holds `text`, newest first.

    Looks at MAX_SEARCHED rows, then leaves the rest to the next page: the id from which that goes on, None
    at the end of the list. A text in the form of an id's first 13 characters, or more, is an id: found by
    its index, however old. Case does not count, in any script, so the rows are compared here.
    """
    sought = text.strip().casefold()
    narrowed = [*scope.clauses(), *wanted.clauses()]
    low, high = (sought + bound[len(sought) :] for bound in _ID_BOUNDS)
    if len(sought) >= MIN_ID_PREFIX and _ID.fullmatch(low):
        narrowed += [j.id >= low, j.id <= high]
    found: list[str] = []
    place, looked = before, 0
    while looked < MAX_SEARCHED and len(found) <= limit:
        some = sa.select(j.id, j.title, j.tags).where(*narrowed).order_by(j.id.desc()).limit(SEARCH_ROWS)
        rows = connection.execute(some if place is None else some.where(j.id < place)).all()
        found += [row.id for row in rows if _holds(row.id, row.title, row.tags, sought)]
        if len(rows) < SEARCH_ROWS:
            place = None
            break
        place, looked = rows[-1].id, looked + len(rows)
    if len(found) > limit:
        found, place = found[:limit], found[limit - 1]
    every = sa.select(models.jobs).where(*scope.clauses(), j.id.in_(found)).order_by(j.id.desc())
    return list(connection.execute(every).mappings()) if found else [], place


_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_ID_BOUNDS = ("00000000-0000-0000-0000-000000000000", "ffffffff-ffff-ffff-ffff-ffffffffffff")


def _holds(job_id: str, title: str | None, tags: Sequence[str], sought: str) -> bool:
    texts = [*tags] if title is None else [title, *tags]
    return job_id.startswith(sought) or any(sought in text.casefold() for text in texts)


_signing_keys = [secrets.token_bytes(32)]


def sign_cursors(keys: Iterable[bytes]) -> None:
    """Sign cursors with the first of these keys, and take what any of them signed.

    Before this was called, and without keys, cursors hold in this process only.
    """
    _signing_keys[:] = list(keys) or [secrets.token_bytes(32)]


def encode_cursor(last_id: str, scope: Scope, wanted: object) -> str:
    """An opaque place in a list, bound to whose list it is and to its filters."""
    place = UUID(last_id).bytes
    return base64.urlsafe_b64encode(place + _mac(_signing_keys[0], place, scope, wanted)).decode()


def decode_cursor(cursor: str, scope: Scope, wanted: object) -> str:
    """The id a cursor stands for. Raises InvalidCursor when it is bent or was made for another list."""
    try:
        read = base64.b64decode(cursor, altchars=b"-_", validate=True)
    except ValueError:
        raise InvalidCursor from None
    place, mac = read[:16], read[16:]
    signed = [hmac.compare_digest(mac, _mac(key, place, scope, wanted)) for key in _signing_keys]
    if len(read) != _CURSOR_BYTES or not any(signed):
        raise InvalidCursor
    return str(UUID(bytes=place))


def newest_first(
    connection: sa.Connection,
    query: sa.Select[Any],
    ids: sa.ColumnElement[str],
    *,
    bound: tuple[Scope, object],
    limit: int,
    cursor: str | None,
) -> tuple[Sequence[sa.RowMapping], str | None]:
    """A page of what `query` finds, by its column `id` from the newest on, and the cursor of the next page.

    Cursors are `bound` to whose list it is, and of what. Raises InvalidCursor.
    """
    if cursor:
        query = query.where(ids < decode_cursor(cursor, *bound))
    rows = connection.execute(query.order_by(ids.desc()).limit(limit + 1)).mappings().all()
    following = encode_cursor(rows[limit - 1]["id"], *bound) if len(rows) > limit else None
    return rows[:limit], following


def _mac(key: bytes, place: bytes, scope: Scope, wanted: object) -> bytes:
    return hmac.digest(key, place + repr((scope, wanted)).encode(), "sha256")[: _CURSOR_BYTES - 16]


def events_after(connection: sa.Connection, job_id: str, seq: int) -> Sequence[sa.RowMapping]:
    """The job's transitions after `seq`, in order."""
    e = models.job_events
    return (
        connection.execute(sa.select(e).where(e.c.job_id == job_id, e.c.seq > seq).order_by(e.c.seq))
        .mappings()
        .all()
    )


def lane_state(
    connection: sa.Connection, lanes: Sequence[str], *, now: datetime
) -> dict[str, dict[str, Any]]:
    """Per lane: rows queued (counted up to MAX_COUNTED) and the age in seconds of the oldest."""
    states: dict[str, dict[str, Any]] = {}
    for lane in lanes:
        queued = sa.select(j.queued_at).where(j.lane == lane, j.status == JobStatus.QUEUED)
        oldest = connection.execute(queued.order_by(j.queued_at, j.id).limit(1)).scalar()
        some = queued.limit(MAX_COUNTED).subquery()
        count = connection.execute(sa.select(sa.func.count()).select_from(some)).scalar_one()
        age = max(0.0, (now - oldest).total_seconds()) if oldest is not None else None
        states[lane] = {"queued": count, "oldest_age_seconds": age}
    return states


def status_counts(connection: sa.Connection, tenant_id: str | None) -> dict[str, int]:
    """A tenant's active jobs by status, or everybody's, each counted up to MAX_COUNTED."""
    whose = [] if tenant_id is None else [j.tenant_id == tenant_id]
    counts: dict[str, int] = {}
    for status in JobStatus:
        if status in FINAL:
            continue
        some = sa.select(j.id).where(*whose, _in_statuses([status])).limit(MAX_COUNTED).subquery()
        counts[status] = connection.execute(sa.select(sa.func.count()).select_from(some)).scalar_one()
    return counts


def lanes_with_work(connection: sa.Connection) -> list[str]:
    """The lanes that have queued rows: one index probe a lane, however many rows."""
    lanes: list[str] = []
    while True:
        query = sa.select(j.lane).where(j.status == JobStatus.QUEUED).order_by(j.lane).limit(1)
        if lanes:
            query = query.where(j.lane > lanes[-1])
        lane = connection.execute(query).scalar()
        if lane is None:
            return lanes
        lanes.append(lane)


def known_queues(connection: sa.Connection) -> list[str]:
    """The default queue, those with queued rows, and those that living workers serve."""
    served = connection.execute(sa.select(w.lanes).where(w.state.in_(("active", "draining")))).scalars()
    lanes = {lane for lanes in served for lane in lanes} | set(lanes_with_work(connection))
    return sorted({DEFAULT_QUEUE} | {queue_of(lane) for lane in lanes})


def is_served(connection: sa.Connection, *, lane: str, job_type: str, within_seconds: float) -> bool:
    """Whether a worker that beat within so many seconds of the database's clock takes such jobs.

    One that does not say which types it knows is taken to know this one.
    """
    active = sa.select(w.lanes, w.job_types, w.beat_at, utc_now().label("now")).where(w.state == "active")
    return any(
        lane in row.lanes
        and (row.job_types is None or job_type in row.job_types)
        and (row.now - row.beat_at).total_seconds() <= within_seconds
        for row in connection.execute(active)
    )


def living_workers(connection: sa.Connection, *, within_seconds: float) -> list[dict[str, Any]]:
    """Workers that beat within the last so many seconds of the database's clock."""
    now = connection.execute(sa.select(utc_now())).scalar_one()
    rows = connection.execute(
        sa.select(models.workers).where(w.state.in_(("active", "draining"))).order_by(w.id)
    )
    living = []
    for row in rows:
        age = (now - row.beat_at).total_seconds()
        if age <= within_seconds:
            living.append(
                {
                    "id": row.id,
                    "name": row.name,
                    "state": row.state,
                    "lanes": row.lanes,
                    "held": len(row.held),
                    "beat_age_seconds": max(0.0, age),
                }
            )
    return living
