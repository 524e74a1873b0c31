"""The sweeps: promote what fell due, ring again what no lane knows, take back what a dead worker held.

Any number of processes may run them at once. Each change is a guarded move, so the loser of a race does
nothing; each push is a doorbell, so ringing twice does no harm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from laneway import models
from laneway.clock import Clock
from laneway.db import Database
from laneway.domain.states import JobStatus
from laneway.engine.outcomes import carry_out, error_record
from laneway.engine.queries import lanes_with_work
from laneway.engine.transitions import Applied, Enqueue, Expire, Fail, Move, Release, Stop
from laneway.lanes.backend import LaneBackend
from laneway.log import get_logger

SWEEP_LIMIT = 500
RING_GRACE = timedelta(seconds=2)  # a row this young may be on its way into a lane, or out of one
ACTOR = "scheduler"

j = models.jobs.c
w = models.workers.c
log = get_logger("upkeep")


def promote(database: Database, *, now: datetime) -> list[tuple[str, str]]:
    """Queue the scheduled and retrying jobs that fell due; their `(lane, id)`, to be rung."""
    late = sa.or_(
        sa.and_(j.status == JobStatus.SCHEDULED, j.scheduled_for <= now),
        sa.and_(j.status == JobStatus.RETRYING, j.next_retry_at <= now),
    )
    due = sa.select(j.id).where(late).order_by(sa.func.coalesce(j.next_retry_at, j.scheduled_for), j.id)
    with database.write() as connection:
        ids = connection.execute(due.limit(SWEEP_LIMIT).with_for_update(skip_locked=True)).scalars().all()
        outcomes = (
            carry_out(connection, [Enqueue(job_id) for job_id in ids], now=now, actor=ACTOR) if ids else []
        )
    return [(o.row["lane"], o.row["id"]) for o in outcomes if isinstance(o, Applied)]


def next_due(database: Database) -> datetime | None:
    """When the next scheduled or retrying job falls due."""
    scheduled = sa.select(sa.func.min(j.scheduled_for)).where(j.status == JobStatus.SCHEDULED)
    retrying = sa.select(sa.func.min(j.next_retry_at)).where(j.status == JobStatus.RETRYING)
    with database.read() as connection:
        moments = [connection.execute(query).scalar() for query in (scheduled, retrying)]
    return min((m for m in moments if m is not None), default=None)


def expire(database: Database, *, now: datetime) -> int:
    """End the waiting jobs whose `expires_at` has passed; how many."""
    late = sa.select(j.id).where(
        j.expires_at <= now,
        j.finished_at.is_(None),
        j.status.in_((JobStatus.SCHEDULED, JobStatus.BLOCKED, JobStatus.QUEUED)),
    )
    with database.write() as connection:
        ids = connection.execute(late.limit(SWEEP_LIMIT)).scalars().all()
        outcomes = (
            carry_out(connection, [Expire(job_id) for job_id in ids], now=now, actor=ACTOR) if ids else []
        )
    return sum(isinstance(o, Applied) for o in outcomes)


def reconcile(database: Database, lanes: LaneBackend, *, window: int, now: datetime) -> int:
    """Ring again for queued rows that their lane lacks: lost ids at its head, waiting ones at its tail.

    A lane shall hold the oldest `window` queued rows, in their order. Comparing the two lists needs no
    state of its own, so it repairs a flushed Redis, a lost push and a full window alike. A young row is
    taken to be on its way, unless the lane's backlog flag is up: then its push was refused, and leaving it
    out would keep the flag up for as long as jobs keep coming. Returns how many ids were rung. Raises
    LanesUnavailable.
    """
    rung = 0
    with database.read() as connection:
        names = lanes_with_work(connection)
    for lane in names:
        backlog = lanes.backlog(lane)  # before the rows are read: a refusal after this keeps the flag up
        queued = sa.select(j.id, j.queued_at).where(j.lane == lane, j.status == JobStatus.QUEUED)
        with database.read() as connection:
            rows = connection.execute(queued.order_by(j.queued_at, j.id).limit(window + 1)).all()
        present = set(lanes.contents(lane))
        head: list[str] = []
        tail: list[str] = []
        met = False
        for row in rows[:window]:
            if row.id in present:
                met = True
            elif backlog.waiting or row.queued_at <= now - RING_GRACE:
                (tail if met else head).append(row.id)
        if not met:
            head, tail = [], head
        complete = len(rows) <= window
        if head or tail or (backlog.waiting and complete):
            rung += lanes.refill(lane, head, tail, complete=complete, refusals_seen=backlog.refusals)
    return rung


@dataclass(slots=True)
class _Watched:
    beat: int
    since: float  # the reaper's monotonic time when it first saw this beat
    unlisted: dict[str, int] = field(default_factory=dict)  # lease token → the beat that first left it out


@dataclass(frozen=True, slots=True)
class WorkerSeen:
    """A worker's row as one look of the reaper found it."""

    id: str
    beat: int
    held: frozenset[str]
    running: frozenset[str]  # lease tokens of the jobs that the database says it runs


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one look decided: workers to declare dead (with the beat last seen), tokens to take back."""

    dead: tuple[tuple[str, int], ...] = ()
    lost_claims: frozenset[str] = frozenset()


class Watch:
    """The reaper's judgement: pure, without wall clocks.

    A worker is silent when its beat has not moved for `lease_seconds` of the observer's monotonic time,
    during which the observer itself kept looking: after a gap (the database was away, the observer slept)
    every observation starts anew, since nobody could have beaten. When more than half of at least four
    workers fall silent together, something else is wrong: wait one more lease. A token that a living
    worker leaves out of two beats running was claimed in a transaction whose answer never arrived.
    """

    def __init__(self, lease_seconds: float) -> None:
        self._lease = lease_seconds
        self._watched: dict[str, _Watched] = {}
        self._looked_at: float | None = None
        self._patience = 0.0

    def look(self, workers: Sequence[WorkerSeen], *, at: float) -> Verdict:
        """Take in one successful read of all living workers' rows."""
        if self._looked_at is None or at - self._looked_at > self._lease / 3:
            self._watched.clear()
        self._looked_at = at
        self._watched = {seen.id: self._watched.get(seen.id, _Watched(seen.beat, at)) for seen in workers}
        silent: list[tuple[str, int]] = []
        lost: set[str] = set()
        for seen in workers:
            known = self._watched[seen.id]
            if seen.beat != known.beat:
                known.beat, known.since = seen.beat, at
            elif at - known.since >= self._lease:
                silent.append((seen.id, seen.beat))
            absent = seen.running - seen.held
            known.unlisted = {token: known.unlisted.get(token, seen.beat) for token in absent}
            lost |= {token for token, first in known.unlisted.items() if seen.beat >= first + 2}
        if len(workers) >= 4 and len(silent) > len(workers) / 2:
            if not self._patience:
                self._patience = at + self._lease
                log.warning("mass_silence", silent=len(silent), workers=len(workers))
            if at < self._patience:
                return Verdict(lost_claims=frozenset(lost))
        else:
            self._patience = 0.0
        return Verdict(tuple(silent), frozenset(lost))


