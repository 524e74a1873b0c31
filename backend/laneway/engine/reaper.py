"""The reaper: takes running jobs back from workers that fell silent, left, or never learnt of their claim.

Any number of processes may run one. `Watch` and `take_back` decide, without a store or a wall clock; the
simulator (tests/simulation) runs the same two. Each change is a guarded move, so of several reapers one
takes a job back and the others change nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from laneway import models
from laneway.clock import Clock
from laneway.db import Database
from laneway.domain.http_target import REMOTE_WORKER
from laneway.domain.states import JobStatus
from laneway.engine.outcomes import carry_out, due_of, error_record
from laneway.engine.transitions import Applied, Fail, HeldMove, Release, Stop
from laneway.lanes.backend import Due
from laneway.log import get_logger

SWEEP_LIMIT = 500
ACTOR = "scheduler"
LIVING = ("active", "draining")
"""States of a worker that may hold jobs."""

MASS_WORKERS = 4
"""With so many workers or more, that over half of them fall silent together is not believed at once."""

j = models.jobs.c
w = models.workers.c
_HERE = (j.status == JobStatus.RUNNING, j.worker_id != REMOTE_WORKER)  # not at the target of an HTTP job
log = get_logger("reaper")


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
    """What one look decided: workers to declare dead (with the beat last seen), tokens to take back.

    `held_back` is how many workers went quiet together, in the look that began to wait for them.
    """

    dead: tuple[tuple[str, int], ...] = ()
    lost_claims: frozenset[str] = frozenset()
    held_back: int = 0


class Watch:
    """Who is silent, as one observer sees it by its own monotonic clock.

    A worker is silent when its beat has not moved for `lease_seconds`, during which the observer itself
    kept looking: after a gap (the database was away, the observer slept) every observation starts anew,
    since nobody could have beaten. When one is silent while more than half of at least four workers have
    been quiet for half a lease or longer, something else is wrong: wait one more lease. (What cuts all of
    them off finds each at another moment between two beats, so they do not fall silent in the same look.)
    A token that a living worker leaves out of two beats running was claimed in a transaction whose answer
    never arrived.
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
        quiet = 0
        lost: set[str] = set()
        for seen in workers:
            known = self._watched[seen.id]
            if seen.beat != known.beat:
                known.beat, known.since = seen.beat, at
            quiet += at - known.since >= self._lease / 2
            if at - known.since >= self._lease:
                silent.append((seen.id, seen.beat))
            absent = seen.running - seen.held
            known.unlisted = {token: known.unlisted.get(token, seen.beat) for token in absent}
            lost |= {token for token, first in known.unlisted.items() if seen.beat >= first + 2}
        if not silent or len(workers) < MASS_WORKERS or quiet <= len(workers) / 2:
            self._patience = 0.0
        elif not self._patience:
            self._patience = at + self._lease
            return Verdict(lost_claims=frozenset(lost), held_back=quiet)
        elif at < self._patience:
            return Verdict(lost_claims=frozenset(lost))
        return Verdict(tuple(silent), frozenset(lost))


@dataclass(frozen=True, slots=True)
class Orphan:
    """A running job that nobody runs any more. `died_running`: its worker died after the job had begun."""

    job_id: str
    attempt: int
    lease_token: str
    crash_count: int
    cancel_requested_at: datetime | None
    died_running: bool


def take_back(orphan: Orphan, *, crash_limit: int) -> HeldMove:
    """The move that frees an orphan. Only the death of a worker that had begun the job is blamed on it."""
    hold = (orphan.job_id, orphan.attempt, orphan.lease_token)
    if orphan.cancel_requested_at is not None:
        return Stop(*hold)
    if not orphan.died_running:  # left cleanly, never learnt of its claim, or had not come to this job
        return Release(*hold)
    error = error_record("WorkerLost", "the worker that ran the job died", category="crash")
    if orphan.crash_count + 1 >= crash_limit:
        return Fail(*hold, error=error, reason="poison", crash=1)
    return Release(*hold, crash=1, error=error)


class Reaper:
    """A `Watch` over the rows of the store, and what follows from its verdicts."""

    def __init__(self, database: Database, clock: Clock, *, lease_seconds: float, crash_limit: int) -> None:
        self._database = database
        self._clock = clock
        self._crash_limit = crash_limit
        self._watch = Watch(lease_seconds)

    def sweep(self) -> list[Due]:
        """One look and what follows from it; the jobs that wait again, to be rung."""
        living = sa.select(w.id, w.beat, w.held).where(w.state.in_(LIVING))
        running = sa.select(j.worker_id, j.lease_token).where(*_HERE)
        with self._database.read() as connection:
            rows = connection.execute(living).all()
            tokens: dict[str, set[str]] = {}
            for worker_id, token in connection.execute(running):
                tokens.setdefault(worker_id, set()).add(token)
        verdict = self._watch.look(
            [WorkerSeen(r.id, r.beat, frozenset(r.held), frozenset(tokens.get(r.id, ()))) for r in rows],
            at=self._clock.monotonic(),
        )
        if verdict.held_back:
            log.error("mass_silence", quiet=verdict.held_back, workers=len(rows))
        for worker_id, beat in verdict.dead:
            self._declare_dead(worker_id, beat)
        if not tokens.keys() - {r.id for r in rows} and not verdict.dead and not verdict.lost_claims:
            return []
        return self._take_back(verdict.lost_claims)

    def _declare_dead(self, worker_id: str, beat: int) -> None:
        silent = (w.id == worker_id, w.beat == beat, w.state.in_(LIVING))
        dying = sa.update(models.workers).where(*silent).values(state="dead")
        with self._database.write() as connection:
            if connection.execute(dying).rowcount:
                log.warning("worker_dead", worker_id=worker_id, beat=beat)

    def _take_back(self, lost_claims: frozenset[str]) -> list[Due]:
        columns = (j.id, j.attempt, j.lease_token, j.crash_count, j.cancel_requested_at, w.state, w.begun)
        ownerless = sa.or_(w.id.is_(None), w.state.not_in(LIVING), j.lease_token.in_(lost_claims))
        orphans = (
            sa.select(*columns)
            .select_from(models.jobs.outerjoin(models.workers, w.id == j.worker_id))
            .where(*_HERE, ownerless)
            .order_by(j.id)
            .limit(SWEEP_LIMIT)
        )
        now = self._clock.now()
        with self._database.write() as connection:
            found = [_orphan(row) for row in connection.execute(orphans)]
            moves = [take_back(orphan, crash_limit=self._crash_limit) for orphan in found]
            outcomes = carry_out(connection, moves, now=now, actor=ACTOR) if moves else []
        taken = [o for o in outcomes if isinstance(o, Applied)]
        for outcome in taken:
            log.warning("job_taken_back", job_id=outcome.row["id"], status=outcome.status.value)
        again = [
            Due(o.row["lane"], o.row["id"], o.row["tenant_id"]) for o in taken if o.status is JobStatus.QUEUED
        ]
        return again + due_of(outcomes)


def _orphan(row: Any) -> Orphan:
    had_begun = row.begun is None or row.lease_token in row.begun  # None: a worker of an older release
    return Orphan(
        row.id,
        row.attempt,
        row.lease_token,
        row.crash_count,
        row.cancel_requested_at,
        row.state == "dead" and had_begun,
    )
