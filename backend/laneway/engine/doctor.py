"""Sentences that must hold of a living system, as bounded queries: what `laneway doctor` calls healthy.

Each reads little, however many rows there are: what runs, the head of a lane, what an index says is
overdue, or the newest RECENT jobs. Each leaves time for what is on its way, so that a busy system is not
called ill: a finding is something that nobody is about to repair.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from laneway import models
from laneway.db import Database, utc_now
from laneway.domain.events import DEFAULT_WEBHOOK_EVENTS, EVENT_OF
from laneway.domain.http_target import REMOTE_WORKER
from laneway.domain.spec import queue_of
from laneway.domain.states import ACTIVE, JobStatus
from laneway.engine import concurrency
from laneway.engine.pauses import is_paused, open_lanes, paused_queues
from laneway.engine.queries import lanes_with_work

SHOWN = 10
RECENT = 10_000
HEAD = 100
"""Rows looked at from the head of each lane."""

RUNNING_EXAMINED = 10_000
PATIENCE = timedelta(minutes=1)  # for sweeps, which run every second
LONG_PATIENCE = timedelta(minutes=5)  # for workers, which may be starting
COURIER_PATIENCE = timedelta(minutes=10)
LONG_TRANSACTION = timedelta(minutes=5)
MESSAGES_SINCE = timedelta(days=1)  # what is delivered may be pruned after a day

_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

j = models.jobs.c
w = models.workers.c
e = models.job_events.c
m = models.webhook_messages.c
d = models.webhook_deliveries.c


@dataclass(frozen=True, slots=True)
class Finding:
    """A sentence that does not hold: the ids that break it (at most SHOWN) and what to do."""

    name: str
    sentence: str
    ids: tuple[str, ...]
    remedy: str


@dataclass(frozen=True, slots=True)
class _View:
    """What a check may look at. `job_types` are taken for those of workers that do not say theirs."""

    connection: sa.Connection
    now: datetime
    lease: timedelta
    job_types: Collection[str] | None

    def knows(self, job_type: str, said: Collection[str] | None) -> bool:
        """Whether a worker that `said` what it can run can run this. Where nobody says, it may be."""
        types = self.job_types if said is None else said
        return types is None or job_type in types

    def ids(self, query: sa.Select[tuple[str]]) -> Sequence[str]:
        return [str(found) for found in self.connection.execute(query.limit(SHOWN)).scalars()]


@dataclass(frozen=True, slots=True)
class Check:
    """A sentence, and the ids that break it."""

    name: str
    sentence: str
    remedy: str
    find: Callable[[_View], Sequence[str]]


def _written(condition: str) -> sa.ColumnElement[bool]:
    """Written out, not bound: only so do both stores see that a partial index serves."""
    return sa.literal_column(condition)


_RUNNING = _written("jobs.status = 'running'")
_QUEUED = _written("jobs.status = 'queued'")
_ENDED = _written("jobs.finished_at IS NOT NULL")


def _orphans(view: _View) -> Sequence[str]:
    gone = sa.or_(w.id.is_(None), w.state.in_(("dead", "gone")))
    return view.ids(
        sa.select(j.id)
        .select_from(models.jobs.outerjoin(models.workers, w.id == j.worker_id))
        .where(_RUNNING, j.worker_id != REMOTE_WORKER, j.started_at < view.now - PATIENCE - view.lease, gone)
    )


def _overdue_runs(view: _View) -> Sequence[str]:
    """Of the RUNNING_EXAMINED runs that began first."""
    columns = (j.id, j.started_at, j.timeout_seconds, j.cancel_requested_at, j.cancel_grace_seconds)
    oldest = sa.select(*columns).where(_RUNNING).order_by(j.started_at).limit(RUNNING_EXAMINED)
    found = []
    for row in view.connection.execute(oldest):
        ends = row.started_at + timedelta(seconds=row.timeout_seconds)
        if row.cancel_requested_at is not None:
            ends = min(ends, row.cancel_requested_at + timedelta(seconds=row.cancel_grace_seconds or 0.0))
        if ends < view.now - LONG_PATIENCE:
            found.append(str(row.id))
    return found[:SHOWN]


def _silent_workers(view: _View) -> Sequence[str]:
    living = _written("workers.state IN ('active', 'draining')")
    return view.ids(sa.select(w.id).where(living, w.beat_at < view.now - 2 * view.lease - PATIENCE))


def _late_schedules(view: _View) -> Sequence[str]:
    return view.ids(
        sa.select(j.id).where(_written("jobs.status = 'scheduled'"), j.scheduled_for < view.now - PATIENCE)
    )


def _late_slots(view: _View) -> Sequence[str]:
    due_at = models.schedules.c.due_at
    return view.ids(sa.select(models.schedules.c.id).where(due_at < view.now - PATIENCE).order_by(due_at))


def _late_retries(view: _View) -> Sequence[str]:
    return view.ids(
        sa.select(j.id).where(_written("jobs.status = 'retrying'"), j.next_retry_at < view.now - PATIENCE)
    )


def _late_expiries(view: _View) -> Sequence[str]:
    late = sa.and_(j.expires_at < view.now - PATIENCE, j.finished_at.is_(None))
    waiting = _written("jobs.status IN ('scheduled', 'blocked', 'queued')")
    return view.ids(sa.select(j.id).where(late, waiting).order_by(j.expires_at))


def _heads(view: _View) -> Iterator[tuple[str, Sequence[sa.Row[str, str, datetime]]]]:
    """Each lane with queued rows of a queue that is not paused, and the HEAD of it."""
    for lane in open_lanes(lanes_with_work(view.connection), paused_queues(view.connection)):
        head = sa.select(j.id, j.job_type, j.queued_at).where(_QUEUED, j.lane == lane)
        yield lane, view.connection.execute(head.order_by(j.queued_at, j.id).limit(HEAD)).all()


def _active(view: _View) -> Sequence[sa.Row[*tuple[Any, ...]]]:
    living = sa.select(w.lanes, w.held, w.job_types)
    return view.connection.execute(living.where(w.state == "active", w.beat_at > view.now - view.lease)).all()


def _passed_over(view: _View) -> Sequence[str]:
    idle = [worker for worker in _active(view) if not worker.held]
    return [
        str(row.id)
        for lane, head in _heads(view)
        for row in head
        if row.queued_at < view.now - LONG_PATIENCE
        and any(lane in worker.lanes and view.knows(row.job_type, worker.job_types) for worker in idle)
    ][:SHOWN]


def _unknown_types(view: _View) -> Sequence[str]:
    """Of a lane that nobody serves, which is another finding, the types that are known to nobody here."""
    workers = _active(view)

    def is_known(job_type: str, lane: str) -> bool:
        said = [worker.job_types for worker in workers if lane in worker.lanes] or [None]
        return any(view.knows(job_type, types) for types in said)

    return [
        str(row.id)
        for lane, head in _heads(view)
        for row in head
        if row.queued_at < view.now - PATIENCE and not is_known(row.job_type, lane)
    ][:SHOWN]


def _recent() -> sa.Select[tuple[str]]:
    """Ids grow with time: the newest jobs are at the end of the primary key."""
    return sa.select(j.id).order_by(j.id.desc()).limit(RECENT)


def _untrue_histories(view: _View) -> Sequence[str]:
    recent = _recent().subquery()
    last = sa.and_(e.job_id == j.id, e.seq == j.event_seq)
    told = sa.select(sa.func.count()).where(models.job_events.c.job_id == j.id).scalar_subquery()
    rows = recent.join(models.jobs, j.id == recent.c.id).outerjoin(models.job_events, last)
    counted = told.correlate(models.jobs)
    untrue = sa.or_(e.job_id.is_(None), e.status != j.status, counted != j.event_seq)
    return view.ids(sa.select(j.id).select_from(rows).where(untrue))


def _retried_too_often(view: _View) -> Sequence[str]:
    recent = _recent().subquery()
    rows = recent.join(models.jobs, j.id == recent.c.id)
    return view.ids(sa.select(j.id).select_from(rows).where(j.retry_count > j.max_retries))


def _untold_ends(view: _View) -> Sequence[str]:
    recent = _recent().subquery()
    rows = recent.join(models.jobs, j.id == recent.c.id)
    message = sa.select(m.id).where(m.job_id == j.id, m.job_seq == j.event_seq).correlate(models.jobs)
    ends = (
        sa.select(j.id, j.status, j.webhook_events)
        .select_from(rows)
        .where(j.webhook_url.is_not(None), _ENDED, j.finished_at > view.now - MESSAGES_SINCE)
        .where(~message.exists())
    )
    return [
        str(row.id)
        for row in view.connection.execute(ends)
        if EVENT_OF[JobStatus(row.status)] in (row.webhook_events or DEFAULT_WEBHOOK_EVENTS)
    ][:SHOWN]


def _uncarried_messages(view: _View) -> Sequence[str]:
    recent = _recent().subquery()
    rows = recent.join(models.webhook_messages, m.job_id == recent.c.id)
    delivery = sa.select(d.id).where(d.message_id == m.id).correlate(models.webhook_messages)
    return view.ids(sa.select(m.id).select_from(rows).where(~delivery.exists()))


def _late_deliveries(view: _View) -> Sequence[str]:
    """Of the oldest that are due: what waits for a paused endpoint, or for its turn, waits rightly."""
    due = sa.select(d.id, d.endpoint_id).where(models.open_delivery, d.next_at < view.now - COURIER_PATIENCE)
    oldest = due.order_by(d.priority, d.next_at, d.id).limit(RECENT).subquery()
    rightly = sa.exists().where(
        models.webhook_endpoints.c.id == oldest.c.endpoint_id,
        sa.or_(models.webhook_endpoints.c.status != "enabled", models.webhook_endpoints.c.in_order),
    )
    return view.ids(sa.select(oldest.c.id).where(~rightly))


def _lost_deliveries(view: _View) -> Sequence[str]:
    sending = _written("webhook_deliveries.status = 'sending'")
    return view.ids(sa.select(d.id).where(sending, d.lease_until < view.now - COURIER_PATIENCE))


def _long_transactions(view: _View) -> Sequence[str]:
    if view.connection.dialect.name != "postgresql":
        return []
    query = sa.text(
        "SELECT CAST(pid AS text) FROM pg_stat_activity WHERE datname = current_database()"
        " AND xact_start < clock_timestamp() - CAST(:age AS interval) ORDER BY xact_start LIMIT :shown"
    )
    return view.connection.execute(query, {"age": LONG_TRANSACTION, "shown": SHOWN}).scalars().all()


def _unfollowed(view: _View) -> Sequence[str]:
    """Of a batch with many active jobs, one ended job is kept in mind until few are left."""
    other = models.jobs.alias("other")
    active = _written(f"other.status IN ({', '.join(repr(str(status)) for status in sorted(ACTIVE))})")
    of_open_batch = sa.exists().where(other.c.batch_id == j.batch_id, active)
    late = j.finished_at < view.now - PATIENCE
    return view.ids(sa.select(j.id).where(models.unfollowed, late, ~of_open_batch).order_by(j.id))


def _late_chains(view: _View) -> Sequence[str]:
    r = models.chain_runs.c
    open_ = _written("chain_runs.finished_at IS NULL AND chain_runs.deadline_at IS NOT NULL")
    late = sa.and_(r.deadline_at < view.now - PATIENCE, r.stopping.is_(None))
    return view.ids(sa.select(r.id).where(open_, late).order_by(r.deadline_at))


def _kept_waiting(view: _View) -> Sequence[str]:
    """Of each key and tenant one job. Where others of it are queued, it is their turn."""
    _, free, _ = concurrency.with_room(view.connection, concurrency.Place())
    queued: set[concurrency.Slots] = set()
    for lane in lanes_with_work(view.connection):
        head = sa.select(j.tenant_id, j.concurrency_key).where(_QUEUED, j.lane == lane)
        for row in view.connection.execute(head.order_by(j.queued_at, j.id).limit(HEAD)):
            slots = concurrency.Slots(row.tenant_id, row.concurrency_key or "")
            queued |= {slots, concurrency.Slots(row.tenant_id)}
    kept = [each.job_id for each in free if each.waits_for not in queued]
    return view.ids(sa.select(j.id).where(j.id.in_(kept), j.updated_at < view.now - PATIENCE)) if kept else []


def _overfull_keys(view: _View) -> Sequence[str]:
    """Of each key one run. Who came last was allowed to, by its own limit, beside all others."""
    taken = _written("jobs.status = 'running' AND jobs.gated")
    columns = (j.tenant_id, j.concurrency_key, j.concurrency_limit)
    some = sa.select(*columns).where(taken, j.concurrency_key.is_not(None)).limit(RUNNING_EXAMINED).subquery()
    of_key = (some.c.tenant_id, some.c.concurrency_key)
    too_many = sa.func.count() > sa.func.max(some.c.concurrency_limit)
    keys = view.connection.execute(sa.select(*of_key).group_by(*of_key).having(too_many).limit(SHOWN)).all()
    runs = [
        sa.select(j.id).where(taken, j.tenant_id == row.tenant_id, j.concurrency_key == row.concurrency_key)
        for row in keys
    ]
    return [view.ids(query.order_by(j.id.desc()).limit(1))[0] for query in runs]


_RUN_SCHEDULER = "run a scheduler (`laneway scheduler`)"

CHECKS = (
    Check(
        "orphans",
        "a running job's worker is alive",
        f"{_RUN_SCHEDULER}: its reaper takes such jobs back",
        _orphans,
    ),
    Check(
        "overdue_runs",
        "a run ends within its timeout, and within the grace of its cancel",
        "its worker does not stop it: end that worker (`GET /api/v1/workers`), and another takes over; of an "
        f"HTTP job that waits for a report: {_RUN_SCHEDULER}",
        _overdue_runs,
    ),
    Check(
        "silent_workers",
        "a worker that is silent for two leases is declared dead",
        f"{_RUN_SCHEDULER}: its reaper declares them dead and takes their jobs back",
        _silent_workers,
    ),
    Check(
        "late_schedules",
        "a scheduled job is queued within a minute of its time",
        f"{_RUN_SCHEDULER}: it queues what is due",
        _late_schedules,
    ),
    Check(
        "late_slots",
        "a schedule is decided within a minute of its time",
        f"{_RUN_SCHEDULER}: it starts what is due, and says by `misfire` what of the rest still runs",
        _late_slots,
    ),
    Check(
        "late_retries",
        "a job that waits for its retry is queued within a minute of its time",
        f"{_RUN_SCHEDULER}: it queues what is due",
        _late_retries,
    ),
    Check(
        "late_expiries",
        "a waiting job ends within a minute of its expires_at",
        f"{_RUN_SCHEDULER}: it ends what came too late",
        _late_expiries,
    ),
    Check(
        "unfollowed_ends",
        "within a minute of a job's end follows what waits for it: dependants, a chain's step, a batch's end",
        f"{_RUN_SCHEDULER}: it goes on with what was left over; its log says `not_followed` if it cannot",
        _unfollowed,
    ),
    Check(
        "late_chains",
        "a chain's run is stopped within a minute of its timeout",
        f"{_RUN_SCHEDULER}: it stops what takes too long",
        _late_chains,
    ),
    Check(
        "kept_waiting",
        "a job waits for a slot only while as many run as its key, or its tenant, allows",
        f"{_RUN_SCHEDULER}: it wakes who waits for nothing",
        _kept_waiting,
    ),
    Check(
        "overfull_keys",
        "of a concurrency key no more jobs run than may",
        "somebody changed rows by hand, or an older release claims beside this one: it passes by itself",
        _overfull_keys,
    ),
    Check(
        "passed_over",
        "no job waits five minutes for a worker of its lane that has nothing to do",
        "look at that worker's log; start another, then end it",
        _passed_over,
    ),
    Check(
        "no_capable_worker",
        "a queued job's type is known to a worker of its lane",
        "start workers with the module that has it in LANEWAY_TASKS, or cancel these jobs",
        _unknown_types,
    ),
    Check(
        "histories",
        "a job has all its events, and the status of the last",
        "somebody changed rows by hand: compare jobs and job_events for these ids",
        _untrue_histories,
    ),
    Check(
        "retry_counts",
        "a job is not retried more often than max_retries",
        "somebody changed rows by hand: set retry_count right for these ids",
        _retried_too_often,
    ),
    Check(
        "untold_ends",
        "an end that a webhook is to hear has its message",
        "somebody changed rows by hand: tell these receivers yourself",
        _untold_ends,
    ),
    Check(
        "uncarried_messages",
        "a webhook message has a delivery",
        "somebody deleted rows by hand: tell these receivers yourself, then delete the messages",
        _uncarried_messages,
    ),
    Check(
        "late_deliveries",
        "a webhook is tried within ten minutes of being due",
        "run a courier: `laneway courier`, or a worker without --no-courier",
        _late_deliveries,
    ),
    Check(
        "lost_deliveries",
        "what a dead courier held is taken over within ten minutes",
        "run a courier: `laneway courier`, or a worker without --no-courier",
        _lost_deliveries,
    ),
    Check(
        "long_transactions",
        "no transaction is open for longer than five minutes (process ids of PostgreSQL)",
        "find whose it is (pg_stat_activity), and SELECT pg_terminate_backend(<pid>): it keeps VACUUM away",
        _long_transactions,
    ),
)


def examine(
    database: Database,
    *,
    now: datetime,
    lease_seconds: float = 30.0,
    job_types: Collection[str] | None = None,
) -> list[Finding]:
    """Every sentence that does not hold, in the order of CHECKS. Empty means healthy.

    `job_types` are taken for those of workers that do not say which they can run; None: any.
    """
    findings: list[Finding] = []
    with database.read() as connection:
        _by_index(connection)
        view = _View(connection, now, timedelta(seconds=lease_seconds), job_types)
        for check in CHECKS:
            if ids := check.find(view):
                findings.append(Finding(check.name, check.sentence, tuple(map(str, ids)), check.remedy))
    return findings


def _by_index(connection: sa.Connection) -> None:
    """For the rest of the transaction: each query here is served by an index, whatever statistics say.

    Before its first ANALYZE, PostgreSQL reads a million rows for what is told of 10,000.
    """
    if connection.dialect.name == "postgresql":
        for way in ("seqscan", "hashjoin", "mergejoin"):
            connection.exec_driver_sql(f"SET LOCAL enable_{way} = off")


def missing_from(
    database: Database, lane: str, present: Collection[str], *, now: datetime
) -> tuple[list[str], list[str]]:
    """What a lane's list has wrong: ids it lacks, ids it should not hold.

    `present` is the list as Redis had it, read before this. It lacks the queued rows of the lane's HEAD that
    have waited for PATIENCE, unless its queue is paused; it should not hold ids of jobs that ended so long
    ago, or that do not exist. Only the first HEAD of `present` are judged.
    """
    first = list(present)[:HEAD]
    ids = [job_id for job_id in first if _ID.fullmatch(job_id)]  # anybody may have written the others
    head = sa.select(j.id).where(_QUEUED, j.lane == lane, j.queued_at < now - PATIENCE)
    known = sa.select(j.id, j.finished_at).where(j.id.in_(ids))
    with database.read() as connection:
        _by_index(connection)
        waiting: Sequence[str] = ()
        if not is_paused(connection, queue_of(lane)):
            waiting = connection.execute(head.order_by(j.queued_at, j.id).limit(HEAD)).scalars().all()
        ended = {row.id: row.finished_at for row in connection.execute(known)}
    inside = set(present)
    lacking = [job_id for job_id in waiting if job_id not in inside]
    useless = [
        job_id
        for job_id in first
        if job_id not in ended or ((at := ended[job_id]) is not None and at < now - PATIENCE)
    ]
    return lacking, useless


def clock_ahead(database: Database, *, now: Callable[[], datetime]) -> float:
    """By how many seconds the database's clock is ahead of ours, give or take the time of one query."""
    with database.read() as connection:
        connection.execute(sa.select(sa.literal(1)))  # the transaction has begun, which may take a connection
        before = now()
        theirs = connection.execute(sa.select(_server_clock(connection))).scalar_one()
        after = now()
    return float((theirs - (before + (after - before) / 2)).total_seconds())


def _server_clock(connection: sa.Connection) -> sa.ColumnElement[datetime]:
    if connection.dialect.name == "postgresql":
        return sa.func.clock_timestamp(type_=models.jobs.c.created_at.type)  # now() is when it began
    return utc_now()
