"""The only writers of `jobs.status`: batches in, an outcome per move out.

A move is an action asked for one job. `apply` turns all moves of one kind into one guarded UPDATE: the
WHERE names the statuses that `domain/states.py` allows and, for moves of the lease holder, the attempt
and the lease token. What the WHERE does not match is not changed, and comes back as `Refused`. Each
change adds one row to `job_events` in the same transaction, and each end is marked as followed: what does
not follow from it within the transaction is left to a sweep (`leave_to_sweep`). Nothing here commits.

Any number of processes may run this at once. Correctness rests on the row lock of each UPDATE at READ
COMMITTED (SQLite: on its single writer) and on the CHECK and UNIQUE constraints in `models.py`. Batches
name their rows in one order, whoever asks, so that two of them seldom lock each other out; a deadlock
that happens all the same is an error of the whole transaction, which may be tried again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from functools import cache
from typing import Any, ClassVar

import sqlalchemy as sa

from laneway import models
from laneway.db import Moment, Rows, any_of, listed
from laneway.domain.retry import DeadLetterReason
from laneway.domain.states import FINAL, RULES, Action, JobStatus
from laneway.lanes.backend import Due


@dataclass(frozen=True, slots=True)
class Move:
    """An action asked for one job. Subclasses add what the action writes."""

    job_id: str

    action: ClassVar[Action]
    kinds: ClassVar[dict[str, str]] = {"job_id": "id"}  # of the fields, for db.Rows
    sets: ClassVar[str]  # the SET clause, after what all moves set
    guard: ClassVar[str] = ""


@dataclass(frozen=True, slots=True)
class HeldMove(Move):
    """A move of the worker that holds the job. It does nothing once the attempt or the token moved on."""

    attempt: int
    lease_token: str

    kinds: ClassVar[dict[str, str]] = {"job_id": "id", "attempt": "int", "lease_token": "id"}


_LET_GO = "lease_token = NULL, worker_id = NULL"
_UNASKED = "jobs.cancel_requested_at IS NULL"
_OPEN_QUEUE = "jobs.queue NOT IN (SELECT paused_queues.queue FROM paused_queues)"
_NEEDS_NO_SLOT = (
    "jobs.concurrency_key IS NULL"
    " AND jobs.tenant_id NOT IN (SELECT tenants.id FROM tenants WHERE tenants.max_running IS NOT NULL)"
)
MAY_START = f"{_UNASKED} AND (jobs.expires_at IS NULL OR jobs.expires_at > :now) AND {_OPEN_QUEUE}"
"""Of a queued job: it is not late, wanted, and its queue is open."""


@dataclass(frozen=True, slots=True)
class Enqueue(Move):
    """It is due. `queued_at`: at its old place in the lane."""

    queued_at: datetime | None = None

    action = Action.ENQUEUE
    kinds: ClassVar = {"job_id": "id", "queued_at": "moment"}
    sets = "queued_at = COALESCE(u.queued_at, :now), next_retry_at = NULL, status_reason = NULL"


_BEGINS = (
    "attempt = jobs.attempt + 1, lease_token = u.lease_token, worker_id = u.worker_id, started_at = u.at,"
    " progress = 0, progress_message = NULL, progress_details = NULL"
)


@dataclass(frozen=True, slots=True)
class Claim(Move):
    """Take the job: attempt + 1, a lease under `lease_token`.

    Refused once the job is late or unwanted, while its queue is paused, and where it needs a slot
    (engine/concurrency.py).
    """

    lease_token: str
    worker_id: str
    at: datetime  # of this job: a batch keeps its order in `started_at`

    action = Action.CLAIM
    kinds: ClassVar = {"job_id": "id", "lease_token": "id", "worker_id": "id", "at": "moment"}
    sets = f"{_BEGINS}, gated = false"
    guard = f"{MAY_START} AND {_NEEDS_NO_SLOT}"


@dataclass(frozen=True, slots=True)
class ClaimSlot(Claim):
    """Take a job for which there is a slot: only for who has made sure of that (engine/concurrency.py)."""

    sets = f"{_BEGINS}, gated = true"
    guard = MAY_START


@dataclass(frozen=True, slots=True)
class Block(Move):
    """No slot is free: wait for one. `reason` is kept as `status_reason`."""

    reason: str

    action = Action.BLOCK
    kinds: ClassVar = {"job_id": "id", "reason": "text"}
    sets = "status_reason = u.reason"


@dataclass(frozen=True, slots=True)
class Complete(HeldMove):
    """The handler returned; `result` is JSON text."""

    result: str | None = None

    action = Action.COMPLETE
    kinds = HeldMove.kinds | {"result": "text"}
    sets = f"progress = 100, result = u.result, error = NULL, finished_at = :now, {_LET_GO}"


@dataclass(frozen=True, slots=True)
class BackOff(HeldMove):
    """Try again at `next_retry_at`. `charge` 1 uses up a retry; `crash` 1 says that the process died.

    Refused when somebody asked the job to stop: there will be no other attempt.
    """

    next_retry_at: datetime
    charge: int = 1
    crash: int = 0
    error: str | None = None

    action = Action.BACK_OFF
    kinds = HeldMove.kinds | {"next_retry_at": "moment", "charge": "int", "crash": "int", "error": "text"}
    sets = (
        "next_retry_at = u.next_retry_at, retry_count = jobs.retry_count + u.charge,"
        f" crash_count = jobs.crash_count + u.crash, error = u.error, {_LET_GO}"
    )
    guard = _UNASKED


@dataclass(frozen=True, slots=True)
class Fail(HeldMove):
    """The last attempt failed, or no further one would help: a dead letter, for `reason`."""

    error: str | None = None
    reason: str = DeadLetterReason.EXHAUSTED
    crash: int = 0

    action = Action.FAIL
    kinds = HeldMove.kinds | {"error": "text", "reason": "text", "crash": "int"}
    sets = (
        "error = u.error, dead_letter_reason = u.reason, crash_count = jobs.crash_count + u.crash,"
        f" finished_at = :now, {_LET_GO}"
    )


@dataclass(frozen=True, slots=True)
class TimeOut(HeldMove):
    """The last attempt ran out of time."""

    error: str | None = None
    reason: str = DeadLetterReason.TIMEOUT

    action = Action.TIME_OUT
    kinds = HeldMove.kinds | {"error": "text", "reason": "text"}
    sets = f"error = u.error, dead_letter_reason = u.reason, finished_at = :now, {_LET_GO}"


@dataclass(frozen=True, slots=True)
class Release(HeldMove):
    """Give the job back unfinished, to its old place in the lane. Charges no retry.

    Refused when somebody asked the job to stop: no worker would take it again.
    """

    crash: int = 0
    error: str | None = None

    action = Action.RELEASE
    kinds = HeldMove.kinds | {"crash": "int", "error": "text"}
    sets = f"crash_count = jobs.crash_count + u.crash, progress = 0, {_LET_GO}"
    guard = _UNASKED


@dataclass(frozen=True, slots=True)
class Stop(HeldMove):
    """A running job's cancel, carried out."""

    action = Action.STOP
    sets = f"finished_at = :now, {_LET_GO}"


