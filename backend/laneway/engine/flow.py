"""What follows from a job's end: dependants, the chain's next step, the end of a batch.

All of it happens in the transaction that ends the job, and costs nothing when no job of that transaction
is `linked`. It is bounded: what a step leaves over, or what went wrong, is found again by the mark that it
does not get (`followed_seq`, models.unfollowed), and a sweep goes on with it. Locks are taken in one
order: jobs, then those that wait for them, then runs, then batches.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime

import sqlalchemy as sa

from laneway import models
from laneway.domain.states import FINAL, Action, JobStatus
from laneway.engine import batch_ends, chain_runs, dependencies
from laneway.engine.transitions import Applied
from laneway.log import get_logger

MAX_ROUNDS = 20
"""So far down a graph of dependencies goes one step: each round is a few statements."""

_AGAIN = frozenset({Action.RETRY, Action.RETRY_LATER})

j = models.jobs.c

log = get_logger("flow")


@dataclass(slots=True)
class Followed:
    """What followed: moves of other jobs, and `(lane, id)` of those that may start.

    `told`: somebody is sent a webhook about a chain or a batch.
    """

    moves: list[Applied] = field(default_factory=list)
    due: list[tuple[str, str]] = field(default_factory=list)
    told: bool = False


def follow(connection: sa.Connection, applied: Sequence[Applied], *, now: datetime) -> Followed:
    """Do what follows from these moves of linked jobs.

    An end is kept whatever becomes of the rest: what fails here is undone, logged and left to the sweep.
    """
    again = [a.row["id"] for a in applied if a.move.action in _AGAIN]
    ended = {a.row["id"]: a.status for a in applied if a.status in FINAL}
    if not again and not ended:
        return Followed()
    try:
        with connection.begin_nested():
            if again:
                _reopen(connection, again, now=now)
            return _follow(connection, ended, now=now)
    except Exception as error:
        if isinstance(error, sa.exc.DBAPIError) and error.connection_invalidated:
            raise
        log.exception("not_followed", job_ids=list(ended)[:10])
        return Followed()


def catch_up(connection: sa.Connection, *, limit: int, now: datetime) -> Followed:
    """Do what should have followed from ends: what steps left over, and what older releases do not do."""
    some = sa.select(j.id, j.status).where(models.unfollowed).order_by(j.id).limit(limit)
    rows = connection.execute(some.with_for_update(skip_locked=True)).all()
    ended = {row.id: JobStatus(row.status) for row in rows}
    if not ended:
        return Followed()
    try:
        with connection.begin_nested():
            return _follow(connection, ended, now=now)
    except sa.exc.IntegrityError:
        log.exception("not_followed", job_ids=list(ended)[:10])
    followed = Followed()
    for job_id, status in ended.items():  # one that cannot be followed must not keep the others
        with suppress(sa.exc.IntegrityError), connection.begin_nested():
            one = _follow(connection, {job_id: status}, now=now)
            followed.moves += one.moves
            followed.due += one.due
            followed.told |= one.told
    return followed


def _follow(connection: sa.Connection, ended: Mapping[str, JobStatus], *, now: datetime) -> Followed:
    followed = Followed()
    batches: dict[str, list[str]] = {}
    done: set[str] = set()
    frontier = dict(ended)
    for _ in range(MAX_ROUNDS):
        if not frontier:
            break
        links = sa.select(j.id, j.batch_id, j.chain_run_id, j.tenant_id).where(j.id.in_(frontier))
        rows = connection.execute(links).all()
        released, more = dependencies.release(connection, frontier, now=now)
        runs = {row.chain_run_id for row in rows if row.chain_run_id is not None}
        moved = chain_runs.advance(connection, runs, now=now) if runs else chain_runs.Moved()
        for row in rows:
            if row.batch_id is not None:
                batches.setdefault(row.batch_id, []).append(row.id)
        if not more:
            done.update(row.id for row in rows if row.chain_run_id not in moved.unsure)
        made = released + moved.dropped
        followed.moves += made
        followed.due += [(a.row["lane"], a.row["id"]) for a in released if a.status is JobStatus.QUEUED]
        followed.due += moved.due
        followed.told |= moved.told
        frontier = {a.row["id"]: a.status for a in made if a.status in FINAL and a.row["linked"]}
    if batches:
        looked = batch_ends.look(connection, batches, now=now)
        followed.due += looked.due
        followed.told |= looked.told
        done.difference_update(batches[batch_id][0] for batch_id in looked.unsure)
    if done:
        connection.execute(sa.update(models.jobs).where(j.id.in_(done)).values(followed_seq=j.event_seq))
    return followed


def _reopen(connection: sa.Connection, job_ids: Collection[str], *, now: datetime) -> None:
    of_jobs = sa.select(j.batch_id).where(j.id.in_(job_ids), j.batch_id.is_not(None)).distinct()
    batches = connection.execute(of_jobs).scalars().all()
    if batches:
        batch_ends.reopen(connection, batches, now=now)
