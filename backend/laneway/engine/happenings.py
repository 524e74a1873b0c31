"""What happens to a tenant's jobs, as one stream that can be left and resumed.

Each event bears the number of the transaction that wrote it (`job_events.tx`), and a stream is at a place:
a transaction, a job, and a number of that job's events. What comes after the place is told, in that order.

A transaction may commit after others with larger numbers, and who reads by number would pass it by. So on
PostgreSQL only events of transactions are told that are older than every one still open
(`pg_snapshot_xmin`): up to there nothing can come any more. On SQLite writers come one after the other, and
number themselves so. The promise: whoever resumes at the last id it was sent is told every event once. The
price: a transaction that stays open holds the stream up, whatever it writes to; and two events of one job
whose transactions overlapped may come the other way round, which their `seq` tells.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Self

import sqlalchemy as sa

from laneway import models
from laneway.domain.states import JobStatus
from laneway.engine.queries import Scope

REPLAYED_FOR = timedelta(hours=1)
MAX_REPLAYED = 10_000
PAGE_ROWS = 500

e = models.job_events.c
j = models.jobs.c

_PLACE = re.compile(r"(\d{1,18})(?:\.([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})\.(\d{1,9}))?")
_LAST_ID = "ffffffff-ffff-ffff-ffff-ffffffffffff"
_LAST_SEQ = 10**9

_XMIN = "CAST(CAST(pg_snapshot_xmin(pg_current_snapshot()) AS text) AS bigint)"
_XMAX = "CAST(CAST(pg_snapshot_xmax(pg_current_snapshot()) AS text) AS bigint)"
_SQLITE_NOW = "CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER)"


@dataclass(frozen=True, slots=True)
class Place:
    """What was told last. By default: all of a transaction."""

    tx: int
    job_id: str = _LAST_ID
    seq: int = _LAST_SEQ

    def __str__(self) -> str:
        return str(self.tx) if self.job_id == _LAST_ID else f"{self.tx}.{self.job_id}.{self.seq}"

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """The place of an event's id, None when it is none of ours."""
        found = _PLACE.fullmatch(text)
        if found is None:
            return None
        return cls(int(found[1]), found[2], int(found[3])) if found[2] else cls(int(found[1]))


@dataclass(frozen=True, slots=True)
class Happened:
    """Events of the scope's jobs, in order, and the place after all that was looked at."""

    events: Sequence[sa.RowMapping]
    place: Place
    more: bool


def begin(
    connection: sa.Connection, scope: Scope, last_event_id: str | None, *, now: datetime
) -> tuple[Place, bool]:
    """Where to begin, and whether events are left out on the way there.

    Without an id at this moment. With one after it; but at this moment, with a gap, when that is longer ago
    than REPLAYED_FOR, more than MAX_REPLAYED events ago, or no id of this store.
    """
    here, newest = _here(connection, scope)
    if last_event_id is None:
        return here, False
    place = Place.parse(last_event_id)
    if place is None or place.tx > newest:
        return here, True
    missed = _after(scope, place, connection.dialect.name)
    first = connection.execute(sa.select(e.at).where(*missed).order_by(e.tx).limit(1)).scalar()
    if first is None:
        return place, False
    some = sa.select(e.seq).where(*missed).limit(MAX_REPLAYED + 1).subquery()
    count = connection.execute(sa.select(sa.func.count()).select_from(some)).scalar_one()
    gap = first < now - REPLAYED_FOR or count > MAX_REPLAYED
    return (here, True) if gap else (place, False)


def after(connection: sa.Connection, scope: Scope, place: Place) -> Happened:
    """What comes after `place`: of the tenant's next PAGE_ROWS events those of the scope."""
    order = (e.tx, e.job_id, e.seq)
    some = sa.select(models.job_events).where(*_after(scope, place, connection.dialect.name))
    next_ones = some.order_by(*order).limit(PAGE_ROWS).subquery()
    n = next_ones.c
    about = (j.job_type, j.queue, j.title, j.created_by)
    query = sa.select(next_ones, *about).join(
        models.jobs, sa.and_(j.id == n.job_id, j.tenant_id == n.tenant_id)
    )
    rows = connection.execute(query.order_by(n.tx, n.job_id, n.seq)).mappings().all()
    seen = [row for row in rows if scope.subject in (None, row["created_by"])]
    end = place_of(rows[-1]) if rows else place
    return Happened(seen, end, more=len(rows) == PAGE_ROWS)


def place_of(event: sa.RowMapping) -> Place:
    """The place after an event: its id."""
    return Place(event["tx"], event["job_id"], event["seq"])


def running(connection: sa.Connection, scope: Scope, ids: Collection[str]) -> Sequence[sa.RowMapping]:
    """Those of the jobs that run, in the scope."""
    some = sa.select(j.id, j.job_type, j.queue, j.title, j.attempt)
    mine = some.where(*scope.clauses(), j.id.in_(ids), j.status == JobStatus.RUNNING)
    return connection.execute(mine).mappings().all()


def _here(connection: sa.Connection, scope: Scope) -> tuple[Place, int]:
    """The place before which nothing more can come, and the largest number there can be."""
    if connection.dialect.name == "postgresql":
        row = connection.execute(sa.text(f"SELECT {_XMIN}, {_XMAX}")).one()
        return Place(row[0] - 1), row[1]
    newest = sa.select(sa.func.max(e.tx), sa.text(_SQLITE_NOW)).where(e.tenant_id == scope.tenant_id)
    told, moment = connection.execute(newest).one()
    return Place(told or 0), max(told or 0, moment)


def _after(scope: Scope, place: Place, dialect: str) -> list[sa.ColumnElement[Any]]:
    later = sa.or_(
        e.tx > place.tx,
        e.job_id > place.job_id,
        sa.and_(e.job_id == place.job_id, e.seq > place.seq),
    )
    clauses: list[sa.ColumnElement[Any]] = [e.tenant_id == scope.tenant_id, e.tx >= place.tx, later]
    return [*clauses, e.tx < sa.literal_column(_XMIN)] if dialect == "postgresql" else clauses