@dataclass(frozen=True, slots=True)
class Cancel(Move):
    """A waiting job will not run."""

    by: str
    reason: str | None = None

    action = Action.CANCEL
    kinds: ClassVar = {"job_id": "id", "by": "text", "reason": "text"}
    sets = (
        "cancel_requested_at = :now, cancelled_by = u.by, cancel_reason = u.reason,"
        " next_retry_at = NULL, finished_at = :now"
    )


@dataclass(frozen=True, slots=True)
class Expire(Move):
    """It did not start in time."""

    action = Action.EXPIRE
    sets = "finished_at = :now"
    guard = "jobs.expires_at <= :now"


_ANEW = (
    "finished_at = NULL, status_reason = NULL, result = NULL, error = NULL, dead_letter_reason = NULL,"
    " retry_count = 0, crash_count = 0, progress = 0, progress_message = NULL, progress_details = NULL,"
    " cancel_requested_at = NULL, cancel_terminate = false, cancel_grace_seconds = NULL,"
    " cancelled_by = NULL, cancel_reason = NULL, expires_at = NULL, webhook_delivered = false"
)


@dataclass(frozen=True, slots=True)
class Retry(Move):
    """A caller wants an ended job run again. The attempt keeps growing; the allowance starts anew.

    `parameters` is JSON text, and takes the place of the job's own. Raises IntegrityError while an active
    job holds the unique key.
    """

    parameters: str | None = None
    reason: str | None = None

    action = Action.RETRY
    kinds: ClassVar = {"job_id": "id", "parameters": "text", "reason": "text"}
    sets = f"queued_at = :now, parameters = COALESCE(u.parameters, jobs.parameters), {_ANEW}"


