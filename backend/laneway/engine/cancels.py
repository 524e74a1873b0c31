"""Stopping many jobs by one call: waiting ones end, running ones are asked to stop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from laneway import models
from laneway.domain.payload import to_json
from laneway.domain.states import ACTIVE, JobStatus
from laneway.engine.access.callers import Caller
from laneway.engine.outcomes import carry_out, due_of
from laneway.engine.queries import MAX_COUNTED, JobFilter, Scope
from laneway.engine.transitions import Applied, Cancel
from laneway.lanes.backend import EndedRun, LanesUnavailable, by_lane

if TYPE_CHECKING:
    from laneway.engine.service import JobService

BATCH_ROWS = 500
MAX_CANCELLED = 10_000  # by one call

j = models.jobs.c


@dataclass(frozen=True, slots=True)
class Manner:
    """How to stop: `reason` is kept with the job, the others are for handlers that run.

    One that goes on is killed after `grace_seconds` (None: the setting), or at once with `terminate`.
    """

    reason: str | None = None
    terminate: bool = False
    grace_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class ActiveJobs:
    """Which of a tenant's active jobs a call means: those that fit the filter and, if given, are in `ids`."""

    filter: JobFilter
    ids: tuple[str, ...] = ()

    def clauses(self) -> list[sa.ColumnElement[bool]]:
        active = [*self.filter.clauses(), j.status.in_(ACTIVE)]
        return [*active, j.id.in_(self.ids)] if self.ids else active


@dataclass(frozen=True, slots=True)
class Cancelled:
    """What a call did: jobs that ended, jobs that were asked to stop, and those that it left.

    `remaining` match and are left to the next call, counted up to `queries.MAX_COUNTED`. A job that was
    asked before is none of them, unless it is now to be killed at once.
    """

    cancelled: int
    cancelling: int
    remaining: int

    @property
    def matched(self) -> int:
        return self.cancelled + self.cancelling + self.remaining


def cancel_all(
    service: JobService,
    caller: Caller,
    wanted: ActiveJobs,
    manner: Manner,
    *,
    limit: int = MAX_CANCELLED,
    dry_run: bool = False,
    of_all_tenants: bool = False,
) -> Cancelled:
    """Cancel at most `limit` of the tenant's jobs, oldest first, in transactions of at most BATCH_ROWS.

    When the database fails on the way, what was cancelled before stays cancelled.
    """
    to_json(manner.reason, what="reason")
    unasked: sa.ColumnElement[bool] = j.cancel_requested_at.is_(None)
    if manner.terminate:
        unasked = sa.or_(unasked, ~j.cancel_terminate)
    whose = [] if of_all_tenants else Scope(caller.tenant_id).clauses()
    clauses = [*whose, *wanted.clauses(), unasked]
    ended = asked = 0
    # Rows that somebody has locked come second, one by one: to wait with others in hand could deadlock.
    for skip_locked in () if dry_run else (True, False):
        rows = BATCH_ROWS if skip_locked else 1
        after = ""
        while left := limit - ended - asked:
            some = _oldest(clauses, after=after, limit=min(rows, left))
            batch = _cancel(service, caller, some.with_for_update(skip_locked=skip_locked), manner)
            if not batch:
                break
            after = batch[-1].id
            waited = sum(row.status != JobStatus.RUNNING for row in batch)
            ended, asked = ended + waited, asked + len(batch) - waited
    with service.database.read() as connection:
        matching = sa.select(sa.func.count()).select_from(
            _oldest(clauses, after="", limit=MAX_COUNTED).subquery()
        )
        return Cancelled(ended, asked, remaining=connection.execute(matching).scalar_one())


def _oldest(clauses: Sequence[sa.ColumnElement[bool]], *, after: str, limit: int) -> sa.Select[Any]:
    query = sa.select(j.id, j.status, j.lane).where(*clauses).order_by(j.id).limit(limit)
    return query.where(j.id > after) if after else query


def _cancel(
    service: JobService, caller: Caller, some: sa.Select[Any], manner: Manner
) -> Sequence[sa.Row[Any]]:
    """End or ask the jobs that `some` finds and locks; what they were before."""
    now = service.clock.now()
    with service.database.write() as connection:
        rows = connection.execute(some).all()
        waiting = [row for row in rows if row.status != JobStatus.RUNNING]
        running = [row.id for row in rows if row.status == JobStatus.RUNNING]
        moves = [Cancel(row.id, by=caller.subject, reason=manner.reason) for row in waiting]
        outcomes = carry_out(connection, moves, now=now, actor=caller.subject)
        if running:
            ask_to_stop(connection, running, manner, by=caller.subject, now=now)
    try:
        for lane, ids in by_lane((row.lane, row.id) for row in waiting).items():
            service.lanes.remove(lane, ids)
        service.lanes.mirror_ended([EndedRun(row.lane, row.id, JobStatus.CANCELLED) for row in waiting])
    except LanesUnavailable:
        pass  # the ids are harmless: no claim can take a cancelled row
    service.news.changed([row.id for row in rows])
    if running:
        service.news.wished()
    if any(isinstance(o, Applied) and o.told for o in outcomes):
        service.news.ring_courier()
    service.ring(due_of(outcomes))
    return rows


def ask_to_stop(
    connection: sa.Connection, ids: Sequence[str], manner: Manner, *, by: str, now: datetime
) -> None:
    """Write the wish into the rows of running jobs: the first moment and the hardest way count."""
    connection.execute(
        sa.update(models.jobs)
        .where(j.id.in_(ids), j.status == JobStatus.RUNNING)
        .values(
            cancel_requested_at=sa.func.coalesce(
                j.cancel_requested_at, sa.literal(now, j.cancel_requested_at.type)
            ),
            cancel_terminate=sa.or_(j.cancel_terminate, sa.literal(manner.terminate)),
            cancel_grace_seconds=manner.grace_seconds,
            cancel_reason=manner.reason,
            cancelled_by=by,
            version=j.version + 1,
            updated_at=now,
        )
    )
