"""What is thrown away, and when: ended jobs, webhooks that are through, workers that left long ago.

Any number of processes may prune at once. A batch is one transaction that locks what it deletes, so a job
that somebody retries at the same moment either waits again or is gone, never half of it. A job is kept for
as long as one of its webhooks is still to be delivered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Self

import sqlalchemy as sa

from laneway import models
from laneway.db import Database
from laneway.domain.states import FINAL, JobStatus
from laneway.engine import idempotency
from laneway.settings import Settings
from laneway.webhooks.retries import UNDONE

BATCH_ROWS = 500
WORKERS_ARE_KEPT = timedelta(days=7)
PAYLOADS_ARE_KEPT = timedelta(days=30)  # then a webhook can be looked at, and no more be sent again

j = models.jobs.c
w = models.workers.c
m = models.webhook_messages.c
d = models.webhook_deliveries.c
a = models.webhook_attempts.c

_Ids = sa.Select[str]


@dataclass(frozen=True, slots=True)
class Retention:
    """How long rows are kept after their end: a final status that is missing, or None, means for ever."""

    jobs: dict[JobStatus, timedelta]
    webhooks: timedelta | None = None

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        days = {
            JobStatus.COMPLETED: settings.keep_completed_days,
            JobStatus.CANCELLED: settings.keep_cancelled_days,
            JobStatus.EXPIRED: settings.keep_cancelled_days,
            JobStatus.FAILED: settings.keep_failed_days,
            JobStatus.TIMEOUT: settings.keep_failed_days,
        }
        webhooks = settings.keep_webhooks_days
        return cls(
            {status: timedelta(days=number) for status, number in days.items() if number},
            timedelta(days=webhooks) if webhooks else None,
        )

    @classmethod
    def of_all_but_dead_letters(cls, age: timedelta) -> Self:
        """One age for webhooks and for all ended jobs but the failed and timed-out ones."""
        statuses = FINAL - {JobStatus.FAILED, JobStatus.TIMEOUT}
        return cls(dict.fromkeys(sorted(statuses), age), age)


@dataclass(frozen=True, slots=True)
class Pruned:
    """How many rows were deleted, or would be; `more`: another batch may find some too."""

    jobs: int = 0
    messages: int = 0  # of webhooks, each with its deliveries
    workers: int = 0
    payloads: int = 0  # emptied, of messages that stay
    keys: int = 0  # of idempotency, whose day is over
    groups: int = 0  # batches and runs of chains
    more: bool = False

    @property
    def rows(self) -> int:
        return self.jobs + self.messages + self.workers + self.payloads + self.keys + self.groups


def delete_jobs(connection: sa.Connection, ids: Sequence[str]) -> list[str]:
    """Delete ended jobs and all that hangs on them: events, webhook messages, deliveries, attempts.

    Returns the ids of those that are gone now. The others do not exist, are active, belong to a chain's run
    or a batch that is, or still have a webhook to deliver, and are left as they are. Give at most BATCH_ROWS
    ids; the caller has checked whose they are.
    """
    ended = sa.select(j.id).where(j.id.in_(ids), j.status.in_(FINAL), *_not_needed()).order_by(j.id)
    locked = connection.execute(ended.with_for_update()).scalars().all()
    # Asked after the lock: a message is written by whoever ends the job, and nobody does that now.
    waiting = sa.select(d.job_id).where(d.job_id.in_(locked), d.status.in_(UNDONE))
    gone = sorted(set(locked).difference(connection.execute(waiting).scalars()))
    if gone:
        told = sa.select(m.id).where(m.job_id.in_(gone)).order_by(m.id)
        _delete_messages(connection, connection.execute(told.with_for_update()).scalars().all())
        e = models.job_events
        connection.execute(sa.delete(e).where(e.c.job_id.in_(gone)))
        connection.execute(sa.delete(models.job_tags).where(models.job_tags.c.job_id.in_(gone)))
        connection.execute(sa.delete(models.jobs).where(j.id.in_(gone)))
    return gone


def prune(database: Database, keep: Retention, *, now: datetime) -> Pruned:
    """Delete one batch of each kind of rows that are past their time; each batch is one transaction."""
    jobs = messages = workers = payloads = 0
    if _any(database, [_ended(status, age, now=now) for status, age in keep.jobs.items()]):
        with database.write() as connection:
            due: list[str] = []
            for status, age in keep.jobs.items():
                oldest = _ended(status, age, now=now).order_by(j.finished_at)
                some = oldest.limit(BATCH_ROWS - len(due)).with_for_update(of=models.jobs, skip_locked=True)
                due += connection.execute(some).scalars()
            jobs = len(delete_jobs(connection, due))
    if keep.webhooks is not None and _any(database, [_through(keep.webhooks, now=now)]):
        with database.write() as connection:
            some = (
                _through(keep.webhooks, now=now)
                .limit(BATCH_ROWS)
                .with_for_update(of=models.webhook_messages, skip_locked=True)
            )
            messages = _delete_messages(connection, connection.execute(some).scalars().all())
    if messages < BATCH_ROWS and _any(database, [_readable(now=now)]):  # nothing that is to go as a whole
        with database.write() as connection:
            some = (
                _readable(now=now)
                .limit(BATCH_ROWS)
                .with_for_update(of=models.webhook_messages, skip_locked=True)
            )
            idle = _idle(connection, connection.execute(some).scalars().all())
            emptied = sa.update(models.webhook_messages).where(m.id.in_(idle))
            payloads = connection.execute(emptied.values(payload=None, version=m.version + 1)).rowcount
    if _any(database, [_left(now=now)]):
        with database.write() as connection:
            some = _left(now=now).limit(BATCH_ROWS).with_for_update(of=models.workers, skip_locked=True)
            ids = connection.execute(some).scalars().all()
            workers = connection.execute(sa.delete(models.workers).where(w.id.in_(ids))).rowcount
    keys = 0
    if _any(database, [idempotency.expired(now=now)]):
        with database.write() as connection:
            keys = idempotency.forget(connection, now=now, limit=BATCH_ROWS)
    groups = 0
    for table, over in _emptied(min(keep.jobs.values()), now=now) if keep.jobs else ():
        if _any(database, [over]):
            with database.write() as connection:
                ids = connection.execute(over.limit(BATCH_ROWS)).scalars().all()
                groups += connection.execute(sa.delete(table).where(table.c.id.in_(ids))).rowcount
    counts = (jobs, messages, workers, payloads, keys, groups)
    return Pruned(*counts, more=BATCH_ROWS in counts)


def count(database: Database, keep: Retention, *, now: datetime) -> Pruned:
    """What `prune` would delete if it were called until nothing is left. Reads all of it."""
    jobs = [_ended(status, age, now=now) for status, age in keep.jobs.items()]
    messages = [] if keep.webhooks is None else [_through(keep.webhooks, now=now)]

    def rows(queries: Sequence[_Ids]) -> int:
        counts = [sa.select(sa.func.count()).select_from(query.subquery()) for query in queries]
        return sum(connection.execute(each).scalar_one() for each in counts)

    with database.read() as connection:
        keys = rows([idempotency.expired(now=now)])
        return Pruned(rows(jobs), rows(messages), rows([_left(now=now)]), keys=keys)


def _any(database: Database, queries: Sequence[_Ids]) -> bool:
    # A read first: on SQLite, an idle scheduler must not take the write lock.
    with database.read() as connection:
        return any(connection.execute(query.limit(1)).first() is not None for query in queries)


def _ended(status: JobStatus, age: timedelta, *, now: datetime) -> _Ids:
    told = ~sa.exists().where(d.job_id == j.id, d.status.in_(UNDONE))
    return sa.select(j.id).where(j.status == status, j.finished_at <= now - age, told, *_not_needed())


def _not_needed() -> list[sa.ColumnElement[bool]]:
    """What follows from the job's end has followed, and its batch and its chain's run have ended."""
    b, r = models.batches.c, models.chain_runs.c
    return [
        sa.or_(~j.linked, j.followed_seq >= j.event_seq),
        ~sa.exists().where(b.id == j.batch_id, b.finished_at.is_(None)),
        ~sa.exists().where(r.id == j.chain_run_id, r.finished_at.is_(None)),
    ]


def _emptied(age: timedelta, *, now: datetime) -> list[tuple[sa.Table, _Ids]]:
    """Batches, and runs of chains, that ended so long ago and whose jobs are gone."""
    b, r = models.batches.c, models.chain_runs.c
    of_batch = sa.exists().where(j.batch_id == b.id)
    of_run = sa.exists().where(j.chain_id == r.chain_id, j.chain_run_id == r.id)
    return [
        (models.batches, sa.select(b.id).where(b.finished_at <= now - age, ~of_batch)),
        (models.chain_runs, sa.select(r.id).where(r.finished_at <= now - age, ~of_run)),
    ]


def _through(age: timedelta, *, now: datetime) -> _Ids:
    """Messages that are old enough, and that no delivery carries or has carried since."""
    of_message = sa.and_(d.message_id == m.id, sa.or_(d.status.in_(UNDONE), d.updated_at > now - age))
    old = sa.select(m.id).where(m.created_at <= now - age, ~sa.exists().where(of_message))
    return old.order_by(m.created_at)  # also where any would do: so the index on it is what is walked


def _readable(*, now: datetime) -> _Ids:
    """Messages that stay for longer than what they say."""
    undone = sa.exists().where(d.message_id == m.id, d.status.in_(UNDONE))
    old = sa.select(m.id).where(m.created_at <= now - PAYLOADS_ARE_KEPT, m.payload.is_not(None), ~undone)
    return old.order_by(m.created_at)


def _left(*, now: datetime) -> _Ids:
    holds = sa.exists().where(j.worker_id == w.id, j.status == JobStatus.RUNNING)
    return sa.select(w.id).where(w.state.in_(("gone", "dead")), w.beat_at <= now - WORKERS_ARE_KEPT, ~holds)


def _delete_messages(connection: sa.Connection, ids: Sequence[str]) -> int:
    """Delete those of the messages, locked already, of which no delivery is under way; with all of theirs.

    Whoever deletes locks messages, then deliveries, then attempts: so two never wait for each other.
    """
    idle = _idle(connection, ids)
    theirs = sa.select(d.id).where(d.message_id.in_(idle))
    connection.execute(sa.delete(models.webhook_attempts).where(a.delivery_id.in_(theirs)))
    connection.execute(sa.delete(models.webhook_deliveries).where(d.message_id.in_(idle)))
    return connection.execute(sa.delete(models.webhook_messages).where(m.id.in_(idle))).rowcount


def _idle(connection: sa.Connection, ids: Sequence[str]) -> list[str]:
    """Those of the messages without a delivery under way; their deliveries are locked from here on."""
    deliveries = sa.select(d.message_id, d.status).where(d.message_id.in_(ids)).order_by(d.id)
    locked = connection.execute(deliveries.with_for_update()).all()
    return sorted(set(ids) - {row.message_id for row in locked if row.status in UNDONE})