@dataclass(frozen=True, slots=True)
class RetryLater(Move):
    """Like `Retry`, but not before `next_retry_at`."""

    next_retry_at: datetime

    action = Action.RETRY_LATER
    kinds: ClassVar = {"job_id": "id", "next_retry_at": "moment"}
    sets = f"next_retry_at = u.next_retry_at, {_ANEW}"


@dataclass(frozen=True, slots=True)
class ForceComplete(Move):
    """An admin ends the job. Whoever still runs it is refused when it reports."""

    result: str | None = None
    reason: str | None = None

    action = Action.FORCE_COMPLETE
    kinds: ClassVar = {"job_id": "id", "result": "text", "reason": "text"}
    sets = (
        "progress = 100, result = u.result, error = NULL, dead_letter_reason = NULL, next_retry_at = NULL,"
        f" finished_at = :now, {_LET_GO}"
    )


MOVES: tuple[type[Move], ...] = (
    Enqueue,
    Claim,
    Block,
    Complete,
    BackOff,
    Fail,
    TimeOut,
    Release,
    Stop,
    Cancel,
    Expire,
    Retry,
    RetryLater,
    ForceComplete,
)


@dataclass(frozen=True, slots=True)
class Applied:
    """The move changed the row. `row` has what the next steps need: RETURNED, and CLAIMED for claims."""

    move: Move
    row: sa.RowMapping
    told: bool = False  # somebody is sent a webhook about it, or about what followed
    due: tuple[Due, ...] = ()  # jobs that may start since: ring them
    next: tuple[Due, ...] = ()  # those whose slot came free: ring them at the head

    @property
    def status(self) -> JobStatus:
        return RULES[self.move.action].target


@dataclass(frozen=True, slots=True)
class Refused:
    """The move changed nothing: the job is unknown (`status` None), has moved on, or needs a slot."""

    move: Move
    status: JobStatus | None
    attempt: int | None
    needs_slot: bool = False  # the job runs in a slot of its key or of its tenant
    next: tuple[Due, ...] = ()  # as of Applied


Outcome = Applied | Refused

RETURNED = (
    *("id", "tenant_id", "lane", "event_seq", "attempt", "webhook_url", "scheduled_job_id"),
    *("linked", "batch_id", "chain_run_id", "gated", "concurrency_key"),
)
CLAIMED = (
    *RETURNED,
    "job_type",
    "parameters",
    "timeout_seconds",
    "retry_count",
    "crash_count",
    "max_retries",
    "retry_delay_seconds",
    "retry_backoff",
    "retry_max_delay_seconds",
    "retry_jitter",
)
_IDS = frozenset({"id", "tenant_id", "batch_id", "chain_run_id", "scheduled_job_id"})
_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

# Milliseconds since 1970, and larger than every number before: writers come one after the other.
_SQLITE_TX = (
    "MAX(CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER),"
    " 1 + COALESCE((SELECT MAX(tx) FROM job_events AS told WHERE told.tenant_id = u.tenant_id), 0))"
)
_EVENTS = Rows(
    job_id="id",
    seq="int",
    tenant_id="id",
    action="text",
    status="text",
    attempt="int",
    actor="text",
    reason="text",
    error="text",
)


