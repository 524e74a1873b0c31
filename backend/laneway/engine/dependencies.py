"""Jobs that wait for others: `depends_on`.

A job that waits is made `blocked`, with a row for each job it waits for. In the same transaction `tie`
locks those jobs before it looks where they are, counts what has ended, and marks the active ones as
`linked` before it lets go. So a parent that ends at the same moment has either ended already, or finds the
mark and the dependency when its own UPDATE gets the row. Each dependency is deleted in the transaction
that counts it: an end moves the child's `dependencies_left` exactly once. A job can name only jobs that
exist, so no two wait for each other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache

import sqlalchemy as sa

from laneway import models
from laneway.db import Moment, Rows
from laneway.domain.states import FINAL, JobStatus
from laneway.engine import transitions
from laneway.engine.queries import Scope
from laneway.engine.telling import tell
from laneway.engine.transitions import Applied, Cancel, Enqueue, LinkedJob, Move, NewJob
from laneway.errors import FieldError, UnknownDependency

MAX_RELEASED = 1_000
"""Dependencies counted by one step; what a parent has beyond these follows in the next."""

BY = "laneway"
WAITS = "waits_for_jobs"
FAILED = "dependency_failed"

j = models.jobs.c
d = models.job_dependencies.c

_LEFT = Rows(job_id="id", dependencies_left="int", reason="text")
_ROWS = 1_000

Ends = Mapping[str, Mapping[str, JobStatus]]
"""By job that waits: the jobs it waited for, and how they ended."""


def waiting(row: NewJob, parents: Sequence[str], *, on_failure: str) -> NewJob:
    """The row to be of a job that waits for `parents`: as it is, when there are none."""
    if not parents:
        return row
    return LinkedJob.of(
        row,
        status=JobStatus.BLOCKED.value,
        status_reason=_waits_for(len(parents)),
        queued_at=None,
        depends_on=json.dumps(parents, separators=(",", ":")),
        on_dependency_failure=on_failure,
        dependencies_left=len(parents),
    )


def tie(connection: sa.Connection, made: Sequence[tuple[NewJob, Scope]], *, now: datetime) -> None:
    """Let new jobs, made in this transaction, wait for those they depend on that are still active.

    Each comes with what its caller may see. Raises UnknownDependency for anything else.
    """
    parents_of = {
        job.id: json.loads(job.depends_on)
        for job, _ in made
        if isinstance(job, LinkedJob) and job.depends_on is not None
    }
    if not parents_of:
        return
    ids = sorted({parent for parents in parents_of.values() for parent in parents})
    rows = _lock(connection, ids)
    dependencies: list[dict[str, str]] = []
    ended: dict[str, dict[str, JobStatus]] = {}
    for job, scope in made:
        for place, parent in enumerate(parents_of.get(job.id, ())):
            status = _status(rows.get(parent), scope, place, parent)
            if status in FINAL:
                ended.setdefault(job.id, {})[parent] = status
            else:
                dependencies.append({"parent_id": parent, "job_id": job.id, "tenant_id": job.tenant_id})
    if dependencies:
        connection.execute(sa.insert(models.job_dependencies), dependencies)
        active = sorted({each["parent_id"] for each in dependencies})
        for some in _parts(active):
            connection.execute(sa.update(models.jobs).where(j.id.in_(some), ~j.linked).values(linked=True))
    for some in _parts(sorted(ended)):
        moves = _count(connection, {job_id: ended[job_id] for job_id in some}, now=now)
        tell(connection, moves, now=now)
        transitions.leave_to_sweep(connection, [a.row["id"] for a in moves if a.status in FINAL])


def release(
    connection: sa.Connection, ended: Mapping[str, JobStatus], *, now: datetime
) -> tuple[list[Applied], bool]:
    """Count the ends of these jobs for those that wait for them.

    The moves that were made: jobs whose last dependency it was are queued, those that wait for what failed
    are cancelled. And whether more of them wait than MAX_RELEASED.
    """
    some = sa.select(d.job_id, d.parent_id).where(d.parent_id.in_(ended)).order_by(d.job_id, d.parent_id)
    found = connection.execute(some.limit(MAX_RELEASED)).all()
    if not found:
        return [], False
    more = len(found) == MAX_RELEASED
    ends: dict[str, dict[str, JobStatus]] = {}
    for row in found:
        ends.setdefault(row.job_id, {})[row.parent_id] = ended[row.parent_id]
    if more:  # the last job may have dependencies beyond these: it is counted as a whole, or not yet
        ends.popitem()
    connection.execute(sa.delete(models.job_dependencies).where(d.parent_id.in_(ended), d.job_id.in_(ends)))
    return _count(connection, ends, now=now), more


def _lock(connection: sa.Connection, ids: Sequence[str]) -> dict[str, sa.Row[tuple[str, str, str, str]]]:
    rows: dict[str, sa.Row[tuple[str, str, str, str]]] = {}
    for some in _parts(ids):
        known = sa.select(j.id, j.tenant_id, j.created_by, j.status).where(j.id.in_(some)).order_by(j.id)
        rows |= {row.id: row for row in connection.execute(known.with_for_update())}
    return rows


def _status(
    row: sa.Row[tuple[str, str, str, str]] | None, scope: Scope, place: int, parent: str
) -> JobStatus:
    visible = row is not None and row.tenant_id == scope.tenant_id
    if row is None or not visible or scope.subject not in (None, row.created_by):
        detail = f"there is no job {parent}"
        error = FieldError(f"/depends_on/{place}", detail, UnknownDependency.code)
        raise UnknownDependency(detail, errors=(error,))
    return JobStatus(row.status)


def _count(connection: sa.Connection, ends: Ends, *, now: datetime) -> list[Applied]:
    """Take these ends off what the jobs wait for; those that wait no more start, or never will."""
    waiting = (
        sa.select(j.id, j.tenant_id, j.dependencies_left, j.on_dependency_failure)
        .where(j.id.in_(ends), j.status == JobStatus.BLOCKED, j.dependencies_left > 0)
        .order_by(j.id)
        .with_for_update()
    )
    moves: list[Move] = []
    changes: list[tuple[str, int, str | None]] = []
    for row in connection.execute(waiting):
        left = row.dependencies_left - len(ends[row.id])
        failed = next((p for p, end in ends[row.id].items() if end is not JobStatus.COMPLETED), None)
        reason: str | None = _waits_for(left)
        if failed is not None and row.on_dependency_failure == "cancel":
            reason = f"{FAILED}: {failed}"
            moves.append(Cancel(row.id, by=BY, reason=reason))
        elif left == 0:
            moves.append(Enqueue(row.id))
        changes.append((row.id, left, reason))
    if changes:
        dialect = connection.dialect.name
        connection.execute(_count_down(dialect), {"now": now, **_LEFT.bind(dialect, changes)})
    outcomes = transitions.apply(connection, moves, now=now, actor=BY) if moves else []
    return [o for o in outcomes if isinstance(o, Applied)]


@cache
def _count_down(dialect: str) -> sa.TextClause:
    return sa.text(
        "UPDATE jobs SET dependencies_left = u.dependencies_left, status_reason = u.reason,"  # noqa: S608
        " version = jobs.version + 1, updated_at = :now"
        f" FROM {_LEFT.sql(dialect)} WHERE {_LEFT.match(dialect, 'jobs.id')}"
    ).bindparams(sa.bindparam("now", type_=Moment))


def _waits_for(left: int) -> str:
    return f"{WAITS}: {left}"


def _parts(ids: Sequence[str]) -> list[Sequence[str]]:
    """At most _ROWS at a time: a statement has only so many parameters."""
    return [ids[first : first + _ROWS] for first in range(0, len(ids), _ROWS)]
