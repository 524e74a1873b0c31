"""The sweeps: promote what fell due, end what came too late, ring again what no lane knows.

Any number of processes may run them at once. Each change is a guarded move, so the loser of a race does
nothing; each push is a doorbell, so ringing twice does no harm. What workers leave behind is the reaper's
(`engine/reaper.py`).
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from datetime import datetime, timedelta
from functools import partial

import sqlalchemy as sa

from laneway import models
from laneway.db import Database
from laneway.domain.states import RULES, Action, JobStatus
from laneway.engine.outcomes import carry_out
from laneway.engine.pauses import open_lanes, paused_queues
from laneway.engine.queries import lanes_with_work
from laneway.engine.transitions import Applied, Enqueue, Expire
from laneway.engine.turns import first_by_tenant, tenant_weights
from laneway.lanes.backend import Due, Lack, LaneBackend

SWEEP_LIMIT = 500
HEAD = 500
"""So many rows of a well filled lane are compared with what it holds."""

RING_GRACE = timedelta(seconds=2)  # a row this young may be on its way into a lane, or out of one
ACTOR = "scheduler"

DUE_BY = {JobStatus.SCHEDULED: "scheduled_for", JobStatus.RETRYING: "next_retry_at"}
"""The statuses that end by themselves at a moment, and the column that holds it."""

j = models.jobs.c


def promote(database: Database, *, now: datetime) -> list[Due]:
    """Queue the scheduled and retrying jobs that fell due; what is to be rung."""
    late = sa.or_(*(sa.and_(j.status == status, j[column] <= now) for status, column in DUE_BY.items()))
    due = sa.select(j.id).where(late).order_by(sa.func.coalesce(j.next_retry_at, j.scheduled_for), j.id)
    with database.write() as connection:
        ids = connection.execute(due.limit(SWEEP_LIMIT).with_for_update(skip_locked=True)).scalars().all()
        outcomes = (
            carry_out(connection, [Enqueue(job_id) for job_id in ids], now=now, actor=ACTOR) if ids else []
        )
    return [Due(o.row["lane"], o.row["id"], o.row["tenant_id"]) for o in outcomes if isinstance(o, Applied)]


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


def missing(
    queued: Sequence[tuple[str, datetime]],
    present: Container[str],
    *,
    tenant_id: str,
    window: int,
    refused: bool,
    now: datetime,
) -> Lack:
    """What to ring of one tenant, so that a lane holds its oldest `window` rows in their order. Pure.

    `queued` are its rows in the lane, `(id, queued_at)`, oldest first: `window + 1` of them, or all.
    `present` is what the lane holds. A young row is taken to be on its way, unless pushes were `refused` (the
    tenant is marked): leaving it out would keep the mark for as long as jobs keep coming.
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
    return Lack(tenant_id, tuple(head), tuple(tail), len(queued) <= window)


def reconcile(database: Database, lanes: LaneBackend, *, window: int, now: datetime) -> int:
    """Ring again for queued rows that their lane lacks: of each tenant as many as its turns there are.

    Comparing the two lists needs no state of its own, so it repairs a flushed Redis, a lost push and a
    full window alike. While a lane holds three quarters of its window, only its head is compared: what is
    lost further back is found when it gets there, and rows outside have no hurry. The lanes of a paused
    queue are left alone. Returns how many ids were rung. Raises LanesUnavailable.
    """
    rung = 0
    with database.read() as connection:
        names = open_lanes(lanes_with_work(connection), paused_queues(connection))
        weights = tenant_weights(connection)
    if names or weights:  # else there is nothing to say, and Redis may be away
        lanes.weigh(weights)
    for lane in names:
        backlog = lanes.backlog(lane)  # before the rows are read: a refusal after this keeps the mark
        present = set(lanes.contents(lane))
        compare = partial(_lacks, database, lane, present, weights=weights, refused=backlog.tenants, now=now)
        if len(present) > max(HEAD, window * 3 // 4) and not _any(compare(most=HEAD)):
            continue
        found = compare(most=window)
        seen = {lack.tenant_id for lack in found}
        gone = backlog.tenants - seen if len(seen) < window else ()  # else more tenants may have rows
        found += [Lack(tenant_id, (), (), complete=True) for tenant_id in sorted(gone)]
        if _any(found) or any(lack.complete and lack.tenant_id in backlog.tenants for lack in found):
            rung += lanes.refill(lane, found, refusals_seen=backlog.refusals)
    return rung


def _lacks(
    database: Database,
    lane: str,
    present: Container[str],
    *,
    most: int,
    weights: Mapping[str, int],
    refused: Container[str],
    now: datetime,
) -> list[Lack]:
    """Of each tenant with rows in the lane what it lacks, looking at about `most` rows."""
    with database.read() as connection:
        first = first_by_tenant(connection, lane, most, weights=weights)
    return [
        missing(rows, present, tenant_id=t, window=len(rows) - more, refused=t in refused, now=now)
        for t, (rows, more) in first.items()
    ]


def _any(lacks: Sequence[Lack]) -> bool:
    return any(lack.head or lack.tail for lack in lacks)