@cache
def _update(kind: type[Move], dialect: str, known_types: bool) -> tuple[sa.TextClause, Rows]:
    rule = RULES[kind.action]
    sources = ", ".join(f"'{status.value}'" for status in sorted(rule.sources))
    rows = Rows(**{field.name: kind.kinds[field.name] for field in fields(kind)})
    # COALESCE hides the status from the planner, which would choose the partial index of such rows instead.
    guards = [rows.match(dialect, "jobs.id"), f"COALESCE(jobs.status, '') IN ({sources})"]
    if issubclass(kind, HeldMove):
        guards += ["jobs.attempt = u.attempt", "jobs.lease_token = u.lease_token"]
    if kind.guard:
        guards.append(kind.guard)
    if known_types:
        guards.append(f"jobs.job_type IN {any_of(dialect, 'job_types')}")
    columns = CLAIMED if issubclass(kind, Claim) else RETURNED
    # Ids come back as text on both stores; JSON stays text, since whoever runs the job parses it.
    read = ", ".join(f"CAST({c} AS text) AS {c}" if c in _IDS else c for c in columns)
    own = ", ".join(f"jobs.{c}" for c in columns)
    ends = ", followed_seq = jobs.event_seq + 1" if rule.target in FINAL else ""
    sql = (
        f"UPDATE jobs SET status = '{rule.target.value}', event_seq = jobs.event_seq + 1{ends},"  # noqa: S608
        f" version = jobs.version + 1, updated_at = :now, {kind.sets}"
        f" FROM {rows.sql(dialect)} WHERE {' AND '.join(guards)} RETURNING {own}"
    )
    if dialect == "postgresql":  # one statement, so that it may commit by itself (db.Database.write_once)
        told = {"actor": "u.by" if "by" in rows.columns else "CAST(:actor AS text)"}
        told |= {name: f"u.{name}" if name in rows.columns else "NULL" for name in ("reason", "error")}
        sql = (
            f"WITH moved AS ({sql}, {', '.join(f'{value} AS told_{name}' for name, value in told.items())}),"  # noqa: S608
            " told AS (INSERT INTO job_events"
            " (job_id, seq, tenant_id, action, status, attempt, actor, reason, error, at)"
            f" SELECT id, event_seq, tenant_id, '{kind.action.value}', '{rule.target.value}', attempt,"
            f" told_actor, told_reason, told_error, :now FROM moved) SELECT {read} FROM moved"
        )
    return sa.text(sql).bindparams(sa.bindparam("now", type_=Moment)), rows


@cache
def _insert_events(dialect: str) -> sa.TextClause:
    columns = ", ".join(_EVENTS.columns)
    names, values = ("at, tx", f":now, {_SQLITE_TX}") if dialect == "sqlite" else ("at", ":now")
    return sa.text(
        f"INSERT INTO job_events ({columns}, {names})"  # noqa: S608
        f" SELECT {columns}, {values} FROM {_EVENTS.sql(dialect)}"
    ).bindparams(sa.bindparam("now", type_=Moment))


def record(
    connection: sa.Connection,
    row: sa.RowMapping,
    *,
    action: str,
    actor: str,
    reason: str | None,
    now: datetime,
) -> None:
    """Write an event of a job that is no transition; `row` is the job as it is since then."""
    event = (
        row["id"],
        row["event_seq"],
        row["tenant_id"],
        action,
        row["status"],
        row["attempt"],
        actor,
        reason,
        None,
    )
    dialect = connection.dialect.name
    connection.execute(_insert_events(dialect), {"now": now, **_EVENTS.bind(dialect, [event])})


def apply(
    connection: sa.Connection,
    moves: Sequence[Move],
    *,
    now: datetime,
    actor: str,
    job_types: Sequence[str] | None = None,
) -> list[Outcome]:
    """Make every move that the table allows; the outcomes come in the order of the moves.

    Of several moves of one kind for one job the first counts, of holders' moves the first for one attempt.
    What is no id in our spelling is an unknown job: ids come from Redis too, where anybody may have written
    them. `job_types` narrows claims to jobs their worker can run: others stay queued for one that knows them.
    """
    dialect = connection.dialect.name
    won: dict[int, Applied] = {}
    events: list[tuple[Any, ...]] = []
    by_kind: dict[type[Move], dict[tuple[str, int | None], int]] = {}
    for index, move in enumerate(moves):
        if _ID.fullmatch(move.job_id):
            by_kind.setdefault(type(move), {}).setdefault(_key(move), index)
    for kind, places in by_kind.items():
        known = issubclass(kind, Claim) and job_types is not None
        statement, rows = _update(kind, dialect, known)  # type: ignore[arg-type]  # mypy: a class has a hash
        chosen = [moves[index] for _, index in sorted(places.items())]
        parameters = rows.bind(dialect, [tuple(getattr(m, name) for name in rows.columns) for m in chosen])
        if known:
            parameters["job_types"] = listed(dialect, job_types or ())
        if dialect == "postgresql" and "by" not in rows.columns:
            parameters["actor"] = actor
        rule = RULES[kind.action]
        for row in connection.execute(statement, {"now": now, **parameters}).mappings():
            index = places[row["id"], row["attempt"] if issubclass(kind, HeldMove) else None]
            move = moves[index]
            won[index] = Applied(move, row)
            events.append(
                (
                    row["id"],
                    row["event_seq"],
                    row["tenant_id"],
                    kind.action.value,
                    rule.target.value,
                    row["attempt"],
                    getattr(move, "by", actor),
                    getattr(move, "reason", None),
                    getattr(move, "error", None),
                )
            )
    if events and dialect != "postgresql":
        connection.execute(_insert_events(dialect), {"now": now, **_EVENTS.bind(dialect, events)})
    if len(won) == len(moves):
        return [won[index] for index in range(len(moves))]
    found = _where_they_are(connection, [m.job_id for i, m in enumerate(moves) if i not in won])
    return [won.get(i) or Refused(m, *found.get(m.job_id, (None, None, False))) for i, m in enumerate(moves)]


