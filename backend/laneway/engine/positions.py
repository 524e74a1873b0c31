"""How many jobs are before a waiting one: of its tenant in its lane, or of those that wait for its slots."""

from __future__ import annotations

import sqlalchemy as sa

from laneway import models
from laneway.domain.spec import Priority
from laneway.domain.states import JobStatus
from laneway.engine.concurrency import KEY_FULL, TENANT_FULL, waits_for

MAX_POSITION = 1_000
"""Who is further back is not told where: nothing is read of those beyond."""

j = models.jobs.c


def position(connection: sa.Connection, row: sa.RowMapping) -> int | None:
    """1 for the next; None for a job that is in no line, or behind MAX_POSITION others."""
    mine = [j.tenant_id == row["tenant_id"]]
    if row["status"] == JobStatus.QUEUED:
        queued: sa.ColumnElement[bool] = sa.literal_column("jobs.status = 'queued'")
        lines = [[*mine, queued, j.lane == row["lane"], _before(row)]]
    elif row["status"] == JobStatus.BLOCKED and row["status_reason"] in (KEY_FULL, TENANT_FULL):
        line = [*mine, waits_for(row["status_reason"])]
        if row["status_reason"] == KEY_FULL:
            line.append(j.concurrency_key == row["concurrency_key"])
        own = list(Priority).index(Priority(row["priority"]))
        lines = [[*line, j.priority == priority.value] for priority in list(Priority)[: own + 1]]
        lines[-1].append(_before(row))
    else:
        return None
    ahead = sa.union_all(
        *(sa.select(j.id).where(*line).limit(MAX_POSITION).subquery().select() for line in lines)
    )
    some = sa.select(sa.func.count()).select_from(ahead.limit(MAX_POSITION).subquery())
    count = connection.execute(some).scalar_one()
    return count + 1 if count < MAX_POSITION else None


def _before(row: sa.RowMapping) -> sa.ColumnElement[bool]:
    return sa.or_(j.queued_at < row["queued_at"], sa.and_(j.queued_at == row["queued_at"], j.id < row["id"]))
