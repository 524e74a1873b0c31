"""What is thrown away, and when: ended jobs, delivered webhooks, workers that left long ago.

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
from laneway.settings import Settings
from laneway.webhooks.retries import UNDONE

BATCH_ROWS = 500
WORKERS_ARE_KEPT = timedelta(days=7)

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
    deliveries: int = 0
    workers: int = 0
    more: bool = False

    @property
    def rows(self) -> int:
        return self.jobs + self.deliveries + self.workers


def delete_jobs(connection: sa.Connection, ids: Sequence[str]) -> list[str]:
    """Delete ended jobs and all that hangs on them: events, webhook messages, deliveries, attempts.

    Returns the ids of those that are gone now. The others do not exist, are active, or still have a webhook
    to deliver, and are left as they are. Give at most BATCH_ROWS ids; the caller has checked whose they are.
    """
    ended = sa.select(j.id).where(j.id.in_(ids), j.status.in_(FINAL)).order_by(j.id)
    locked = connection.execute(ended.with_for_update()).scalars().all()
    # Asked after the lock: a message is written by whoever ends the job, and nobody does that now.
    waiting = sa.select(d.job_id).where(d.job_id.in_(locked), d.status.in_(UNDONE))
    gone = sorted(set(locked).difference(connection.execute(waiting).scalars()))
    if gone:
        _delete_deliveries(connection, sa.select(d.id).where(d.job_id.in_(gone)))
        for table in (models.webhook_messages, models.job_events):
            connection.execute(sa.delete(table).where(table.c.job_id.in_(gone)))
        connection.execute(sa.delete(models.jobs).where(j.id.in_(gone)))
    return gone


def prune(database: Database, keep: Retention, *, now: datetime) -> Pruned:
    """Delete one batch of each kind of rows that are past their time; each batch is one transaction."""
    jobs = deliveries = workers = 0
    if _any(database, [_ended(status, age, now=now) for status, age in keep.jobs.items()]):
        with database.write() as connection:
            due: list[str] = []
            for status, age in keep.jobs.items():
                oldest = _ended(status, age, now=now).order_by(j.finished_at)
                some = oldest.limit(BATCH_ROWS - len(due)).with_for_update(of=models.jobs, skip_locked=True)
                due += connection.execute(some).scalars()
            jobs = len(delete_jobs(connection, due))
    if keep.webhooks is not None and _any(database, [_delivered(keep.webhooks, now=now)]):
        with database.write() as connection:
            oldest = _delivered(keep.webhooks, now=now).order_by(d.delivered_at)
            some = oldest.limit(BATCH_ROWS).with_for_update(skip_locked=True)
            deliveries = _delete_webhooks(connection, connection.execute(some).scalars().all())
    if _any(database, [_left(now=now)]):
        with database.write() as connection:
            some = _left(now=now).limit(BATCH_ROWS).with_for_update(of=models.workers, skip_locked=True)
            ids = connection.execute(some).scalars().all()
            workers = connection.execute(sa.delete(models.workers).where(w.id.in_(ids))).rowcount
    return Pruned(jobs, deliveries, workers, more=BATCH_ROWS in (jobs, deliveries, workers))


def count(database: Database, keep: Retention, *, now: datetime) -> Pruned:
    """What `prune` would delete if it were called until nothing is left. Reads all of it."""
    jobs = [_ended(status, age, now=now) for status, age in keep.jobs.items()]
    deliveries = [] if keep.webhooks is None else [_delivered(keep.webhooks, now=now)]

    def rows(queries: Sequence[_Ids]) -> int:
        counts = [sa.select(sa.func.count()).select_from(query.subquery()) for query in queries]
        return sum(connection.execute(each).scalar_one() for each in counts)

    with database.read() as connection:
        return Pruned(rows(jobs), rows(deliveries), rows([_left(now=now)]))


def _any(database: Database, queries: Sequence[_Ids]) -> bool:
    # A read first: on SQLite, an idle scheduler must not take the write lock.
    with database.read() as connection:
        return any(connection.execute(query.limit(1)).first() is not None for query in queries)


def _ended(status: JobStatus, age: timedelta, *, now: datetime) -> _Ids:
    told = ~sa.exists().where(d.job_id == j.id, d.status.in_(UNDONE))
    return sa.select(j.id).where(j.status == status, j.finished_at <= now - age, told)


def _delivered(age: timedelta, *, now: datetime) -> _Ids:
    return sa.select(d.id).where(d.delivered_at <= now - age)


def _left(*, now: datetime) -> _Ids:
    holds = sa.exists().where(j.worker_id == w.id, j.status == JobStatus.RUNNING)
    return sa.select(w.id).where(w.state.in_(("gone", "dead")), w.beat_at <= now - WORKERS_ARE_KEPT, ~holds)


def _delete_webhooks(connection: sa.Connection, delivery_ids: Sequence[str]) -> int:
    """Delete deliveries, and the messages that no other delivery carries."""
    carried = sa.select(d.message_id).where(d.id.in_(delivery_ids)).distinct()
    messages = connection.execute(carried).scalars().all()
    deleted = _delete_deliveries(connection, sa.select(d.id).where(d.id.in_(delivery_ids)))
    others = sa.exists().where(d.message_id == m.id)
    connection.execute(sa.delete(models.webhook_messages).where(m.id.in_(messages), ~others))
    return deleted


def _delete_deliveries(connection: sa.Connection, ids: _Ids) -> int:
    connection.execute(sa.delete(models.webhook_attempts).where(a.delivery_id.in_(ids)))
    return connection.execute(sa.delete(models.webhook_deliveries).where(d.id.in_(ids))).rowcount
