"""Sentences that must hold, as bounded queries: what tests, operators and `laneway doctor` call healthy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

import sqlalchemy as sa

from laneway import models
from laneway.db import Database
from laneway.domain.states import JobStatus

SHOWN = 10

j = models.jobs.c
w = models.workers.c
e = models.job_events.c
d = models.webhook_deliveries.c


@dataclass(frozen=True, slots=True)
class Finding:
    """A sentence that does not hold: the ids that break it (at most SHOWN) and what to do."""

    sentence: str
    ids: tuple[str, ...]
    remedy: str


@dataclass(frozen=True, slots=True)
class _Check:
    sentence: str
    query: Callable[[datetime], sa.Select[tuple[str]]]
    remedy: str


CHECKS = (
    _Check(
        "a running job's worker is alive",
        lambda now: (
            sa.select(j.id)
            .select_from(models.jobs.outerjoin(models.workers, w.id == j.worker_id))
            .where(
                j.status == JobStatus.RUNNING,
                j.started_at < now - timedelta(minutes=2),
                sa.or_(w.id.is_(None), w.state.in_(("dead", "gone"))),
            )
        ),
        "run a scheduler: its reaper takes such jobs back (`make scheduler`)",
    ),
    _Check(
        "a due job is queued within a minute",
        lambda now: sa.select(j.id).where(
            sa.or_(
                sa.and_(j.status == JobStatus.SCHEDULED, j.scheduled_for < now - timedelta(minutes=1)),
                sa.and_(j.status == JobStatus.RETRYING, j.next_retry_at < now - timedelta(minutes=1)),
            )
        ),
        "run a scheduler: it promotes due jobs (`make scheduler`)",
    ),
    _Check(
        "a job's status is that of its last event",
        lambda _: (
            sa.select(j.id)
            .select_from(
                models.jobs.outerjoin(models.job_events, sa.and_(e.job_id == j.id, e.seq == j.event_seq))
            )
            .where(sa.or_(e.job_id.is_(None), e.status != j.status))
            .order_by(j.id.desc())
        ),
        "somebody changed rows by hand: compare jobs and job_events for these ids",
    ),
    _Check(
        "a webhook is tried within ten minutes of being due",
        lambda now: sa.select(d.id).where(
            d.status.in_(("pending", "retrying")), d.next_at < now - timedelta(minutes=10)
        ),
        "run a courier: `laneway courier`, or a worker without --no-courier",
    ),
)


def examine(database: Database, *, now: datetime) -> list[Finding]:
    """Every sentence that does not hold. Empty means healthy."""
    findings: list[Finding] = []
    with database.read() as connection:
        for check in CHECKS:
            ids = connection.execute(check.query(now).limit(SHOWN)).scalars().all()
            if ids:
                findings.append(Finding(check.sentence, tuple(map(str, ids)), check.remedy))
    return findings
