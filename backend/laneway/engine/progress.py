"""Progress of running jobs: no transition, so no event; fenced like one all the same."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from functools import cache

import sqlalchemy as sa

from laneway.db import Moment, Rows
from laneway.engine.context import Progress
from laneway.engine.outcomes import Claimed

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
    ).bindparams(sa.bindparam("now", type_=Moment))


def save(connection: sa.Connection, news: Sequence[tuple[Claimed, Progress]], *, now: datetime) -> None:
    """Write the newest progress of held jobs, one each.

    Within an attempt it never falls; stale attempts change nothing.
    """
    rows = [(job.job_id, job.attempt, job.lease_token, p.percent, p.message, p.details) for job, p in news]
    if rows:
        dialect = connection.dialect.name
        connection.execute(_update(dialect), {"now": now, **_ROWS.bind(dialect, rows)})
