"""What the target of an HTTP job reports about the attempt it works on: progress, and how it ended.

A report is fenced like all that a worker says: it counts while that attempt runs, wherever it runs. So one
that comes before the worker has handed the job over counts too, and one of an older attempt never does.
"""

from __future__ import annotations

from random import Random
from typing import Any

import sqlalchemy as sa

from laneway import models
from laneway.domain.http_target import HTTP_REQUEST
from laneway.domain.states import JobStatus
from laneway.engine import progress, queries
from laneway.engine.access.callers import Caller
from laneway.engine.context import Progress
from laneway.engine.endings import Ending
from laneway.engine.outcomes import Claimed, carry_out, decide, due_of
from laneway.engine.service import JobService
from laneway.engine.transitions import Applied
from laneway.errors import IllegalTransition, JobNotFound
from laneway.lanes.backend import EndedRun, LanesUnavailable
from laneway.log import get_logger

j = models.jobs.c
log = get_logger("job_reports")


def report_progress(service: JobService, caller: Caller, news: Progress) -> dict[str, Any]:
    """Keep how far the attempt is; the job. Raises JobNotFound, IllegalTransition once it is over."""
    now = service.clock.now()
    with service.database.write() as connection:
        job = _running(connection, caller)
        told = progress.save_and_tell(connection, [(job, news)], now=now)
        view = queries.view(_find(connection, caller))
    service.news.changed([job.job_id])
    service.news.progressed([(job.job_id, job.attempt, news.percent, news.message, news.details)])
    if told:
        service.news.ring_courier()
    return view


def report_end(service: JobService, caller: Caller, ending: Ending) -> dict[str, Any]:
    """End the caller's attempt, with all that follows; the job.

    Raises JobNotFound, IllegalTransition once the attempt is over: the first end counts.
    """
    now = service.clock.now()
    with service.database.write() as connection:
        job = _running(connection, caller)
        move = decide(job, ending, now=now, rng=Random(), crash_limit=service.settings.crash_limit)  # noqa: S311
        [outcome] = carry_out(connection, [move], now=now, actor=caller.subject)
        row = _find(connection, caller)
        if not isinstance(outcome, Applied):
            raise _over(row, caller)
        view = queries.view(row)
    log.info("job_reported", job_id=job.job_id, attempt=job.attempt, status=outcome.status.value)
    try:
        service.lanes.mirror_ended([EndedRun(job.lane, job.job_id, outcome.status)])
    except LanesUnavailable:
        pass  # a mirror
    service.news.changed([job.job_id])
    if outcome.told:
        service.news.ring_courier()
    service.ring(due_of([outcome]))
    return view


def _running(connection: sa.Connection, caller: Caller) -> Claimed:
    """The attempt that the caller reports about, locked."""
    row = _find(connection, caller, lock=True)
    if row["status"] != JobStatus.RUNNING or row["attempt"] != caller.attempt:
        raise _over(row, caller)
    return Claimed.of(row, row["lease_token"])


def _find(connection: sa.Connection, caller: Caller, *, lock: bool = False) -> sa.RowMapping:
    query = sa.select(models.jobs).where(
        j.id == caller.job_id, j.tenant_id == caller.tenant_id, j.job_type == HTTP_REQUEST
    )
    row = connection.execute(query.with_for_update() if lock else query).mappings().first()
    if row is None:
        raise JobNotFound(f"there is no job {caller.job_id}", job_id=caller.job_id)
    return row


def _over(row: sa.RowMapping, caller: Caller) -> IllegalTransition:
    return IllegalTransition(
        f"attempt {caller.attempt} is over: the job is {row['status']}, at attempt {row['attempt']}",
        current_status=row["status"],
        attempt=row["attempt"],
    )
