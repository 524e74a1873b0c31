"""What the end of a run means for its schedule, and what is told of schedules.

An end is written down in the transaction that settles the job (`count_ends`), and counted by a scheduler
(`fold_ends`). Settling itself never waits for a schedule's row: a scheduler that is stopped while it has it
locked would hold up every job that ends together with a run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from typing import Any

import sqlalchemy as sa

from laneway.clock import new_id
from laneway.db import Database, Rows
from laneway.domain.events import SystemEvent
from laneway.domain.states import JobStatus
from laneway.engine.transitions import Applied
from laneway.models import schedule_ends, schedules
from laneway.notify.rules import current as notifications
from laneway.webhooks.messages import Target, Told, message_id, record
from laneway.webhooks.subscriptions import subscribers

FAILING_AFTER = 3  # failures in a row: then `schedule.failing` is told, once
FOLDED_AT_ONCE = 1000
SCHEDULES_AT_ONCE = 50
ACTOR = "scheduler"

_SUCCESSFUL = {JobStatus.COMPLETED: True, JobStatus.FAILED: False, JobStatus.TIMEOUT: False}
_ENDS = Rows(id="id", tenant_id="id", schedule_id="id", job_id="id", successful="bool")

e = schedule_ends.c
s = schedules.c


@dataclass(frozen=True, slots=True)
class ScheduleNews:
    """Something that happened to a schedule (its row); `happening` tells it from all else."""

    event: SystemEvent
    schedule: Mapping[Any, Any]
    happening: str
    facts: dict[str, Any] = field(default_factory=dict)


def count_ends(connection: sa.Connection, applied: Sequence[Applied]) -> None:
    """Write down the successes and failures of runs: one statement for all, and none where no run ended.

    A run that is retried ends, and counts, again.
    """
    rows = [
        (new_id(), each.row["tenant_id"], each.row["scheduled_job_id"], each.row["id"], successful)
        for each in applied
        if each.row["scheduled_job_id"] is not None
        and (successful := _SUCCESSFUL.get(each.status)) is not None
    ]
    if rows:
        dialect = connection.dialect.name
        connection.execute(_insert(dialect), {"u": _ENDS.bind(dialect, rows)["u"]})


@cache
def _insert(dialect: str) -> sa.TextClause:
    columns = ", ".join(_ENDS.columns)
    return sa.text(
        f"INSERT INTO schedule_ends ({columns}) SELECT {columns} FROM {_ENDS.sql(dialect)}"  # noqa: S608
    )


def uncounted(connection: sa.Connection, schedule_ids: Sequence[str]) -> dict[tuple[str, bool], int]:
    """How many successes and failures of each schedule are written down and not yet counted."""
    query = sa.select(e.schedule_id, e.successful, sa.func.count()).where(e.schedule_id.in_(schedule_ids))
    found = connection.execute(query.group_by(e.schedule_id, e.successful)) if schedule_ids else ()
    return {(row[0], bool(row[1])): row[2] for row in found}


def fold_ends(database: Database, *, now: datetime) -> tuple[int, bool]:
    """Count what is written down, in its order; how many ends, and whether somebody is told of a schedule."""
    with database.read() as connection:
        some = sa.select(e.schedule_id).distinct().order_by(e.schedule_id).limit(SCHEDULES_AT_ONCE)
        ids = connection.execute(some).scalars().all()
    if not ids:
        return 0, False
    with database.write() as connection:
        known = set(connection.execute(sa.select(s.id).where(s.id.in_(ids))).scalars())
        connection.execute(sa.delete(schedule_ends).where(e.schedule_id.in_(set(ids) - known)))
        # Whoever has the schedule has its ends: so they are counted once, and in their order.
        locked = sa.select(schedules).where(s.id.in_(known)).order_by(s.id).with_for_update(skip_locked=True)
        found = {row["id"]: row for row in connection.execute(locked).mappings()}
        ends = connection.execute(
            sa.select(schedule_ends).where(e.schedule_id.in_(found)).order_by(e.id).limit(FOLDED_AT_ONCE)
        ).all()
        news: list[ScheduleNews] = []
        for schedule_id, row in found.items():
            own = [end for end in ends if end.schedule_id == schedule_id]
            in_a_row = row["consecutive_failures"]
            for end in own:
                in_a_row = 0 if end.successful else in_a_row + 1
                if in_a_row == FAILING_AFTER:
                    facts = {"consecutive_failures": in_a_row, "last_job_id": end.job_id}
                    news.append(ScheduleNews(SystemEvent.SCHEDULE_FAILING, row, end.id, facts))
            successful = sum(end.successful for end in own)
            connection.execute(
                sa.update(schedules)
                .where(s.id == schedule_id)
                .values(
                    successful_runs=s.successful_runs + successful,
                    failed_runs=s.failed_runs + len(own) - successful,
                    consecutive_failures=in_a_row,
                    version=s.version + 1,
                    updated_at=now,
                )
            )
        connection.execute(sa.delete(schedule_ends).where(e.id.in_([end.id for end in ends])))
        return len(ends), tell(connection, news, now=now)


def tell(connection: sa.Connection, news: Sequence[ScheduleNews], *, now: datetime) -> bool:
    """Write the messages about these; whether somebody hears of any."""
    if not news:
        return False
    listening = subscribers(connection, {each.schedule["tenant_id"] for each in news})
    told = []
    for each in news:
        tenant_id, job_type = each.schedule["tenant_id"], each.schedule["job_type"]
        endpoints = [one for one in listening.get(tenant_id, ()) if one.wants(each.event)]
        addresses = notifications().addresses(each.event, job_type)
        targets = [Target.endpoint(endpoint) for endpoint in endpoints]
        targets += [Target.notified(tenant_id, address) for address in addresses]
        about = {"schedule_id": each.schedule["id"], "name": each.schedule["name"], "job_type": job_type}
        told.append(
            Told(
                id=message_id(each.schedule["id"], each.happening, each.event),
                tenant_id=tenant_id,
                event_type=each.event.value,
                data=about | each.facts,
                created_by=ACTOR,
                targets=targets,
            )
        )
    return record(connection, told, now=now) > 0
