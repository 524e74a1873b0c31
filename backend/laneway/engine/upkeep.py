"""The sweeps: promote what fell due, end what came too late, ring again what no lane knows.

Any number of processes may run them at once. Each change is a guarded move, so the loser of a race does
nothing; each push is a doorbell, so ringing twice does no harm. What workers leave behind is the reaper's
(`engine/reaper.py`).
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import sqlalchemy as sa

from laneway import models
from laneway.db import Database
from laneway.domain.states import RULES, Action, JobStatus
from laneway.engine.outcomes import carry_out
from laneway.engine.pauses import open_lanes, paused_queues
from laneway.engine.queries import lanes_with_work
from laneway.engine.transitions import Applied, Enqueue, Expire
from laneway.lanes.backend import LaneBackend

SWEEP_LIMIT = 500
HEAD = 500
"""So many rows of a well filled lane are compared with what it holds."""

RING_GRACE = timedelta(seconds=2)  # a row this young may be on its way into a lane, or out of one
ACTOR = "scheduler"

DUE_BY = {JobStatus.SCHEDULED: "scheduled_for", JobStatus.RETRYING: "next_retry_at"}
"""The statuses that end by themselves at a moment, and the column that holds it."""

j = models.jobs.c


def promote(database: Database, *, now: datetime) -> list[tuple[str, str]]:
    """Queue the scheduled and retrying jobs that fell due; their `(lane, id)`, to be rung."""
    late = sa.or_(*(sa.and_(j.status == status, j[column] <= now) for status, column in DUE_BY.items()))
    due = sa.select(j.id).where(late).order_by(sa.func.coalesce(j.next_retry_at, j.scheduled_for), j.id)
    with database.write() as connection:
        ids = connection.execute(due.limit(SWEEP_LIMIT).with_for_update(skip_locked=True)).scalars().all()
        outcomes = (
            carry_out(connection, [Enqueue(job_id) for job_id in ids], now=now, actor=ACTOR) if ids else []
        )
    return [(o.row["lane"], o.row["id"]) for o in outcomes if isinstance(o, Applied)]


def next_due(database: Database) -> datetime | None:
    """When the next scheduled or retrying job falls due."""
    first = [sa.select(sa.func.min(j[column])).where(j.status == status) for status, column in DUE_BY.items()]
    with database.read() as connection:
        moments = [connection.execute(query).scalar() for query in first]
    return min((m for m in moments if m is not None), default=None)


def expire(database: Database, *, now: datetime) -> int:
    """End the waiting jobs whose `expires_at` has passed; how many."""
    late = sa.select(j.id).where(
        j.expires_at <= now,
        j.finished_at.is_(None),
        j.status.in_(RULES[Action.EXPIRE].sources),
    )
    with database.write() as connection:
        ids = connection.execute(late.limit(SWEEP_LIMIT)).scalars().all()
        outcomes = (
            carry_out(connection, [Expire(job_id) for job_id in ids], now=now, actor=ACTOR) if ids else []
        )
    return sum(isinstance(o, Applied) for o in outcomes)


@dataclass(frozen=True, slots=True)
class Missing:
    """The ids that a lane lacks, next first: those before its first and those after its last.

    `complete`: no queued row is missing beyond these.
    """

    head: tuple[str, ...]
    tail: tuple[str, ...]
    complete: bool


def missing(
    queued: Sequence[tuple[str, datetime]],
    present: Container[str],
    *,
    window: int,
    refused: bool,
    now: datetime,
) -> Missing:
    """What to ring, so that a lane holds its oldest `window` rows in their order. Pure.

    `queued` are the lane's rows, `(id, queued_at)`, oldest first: `window + 1` of them, or all. `present` is
    what the lane holds. A young row is taken to be on its way, unless pushes were `refused` (the lane's
    backlog flag is up): leaving it out would keep the flag up for as long as jobs keep coming.
    """
    head: list[str] = []
    tail: list[str] = []
    met = False
    for job_id, queued_at in queued[:window]:
        if job_id in present:
            met = True
        elif refused or queued_at <= now - RING_GRACE:
            (tail if met else head).append(job_id)
    if not met:
        head, tail = [], head
    return Missing(tuple(head), tuple(tail), len(queued) <= window)


def reconcile(database: Database, lanes: LaneBackend, *, window: int, now: datetime) -> int:
    """Ring again for queued rows that their lane lacks: lost ids at its head, waiting ones at its tail.

    Comparing the two lists needs no state of its own, so it repairs a flushed Redis, a lost push and a
    full window alike. While a lane holds three quarters of its window, only its head is compared: what is
    lost further back is found when it gets there, and rows outside have no hurry. The lanes of a paused
    queue are left alone. Returns how many ids were rung. Raises LanesUnavailable.
    """
    rung = 0
    with database.read() as connection:
        names = open_lanes(lanes_with_work(connection), paused_queues(connection))
    for lane in names:
        backlog = lanes.backlog(lane)  # before the rows are read: a refusal after this keeps the flag up
        present = set(lanes.contents(lane))
        if len(present) > max(HEAD, window * 3 // 4):
            rows = _oldest(database, lane, HEAD)
            near = missing(rows, present, window=window, refused=backlog.waiting, now=now)
            if not near.head and not near.tail:
                continue
        rows = _oldest(database, lane, window + 1)
        lacks = missing(rows, present, window=window, refused=backlog.waiting, now=now)
        if lacks.head or lacks.tail or (backlog.waiting and lacks.complete):
            rung += lanes.refill(
                lane, lacks.head, lacks.tail, complete=lacks.complete, refusals_seen=backlog.refusals
            )
    return rung


def _oldest(database: Database, lane: str, limit: int) -> list[tuple[str, datetime]]:
    """A lane's queued rows, `(id, queued_at)`, in the order of the lane."""
    queued = sa.select(j.id, j.queued_at).where(j.lane == lane, j.status == JobStatus.QUEUED)
    with database.read() as connection:
        found = connection.execute(queued.order_by(j.queued_at, j.id).limit(limit))
        return [(row.id, row.queued_at) for row in found]