def leave_to_sweep(connection: sa.Connection, job_ids: Collection[str]) -> None:
    """Take back from ended jobs that all has followed from their ends, as `apply` says of each."""
    if job_ids:
        j = models.jobs.c
        ended = sa.update(models.jobs).where(j.id.in_(job_ids))
        connection.execute(ended.values(followed_seq=j.event_seq - 1))


def _key(move: Move) -> tuple[str, int | None]:
    """What a move is about. A worker that lost a job and claimed it again may report both attempts."""
    return move.job_id, move.attempt if isinstance(move, HeldMove) else None


def _where_they_are(connection: sa.Connection, ids: Iterable[str]) -> dict[str, tuple[JobStatus, int, bool]]:
    dialect = connection.dialect.name
    known = sorted({job_id for job_id in ids if _ID.fullmatch(job_id)})
    statement = sa.text(
        f"SELECT CAST(id AS text), status, attempt, NOT ({_NEEDS_NO_SLOT}) FROM jobs"  # noqa: S608
        f" WHERE id IN {any_of(dialect, 'ids', kind='id')}"
    )
    rows = connection.execute(statement, {"ids": listed(dialect, known)})
    return {job_id: (JobStatus(status), attempt, bool(slot)) for job_id, status, attempt, slot in rows}


@dataclass(frozen=True, slots=True)
class NewJob:
    """A row to be. JSON fields are text already; `status` is scheduled or queued."""

    id: str
    tenant_id: str
    created_by: str
    job_type: str
    parameters: str
    queue: str
    priority: str
    lane: str
    title: str | None
    description: str | None
    tags: str
    metadata: str
    scheduled_for: datetime | None
    expires_at: datetime | None
    timeout_seconds: int
    max_retries: int
    retry_delay_seconds: float
    retry_backoff: float
    retry_max_delay_seconds: float
    retry_jitter: bool
    unique_key: str | None
    webhook_url: str | None
    webhook_events: str | None
    status: str
    queued_at: datetime | None


@dataclass(frozen=True, slots=True)
class LinkedJob(NewJob):
    """A row to be of a job in a batch or a chain, that waits for others, or that has a concurrency key.

    It may be `blocked` too.

    `depends_on` is JSON text. `linked` says that something follows its end.
    """

    status_reason: str | None = None
    batch_id: str | None = None
    chain_id: str | None = None
    chain_run_id: str | None = None
    chain_step: int | None = None
    depends_on: str | None = None
    on_dependency_failure: str = "cancel"
    dependencies_left: int = 0
    linked: bool = False
    scheduled_job_id: str | None = None
    concurrency_key: str | None = None
    concurrency_limit: int | None = None

    @classmethod
    def of(cls, job: NewJob, **links: Any) -> LinkedJob:
        """`job` with these links, beside those it has."""
        return cls(**{each.name: getattr(job, each.name) for each in fields(job)} | links)


