"""Dead letters: jobs that failed for good, and wait for somebody to retry or delete them.

A dead letter is no row of its own but a `failed` or `timeout` job with a `dead_letter_reason`. What is done
to many of them is done oldest first and a batch a transaction. Whatever dies in the middle, what was done
stays done and no longer matches, so the same call again goes on with the rest. Any number of callers may
do so at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from laneway import models
from laneway.domain.retry import DeadLetterReason
from laneway.domain.states import JobStatus
from laneway.engine import queries
from laneway.engine.access.callers import Caller
from laneway.engine.group_commit import commit_each
from laneway.engine.outcomes import carry_out
from laneway.engine.queries import Clauses, between, equal_to, made_between
from laneway.engine.retention import BATCH_ROWS, delete_jobs
from laneway.engine.service import JobService, find_dead_letter, scope_of
from laneway.engine.transitions import Applied, Outcome, Retry, RetryLater
from laneway.errors import Conflict, StorageUnavailable
from laneway.lanes.backend import Due

MAX_BULK = 10_000
MAX_SAMPLE = 10

j = models.jobs.c


@dataclass(frozen=True, slots=True)
class DeadLetterFilter:
    """Which dead letters; None means any. Moments are exclusive."""

    job_type: str | None = None
    queue: str | None = None
    reason: DeadLetterReason | None = None
    created_after: datetime | None = None
    created_before: datetime | None = None
    finished_after: datetime | None = None
    finished_before: datetime | None = None

    def clauses(self) -> Clauses:
        return [
            j.dead_letter_reason.is_not(None),
            *equal_to(
                (j.job_type, self.job_type), (j.queue, self.queue), (j.dead_letter_reason, self.reason)
            ),
            *made_between(models.jobs, self.created_after, self.created_before),
            *between(j.finished_at, self.finished_after, self.finished_before),
        ]


@dataclass(frozen=True, slots=True)
class Bulk:
    """What a call did, or would do with `dry_run`.

    `count` jobs, of which `sample_ids` are the oldest MAX_SAMPLE. `skipped` match and were left alone;
    `remaining` match and are left to the next call. These two are counted up to `queries.MAX_COUNTED`.
    `last_due_at`: when the last of them is tried, where a rate spreads them.
    """

    dry_run: bool
    count: int = 0
    sample_ids: tuple[str, ...] = ()
    skipped: int = 0
    remaining: int = 0
    last_due_at: datetime | None = None


def get(service: JobService, job_id: str, caller: Caller) -> dict[str, Any]:
    """The job. Raises DeadLetterNotFound."""
    with service.database.read() as connection:
        return queries.view(find_dead_letter(connection, job_id, caller))


def delete(service: JobService, job_id: str, caller: Caller) -> None:
    """Delete the job with all that hangs on it. Raises DeadLetterNotFound, Conflict."""
    with service.database.write() as connection:
        row = find_dead_letter(connection, job_id, caller, lock=True)
        if not delete_jobs(connection, [job_id]):
            raise Conflict(
                "it is still needed: by a webhook that is to be delivered, or by its chain or batch",
                current_status=row["status"],
            )


def retry_all(
    service: JobService,
    caller: Caller,
    wanted: DeadLetterFilter,
    *,
    rate: float | None = None,
    limit: int = MAX_BULK,
    dry_run: bool = False,
) -> Bulk:
    """Retry at most `limit` dead letters, oldest first; with `rate` so many of them a second.

    Skips those whose unique key an active job holds: of several with one key, the oldest is retried.
    Raises StorageUnavailable when the database goes away; the batches before are retried.
    """
    every = [*scope_of(caller).clauses(), *wanted.clauses()]
    free, held = [*every, ~_key_is_held()], [*every, _key_is_held()]
    if dry_run:
        return _forecast(service, free, held, limit=limit)
    start = service.clock.now()
    retried: list[str] = []
    after, turn, last_due_at = "", 0, None
    while len(retried) < limit:
        with service.database.read() as connection:
            some = _oldest(free, j.id, j.unique_key, after=after, limit=min(BATCH_ROWS, limit - len(retried)))
            rows = connection.execute(some).all()
        if not rows:
            break
        after = rows[-1].id
        keys: set[str | None] = set()
        moves: list[Retry | RetryLater] = []
        for row in rows:
            if row.unique_key is not None and row.unique_key in keys:
                continue
            keys.add(row.unique_key)
            due_at = None if rate is None else start + timedelta(seconds=turn / rate)
            moves.append(Retry(row.id) if due_at is None else RetryLater(row.id, due_at))
            turn += 1
        made = _retry(service, caller, moves, every)
        retried += [done.row["id"] for done in made]
        last_due_at = max(
            (m.next_retry_at for done in made if isinstance(m := done.move, RetryLater)), default=last_due_at
        )
    with service.database.read() as connection:
        return Bulk(
            dry_run=False,
            count=len(retried),
            sample_ids=tuple(retried[:MAX_SAMPLE]),
            skipped=_count(connection, held),
            remaining=_count(connection, [*free, j.id > after]) if after else 0,
            last_due_at=last_due_at,
        )


def purge(
    service: JobService,
    caller: Caller,
    wanted: DeadLetterFilter,
    *,
    limit: int = MAX_BULK,
    dry_run: bool = False,
) -> Bulk:
    """Delete at most `limit` dead letters, oldest first, with all that hangs on them.

    Skips those that still have a webhook to deliver.
    """
    clauses = [*scope_of(caller).clauses(), *wanted.clauses()]
    if dry_run:
        return _forecast(service, clauses, [sa.false()], limit=limit)
    gone: list[str] = []
    after, skipped = "", 0
    while len(gone) < limit:
        with service.database.write() as connection:
            some = _oldest(clauses, j.id, after=after, limit=min(BATCH_ROWS, limit - len(gone)))
            ids = connection.execute(some.with_for_update()).scalars().all()
            deleted = delete_jobs(connection, ids) if ids else []
        if not ids:
            break
        after = ids[-1]
        gone += deleted
        skipped += len(ids) - len(deleted)
    with service.database.read() as connection:
        remaining = _count(connection, [*clauses, j.id > after]) if after else 0
    return Bulk(
        dry_run=False,
        count=len(gone),
        sample_ids=tuple(gone[:MAX_SAMPLE]),
        skipped=skipped,
        remaining=remaining,
    )


def _retry(
    service: JobService, caller: Caller, moves: Sequence[Retry | RetryLater], clauses: Clauses
) -> list[Applied]:
    """Make the moves of jobs that still match, in one transaction; those that were made.

    A job whose unique key was taken meanwhile is left alone.
    """

    def commit(batch: Sequence[Retry | RetryLater]) -> list[Outcome | None]:
        ids = [move.job_id for move in batch]
        with service.database.write() as connection:
            matching = sa.select(j.id).where(j.id.in_(ids), *clauses).order_by(j.id).with_for_update()
            still = set(connection.execute(matching).scalars())
            wanted = [move for move in batch if move.job_id in still]
            done = carry_out(connection, wanted, now=service.clock.now(), actor=caller.subject)
        by_id = {outcome.move.job_id: outcome for outcome in done}
        return [by_id.get(job_id) for job_id in ids]

    outcomes = commit_each(commit, moves)
    made = [outcome for outcome in outcomes if isinstance(outcome, Applied)]
    service.ring(
        [
            Due(done.row["lane"], done.row["id"], done.row["tenant_id"])
            for done in made
            if done.status is JobStatus.QUEUED
        ]
    )
    service.news.changed([done.row["id"] for done in made])
    for outcome in outcomes:
        if isinstance(outcome, StorageUnavailable):
            raise outcome
    return made


def _key_is_held() -> sa.ColumnElement[bool]:
    holder = models.jobs.alias("holder")
    h = holder.c
    return sa.exists().where(
        h.tenant_id == j.tenant_id,
        h.unique_key == j.unique_key,
        h.unique_key.is_not(None),
        h.finished_at.is_(None),
    )


def _oldest(clauses: Clauses, *columns: sa.ColumnElement[Any], after: str, limit: int) -> sa.Select[Any]:
    query = sa.select(*columns).where(*clauses).order_by(j.id).limit(limit)
    return query.where(j.id > after) if after else query


def _count(connection: sa.Connection, clauses: Clauses, *, up_to: int = queries.MAX_COUNTED) -> int:
    some = sa.select(j.id).where(*clauses).limit(up_to).subquery()
    return connection.execute(sa.select(sa.func.count()).select_from(some)).scalar_one()


def _forecast(service: JobService, clauses: Clauses, skipped: Clauses, *, limit: int) -> Bulk:
    with service.database.read() as connection:
        matching = _count(connection, clauses, up_to=limit + queries.MAX_COUNTED)
        sample = _oldest(clauses, j.id, after="", limit=min(limit, MAX_SAMPLE))
        return Bulk(
            dry_run=True,
            count=min(matching, limit),
            sample_ids=tuple(connection.execute(sample).scalars()),
            skipped=_count(connection, skipped),
            remaining=max(0, matching - limit),
        )
