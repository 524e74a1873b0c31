"""When a batch has ended: found without a counter that all its jobs would write.

How many of a batch's jobs are where is counted from the index on (batch_id, status). Whoever ends one of
them looks whether others are active. While there are many, that is all. Near the end it takes the row of
the batch, so that of several that end their jobs at the same moment the last one sees that nothing is
left, and does what follows: once, since it writes `finished_at` under that lock. Should as many as
LOCK_BELOW be ended at the same moment, nobody has taken the row; then one ended job of the batch is left
unfollowed (models.unfollowed), and a sweep looks again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from typing import Any

import sqlalchemy as sa

from laneway import models
from laneway.db import any_of, listed
from laneway.domain.events import SystemEvent
from laneway.domain.flow import ResultMissing
from laneway.domain.states import ACTIVE, FINAL, JobStatus
from laneway.engine import transitions
from laneway.engine.plans import make
from laneway.engine.queries import stamp
from laneway.engine.telling import tell_of
from laneway.engine.transitions import LinkedJob
from laneway.errors import LanewayError
from laneway.lanes.backend import Due
from laneway.log import get_logger

LOCK_BELOW = 1_000
"""With fewer active jobs than this a batch may be about to end."""

j = models.jobs.c
b = models.batches.c

log = get_logger("batches")


@dataclass(slots=True)
class Looked:
    """What was found: `unsure` are batches of which somebody must look again."""

    due: list[Due] = field(default_factory=list)
    told: bool = False
    unsure: set[str] = field(default_factory=set)


def look(connection: sa.Connection, batch_ids: Collection[str], *, now: datetime) -> Looked:
    """Do what follows for those of the batches of which no job is active any more.

    Jobs of theirs have ended in this transaction, or before.
    """
    active = _count_active(connection, batch_ids, up_to=LOCK_BELOW)
    looked = Looked(unsure={batch_id for batch_id, count in active.items() if count >= LOCK_BELOW})
    near = sorted(set(active) - looked.unsure)
    if not near:
        return looked
    locked = sa.select(models.batches).where(b.id.in_(near)).order_by(b.id).with_for_update()
    rows = connection.execute(locked).mappings().all()
    # Counted anew: what others committed while this waited for the lock is seen only now.
    still = _count_active(connection, near, up_to=1)
    ended = [row for row in rows if not still[row["id"]]]
    if ended:
        _end(connection, ended, looked, now=now)
    return looked


def reopen(connection: sa.Connection, batch_ids: Collection[str], *, now: datetime) -> None:
    """Some of their jobs are to run again."""
    connection.execute(
        sa.update(models.batches)
        .where(b.id.in_(sorted(batch_ids)), b.finished_at.is_not(None))
        .values(finished_at=None, counts=None, version=b.version + 1, updated_at=now)
    )


def counts_of(connection: sa.Connection, batch_ids: Collection[str]) -> dict[str, dict[str, int]]:
    """By batch: how many jobs are in each status that has some."""
    counted = (
        sa.select(j.batch_id, j.status, sa.func.count())
        .where(j.batch_id.in_(batch_ids))
        .group_by(j.batch_id, j.status)
    )
    found: dict[str, dict[str, int]] = {batch_id: {} for batch_id in batch_ids}
    for batch_id, status, count in connection.execute(counted):
        found[batch_id][status] = count
    return found


def _end(connection: sa.Connection, rows: Sequence[sa.RowMapping], looked: Looked, *, now: datetime) -> None:
    """Write the ends of batches, their rows locked; one that had ended before is only counted anew."""
    counts = counts_of(connection, [row["id"] for row in rows])
    new: list[LinkedJob] = []
    changes = []
    for row in rows:
        counted, callbacks = counts[row["id"]], row["callbacks"]
        if row["finished_at"] is None:
            made = _callbacks(row, counted, now=now)
            new += made.values()
            callbacks = callbacks | {
                name: callbacks[name] | {"job_id": made[name].id if name in made else None}
                for name in callbacks
            }
        changes.append(
            {
                "batch": row["id"],
                "counts": counted,
                "callbacks": callbacks,
                "ends": row["ends"] + (row["finished_at"] is None),
                "finished_at": row["finished_at"] or now,
            }
        )
    if new:
        transitions.create(connection, new, now=now)
        looked.due += [Due(job.lane, job.id, job.tenant_id) for job in new if job.status == JobStatus.QUEUED]
    connection.execute(
        sa.update(models.batches)
        .where(b.id == sa.bindparam("batch"))
        .values(
            **{name: sa.bindparam(name) for name in changes[0] if name != "batch"},
            version=b.version + 1,
            updated_at=now,
        ),
        changes,
    )
    told = [
        (row, row["ends"] + 1, _said(row, counts[row["id"]], now=now))
        for row in rows
        if row["finished_at"] is None
    ]
    if told:
        looked.told |= tell_of(connection, SystemEvent.BATCH_COMPLETED, told, now=now)


def _callbacks(row: sa.RowMapping, counts: Mapping[str, int], *, now: datetime) -> dict[str, LinkedJob]:
    """The jobs that the end of a batch makes, by the names of its callbacks."""
    well = counts.get(JobStatus.COMPLETED, 0) == sum(counts.values())
    made = {}
    facts = {"id": row["id"], "total": row["total"], "enqueued": row["enqueued"]}
    facts |= {status.value: counts.get(status, 0) for status in FINAL}
    for name in ("on_complete", "on_success" if well else "on_failure"):
        if name in row["callbacks"]:
            try:
                made[name] = make(
                    row["callbacks"][name]["plan"],
                    {"batch": facts},
                    tenant_id=row["tenant_id"],
                    created_by=row["created_by"],
                    now=now,
                )
            except (ResultMissing, LanewayError) as error:  # checked when the batch was made
                log.error("callback_failed", batch_id=row["id"], callback=name, error=str(error))
    return made


def _said(row: sa.RowMapping, counts: Mapping[str, int], *, now: datetime) -> dict[str, Any]:
    return {
        "batch_id": row["id"],
        "status": status_of(counts).value,
        "total": row["total"],
        "enqueued": row["enqueued"],
        "counts": {status.value: counts.get(status, 0) for status in JobStatus},
        "created_at": stamp(row["created_at"]),
        "finished_at": stamp(now),
    }


def status_of(counts: Mapping[str, int]) -> JobStatus:
    """Where a batch is whose jobs are counted so: `running`, `completed`, or `failed` when not all did."""
    if any(counts.get(status, 0) for status in ACTIVE):
        return JobStatus.RUNNING
    well = counts.get(JobStatus.COMPLETED, 0) == sum(counts.values())
    return JobStatus.COMPLETED if well else JobStatus.FAILED


def _count_active(connection: sa.Connection, batch_ids: Collection[str], *, up_to: int) -> dict[str, int]:
    """How many jobs of each batch are active, counted up to a bound."""
    dialect = connection.dialect.name
    rows = connection.execute(_active(dialect), {"ids": listed(dialect, sorted(batch_ids)), "up_to": up_to})
    return {row.id: row.active for row in rows}


@cache
def _active(dialect: str) -> sa.TextClause:
    # Written out, not bound: only so do both stores see that the index serves.
    statuses = ", ".join(f"'{status.value}'" for status in sorted(ACTIVE))
    return sa.text(
        "SELECT CAST(batches.id AS text) AS id, (SELECT count(*) FROM (SELECT 1 FROM jobs"  # noqa: S608
        f" WHERE jobs.batch_id = batches.id AND jobs.status IN ({statuses}) LIMIT :up_to) AS them) AS active"
        f" FROM batches WHERE batches.id IN {any_of(dialect, 'ids', kind='id')}"
    )
