"""Progress of running jobs: no transition, so no row of `job_events`; fenced like one all the same."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from functools import cache

import sqlalchemy as sa

from laneway.db import Moment, Rows
from laneway.domain.events import EventType
from laneway.engine.context import Progress
from laneway.engine.outcomes import Claimed
from laneway.engine.telling import tell_progress

_ROWS = Rows(
    job_id="id",
    attempt="int",
    lease_token="id",  # noqa: S106 - a kind of column
    percent="int",
    message="text",
    details="text",
)


@cache
def _update(dialect: str) -> sa.TextClause:
    return sa.text(
        "UPDATE jobs SET progress = u.percent, progress_message = u.message, progress_details = u.details,"  # noqa: S608
        f" version = jobs.version + 1, updated_at = :now FROM {_ROWS.sql(dialect)}"
        f" WHERE {_ROWS.match(dialect, 'jobs.id')} AND COALESCE(jobs.status, '') = 'running'"
        " AND jobs.attempt = u.attempt"
        " AND jobs.lease_token = u.lease_token AND jobs.progress <= u.percent"
        " RETURNING CAST(jobs.id AS text) AS id, jobs.webhook_url, jobs.webhook_events,"
        " EXISTS (SELECT 1 FROM webhook_endpoints AS e WHERE e.tenant_id = jobs.tenant_id) AS listened"
    ).bindparams(sa.bindparam("now", type_=Moment))


def save(
    connection: sa.Connection, news: Sequence[tuple[Claimed, Progress]], *, now: datetime
) -> list[sa.RowMapping]:
    """Write the newest progress of held jobs, one each; those that changed, with who may want to hear of it.

    Within an attempt it never falls; stale attempts change nothing.
    """
    rows = [(job.job_id, job.attempt, job.lease_token, p.percent, p.message, p.details) for job, p in news]
    if not rows:
        return []
    dialect = connection.dialect.name
    saved = connection.execute(_update(dialect), {"now": now, **_ROWS.bind(dialect, rows)})
    return list(saved.mappings())


def save_and_tell(
    connection: sa.Connection, news: Sequence[tuple[Claimed, Progress]], *, now: datetime
) -> bool:
    """Write it and whom it is told; whether a courier has something to do.

    The one UPDATE is all that jobs cost which nobody listens to.
    """
    heard = [row["id"] for row in save(connection, news, now=now) if row["listened"] or _asked_for(row)]
    return bool(heard) and tell_progress(connection, heard, now=now)


def _asked_for(row: sa.RowMapping) -> bool:
    events = json.loads(row["webhook_events"] or "[]")
    return row["webhook_url"] is not None and EventType.JOB_PROGRESS in events
