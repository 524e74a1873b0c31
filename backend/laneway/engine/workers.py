"""The worker registry as operators see it: who there is, who left, and what each one holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from laneway import models
from laneway.db import Database, utc_now
from laneway.domain.states import JobStatus
from laneway.engine import queries
from laneway.engine.access.callers import Caller
from laneway.engine.queries import Scope, stamp
from laneway.engine.reaper import LIVING
from laneway.errors import NotFound

MAX_HELD_SHOWN = 100  # ids of held jobs, of each worker

j = models.jobs.c
w = models.workers.c


def page(
    database: Database, caller: Caller, states: Sequence[str], *, limit: int, cursor: str | None
) -> tuple[list[dict[str, Any]], str | None]:
    """Workers in these states (none: the living ones), newest first, and the cursor of the next page.

    Raises InvalidCursor.
    """
    wanted = tuple(sorted(states)) or LIVING
    bound = (Scope(caller.tenant_id), ("workers", wanted))
    query = sa.select(models.workers).where(w.state.in_(wanted))
    with database.read() as connection:
        rows, following = queries.newest_first(
            connection, query, w.id, bound=bound, limit=limit, cursor=cursor
        )
        return _views(connection, rows, caller), following


def get(database: Database, worker_id: str, caller: Caller) -> dict[str, Any]:
    """The worker. Raises NotFound."""
    with database.read() as connection:
        query = sa.select(models.workers).where(w.id == worker_id)
        shown = _views(connection, connection.execute(query).mappings().all(), caller)
    if not shown:
        raise NotFound(f"there is no worker {worker_id}; GET /workers lists them", worker_id=worker_id)
    return shown[0]


def _views(connection: sa.Connection, rows: Sequence[sa.RowMapping], caller: Caller) -> list[dict[str, Any]]:
    """As the API answers them. Of other tenants' jobs only the number is told."""
    ids = [row["id"] for row in rows]
    running = (j.status == JobStatus.RUNNING, j.worker_id.in_(ids))
    held = sa.select(j.worker_id, sa.func.count().label("held")).where(*running).group_by(j.worker_id)
    counts = {row.worker_id: row.held for row in connection.execute(held)}
    place = sa.func.row_number().over(partition_by=j.worker_id, order_by=j.id).label("place")
    mine = sa.select(j.worker_id, j.id, place).where(*running, j.tenant_id == caller.tenant_id).subquery()
    jobs: dict[str, list[str]] = {}
    first = sa.select(mine.c.worker_id, mine.c.id).where(mine.c.place <= MAX_HELD_SHOWN)
    for worker_id, job_id in connection.execute(first.order_by(mine.c.id)):
        jobs.setdefault(worker_id, []).append(job_id)
    now = connection.execute(sa.select(utc_now())).scalar_one()
    return [
        {name: row[name] for name in ("id", "name", "host", "pid", "version", "state", "lanes")}
        | {
            "held": counts.get(row["id"], 0),
            "held_jobs": jobs.get(row["id"], []),
            "beat_age_seconds": max(0.0, (now - row["beat_at"]).total_seconds()),
            "started_at": stamp(row["started_at"]),
        }
        for row in rows
    ]
