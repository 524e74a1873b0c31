"""Queues as callers see them: what waits, since when, how fast it goes, and who works.

An admin sees the installation. Everybody else sees the jobs of its own tenant, in queues that it uses or
that workers serve: another tenant's queue names and depths are that tenant's own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from laneway import models
from laneway.domain.payload import to_json
from laneway.domain.spec import DEFAULT_QUEUE, QUEUE_PATTERN, Priority, lane_of, queue_of
from laneway.domain.states import WAITING, JobStatus
from laneway.engine import queries
from laneway.engine.access.audit import AuditAction, record
from laneway.engine.access.callers import AccessScope, Caller, Role
from laneway.engine.cancels import MAX_CANCELLED, ActiveJobs, Cancelled, Manner, cancel_all
from laneway.engine.pauses import open_lanes, paused_queues
from laneway.engine.queries import MAX_COUNTED, JobFilter, stamp
from laneway.engine.service import JobService
from laneway.engine.statistics import Ended, percentile, sample
from laneway.errors import Conflict, QueueNotFound
from laneway.lanes.backend import LanesUnavailable

RECENT = timedelta(minutes=5)
MAX_RECENT = 1_000  # ended jobs of one status that waits and throughput are told from
MAX_QUEUES_SHOWN = 1_000
MAX_PAUSED_QUEUES = 1_000
PURGED = "the queue was purged"
RAN = (JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.TIMEOUT)

j = models.jobs.c
w = models.workers.c
p = models.paused_queues.c


def sees_all(caller: Caller) -> bool:
    """Whether the caller sees the installation, not only its tenant's part of it."""
    return AccessScope.ADMIN in caller.scopes


def page(service: JobService, caller: Caller) -> list[dict[str, Any]]:
    """The queues the caller sees, by name, at most MAX_QUEUES_SHOWN."""
    with service.database.read() as connection:
        waiting = _waiting(service, connection, caller)
        names = _names(connection, waiting, caller)[:MAX_QUEUES_SHOWN]
        return _views(service, connection, names, waiting, caller)


def get(service: JobService, name: str, caller: Caller) -> dict[str, Any]:
    """One queue. Raises QueueNotFound, also for one that only other tenants use."""
    with service.database.read() as connection:
        waiting = _waiting(service, connection, caller)
        if name not in _names(connection, waiting, caller):
            raise QueueNotFound(f"there is no queue {name!r}; GET /queues lists them", queue=name)
        return _views(service, connection, [name], waiting, caller)[0]


def stats(service: JobService, caller: Caller) -> dict[str, Any]:
    """The queues' lanes, and the caller's tenant's active jobs by status; an admin's: of all tenants."""
    with service.database.read() as connection:
        waiting = _waiting(service, connection, caller)
        names = _names(connection, waiting, caller)[:MAX_QUEUES_SHOWN]
        found = _lanes(service, names, waiting, caller)
        counts = queries.status_counts(connection, None if sees_all(caller) else caller.tenant_id)
    queues = [{"name": n, "queued": _sum(lanes), "lanes": lanes} for n, lanes in found.items()]
    return {"queues": queues, "jobs": counts}


def health(service: JobService, caller: Caller) -> dict[str, Any]:
    """Whether somebody works: the reasons for which nobody might; the workers, for all but users."""
    with service.database.read() as connection:
        workers = queries.living_workers(connection, within_seconds=service.settings.lease_seconds)
        waiting = open_lanes(_waiting(service, connection, caller), paused_queues(connection))
    redis = "ok" if _depths(service, ["normal"]) is not None else "away"
    served = {lane for worker in workers for lane in worker["lanes"]}
    reasons = [] if workers else ["no worker is alive: start one with `laneway worker`"]
    if workers:
        reasons = [
            f"jobs wait in lane {lane!r}, and no worker serves it" for lane in waiting if lane not in served
        ]
    return {
        "status": "unhealthy" if reasons else "healthy",
        "reasons": reasons,
        "redis": redis,
        "workers": None if caller.role is Role.USER else workers,
    }