_NEW_KINDS = {
    "id": "id",
    "tenant_id": "id",
    "scheduled_for": "moment",
    "expires_at": "moment",
    "queued_at": "moment",
    "timeout_seconds": "int",
    "max_retries": "int",
    "retry_delay_seconds": "float",
    "retry_backoff": "float",
    "retry_max_delay_seconds": "float",
    "retry_jitter": "bool",
    "batch_id": "id",
    "chain_id": "id",
    "chain_run_id": "id",
    "chain_step": "int",
    "dependencies_left": "int",
    "linked": "bool",
    "scheduled_job_id": "id",
    "concurrency_limit": "int",
}
_NEW = Rows(**{field.name: _NEW_KINDS.get(field.name, "text") for field in fields(NewJob)})
_LINKED = Rows(**{field.name: _NEW_KINDS.get(field.name, "text") for field in fields(LinkedJob)})
_UNLINKED = {field.name: field.default for field in fields(LinkedJob) if field.name not in NewJob.__slots__}


_TAGGED = (
    ", tagged AS (INSERT INTO job_tags (job_id, tag, tenant_id)"
    " SELECT DISTINCT made.id, each.tag, made.tenant_id"
    " FROM made, jsonb_array_elements_text(CAST(made.tags AS jsonb)) AS each(tag))"
)
_TAGS = Rows(job_id="id", tag="text", tenant_id="id")


@cache
def _insert_tags(dialect: str) -> sa.TextClause:
    columns = ", ".join(_TAGS.columns)
    return sa.text(f"INSERT INTO job_tags ({columns}) SELECT {columns} FROM {_TAGS.sql(dialect)}")  # noqa: S608


def tag(connection: sa.Connection, job_id: str, tenant_id: str, tags: Iterable[str]) -> None:
    """Let lists find the job by these tags."""
    dialect = connection.dialect.name
    rows = [(job_id, each, tenant_id) for each in dict.fromkeys(tags)]
    if rows:
        bound = _TAGS.bind(dialect, rows)
        connection.execute(_insert_tags(dialect), {"u": bound["u"]})


@cache
def _insert_jobs(dialect: str, linked: bool, tagged: bool) -> sa.TextClause:
    new = _LINKED if linked else _NEW
    columns = ", ".join(new.columns)
    jobs = (
        f"INSERT INTO jobs ({columns}, event_seq, created_at, updated_at)"  # noqa: S608
        f" SELECT {columns}, 1, :now, :now FROM {new.sql(dialect)} WHERE true"
        " ON CONFLICT (tenant_id, unique_key) WHERE unique_key IS NOT NULL AND finished_at IS NULL DO NOTHING"
    )
    if dialect == "postgresql":  # one statement, so that it may commit by itself (db.Database.write_once)
        jobs = (
            f"WITH made AS ({jobs} RETURNING id, tenant_id, status, created_by, tags),"  # noqa: S608
            " told AS (INSERT INTO job_events (job_id, seq, tenant_id, action, status, attempt, actor, at)"
            " SELECT id, 1, tenant_id, 'create', status, 0, created_by, :now FROM made)"
            f"{_TAGGED if tagged else ''} SELECT CAST(id AS text) FROM made"
        )
    else:
        jobs += " RETURNING id"
    return sa.text(jobs).bindparams(sa.bindparam("now", type_=Moment))


def create(connection: sa.Connection, jobs: Sequence[NewJob], *, now: datetime) -> list[str | None]:
    """Insert rows and their first events; on PostgreSQL in one statement.

    The id of each, or None where an active job holds its unique key: of the batch, the first has it. Rows
    go in by their keys, since an insert waits for another transaction's uncommitted holder of its key, and
    two that wait for each other would both be refused.
    """
    dialect = connection.dialect.name
    by_key = sorted(jobs, key=lambda job: job.unique_key or "")
    linked = any(isinstance(job, LinkedJob) for job in jobs)
    new = _LINKED if linked else _NEW
    rows = [tuple(getattr(job, name, _UNLINKED.get(name)) for name in new.columns) for job in by_key]
    tagged = [job for job in jobs if job.tags != "[]"]
    statement = _insert_jobs(dialect, linked, bool(tagged))
    made = set(connection.execute(statement, {"now": now, **new.bind(dialect, rows)}).scalars())
    events = [
        (job.id, 1, job.tenant_id, "create", job.status, 0, job.created_by, None, None)
        for job in jobs
        if job.id in made
    ]
    if events and dialect != "postgresql":
        connection.execute(_insert_events(dialect), {"now": now, **_EVENTS.bind(dialect, events)})
        for job in tagged:
            if job.id in made:
                tag(connection, job.id, job.tenant_id, json.loads(job.tags))
    return [job.id if job.id in made else None for job in jobs]
