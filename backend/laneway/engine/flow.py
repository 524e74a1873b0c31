"""What follows from a job's end: dependants, the chain's next step, the end of a batch.

All of it happens in the transaction that ends the job, and costs nothing when no job of that transaction
is `linked`. It is bounded: what a step leaves over, or what went wrong, loses the mark that its end came
with (`followed_seq`, models.unfollowed), and a sweep that finds such ends goes on with it. Locks are taken
in one order: jobs, then those that wait for them, then runs, then batches.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime

import sqlalchemy as sa

from laneway import models
from laneway.domain.states import FINAL, Action, JobStatus
from laneway.engine import batch_ends, chain_runs, dependencies
from laneway.engine.transitions import Applied, leave_to_sweep
from laneway.lanes.backend import Due
from laneway.log import get_logger

MAX_ROUNDS = 20
"""So far down a graph of dependencies goes one step: each round is a few statements."""

_AGAIN = frozenset({Action.RETRY, Action.RETRY_LATER})

j = models.jobs.c

log = get_logger("flow")


@dataclass(slots=True)
class Followed:
    """What followed: moves of other jobs, and those that may start.

    `told`: somebody is sent a webhook about a chain or a batch.
    """

    moves: list[Applied] = field(default_factory=list)
    due: list[Due] = field(default_factory=list)
    told: bool = False


def follow(connection: sa.Connection, applied: Sequence[Applied], *, now: datetime) -> Followed:
    """Do what follows from these moves of linked jobs.

    An end is kept whatever becomes of the rest: what fails here is undone, logged and left to the sweep.
    """
    again = [a.row["id"] for a in applied if a.move.action in _AGAIN]
    ended = [_End.of(a) for a in applied if a.status in FINAL]
    if not again and not ended:
        return Followed()
    try:
        with connection.begin_nested():
            if again:
                _reopen(connection, again, now=now)
            followed, left = _follow(connection, ended, now=now)
    except Exception as error:
        if isinstance(error, sa.exc.DBAPIError) and error.connection_invalidated:
            raise
        log.exception("not_followed", job_ids=[end.id for end in ended][:10])
        followed, left = Followed(), {end.id for end in ended}
    leave_to_sweep(connection, left)
    return followed


def catch_up(connection: sa.Connection, *, limit: int, now: datetime) -> Followed:
    """Do what should have followed from ends: what steps left over, and what older releases do not do."""
    some = sa.select(j.id, j.status, j.batch_id, j.chain_run_id).where(models.unfollowed).order_by(j.id)
    rows = connection.execute(some.limit(limit).with_for_update(skip_locked=True))
    ended = [_End(row.id, JobStatus(row.status), row.batch_id, row.chain_run_id) for row in rows]
    if not ended:
        return Followed()
    try:
        with connection.begin_nested():
            return _make_good(connection, ended, now=now)
    except sa.exc.IntegrityError:
        log.exception("not_followed", job_ids=[end.id for end in ended][:10])
    all_of_them = Followed()
    for end in ended:  # one that cannot be followed must not keep the others
        with suppress(sa.exc.IntegrityError), connection.begin_nested():
            one = _make_good(connection, [end], now=now)
            all_of_them.moves += one.moves
            all_of_them.due += one.due
            all_of_them.told |= one.told
    return all_of_them


@dataclass(frozen=True, slots=True)
class _End:
    """A linked job that has ended, and what it is part of."""

    id: str
    status: JobStatus
    batch_id: str | None
    chain_run_id: str | None

    @classmethod
    def of(cls, applied: Applied) -> _End:
        row = applied.row
        return cls(row["id"], applied.status, row["batch_id"], row["chain_run_id"])


def _make_good(connection: sa.Connection, ended: Sequence[_End], *, now: datetime) -> Followed:
    followed, left = _follow(connection, ended, now=now)
    were = {end.id for end in ended}
    leave_to_sweep(connection, left - were)
    connection.execute(sa.update(models.jobs).where(j.id.in_(were - left)).values(followed_seq=j.event_seq))
    return followed


def _follow(connection: sa.Connection, ended: Sequence[_End], *, now: datetime) -> tuple[Followed, set[str]]:
    """What followed, and of which ends something is still to follow: of these, or of those they brought."""
    followed = Followed()
    batches: dict[str, list[str]] = {}
    left: set[str] = set()
    frontier = list(ended)
    for _ in range(MAX_ROUNDS):
        if not frontier:
            break
        released, more = dependencies.release(connection, {end.id: end.status for end in frontier}, now=now)
        runs = {end.chain_run_id for end in frontier if end.chain_run_id is not None}
        moved = chain_runs.advance(connection, runs, now=now) if runs else chain_runs.Moved()
        for end in frontier:
            if end.batch_id is not None:
                batches.setdefault(end.batch_id, []).append(end.id)
            if more or end.chain_run_id in moved.unsure:
                left.add(end.id)
        made = released + moved.dropped
        followed.moves += made
        followed.due += [
            Due(a.row["lane"], a.row["id"], a.row["tenant_id"])
            for a in released
            if a.status is JobStatus.QUEUED
        ]
        followed.due += moved.due
        followed.told |= moved.told
        frontier = [_End.of(a) for a in made if a.status in FINAL and a.row["linked"]]
    left.update(end.id for end in frontier)
    if batches:
        looked = batch_ends.look(connection, batches, now=now)
        followed.due += looked.due
        followed.told |= looked.told
        left.update(batches[batch_id][0] for batch_id in looked.unsure)
    return followed, left


def _reopen(connection: sa.Connection, job_ids: Collection[str], *, now: datetime) -> None:
    of_jobs = sa.select(j.batch_id).where(j.id.in_(job_ids), j.batch_id.is_not(None)).distinct()
    batches = connection.execute(of_jobs).scalars().all()
    if batches:
        batch_ends.reopen(connection, batches, now=now)