def status(service: JobService, caller: Caller) -> dict[str, Any]:
    """The installation at a glance: its queues, active jobs by status, and whether somebody works."""
    with service.database.read() as connection:
        jobs = queries.status_counts(connection, None)
    return {"queues": page(service, caller), "jobs": jobs, "health": health(service, caller)}


def pause(service: JobService, name: str, caller: Caller, *, reason: str | None = None) -> dict[str, Any]:
    """Let the queue's jobs wait until it is resumed; the queue. Pausing twice is no error.

    Jobs that run go on. Raises QueueNotFound for what can be no queue, Conflict when MAX_PAUSED_QUEUES are
    paused.
    """
    _need_valid(name)
    to_json(reason, what="reason")
    insert = sqlite.insert if service.database.dialect == "sqlite" else postgresql.insert
    values = {"queue": name, "reason": reason, "created_by": caller.subject}
    pausing = insert(models.paused_queues).values(values).on_conflict_do_nothing().returning(p.queue)
    with service.database.write() as connection:
        known = paused_queues(connection)
        if name not in known and len(known) >= MAX_PAUSED_QUEUES:
            raise Conflict(f"{MAX_PAUSED_QUEUES} queues are paused, and no more may be; resume some")
        if connection.execute(pausing).first() is not None:
            record(connection, caller, AuditAction.QUEUE_PAUSED, f"queue:{name}", {"reason": reason})
    service.news.wished()  # workers beat now, and learn of it
    return _one(service, name, caller)


def resume(service: JobService, name: str, caller: Caller) -> dict[str, Any]:
    """Let the queue's jobs run again; the queue. Raises QueueNotFound for what can be no queue.

    What its lanes hold is taken at once; what they lack, the reconciler fills in with its next round.
    """
    _need_valid(name)
    with service.database.write() as connection:
        if connection.execute(sa.delete(models.paused_queues).where(p.queue == name)).rowcount:
            record(connection, caller, AuditAction.QUEUE_RESUMED, f"queue:{name}")
    service.news.wished()
    return _one(service, name, caller)


def purge(
    service: JobService, name: str, caller: Caller, *, limit: int = MAX_CANCELLED, dry_run: bool = False
) -> Cancelled:
    """Cancel what waits in the queue, of all tenants: at most `limit` jobs, oldest first, in bounded steps.

    They end `cancelled`, and whoever is told of cancelled jobs is told of these. When the database fails on
    the way, what was cancelled stays so. Raises QueueNotFound for what can be no queue.
    """
    _need_valid(name)
    if not dry_run:
        with (
            service.database.write() as connection
        ):  # before the first step: the log tells also of half a purge
            record(connection, caller, AuditAction.QUEUE_PURGED, f"queue:{name}", {"limit": limit})
    wanted = ActiveJobs(JobFilter(statuses=tuple(sorted(WAITING)), queue=name))
    manner = Manner(PURGED)
    return cancel_all(service, caller, wanted, manner, limit=limit, dry_run=dry_run, of_all_tenants=True)


# What there is


def _need_valid(name: str) -> None:
    if not re.fullmatch(QUEUE_PATTERN, name) or queue_of(name) != name:
        raise QueueNotFound(f"no queue can be called {name!r}", queue=name)


def _one(service: JobService, name: str, caller: Caller) -> dict[str, Any]:
    with service.database.read() as connection:
        return _views(service, connection, [name], _waiting(service, connection, caller), caller)[0]


