"""Worker rows: who is alive, what it holds, and what its jobs are asked to do.

A worker process makes one row when it starts, under a new id, and beats: one UPDATE that counts up and
names the lease tokens it holds. The lease is in that count, not in a clock: a reaper calls a worker
silent when the count has not moved for one lease of the reaper's own monotonic time (`engine/reaper.py`).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa

from laneway import __version__, models
from laneway.db import Database, utc_now
from laneway.domain.states import JobStatus
from laneway.engine.turns import tenant_weights, waiting_tenants
from laneway.lanes.turns import FairPicks

w = models.workers.c
j = models.jobs.c


@dataclass(frozen=True, slots=True)
class Wish:
    """Somebody asked a running job to stop."""

    job_id: str
    lease_token: str
    terminate: bool
    grace_seconds: float | None


def register(
    database: Database,
    *,
    worker_id: str,
    name: str,
    lanes: Sequence[str],
    job_types: Sequence[str] | None = None,
    replaces: str | None = None,
) -> None:
    """Make the worker's row. `job_types` are those it can run; None does not say.

    `replaces` is who the process was until it lost its lease. It is gone from the same moment on: were it
    taken for dead, its jobs would be blamed.
    """
    with database.write() as connection:
        if replaces is not None:
            _leave(connection, replaces, "gone")
        connection.execute(
            sa.insert(models.workers).values(
                id=worker_id,
                name=name[:200],
                host=socket.gethostname()[:200],
                pid=os.getpid(),
                version=__version__,
                lanes=list(lanes),
                job_types=None if job_types is None else list(job_types),
                state="active",
                held=[],
            )
        )


def beat(
    database: Database, *, worker_id: str, held: Sequence[str], begun: Sequence[str] | None = None
) -> list[Wish] | None:
    """Say that the worker lives, what it holds, and what of that has begun.

    Returns the wishes for its jobs. None: it was declared dead.
    """
    beating = (
        sa.update(models.workers)
        .where(w.id == worker_id, w.state.in_(("active", "draining")))
        .values(beat=w.beat + 1, beat_at=utc_now(), held=list(held), begun=begun)
    )
    wished = sa.select(j.id, j.lease_token, j.cancel_terminate, j.cancel_grace_seconds).where(
        j.worker_id == worker_id, j.status == JobStatus.RUNNING, j.cancel_requested_at.is_not(None)
    )
    with database.write() as connection:
        if not connection.execute(beating).rowcount:
            return None
        return [
            Wish(row.id, row.lease_token, bool(row.cancel_terminate), row.cancel_grace_seconds)
            for row in connection.execute(wished)
        ]


def leave(database: Database, *, worker_id: str, state: str = "gone") -> None:
    """Mark the worker as draining, or as gone after it let go of everything."""
    with database.write() as connection:
        _leave(connection, worker_id, state)


def _leave(connection: sa.Connection, worker_id: str, state: str) -> None:
    living = (w.id == worker_id, w.state.in_(("active", "draining")))
    connection.execute(sa.update(models.workers).where(*living).values(state=state))


def find_queued(
    connection: sa.Connection,
    lanes: Sequence[str],
    job_types: Sequence[str],
    *,
    limit: int,
    before: datetime,
    picks: dict[str, FairPicks] | None = None,
) -> list[str]:
    """The slow path: ids of queued rows of `lanes`, most urgent lane first, queued before `before`.

    Inside a lane tenants take turns. `picks`, a dict that the caller keeps, remembers those of earlier calls.
    """
    found: list[str] = []
    fit = (j.queued_at <= before, j.job_type.in_(job_types))
    weights: dict[str, int] | None = None
    for lane in lanes:
        if len(found) >= limit:
            break
        tenants = waiting_tenants(connection, lane)
        if not tenants:
            continue
        if weights is None:
            weights = tenant_weights(connection)
        of_lane = FairPicks() if picks is None else picks.setdefault(lane, FairPicks())
        rows: dict[str, Sequence[str]] = {}
        for tenant_id in of_lane.order(tenants):
            queued = sa.select(j.id).where(
                j.lane == lane, j.status == JobStatus.QUEUED, j.tenant_id == tenant_id, *fit
            )
            oldest = queued.order_by(j.queued_at, j.id).limit(limit - len(found))
            if ids := connection.execute(oldest).scalars().all():
                rows[tenant_id] = ids
            if len(rows) + len(found) >= limit:  # who is next in turn has been asked
                break
        found += of_lane.pick(rows, weights, limit=limit - len(found))
    return found
