"""HTTP jobs in the store: how a target is kept, and who holds the job while the work goes on there.

A job with a `target` becomes one of the type `http.request` whose parameters are the target. Values of
headers are sealed in it (`private`), and shown to nobody again; what signs the call is added, sealed, when
a worker has claimed the job (`sender`). Both are opened in the child that makes the call.

A target that answers 202 goes on working, and nobody here does. The worker then hands the job over: it
stays `running`, under its attempt and lease token, with REMOTE_WORKER as its worker, whom no reaper looks
after. It ends by a report of the target (`engine/job_reports.py`), or by `end_overdue` when its timeout, or
the grace of its cancel, is over. A worker that dies before it handed over is found by the reaper as ever.
See docs/decisions/0007.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import cache
from random import Random
from typing import Any

import sqlalchemy as sa

from laneway import models
from laneway.db import Database, Moment, Rows
from laneway.domain.http_target import HTTP_REQUEST, MASK, REMOTE_WORKER, HttpTarget
from laneway.engine.endings import Cancelled, Ending, TimedOut
from laneway.engine.outcomes import Claimed, carry_out, decide, due_of
from laneway.engine.transitions import Applied
from laneway.errors import FieldError, WebhookUrlRefused
from laneway.lanes.backend import Due
from laneway.log import get_logger
from laneway.webhooks.guard import Policy, check_url
from laneway.webhooks.secrets import SecretBox, live_secrets, target_headers_context

SWEEP_LIMIT = 500
ACTOR = "scheduler"

j = models.jobs.c
t = models.tenants.c
log = get_logger("http_jobs")


# Making one


def parameters_of(
    target: HttpTarget, *, tenant_id: str, traceparent: str | None, policy: Policy, box: SecretBox
) -> dict[str, Any]:
    """The target as the parameters of its job. Raises WebhookUrlRefused."""
    try:
        url = check_url(target.url, policy).url
    except WebhookUrlRefused as refused:
        refused.errors = (FieldError("/target/url", str(refused), refused.code),)
        raise
    private: dict[str, str] = {}
    if target.headers:
        private["headers"] = box.seal(json.dumps(target.headers), target_headers_context(tenant_id))
    if traceparent is not None:
        private["traceparent"] = traceparent
    return {
        "url": url,
        "method": target.method,
        "headers": dict.fromkeys(target.headers, MASK),
        "body": target.body,
        "success": list(target.success),
        "timeout_seconds": target.timeout_seconds,
        "private": private,
    }


# Running one


def equip(database: Database, claimed: Sequence[Claimed], *, now: datetime) -> list[Claimed]:
    """The same jobs, the HTTP jobs among them with what signs their calls: one read for all of them.

    Where the store does not answer they go without, and their handler comes back later.
    """
    tenants = {job.tenant_id for job in claimed if job.job_type == HTTP_REQUEST}
    if not tenants:
        return list(claimed)
    query = sa.select(t.id, t.webhook_secret, t.old_webhook_secrets).where(t.id.in_(tenants))
    senders: dict[str, list[str]] | None = None
    try:
        with database.read() as connection:
            senders = {tenant_id: [] for tenant_id in tenants}
            for row in connection.execute(query):
                senders[row.id] = live_secrets(row.webhook_secret, row.old_webhook_secrets, now=now)
    except (sa.exc.DBAPIError, sa.exc.TimeoutError) as error:
        log.warning("targets_not_equipped", error=type(error).__name__)
        senders = None
    return [_equipped(job, senders) if job.job_type == HTTP_REQUEST else job for job in claimed]


def _equipped(job: Claimed, senders: Mapping[str, Sequence[str]] | None) -> Claimed:
    sender = None if senders is None else {"tenant_id": job.tenant_id, "secrets": senders[job.tenant_id]}
    return replace(job, parameters=json.dumps(json.loads(job.parameters) | {"sender": sender}))


_HELD = Rows(job_id="id", attempt="int", lease_token="id")  # noqa: S106 - a kind of column


@cache
def _hand_over(dialect: str) -> sa.TextClause:
    return sa.text(
        f"UPDATE jobs SET worker_id = '{REMOTE_WORKER}', version = jobs.version + 1, updated_at = :now"  # noqa: S608
        f" FROM {_HELD.sql(dialect)} WHERE {_HELD.match(dialect, 'jobs.id')}"
        " AND COALESCE(jobs.status, '') = 'running' AND jobs.attempt = u.attempt"
        " AND jobs.lease_token = u.lease_token RETURNING CAST(jobs.id AS text)"
    ).bindparams(sa.bindparam("now", type_=Moment))


def hand_over(connection: sa.Connection, held: Sequence[Claimed], *, now: datetime) -> list[bool]:
    """Leave held jobs to their targets; which of them were still held. No transition, but fenced like one."""
    dialect = connection.dialect.name
    rows = _HELD.bind(dialect, [(job.job_id, job.attempt, job.lease_token) for job in held])
    left = set(connection.execute(_hand_over(dialect), {"now": now, **rows}).scalars())
    return [job.job_id in left for job in held]


# Ending those that are not heard of


@dataclass(frozen=True, slots=True)
class Overdue:
    """What a sweep ended: how many, whether a courier has something to do, jobs to be rung."""

    ids: tuple[str, ...] = ()
    told: bool = False
    due: tuple[Due, ...] = ()


_TIME_IS_OVER = {
    "postgresql": "jobs.started_at + jobs.timeout_seconds * interval '1 second' <= :now",
    "sqlite": "julianday(jobs.started_at) + jobs.timeout_seconds / 86400.0 <= julianday(:now)",
}


def end_overdue(
    database: Database, *, now: datetime, cancel_grace_seconds: float, crash_limit: int, rng: Random
) -> Overdue:
    """End the attempts whose target had no more time to report, and those that had their grace to stop.

    An attempt ends as its handler's would: a timeout with another attempt while retries are left, a cancel
    for good.
    """
    over = sa.text(_TIME_IS_OVER[database.dialect]).bindparams(sa.bindparam("now", now, type_=Moment))
    running: sa.ColumnElement[bool] = sa.literal_column("jobs.status = 'running'")  # for the partial index
    query = (
        sa.select(models.jobs)
        .where(running, j.worker_id == REMOTE_WORKER, sa.or_(j.cancel_requested_at.is_not(None), over))
        .order_by(sa.nulls_first(j.cancel_requested_at), j.id)  # a long grace holds up nobody's timeout
        .limit(SWEEP_LIMIT)
    )
    with database.read() as connection:
        if connection.execute(query.with_only_columns(j.id).limit(1)).first() is None:
            return Overdue()
    with database.write() as connection:
        moves = []
        for row in connection.execute(query.with_for_update(skip_locked=True)).mappings():
            ending = _ending(row, now=now, cancel_grace_seconds=cancel_grace_seconds)
            if ending is not None:
                job = Claimed.of(row, row["lease_token"])
                moves.append(decide(job, ending, now=now, rng=rng, crash_limit=crash_limit))
        outcomes = carry_out(connection, moves, now=now, actor=ACTOR) if moves else []
    ended = [o for o in outcomes if isinstance(o, Applied)]
    return Overdue(tuple(o.row["id"] for o in ended), any(o.told for o in ended), tuple(due_of(ended)))


def _ending(row: Mapping[Any, Any], *, now: datetime, cancel_grace_seconds: float) -> Ending | None:
    if row["started_at"] + timedelta(seconds=row["timeout_seconds"]) <= now:
        return TimedOut(row["timeout_seconds"])
    if row["cancel_requested_at"] is None:
        return None
    grace = row["cancel_grace_seconds"]
    wait = 0.0 if row["cancel_terminate"] else cancel_grace_seconds if grace is None else grace
    return Cancelled() if row["cancel_requested_at"] + timedelta(seconds=wait) <= now else None