def _waiting(service: JobService, connection: sa.Connection, caller: Caller) -> dict[str, dict[str, Any]]:
    """The lanes where jobs that the caller sees are queued: how many, and the age of the oldest.

    Counted up to MAX_COUNTED; a tenant's are those among so many of the lane's oldest.
    """
    now = service.clock.now()
    lanes = queries.lanes_with_work(connection)
    if sees_all(caller):
        return queries.lane_state(connection, lanes, now=now)
    found: dict[str, dict[str, Any]] = {}
    for lane in lanes:
        queued = sa.select(j.tenant_id, j.queued_at).where(j.lane == lane, j.status == JobStatus.QUEUED)
        oldest = queued.order_by(j.queued_at, j.id).limit(MAX_COUNTED).subquery()
        mine = sa.select(sa.func.count(), sa.func.min(oldest.c.queued_at, type_=j.queued_at.type)).where(
            oldest.c.tenant_id == caller.tenant_id
        )
        count, first = connection.execute(mine).one()
        if count:
            age = max(0.0, (now - first).total_seconds())
            found[lane] = {"queued": count, "oldest_age_seconds": age}
    return found


def _names(connection: sa.Connection, waiting: Iterable[str], caller: Caller) -> list[str]:
    """The default queue, those that workers serve, and those of the lanes where jobs are `waiting`.

    An admin's are also those that are paused.
    """
    living = sa.select(w.lanes).where(w.state.in_(("active", "draining")))
    served = {lane for lanes in connection.execute(living).scalars() for lane in lanes}
    names = {DEFAULT_QUEUE} | {queue_of(lane) for lane in served.union(waiting)}
    return sorted(names.union(paused_queues(connection)) if sees_all(caller) else names)


def _lanes(
    service: JobService, names: Sequence[str], waiting: Mapping[str, dict[str, Any]], caller: Caller
) -> dict[str, list[dict[str, Any]]]:
    """Each queue's lanes, most urgent first. How many ids a lane holds in Redis is the installation's."""
    lanes = [lane_of(name, priority) for name in names for priority in Priority]
    depths = (_depths(service, lanes) if sees_all(caller) else None) or {}
    nothing = {"queued": 0, "oldest_age_seconds": None}
    return {
        name: [
            {
                "lane": (lane := lane_of(name, priority)),
                "priority": priority.value,
                **waiting.get(lane, nothing),
                "depth": depths.get(lane),
            }
            for priority in Priority
        ]
        for name in names
    }


def _views(
    service: JobService,
    connection: sa.Connection,
    names: Sequence[str],
    waiting: Mapping[str, dict[str, Any]],
    caller: Caller,
) -> list[dict[str, Any]]:
    now = service.clock.now()
    tenant_id = None if sees_all(caller) else caller.tenant_id
    recent = sample(connection, window=RECENT, now=now, statuses=RAN, tenant_id=tenant_id, most=MAX_RECENT)
    paused = paused_queues(connection)
    lanes = _lanes(service, names, waiting, caller)
    return [
        {
            "name": name,
            **_pause(paused.get(name), caller),
            "queued": _sum(lanes[name]),
            "oldest_age_seconds": max(
                (age for lane in lanes[name] if (age := lane["oldest_age_seconds"]) is not None), default=None
            ),
            **_pace([job for job in recent.jobs if job.queue == name], recent.seconds),
            "lanes": lanes[name],
        }
        for name in names
    ]


def _pause(row: sa.RowMapping | None, caller: Caller) -> dict[str, Any]:
    """Who paused it and why is for admins: both are words of another tenant."""
    told = row if sees_all(caller) else None
    return {
        "paused": row is not None,
        "paused_at": None if row is None else stamp(row["created_at"]),
        "paused_by": None if told is None else told["created_by"],
        "pause_reason": None if told is None else told["reason"],
    }


def _pace(jobs: Sequence[Ended], seconds: float) -> dict[str, float | None]:
    waits = [job.wait_seconds for job in jobs if job.wait_seconds is not None]
    return {
        "wait_p50_seconds": percentile(waits, 0.5),
        "wait_p95_seconds": percentile(waits, 0.95),
        "ended_per_minute": round(60 * len(jobs) / seconds, 3),
    }


def _sum(lanes: Sequence[dict[str, Any]]) -> int:
    return sum(lane["queued"] for lane in lanes)


def _depths(service: JobService, lanes: Sequence[str]) -> dict[str, int] | None:
    try:
        return service.lanes.depths(lanes)
    except LanesUnavailable:
        return None
