"""The sweep over what hangs together: what jobs' ends left over, and runs of chains that are to stop.

Any number of processes may run it. What it finds, it finds by the rows alone, so whatever died before is
gone on with: an end without its mark, a run past its deadline, a run somebody wished to stop.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa

from laneway import models
from laneway.db import Database
from laneway.domain.states import ACTIVE, JobStatus
from laneway.engine import flow
from laneway.engine.cancels import Manner, ask_to_stop
from laneway.engine.chain_runs import BY, ask_runs_to_stop
from laneway.engine.outcomes import carry_out
from laneway.engine.telling import tell
from laneway.engine.transitions import Cancel
from laneway.lanes.backend import Due

SWEEP_LIMIT = 200
TOO_LONG = "the run took longer than the chain's timeout"

j = models.jobs.c
r = models.chain_runs.c


def sweep(database: Database, *, now: datetime) -> list[Due]:
    """Go on with what is left over; jobs that may start since, to be rung."""
    due = _catch_up(database, now=now)
    late = sa.select(r.id).where(
        r.deadline_at <= now, r.finished_at.is_(None), r.deadline_at.is_not(None), r.stopping.is_(None)
    )
    stopping = sa.select(r.id).where(r.finished_at.is_(None), r.stopping.is_not(None))
    with database.read() as connection:
        overdue = connection.execute(late.limit(SWEEP_LIMIT)).scalars().all()
        wished = list(connection.execute(stopping.order_by(r.id).limit(SWEEP_LIMIT)).scalars())
    if overdue:
        with database.write() as connection:
            wished += ask_runs_to_stop(
                connection, [r.id.in_(overdue)], status=JobStatus.TIMEOUT, by=BY, reason=TOO_LONG, now=now
            )
    if wished:
        with database.write() as connection:
            stop_jobs(connection, wished, by=BY, manner=Manner("the chain stops"), now=now)
    return due


def _catch_up(database: Database, *, now: datetime) -> list[Due]:
    # A read first: on SQLite, an idle scheduler must not take the write lock.
    with database.read() as connection:
        if connection.execute(sa.select(j.id).where(models.unfollowed).limit(1)).first() is None:
            return []
    with database.write() as connection:
        followed = flow.catch_up(connection, limit=SWEEP_LIMIT, now=now)
        tell(connection, followed.moves, now=now)
    return followed.due


@dataclass(frozen=True, slots=True)
class Stopped:
    """What a stop did: `(lane, id)` of jobs that ended, ids of those that run and were asked to.

    `told`: a courier has something to do.
    """

    ended: tuple[tuple[str, str], ...]
    asked: tuple[str, ...]
    told: bool


def stop_jobs(
    connection: sa.Connection, run_ids: Collection[str], *, by: str, manner: Manner, now: datetime
) -> Stopped:
    """End the waiting jobs of these runs and ask the running ones; those somebody else has are left alone."""
    chains = sa.select(r.chain_id).where(r.id.in_(run_ids))
    active = (
        sa.select(j.id, j.tenant_id, j.lane, j.status)
        .where(
            j.chain_id.in_(chains),
            j.chain_run_id.in_(run_ids),
            j.status.in_(ACTIVE),
            sa.or_(j.status != JobStatus.RUNNING, j.cancel_requested_at.is_(None)),
        )
        .order_by(j.id)
        .with_for_update(skip_locked=True, of=models.jobs)
    )
    rows = connection.execute(active).all()
    waiting = [row for row in rows if row.status != JobStatus.RUNNING]
    running = [row.id for row in rows if row.status == JobStatus.RUNNING]
    moves = [Cancel(row.id, by=by, reason=manner.reason) for row in waiting]
    outcomes = carry_out(connection, moves, now=now, actor=by) if moves else []
    if running:
        ask_to_stop(connection, running, manner, by=by, now=now)
    return Stopped(
        tuple((row.lane, row.id) for row in waiting),
        tuple(running),
        told=any(getattr(outcome, "told", False) for outcome in outcomes),
    )
