"""Slots: what falls due of the schedules becomes a job, or a recorded reason why not.

Any number of schedulers may run this at once; none leads. A slot is decided by one INSERT into
`schedule_runs`, under UNIQUE(schedule, slot), in the transaction that makes its job and moves the schedule
on to its next slot. Whoever comes second finds the row and makes nothing; whoever dies in the middle has
decided nothing, and the slot is still due.

*Time* is that of whichever clock is behind, this process's or the database's. One that jumps ahead starts
nothing early; one that falls back delays, and passes over nothing, since slots are decided in their order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from laneway.clock import first_id, new_id
from laneway.db import Database, Moment, Rows, utc_now
from laneway.domain.cadence import BadCadence
from laneway.domain.events import SystemEvent
from laneway.domain.payload import to_json
from laneway.domain.spec import Priority, lane_of
from laneway.domain.states import JobStatus
from laneway.engine.admission import Admission
from laneway.engine.cancels import Manner, ask_to_stop
from laneway.engine.outcomes import carry_out
from laneway.engine.outcomes import due_of as due_of_moves
from laneway.engine.queries import stamp
from laneway.engine.schedule_ends import ACTOR, ScheduleNews, tell
from laneway.engine.slot_plan import Decision, Overlap, Plan, Skipped, due_of, plan
from laneway.engine.transitions import Applied, Cancel, LinkedJob, create
from laneway.errors import QuotaQueued
from laneway.lanes.backend import Due
from laneway.log import get_logger
from laneway.models import jobs, schedule_runs, schedules

SCHEDULES_AT_ONCE = 50
RUNS_ARE_KEPT = timedelta(days=30)
PRUNED_AT_ONCE = 500

s = schedules.c
r = schedule_runs.c
j = jobs.c

log = get_logger("slots")


@dataclass(slots=True)
class Fired:
    """What a sweep did: how many slots it decided, jobs to be rung, whether somebody is told."""

    decided: int = 0
    rung: list[Due] = field(default_factory=list)
    told: bool = False


def seconds_until_due(database: Database, *, now: datetime) -> float | None:
    """How long until a schedule is due, by whichever clock is behind; None: none will be."""
    first = sa.select(sa.func.min(s.due_at), utc_now()).where(s.due_at.is_not(None))
    with database.read() as connection:
        due_at, server = connection.execute(first).one()
    return None if due_at is None else float((due_at - min(now, server)).total_seconds())


# Deciding


@dataclass(frozen=True, slots=True)
class _Start:
    """A job to be, and the run that it belongs to."""

    row: LinkedJob
    schedule: Mapping[Any, Any]
    slot: datetime
    run_id: str


def job_of(schedule: Mapping[Any, Any], *, slot: datetime, now: datetime) -> LinkedJob:
    """The job that a run of the schedule is, to be queued at once."""
    return LinkedJob(
        id=new_id(),
        tenant_id=schedule["tenant_id"],
        created_by=schedule["created_by"],
        job_type=schedule["job_type"],
        parameters=to_json(schedule["parameters"]),
        queue=schedule["queue"],
        priority=schedule["priority"],
        lane=lane_of(schedule["queue"], Priority(schedule["priority"])),
        title=schedule["name"],
        description=None,
        tags="[]",
        metadata="{}",
        scheduled_for=slot,
        expires_at=None,
        timeout_seconds=schedule["timeout_seconds"],
        max_retries=schedule["max_retries"],
        retry_delay_seconds=schedule["retry_delay_seconds"],
        retry_backoff=schedule["retry_backoff"],
        retry_max_delay_seconds=schedule["retry_max_delay_seconds"],
        retry_jitter=schedule["retry_jitter"],
        unique_key=None,
        webhook_url=None,
        webhook_events=None,
        status=JobStatus.QUEUED.value,
        queued_at=now,
        scheduled_job_id=schedule["id"],
    )


def fire(database: Database, room: Admission, *, now: datetime) -> Fired:
    """Decide what is due of SCHEDULES_AT_ONCE schedules, in one transaction."""
    wait = seconds_until_due(database, now=now)
    if wait is None or wait > 0:  # a read first: on SQLite, an idle scheduler must not take the write lock
        return Fired()
    due = (
        sa.select(schedules, utc_now().label("server_now"))
        .where(s.due_at <= now, s.due_at <= utc_now())
        .order_by(s.due_at, s.id)
        .limit(SCHEDULES_AT_ONCE)
        .with_for_update(skip_locked=True)
    )
    done = Fired()
    with database.write() as connection:
        found = connection.execute(due).mappings().all()
        active = active_runs(connection, [each["id"] for each in found])
        waiting = _waiting(connection, [each["id"] for each in found])
        plans: list[tuple[Mapping[Any, Any], Plan]] = []
        for each in found:
            moment = min(now, each["server_now"])
            here = each["id"] in waiting
            try:
                plans.append((each, plan(each, active=active.get(each["id"], 0), waiting=here, now=moment)))
            except BadCadence as error:  # a time zone that is gone: whoever mends it switches it on again
                log.error("schedule_switched_off", schedule_id=each["id"], error=str(error))
                off = sa.update(schedules).where(s.id == each["id"])
                connection.execute(off.values(is_active=False, next_slot=None, due_at=None))
        drop_waiting(connection, [each["id"] for each, planned in plans if planned.displaces], now=now)
        started, skipped = _carry_out(connection, plans, room, now=now)
        _move_on(connection, plans, started, skipped, now=now)
        done.told = tell(connection, [_missed(each, decision) for each, decision in skipped], now=now)
        done.decided = sum(len(planned.decisions) for _, planned in plans)
        done.rung = [Due(each.row.lane, each.row.id, each.row.tenant_id) for each in started]
    return done


def active_runs(connection: sa.Connection, schedule_ids: Sequence[str]) -> dict[str, int]:
    """How many runs of each schedule have not ended."""
    if not schedule_ids:
        return {}
    active = sa.select(j.scheduled_job_id, sa.func.count()).where(
        j.scheduled_job_id.in_(schedule_ids), j.scheduled_job_id.is_not(None), j.finished_at.is_(None)
    )
    return {row[0]: row[1] for row in connection.execute(active.group_by(j.scheduled_job_id))}


def _waiting(connection: sa.Connection, schedule_ids: Sequence[str]) -> set[str]:
    waits = sa.select(r.schedule_id).where(r.schedule_id.in_(schedule_ids), _IS_WAITING)
    return set(connection.execute(waits).scalars()) if schedule_ids else set()


# Written out, not bound: only so do both stores see that the partial index serves.
_IS_WAITING: sa.ColumnElement[bool] = sa.literal_column("schedule_runs.status = 'waiting'")


def drop_waiting(
    connection: sa.Connection,
    schedule_ids: Sequence[str],
    *,
    now: datetime,
    reason: Skipped = Skipped.OVERLAP,
) -> None:
    """Skip what waits for its turn."""
    if not schedule_ids:
        return
    waits = sa.update(schedule_runs).where(r.schedule_id.in_(schedule_ids), r.status == "waiting")
    gone = connection.execute(
        waits.values(status="skipped", reason=reason.value, version=r.version + 1, updated_at=now).returning(
            r.schedule_id
        )
    ).scalars()
    for schedule_id in sorted(gone):
        connection.execute(
            sa.update(schedules).where(s.id == schedule_id).values(skipped_runs=s.skipped_runs + 1)
        )


def _carry_out(
    connection: sa.Connection,
    plans: Sequence[tuple[Mapping[Any, Any], Plan]],
    room: Admission,
    *,
    now: datetime,
) -> tuple[list[_Start], list[tuple[Mapping[Any, Any], Decision]]]:
    """Write the runs and their jobs; what was started, and what was skipped."""
    starts: list[_Start] = []
    others: dict[str, tuple[Mapping[Any, Any], Decision]] = {}
    for schedule, planned in plans:
        for decision in planned.decisions:
            run_id = new_id()
            if decision.status == "started":
                job = job_of(schedule, slot=decision.slot, now=now)
                starts.append(_Start(job, schedule, decision.slot, run_id))
            else:
                others[run_id] = schedule, decision
    started: list[_Start] = []

    def make(passed: Sequence[_Start]) -> list[dict[str, Any] | Exception]:
        rows = [
            run_row(each.schedule, each.slot, each.run_id, now=now, job_id=each.row.id) for each in passed
        ]
        new = insert_runs(connection, rows)
        started.extend(each for each in passed if each.run_id in new)
        if started:
            create(connection, [each.row for each in started], now=now)
        return [
            {"id": each.row.id} if each.run_id in new else LookupError("decided already") for each in passed
        ]

    for each, answer in zip(starts, room.admit(starts, make) if starts else [], strict=True):
        if isinstance(answer, Exception) and not isinstance(answer, LookupError):
            reason = Skipped.QUOTA if isinstance(answer, QuotaQueued) else Skipped.OVERLOADED
            others[each.run_id] = each.schedule, Decision(each.slot, "skipped", reason)
    rows = [run_row(of, each.slot, i, now=now, decision=each) for i, (of, each) in others.items()]
    new = insert_runs(connection, rows)
    written = [pair for run_id, pair in others.items() if run_id in new]
    return started, [(each, decision) for each, decision in written if decision.status == "skipped"]


def run_row(
    schedule: Mapping[Any, Any],
    slot: datetime,
    run_id: str,
    *,
    now: datetime,
    job_id: str | None = None,
    decision: Decision | None = None,
    trigger: str = "slot",
) -> dict[str, Any]:
    """The columns of a run: started as `job_id`, or as the decision says."""
    return {
        "id": run_id,
        "tenant_id": schedule["tenant_id"],
        "created_by": schedule["created_by"],
        "created_at": now,
        "updated_at": now,
        "schedule_id": schedule["id"],
        "slot": slot,
        "slots": 1 if decision is None else decision.slots,
        "last_slot": slot if decision is None else decision.last_slot or slot,
        "trigger": trigger,
        "status": "started" if decision is None else decision.status,
        "reason": None if decision is None or decision.reason is None else decision.reason.value,
        "job_id": job_id,
    }


def insert_runs(connection: sa.Connection, rows: Sequence[dict[str, Any]]) -> set[str]:
    """The ids of those that are new: a slot that has a row was decided before, and is left as it is."""
    if not rows:
        return set()
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    statement = insert(schedule_runs).on_conflict_do_nothing().returning(r.id)
    return set(connection.execute(statement, list(rows)).scalars())


_MOVED = Rows(
    schedule_id="id", last_slot="moment", next_slot="moment", due_at="moment", started="int", skipped="int"
)


def _move_on(
    connection: sa.Connection,
    plans: Sequence[tuple[Mapping[Any, Any], Plan]],
    started: Sequence[_Start],
    skipped: Sequence[tuple[Mapping[Any, Any], Decision]],
    *,
    now: datetime,
) -> None:
    rows = []
    for schedule, planned in plans:
        last = planned.decisions[-1] if planned.decisions else None
        rows.append(
            (
                schedule["id"],
                schedule["last_slot"] if last is None else last.last_slot or last.slot,
                planned.next_slot,
                None if planned.next_slot is None else due_of(schedule, planned.next_slot),
                sum(each.schedule["id"] == schedule["id"] for each in started),
                sum(each.slots for of, each in skipped if of["id"] == schedule["id"]),
            )
        )
    if not rows:
        return
    dialect = connection.dialect.name
    statement = sa.text(
        "UPDATE schedules SET last_slot = u.last_slot, next_slot = u.next_slot, due_at = u.due_at,"  # noqa: S608
        " total_runs = total_runs + u.started, skipped_runs = skipped_runs + u.skipped,"
        " last_run_at = CASE WHEN u.started > 0 THEN :now ELSE last_run_at END,"
        " version = version + 1, updated_at = :now"
        f" FROM {_MOVED.sql(dialect)} WHERE {_MOVED.match(dialect, 'schedules.id')}"
    ).bindparams(sa.bindparam("now", type_=Moment))
    connection.execute(statement, {"now": now, **_MOVED.bind(dialect, rows)})


def _missed(schedule: Mapping[Any, Any], decision: Decision) -> ScheduleNews:
    facts = {
        "slot": stamp(decision.slot),
        "last_slot": stamp(decision.last_slot or decision.slot),
        "slots": decision.slots,
        "reason": None if decision.reason is None else decision.reason.value,
    }
    return ScheduleNews(SystemEvent.SCHEDULE_MISSED, schedule, decision.slot.isoformat(), facts)


# Runs that wait for their turn


def start_waiting(database: Database, room: Admission, *, now: datetime) -> Fired:
    """Start the runs that wait and whose schedules have a place for them."""
    done = Fired()
    some = (
        sa.select(s.id)
        .join(schedule_runs, r.schedule_id == s.id)
        .where(_IS_WAITING, _count_active() < s.max_concurrent_runs)
        .limit(SCHEDULES_AT_ONCE)
    )
    with database.read() as connection:
        ids = connection.execute(some).scalars().all()
    if not ids:
        return done
    locked = sa.select(schedules).where(s.id.in_(ids)).order_by(s.id).with_for_update(skip_locked=True)
    with database.write() as connection:
        found = {each["id"]: each for each in connection.execute(locked).mappings()}
        active = active_runs(connection, list(found))
        waits = sa.select(r.id, r.schedule_id, r.slot).where(r.schedule_id.in_(found), _IS_WAITING)
        starts = [
            _Start(job_of(schedule, slot=run.slot, now=now), schedule, run.slot, run.id)
            for run in connection.execute(waits)
            for schedule in [found[run.schedule_id]]
            if active.get(schedule["id"], 0) < schedule["max_concurrent_runs"]
        ]

        def make(passed: Sequence[_Start]) -> list[dict[str, Any] | Exception]:
            for each in passed:
                run = sa.update(schedule_runs).where(r.id == each.run_id)
                connection.execute(
                    run.values(status="started", job_id=each.row.id, version=r.version + 1, updated_at=now)
                )
                count_start(connection, each.schedule["id"], now=now)
            create(connection, [each.row for each in passed], now=now)
            return [{"id": each.row.id} for each in passed]

        answers = room.admit(starts, make) if starts else []
        done.rung = [
            Due(each.row.lane, each.row.id, each.row.tenant_id)
            for each, answer in zip(starts, answers, strict=True)
            if not isinstance(answer, Exception)  # one for which there is no room goes on waiting
        ]
    return done


def _count_active(*conditions: sa.ColumnElement[bool]) -> sa.ScalarSelect[int]:
    active = sa.select(sa.func.count()).where(
        j.scheduled_job_id == s.id, j.scheduled_job_id.is_not(None), j.finished_at.is_(None), *conditions
    )
    return active.correlate(schedules).scalar_subquery()


def count_start(connection: sa.Connection, schedule_id: str, *, now: datetime) -> None:
    """A run more."""
    connection.execute(
        sa.update(schedules)
        .where(s.id == schedule_id)
        .values(total_runs=s.total_runs + 1, last_run_at=now, version=s.version + 1, updated_at=now)
    )


def cancel_overtaken(database: Database, *, now: datetime) -> Fired:
    """Cancel the oldest runs of schedules whose next run waits for that.

    A transaction of its own, after the one that made the run wait: jobs are locked before schedules.
    """
    unasked = j.cancel_requested_at.is_(None)
    waits = (
        sa.select(s.id, s.max_concurrent_runs)
        .join(schedule_runs, r.schedule_id == s.id)
        .where(_IS_WAITING, s.overlap == Overlap.CANCEL_RUNNING.value)
        .where(_count_active(unasked) >= s.max_concurrent_runs)
        .limit(SCHEDULES_AT_ONCE)
    )
    with database.read() as connection:
        found = connection.execute(waits).all()
        ids: list[str] = []
        for schedule_id, most in found:
            active = sa.select(j.id).where(
                j.scheduled_job_id == schedule_id, j.finished_at.is_(None), unasked
            )
            oldest = connection.execute(active.order_by(j.id)).scalars().all()
            ids += oldest[: max(0, len(oldest) - most + 1)]
    if not ids:
        return Fired()
    how = Manner("overtaken by the schedule's next run")
    with database.write() as connection:
        moves = [Cancel(job_id, by=ACTOR, reason=how.reason) for job_id in ids]
        outcomes = carry_out(connection, moves, now=now, actor=ACTOR)
        running = [o.move.job_id for o in outcomes if o.status is JobStatus.RUNNING]
        if running:
            ask_to_stop(connection, running, how, by=ACTOR, now=now)
    told = any(isinstance(o, Applied) and o.told for o in outcomes)
    return Fired(len(ids), due_of_moves(outcomes), told)


def prune_runs(database: Database, *, now: datetime) -> int:
    """Forget runs that were decided long ago, PRUNED_AT_ONCE at most; how many."""
    old = sa.select(r.id).where(r.id < first_id(now - RUNS_ARE_KEPT), r.status != "waiting").order_by(r.id)
    with database.read() as connection:
        ids = connection.execute(old.limit(PRUNED_AT_ONCE)).scalars().all()
    if not ids:
        return 0
    with database.write() as connection:
        return connection.execute(sa.delete(schedule_runs).where(r.id.in_(ids))).rowcount
