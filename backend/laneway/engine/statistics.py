"""How jobs went lately: rates, durations and waits, from the rows of jobs that ended.

A look is bounded: of each final status it reads the newest MAX_SAMPLED rows of the window at most, by the
index on `finished_at`. When one status has more, the window is cut to what was read of it, for all of them:
so rates stay true, for a shorter time, and the answer says from when.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from laneway import models
from laneway.domain.states import FINAL, JobStatus
from laneway.engine.queries import stamp
from laneway.engine.service import JobService

MAX_SAMPLED = 10_000  # rows of one final status in one look

j = models.jobs.c


@dataclass(frozen=True, slots=True)
class Ended:
    """One job that ended. `wait_seconds` from being due to its last start, which an unstarted one lacks."""

    job_type: str
    queue: str
    status: JobStatus
    finished_at: datetime
    wait_seconds: float | None
    run_seconds: float | None


@dataclass(frozen=True, slots=True)
class Sample:
    """What ended after `since`; `cut`: more ended in the window asked for, before `since`."""

    jobs: Sequence[Ended]
    since: datetime
    until: datetime
    cut: bool

    @property
    def seconds(self) -> float:
        return max((self.until - self.since).total_seconds(), 1e-6)


def sample(
    connection: sa.Connection,
    *,
    window: timedelta,
    now: datetime,
    statuses: Collection[JobStatus] = FINAL,
    tenant_id: str | None = None,
    most: int = MAX_SAMPLED,
) -> Sample:
    """The jobs that ended within `window` before `now`, of one tenant or of all, `most` of each status.

    Of one tenant: those of it among the rows that a look at all tenants would read.
    """
    since = now - window
    cut = False
    rows: list[sa.Row[Any]] = []
    for status in sorted(statuses):
        newest = (
            sa.select(j.tenant_id, j.job_type, j.queue, j.status, j.queued_at, j.started_at, j.finished_at)
            .where(j.status == status, j.finished_at > since, j.finished_at <= now)
            .order_by(j.finished_at.desc())
            .limit(most + 1)
        ).subquery()
        last = sa.select(sa.func.count(), sa.func.min(newest.c.finished_at)).select_from(newest)
        count, first = connection.execute(last).one()
        if count > most:
            since, cut = max(since, first), True
        mine = [newest.c.tenant_id == tenant_id] if tenant_id is not None else []
        rows += connection.execute(sa.select(newest).where(*mine)).all()
    return Sample([_ended(row) for row in rows if row.finished_at > since], since, now, cut)


def _ended(row: sa.Row[Any]) -> Ended:
    started = row.started_at
    return Ended(
        row.job_type,
        row.queue,
        JobStatus(row.status),
        row.finished_at,
        _seconds(row.queued_at, started),
        _seconds(started, row.finished_at),
    )


def _seconds(begin: datetime | None, end: datetime | None) -> float | None:
    """None where one is missing, or where they are of two runs: a retried job was queued after its start."""
    if begin is None or end is None or end < begin:
        return None
    return (end - begin).total_seconds()


def percentile(values: Sequence[float], share: float) -> float | None:
    """The nearest-rank percentile: the smallest value that `share` of all do not exceed. None of none."""
    if not values:
        return None
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def spread(values: Iterable[float | None]) -> dict[str, float | None]:
    """`average_seconds`, `p50_seconds` and `p95_seconds` of what there is, to the microsecond."""
    known = [value for value in values if value is not None]
    average = sum(known) / len(known) if known else None
    figures = {"average": average, "p50": percentile(known, 0.5), "p95": percentile(known, 0.95)}
    return {f"{name}_seconds": None if v is None else round(v, 6) for name, v in figures.items()}


def figures(jobs: Sequence[Ended]) -> dict[str, Any]:
    """Counts by final status, rates among those that were run to an end, durations and waits.

    A cancelled or expired job is neither a success nor a failure.
    """
    counts = {status.value: 0 for status in sorted(FINAL)}
    for job in jobs:
        counts[job.status] += 1
    done = counts[JobStatus.COMPLETED]
    broken = counts[JobStatus.FAILED] + counts[JobStatus.TIMEOUT]
    ran = done + broken
    return {
        "total": len(jobs),
        "by_status": counts,
        "success_rate": round(done / ran, 6) if ran else None,
        "failure_rate": round(broken / ran, 6) if ran else None,
        "duration": spread(job.run_seconds for job in jobs),
        "wait": spread(job.wait_seconds for job in jobs),
    }


def of_all(service: JobService, *, window: timedelta) -> dict[str, Any]:
    """`figures` of all tenants' jobs that ended within `window`, in all and for each job type."""
    with service.database.read() as connection:
        seen = sample(connection, window=window, now=service.clock.now())
    by_type: defaultdict[str, list[Ended]] = defaultdict(list)
    for job in seen.jobs:
        by_type[job.job_type].append(job)
    return {
        "window_seconds": int(window.total_seconds()),
        "since": stamp(seen.since),
        "until": stamp(seen.until),
        "cut": seen.cut,
        **figures(seen.jobs),
        "job_types": [{"job_type": name, **figures(jobs)} for name, jobs in sorted(by_type.items())],
    }