class Reaper:
    """Takes running jobs back from workers that fell silent, left, or never learnt of their claim."""

    def __init__(self, database: Database, clock: Clock, *, lease_seconds: float, crash_limit: int) -> None:
        self._database = database
        self._clock = clock
        self._crash_limit = crash_limit
        self._watch = Watch(lease_seconds)

    def sweep(self) -> list[tuple[str, str]]:
        """One look and what follows from it; `(lane, id)` of the jobs that wait again, to be rung."""
        living = sa.select(w.id, w.beat, w.held).where(w.state.in_(("active", "draining")))
        running = sa.select(j.worker_id, j.lease_token).where(j.status == JobStatus.RUNNING)
        with self._database.read() as connection:
            rows = connection.execute(living).all()
            tokens: dict[str, set[str]] = {}
            for worker_id, token in connection.execute(running):
                tokens.setdefault(worker_id, set()).add(token)
        verdict = self._watch.look(
            [WorkerSeen(r.id, r.beat, frozenset(r.held), frozenset(tokens.get(r.id, ()))) for r in rows],
            at=self._clock.monotonic(),
        )
        for worker_id, beat in verdict.dead:
            self._declare_dead(worker_id, beat)
        if not tokens.keys() - {r.id for r in rows} and not verdict.dead and not verdict.lost_claims:
            return []
        return self._take_back(verdict.lost_claims)

    def _declare_dead(self, worker_id: str, beat: int) -> None:
        silent = (w.id == worker_id, w.beat == beat, w.state.in_(("active", "draining")))
        dying = sa.update(models.workers).where(*silent).values(state="dead")
        with self._database.write() as connection:
            if connection.execute(dying).rowcount:
                log.warning("worker_dead", worker_id=worker_id, beat=beat)

    def _take_back(self, lost_claims: frozenset[str]) -> list[tuple[str, str]]:
        columns = (j.id, j.attempt, j.lease_token, j.crash_count, j.cancel_requested_at, w.state)
        ownerless = sa.or_(w.id.is_(None), w.state.in_(("dead", "gone")), j.lease_token.in_(lost_claims))
        orphans = (
            sa.select(*columns)
            .select_from(models.jobs.outerjoin(models.workers, w.id == j.worker_id))
            .where(j.status == JobStatus.RUNNING, ownerless)
            .order_by(j.id)
            .limit(SWEEP_LIMIT)
        )
        now = self._clock.now()
        with self._database.write() as connection:
            moves = [self._move(row) for row in connection.execute(orphans)]
            outcomes = carry_out(connection, moves, now=now, actor=ACTOR) if moves else []
        taken = [o for o in outcomes if isinstance(o, Applied)]
        for outcome in taken:
            log.warning("job_taken_back", job_id=outcome.row["id"], status=outcome.status.value)
        return [(o.row["lane"], o.row["id"]) for o in taken if o.status is JobStatus.QUEUED]

    def _move(self, row: sa.Row[*tuple[Any, ...]]) -> Move:
        hold = (row.id, row.attempt, row.lease_token)
        if row.cancel_requested_at is not None:
            return Stop(*hold)
        if row.state != "dead":  # left cleanly, or never learnt of its claim: no fault of the job
            return Release(*hold)
        error = error_record("WorkerLost", "the worker that ran the job died", category="crash")
        if row.crash_count + 1 >= self._crash_limit:
            return Fail(*hold, error=error, reason="poison", crash=1)
        return Release(*hold, crash=1, error=error)
