"""What admins do across tenants: look at all jobs, end one by hand, delete old ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import sqlalchemy as sa

from laneway import models
from laneway.domain.payload import to_json
from laneway.domain.states import FINAL, JobStatus
from laneway.engine import queries
from laneway.engine.access.audit import AuditAction, record
from laneway.engine.access.callers import Caller
from laneway.engine.outcomes import carry_out, due_of
from laneway.engine.queries import MAX_COUNTED, Clauses, JobFilter, Scope, equal_to
from laneway.engine.retention import BATCH_ROWS, delete_jobs
from laneway.engine.service import JobService
from laneway.engine.transitions import Applied, ForceComplete
from laneway.errors import IllegalTransition, JobNotFound
from laneway.lanes.backend import EndedRun, LanesUnavailable
from laneway.webhooks.retries import UNDONE

MAX_CLEANED_UP = 10_000  # by one call
CLEANED_UP_UNNAMED = (JobStatus.COMPLETED, JobStatus.CANCELLED, JobStatus.EXPIRED)
"""What a cleanup deletes that names no statuses: dead letters are kept."""

j = models.jobs.c
d = models.webhook_deliveries.c


@dataclass(frozen=True, slots=True)
class AdminFilter:
    """Which jobs of which tenants; None means any."""

    jobs: JobFilter
    tenant_id: str | None = None
    created_by: str | None = None

    def clauses(self) -> Clauses:
        return [
            *equal_to((j.tenant_id, self.tenant_id), (j.created_by, self.created_by)),
            *self.jobs.clauses(),
        ]


class _Everybody(Scope):
    """No tenant's rows, but all tenants'."""

    def clauses(self) -> Clauses:
        return []


def page_of_jobs(
    service: JobService,
    caller: Caller,
    wanted: AdminFilter,
    *,
    q: str | None = None,
    limit: int,
    cursor: str | None,
) -> tuple[list[dict[str, Any]], str | None]:
    """Jobs of all tenants, newest first, and the cursor of the next page. Raises InvalidCursor.

    `q` searches them as `JobService.page` does.
    """
    everybody = _Everybody("")
    bound = (Scope(caller.tenant_id), ("admin", wanted, q))
    before = queries.decode_cursor(cursor, *bound) if cursor else None
    with service.database.read() as connection:
        if q is not None:
            rows, place = queries.search_jobs(connection, everybody, wanted, q, limit=limit, before=before)
        else:
            rows, more = queries.page_of_jobs(connection, everybody, wanted, limit=limit, before=before)
            place = rows[-1]["id"] if more else None
    following = queries.encode_cursor(place, *bound) if place else None
    return [queries.view(row) for row in rows], following


def force_complete(
    service: JobService, job_id: str, caller: Caller, *, result: Any = None, reason: str | None = None
) -> dict[str, Any]:
    """End a job of any tenant as completed with this result; the job.

    A handler that still runs goes on to its end, and what it reports is discarded: its lease is void.
    Raises JobNotFound, IllegalTransition for a completed job, InvalidPayload, PayloadTooLarge.
    """
    text = to_json(result, what="result")
    to_json(reason, what="reason")
    move = ForceComplete(job_id, text, reason)
    with service.database.write() as connection:
        [outcome] = carry_out(connection, [move], now=service.clock.now(), actor=caller.subject)
        if not isinstance(outcome, Applied):
            if outcome.status is None:
                raise JobNotFound(f"there is no job {job_id}", job_id=job_id)
            raise IllegalTransition(f"the job is {outcome.status}", current_status=outcome.status)
        record(connection, caller, AuditAction.JOB_FORCE_COMPLETED, f"job:{job_id}", {"reason": reason})
        row = connection.execute(sa.select(models.jobs).where(j.id == job_id)).mappings().one()
    try:
        service.lanes.remove(row["lane"], [job_id])
        service.lanes.mirror_ended([EndedRun(row["lane"], job_id, JobStatus.COMPLETED)])
    except LanesUnavailable:
        pass  # the id is harmless: no claim can take a completed row
    service.ring(due_of([outcome]))
    service.news.changed([job_id])
    if outcome.told:
        service.news.ring_courier()
    return queries.view(row)


@dataclass(frozen=True, slots=True)
class CleanedUp:
    """What a cleanup deleted, or would; `remaining` match too, counted up to MAX_COUNTED."""

    by_status: dict[str, int]
    remaining: int

    @property
    def deleted(self) -> int:
        return sum(self.by_status.values())


def clean_up(
    service: JobService,
    caller: Caller,
    *,
    older_than: timedelta,
    statuses: Sequence[JobStatus] = CLEANED_UP_UNNAMED,
    limit: int = MAX_CLEANED_UP,
    dry_run: bool = False,
) -> CleanedUp:
    """Delete at most `limit` jobs of all tenants that ended so long ago, with all that hangs on them.

    A transaction deletes at most BATCH_ROWS. Jobs with a webhook that is still to be delivered are kept.
    When the database fails on the way, what was deleted is gone.
    """
    before = service.clock.now() - older_than
    undone = sa.exists().where(d.job_id == j.id, d.status.in_(UNDONE))
    kinds = [
        (status, [j.status == status, j.finished_at <= before, ~undone])
        for status in sorted(FINAL.intersection(statuses))
    ]
    counts: Counter[str] = Counter()
    if dry_run:
        with service.database.read() as connection:
            found = {status: _count(connection, clauses) for status, clauses in kinds}
        return CleanedUp({status.value: count for status, count in found.items()}, sum(found.values()))
    facts = {"older_than_days": older_than.days, "statuses": [status.value for status, _ in kinds]}
    with service.database.write() as connection:  # before the first step: the log tells also of half of it
        record(connection, caller, AuditAction.JOBS_CLEANED_UP, "jobs:all", facts)
    for status, clauses in kinds:
        while left := limit - counts.total():
            oldest = sa.select(j.id).where(*clauses).order_by(j.finished_at).limit(min(BATCH_ROWS, left))
            with service.database.write() as connection:
                ids = connection.execute(oldest.with_for_update(skip_locked=True)).scalars().all()
                gone = delete_jobs(connection, ids) if ids else []
            counts[status.value] += len(gone)
            if not gone:
                break
    with service.database.read() as connection:
        remaining = min(MAX_COUNTED, sum(_count(connection, clauses) for _, clauses in kinds))
    return CleanedUp({status.value: counts[status] for status, _ in kinds}, remaining)


def _count(connection: sa.Connection, clauses: Clauses) -> int:
    some = sa.select(j.id).where(*clauses).limit(MAX_COUNTED).subquery()
    return connection.execute(sa.select(sa.func.count()).select_from(some)).scalar_one()
