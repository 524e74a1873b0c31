"""Debounce: of many requests with one unique key a single job is made, which starts once they have ceased.

The first makes a scheduled job; each that finds it waiting puts its own parameters, title, tags and metadata
in place of those it has, and starts its time anew. A job that waits for something else than its time (a
worker, a slot, its next attempt) takes them on and keeps its place. One that runs cannot: it lets go of the
key, and a new job waits for the time after it.
"""

from __future__ import annotations

import json
from datetime import datetime

import sqlalchemy as sa

from laneway import models
from laneway.domain.states import FINAL, JobStatus
from laneway.engine.transitions import NewJob, record, tag

DEBOUNCE = "debounce"
"""The reason of the event that each further request leaves."""

j = models.jobs.c
t = models.job_tags.c


def put_off(connection: sa.Connection, job_id: str, wanted: NewJob, *, now: datetime) -> bool:
    """Let the active job that holds the key wait on, for `wanted`; whether it could.

    If not it has ended, or runs: then the key is free, and `wanted` can be made.
    """
    held = sa.select(models.jobs).where(j.id == job_id, j.tenant_id == wanted.tenant_id).with_for_update()
    row = connection.execute(held).mappings().one()
    mine = sa.update(models.jobs).where(j.id == job_id, j.tenant_id == wanted.tenant_id)
    if row["status"] in FINAL:
        return False
    if row["status"] == JobStatus.RUNNING:
        connection.execute(mine.values(unique_key=None, version=j.version + 1, updated_at=now))
        return False
    texts = {name: json.loads(getattr(wanted, name)) for name in ("parameters", "tags", "metadata")}
    values = texts | {"title": wanted.title}
    if row["status"] == JobStatus.SCHEDULED:
        values["scheduled_for"] = wanted.scheduled_for
    connection.execute(
        mine.values(values | {"version": j.version + 1, "event_seq": j.event_seq + 1, "updated_at": now})
    )
    connection.execute(sa.delete(models.job_tags).where(t.job_id == job_id, t.tenant_id == wanted.tenant_id))
    tag(connection, job_id, wanted.tenant_id, texts["tags"])
    changed = connection.execute(sa.select(models.jobs).where(j.id == job_id)).mappings().one()
    record(connection, changed, action="change", actor=wanted.created_by, reason=DEBOUNCE, now=now)
    return True
