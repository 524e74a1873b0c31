"""The operations, in the order of a job's life: one method, one operation, one transaction.

Redis is told after the commit and may be away: the reconciler rings again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Any

import sqlalchemy as sa

from laneway import models
from laneway.clock import Clock, SystemClock, new_id
from laneway.db import Database
from laneway.domain.http_target import HTTP_REQUEST, shown
from laneway.domain.payload import check_storable, to_json
from laneway.domain.spec import JobSpec
from laneway.domain.states import FINAL, JobStatus
from laneway.engine import debounce, dependencies, http_jobs, idempotency, queries
from laneway.engine.access.callers import Caller, Role
from laneway.engine.admission import Admission
from laneway.engine.cancels import Manner, ask_to_stop
from laneway.engine.group_commit import commit_each
from laneway.engine.idempotency import Kept, Key
from laneway.engine.outcomes import carry_out, due_of
from laneway.engine.pauses import QUEUE_PAUSED, is_paused
from laneway.engine.positions import position
from laneway.engine.queries import Filter, Scope
from laneway.engine.registry import JobType, Registry
from laneway.engine.retention import delete_jobs
from laneway.engine.transitions import Applied, Cancel, LinkedJob, NewJob, Retry, create
from laneway.errors import (
    Conflict,
    DeadLetterNotFound,
    FieldError,
    IllegalTransition,
    JobNotFound,
    LanewayError,
    NotFinished,
    Overloaded,
    QuotaQueued,
    UniqueKeyTaken,
    UnknownJobType,
    Unprocessable,
    WebhookUrlRefused,
)
from laneway.lanes.backend import Due, EndedRun, LaneBackend, LanesUnavailable
from laneway.lanes.live import News, Silence
from laneway.log import get_logger
from laneway.settings import Settings
from laneway.webhooks.guard import Policy, check_url
from laneway.webhooks.secrets import SecretBox

MAX_METADATA_BYTES = 16 * 1024
NO_CAPABLE_WORKER = "no_capable_worker"
UNSERVED_AFTER = timedelta(seconds=5)  # younger jobs are not asked about: most are on their way
RING_SCHEDULERS_WITHIN = timedelta(seconds=5)
NO_ROOM = (QuotaQueued, Overloaded)

Answer = dict[str, Any] | Exception

log = get_logger("service")


@dataclass(frozen=True, slots=True)
class Prepared:
    """A checked request: the row to be, and the JSON objects it was made of."""

    row: NewJob
    spec: JobSpec
    scope: Scope
    key: Key | None = None


@dataclass(frozen=True, slots=True)
class Following:
    """What a follower has missed: `events`, oldest first, and the job, never older than they are.

    `ended`: the job has ended, and these are its last events.
    """

    events: Sequence[sa.RowMapping]
    job: dict[str, Any]
    ended: bool


@dataclass(frozen=True, slots=True)
class CancelAnswer:
    """What a cancel did: `job` as it is now; `done` False while a running handler is asked to stop."""

    job: dict[str, Any]
    done: bool


class JobService:
    """What may be asked of jobs. Synchronous; safe to use from many threads."""

    def __init__(
        self,
        database: Database,
        lanes: LaneBackend,
        settings: Settings,
        registry: Registry,
        *,
        news: News | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.database = database
        self.lanes = lanes
        self.settings = settings
        self.registry = registry
        self.news = news or Silence()
        self.clock = clock or SystemClock()
        self._webhook_policy = Policy.from_settings(settings)
        self._admission = Admission(database, settings, self.clock)

    # Making jobs

    def prepare(
        self, spec: JobSpec, caller: Caller, *, key: Key | None = None, check_parameters: bool = True
    ) -> Prepared:
        """Check a request against its job type and every limit, without I/O.

        With an idempotency `key` it makes its job only if no request did before. Parameters that are not
        what they will be are checked when the job runs.

        Raises UnknownJobType, InvalidParameters, InvalidPayload, PayloadTooLarge, WebhookUrlRefused.
        """
        job_type = self.known_type(spec.job_type, "/job_type")
        if spec.target is not None:
            spec, check_parameters = self._aimed(spec, caller), False
        spec = _with_defaults(spec, job_type)
        parameters = to_json(spec.parameters)
        if check_parameters:
            job_type.check(spec.parameters)
        spec = spec.model_copy(update=self._storable(spec))
        now = self.clock.now()
        starts_at = spec.starts_at(now)
        row = NewJob(
            id=new_id(),
            tenant_id=caller.tenant_id,
            created_by=caller.subject,
            job_type=spec.job_type,
            parameters=parameters,
            queue=spec.queue,
            priority=spec.priority.value,
            lane=spec.lane,
            title=spec.title,
            description=spec.description,
            tags=to_json(list(spec.tags), what="tags") if spec.tags else "[]",
            metadata=to_json(spec.metadata, what="metadata", max_bytes=MAX_METADATA_BYTES)
            if spec.metadata
            else "{}",
            scheduled_for=starts_at,
            expires_at=spec.expires_at,
            timeout_seconds=spec.timeout_seconds or self.settings.job_timeout_seconds,
            max_retries=spec.max_retries,
            retry_delay_seconds=spec.retry_delay_seconds,
            retry_backoff=spec.retry_backoff,
            retry_max_delay_seconds=spec.retry_max_delay_seconds,
            retry_jitter=spec.retry_jitter,
            unique_key=spec.unique_key,
            webhook_url=spec.webhook_url,
            webhook_events=to_json(list(spec.webhook_events)) if spec.webhook_events else None,
            status=JobStatus.QUEUED.value if starts_at is None else JobStatus.SCHEDULED.value,
            queued_at=now if starts_at is None else None,
        )
        if spec.concurrency_key is not None:
            limit = spec.concurrency_limit or 1
            row = LinkedJob.of(row, concurrency_key=spec.concurrency_key, concurrency_limit=limit)
        row = dependencies.waiting(row, spec.parents, on_failure=spec.on_dependency_failure)
        return Prepared(row, spec, scope_of(caller), key)

    def _aimed(self, spec: JobSpec, caller: Caller) -> JobSpec:
        """The spec with its target as its parameters. Raises WebhookUrlRefused."""
        assert spec.target is not None  # noqa: S101 - for mypy
        parameters = http_jobs.parameters_of(
            spec.target,
            tenant_id=caller.tenant_id,
            traceparent=spec.metadata.get("traceparent"),
            policy=self._webhook_policy,
            box=self._box,
        )
        return spec.model_copy(update={"parameters": parameters, "target": None})

    @cached_property
    def _box(self) -> SecretBox:
        return SecretBox.from_settings(self.settings)

    def known_type(self, name: str, pointer: str) -> JobType:
        """The job type. Raises UnknownJobType, which points at the field that names it."""
        job_type = self.registry.get(name)
        if job_type is None:
            detail = f"there is no job type {name!r}; GET /job-types lists them"
            raise UnknownJobType(detail, errors=(FieldError(pointer, detail, "unknown_job_type"),))
        return job_type

    def _storable(self, spec: JobSpec) -> dict[str, Any]:
        """The fields that both stores must be able to hold, checked and in the form that is kept."""
        for name in ("title", "description", "unique_key", "concurrency_key"):
            check_storable(getattr(spec, name), what=name)
        fields: dict[str, Any] = {
            name: in_utc(moment, name)
            for name in ("scheduled_for", "expires_at")
            if (moment := getattr(spec, name)) is not None
        }
        if spec.webhook_url is not None:
            fields["webhook_url"] = self._target(spec.webhook_url)
        return fields

    def _target(self, url: str) -> str:
        try:
            return check_url(url, self._webhook_policy).url
        except WebhookUrlRefused as refused:
            refused.errors = (FieldError("/webhook_url", str(refused), refused.code),)
            raise

    def enqueue(self, prepared: Sequence[Prepared]) -> list[dict[str, Any] | Exception]:
        """Write jobs and ring their lanes; one answer each, in order: the job, or the error of that one.

        The job is new, or the active one that holds its unique key. What is answered is kept.
        """
        answers: list[dict[str, Any] | Exception] = list(commit_each(self.create, prepared))
        self.ring_new(prepared, answers)
        return answers

    def create(self, prepared: Sequence[Prepared]) -> list[dict[str, Any] | Exception]:
        """Write the jobs there is room for, in one transaction. Nobody is told: `ring_new` is for later.

        A request that was answered before is answered again (Replayed), also when there is no room.
        """
        answers = self._admission.admit(prepared, self._create)
        refused = [p.key for p, a in zip(prepared, answers, strict=True) if p.key and isinstance(a, NO_ROOM)]
        if not refused:
            return answers
        with self.database.read() as connection:
            known = idempotency.find(connection, refused, now=self.clock.now())
        return [
            _replay(p, p.key, kept) if p.key and isinstance(a, NO_ROOM) and (kept := known[p.key.id]) else a
            for p, a in zip(prepared, answers, strict=True)
        ]

    def admit(
        self, prepared: Sequence[Prepared], create: Callable[[Sequence[Prepared]], Sequence[Answer]]
    ) -> list[Answer]:
        """The answers of `create` to those there is room for; QuotaQueued or Overloaded to the others."""
        return self._admission.admit(prepared, create)

    def _create(self, prepared: Sequence[Prepared]) -> list[dict[str, Any] | Exception]:
        answers = self._insert(prepared)
        again = [p for p, answer in zip(prepared, answers, strict=True) if answer is None]
        if again:  # the holders of their unique keys ended in between, or let go of them
            second = iter(self._insert(again))
            answers = [next(second) if answer is None else answer for answer in answers]
        return [answer or _taken(p.row.unique_key, None) for p, answer in zip(prepared, answers, strict=True)]

    def _insert(self, prepared: Sequence[Prepared]) -> list[dict[str, Any] | Exception | None]:
        now = self.clock.now()
        if any(p.key for p in prepared):
            return self._insert_keyed(prepared, now)
        more = any(p.spec.depends_on or p.spec.debounce_seconds for p in prepared)
        with self.database.write() if more else self.database.write_once() as connection:
            made = create(connection, [p.row for p in prepared], now=now)
            _tie(connection, prepared, made, now=now)
            answers = _answers(connection, prepared, made, now=now)
        return [answers[p.row.id] for p in prepared]

    def _insert_keyed(self, prepared: Sequence[Prepared], now: datetime) -> list[Answer | None]:
        """The same where some have keys: only the first request of each key makes its job."""
        first = {p.key.id: p for p in reversed(prepared) if p.key}
        told = {key_id: _new_view(p, now) | {"parameters": None} for key_id, p in first.items()}
        with self.database.write() as connection:
            wanted = [(p.key, told[p.key.id]) for p in first.values() if p.key]
            known = idempotency.take(connection, wanted, now=now)
            ours = [p for p in prepared if p.key is None or (p is first[p.key.id] and p.key.id not in known)]
            made = create(connection, [p.row for p in ours], now=now)
            _tie(connection, ours, made, now=now)
            answers = _answers(connection, ours, made, now=now)
            for p, new in zip(ours, made, strict=True):
                answer = answers[p.row.id]
                if p.key and isinstance(answer, dict):
                    known[p.key.id] = Kept(p.key.request, told[p.key.id] if new else answer)
                    if not new:
                        idempotency.keep(connection, p.key, answer)
                elif p.key:
                    idempotency.drop(connection, p.key)
        return [
            answers[p.row.id]
            if p.row.id in answers
            else _replay(p, p.key, known[p.key.id])
            if p.key and p.key.id in known
            else answers[first[p.key.id].row.id]  # type: ignore[union-attr]
            for p in prepared
        ]

    def create_in(self, connection: sa.Connection, prepared: Prepared) -> dict[str, Any]:
        """Write a job through a connection whose transaction is not ours; the new job, or its key's holder.

        Nobody is told: whoever commits rings afterwards, or the reconciler does. Raises UniqueKeyTaken,
        QuotaQueued, Overloaded.
        """
        now = self.clock.now()

        def insert(_: Sequence[Prepared]) -> list[Answer]:
            for _attempt in range(2):  # the holder of its unique key may have let go of it
                made = create(connection, [prepared.row], now=now)
                _tie(connection, [prepared], made, now=now)
                if answer := _answers(connection, [prepared], made, now=now)[prepared.row.id]:
                    return [answer]
            return [_taken(prepared.row.unique_key, None)]

        [answer] = self._admission.admit([prepared], insert)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def ring_new(self, prepared: Sequence[Prepared], answers: Sequence[dict[str, Any] | Exception]) -> None:
        """Ring the lanes of those that `create` made and that are due, in one round trip.

        Schedulers look for what is due soon by themselves, but not all the time: those are rung as well.
        """
        soon = self.clock.now() + RING_SCHEDULERS_WITHIN
        if any(
            p.row.queued_at is None and p.row.scheduled_for and p.row.scheduled_for < soon for p in prepared
        ):
            self.news.ring_scheduler()
        self.news.changed(
            [
                answer["id"]
                for p, answer in zip(prepared, answers, strict=True)
                if p.spec.debounce_seconds and isinstance(answer, dict) and answer["id"] != p.row.id
            ]
        )
        self.ring(
            [
                Due(p.row.lane, p.row.id, p.row.tenant_id)
                for p, answer in zip(prepared, answers, strict=True)
                if (p.row.queued_at is not None or p.spec.depends_on)  # which may have ended long ago
                and not isinstance(answer, Exception)
                and answer["id"] == p.row.id
            ]
        )

    def ring(self, items: Sequence[Due], *, first: bool = False) -> None:
        """Push these jobs, best effort: what fails here is rung again by the reconciler.

        With `first` at the head of their lanes.
        """
        if not items:
            return
        push = self.lanes.push_first if first else self.lanes.push
        try:
            push(items)
        except LanesUnavailable as error:
            log.warning("push_failed", jobs=len(items), error=str(error))

    # Looking at jobs

    def get(self, job_id: str, caller: Caller) -> dict[str, Any]:
        """The job. Raises JobNotFound, also for what the caller may not see."""
        return self.get_versioned(job_id, caller)[0]

    def get_versioned(self, job_id: str, caller: Caller) -> tuple[dict[str, Any], int]:
        """The job and its version, which grows with each change of its row. Raises JobNotFound.

        The `status_reason` of a queued job is `queue_paused` while its queue is; of one that has been queued
        for a while and that no living worker can run `no_capable_worker`. They tell of the moment, and are
        written nowhere.
        """
        with self.database.read() as connection:
            row = self.find(connection, job_id, caller)
            job = queries.view(row) | {"position": position(connection, row)}
            if row["status"] == JobStatus.QUEUED and is_paused(connection, row["queue"]):
                job["status_reason"] = QUEUE_PAUSED
            elif row["status"] == JobStatus.QUEUED and row["queued_at"] < self.clock.now() - UNSERVED_AFTER:
                served = queries.is_served(
                    connection,
                    lane=row["lane"],
                    job_type=row["job_type"],
                    within_seconds=self.settings.lease_seconds,
                )
                job["status_reason"] = row["status_reason"] if served else NO_CAPABLE_WORKER
            return job, row["version"]

    def result(self, job_id: str, caller: Caller) -> dict[str, Any]:
        """`id`, `status`, `result` and `error` of an ended job. Raises JobNotFound, NotFinished."""
        job = self.get(job_id, caller)
        if job["status"] not in FINAL:
            raise NotFinished(
                f"the job is {job['status']}; GET /jobs/{job_id} with `Prefer: wait=30` waits for its end",
                current_status=job["status"],
            )
        return {name: job[name] for name in ("id", "status", "result", "error", "finished_at")}

    def page(
        self,
        caller: Caller,
        wanted: Filter,
        *,
        limit: int,
        cursor: str | None,
        mine: bool,
        q: str | None = None,
    ) -> tuple[list[dict[str, Any]], str | None]:
        """Jobs, newest first, and the cursor of the next page. Raises InvalidCursor.

        With `q` those whose title, tags or id hold it: such a page may be short although another follows.
        """
        scope = Scope(caller.tenant_id, caller.subject) if mine else scope_of(caller)
        bound = (scope, wanted) if q is None else (scope, (wanted, q))
        before = queries.decode_cursor(cursor, *bound) if cursor else None
        with self.database.read() as connection:
            if q is None:
                rows, more = queries.page_of_jobs(connection, scope, wanted, limit=limit, before=before)
                last = rows[-1]["id"] if more else None
            else:
                rows, last = queries.search_jobs(connection, scope, wanted, q, limit=limit, before=before)
        following = None if last is None else queries.encode_cursor(last, *bound)
        return [queries.view(row) for row in rows], following

    def follow(self, job_id: str, caller: Caller, *, after: int = 0) -> Following:
        """The job's transitions with a `seq` above `after`, and where it is. Raises JobNotFound."""
        with self.database.read() as connection:
            events = queries.events_after(connection, job_id, after)
            row = self.find(connection, job_id, caller)
        seen = events[-1]["seq"] if events else after
        ended = row["status"] in FINAL and seen >= row["event_seq"]
        return Following(events, queries.view(row), ended)

    def find(
        self, connection: sa.Connection, job_id: str, caller: Caller, *, lock: bool = False
    ) -> sa.RowMapping:
        """The job's row. Raises JobNotFound, also for what the caller may not see."""
        row = queries.find_job(connection, job_id, scope_of(caller), lock=lock)
        if row is None:
            raise JobNotFound(f"there is no job {job_id}", job_id=job_id)
        return row

    # Stopping jobs

    def cancel(
        self,
        job_id: str,
        caller: Caller,
        *,
        reason: str | None = None,
        terminate: bool = False,
        grace_seconds: float | None = None,
    ) -> CancelAnswer:
        """End a waiting job, or ask a running one to stop; asking twice is no error.

        A running handler sees the wish in `check_cancelled()`; one that goes on is killed after
        `grace_seconds` (default: the setting), or at once with `terminate`.
        Raises JobNotFound, IllegalTransition for a job that has ended otherwise.
        """
        to_json(reason, what="reason")
        now = self.clock.now()
        with self.database.write() as connection:
            # Locked, so that the job is not handed on between the refused move and the wish.
            self.find(connection, job_id, caller, lock=True)
            move = Cancel(job_id, by=caller.subject, reason=reason)
            outcome = carry_out(connection, [move], now=now, actor=caller.subject)[0]
            if not isinstance(outcome, Applied) and outcome.status is JobStatus.RUNNING:
                how = Manner(reason, terminate, grace_seconds)
                ask_to_stop(connection, [job_id], how, by=caller.subject, now=now)
            row = self.find(connection, job_id, caller)
        job = queries.view(row)
        if job["status"] in FINAL and job["status"] != JobStatus.CANCELLED:
            raise IllegalTransition(f"the job is {job['status']}", current_status=job["status"])
        done = job["status"] == JobStatus.CANCELLED
        if done:
            self._forget(row["lane"], job_id)
        else:
            self.news.wished()
        self.news.changed([job_id])
        if isinstance(outcome, Applied) and outcome.told:
            self.news.ring_courier()
        self.ring(due_of([outcome]))
        return CancelAnswer(job, done)

    def _forget(self, lane: str, job_id: str) -> None:
        try:
            self.lanes.remove(lane, [job_id])
            self.lanes.mirror_ended([EndedRun(lane, job_id, JobStatus.CANCELLED)])
        except LanesUnavailable:
            pass  # the id is harmless: no claim can take a cancelled row

    # Deleting ended jobs

    def delete(self, job_id: str, caller: Caller) -> None:
        """Delete an ended job with all that hangs on it.

        Raises JobNotFound, IllegalTransition for an active job, Conflict while one of its webhooks is still
        to be delivered.
        """
        with self.database.write() as connection:
            status = self.find(connection, job_id, caller, lock=True)["status"]
            if status not in FINAL:
                raise IllegalTransition(f"the job is {status}; cancel it first", current_status=status)
            if not delete_jobs(connection, [job_id]):
                raise Conflict(
                    "it is still needed: by a webhook that is to be delivered, or by its chain or batch",
                    current_status=status,
                )

    # Trying ended jobs again

    def retry(
        self,
        job_id: str,
        caller: Caller,
        *,
        parameters: dict[str, Any] | None = None,
        dead_letter: bool = False,
        key: Key | None = None,
    ) -> dict[str, Any]:
        """Queue an ended job again, with other `parameters` where they are given.

        Its attempts count on, its retries from 0. With `dead_letter` it must be one. A second call with an
        idempotency `key` is answered as the first was (Replayed).
        Raises JobNotFound or DeadLetterNotFound, IllegalTransition unless it failed, timed out, expired or
        was cancelled, UniqueKeyTaken while an active job holds its key; and for the parameters what
        `prepare` raises.
        """
        now = self.clock.now()
        new = None if parameters is None else to_json(parameters)
        move = Retry(job_id, new, reason=None if new is None else "with other parameters")
        try:
            with self.database.write() as connection:
                if (first := idempotency.begin(connection, key, now=now)) is not None:
                    return first
                find = find_dead_letter if dead_letter else self.find
                row = find(connection, job_id, caller, lock=True)
                if parameters is not None:
                    self.known_type(row["job_type"], "/parameters").check(parameters)
                [outcome] = carry_out(connection, [move], now=now, actor=caller.subject)
                if not isinstance(outcome, Applied):
                    raise IllegalTransition(f"the job is {row['status']}", current_status=row["status"])
                row = self.find(connection, job_id, caller)
                job = queries.view(row) | {"position": position(connection, row)}
                idempotency.keep(connection, key, job)
        except sa.exc.IntegrityError:
            raise self._key_taken(job_id, caller) from None
        self.ring([Due(outcome.row["lane"], job_id, outcome.row["tenant_id"])])
        self.news.changed([job_id])
        return job

    def _key_taken(self, job_id: str, caller: Caller) -> UniqueKeyTaken:
        with self.database.read() as connection:
            key = self.find(connection, job_id, caller)["unique_key"]
            holder = queries.find_active(connection, scope_of(caller), key)
        return _taken(key, holder)


def scope_of(caller: Caller) -> Scope:
    """What a caller may see: a user its own jobs, others their tenant's."""
    return Scope(caller.tenant_id, caller.subject if caller.role is Role.USER else None)


def find_dead_letter(
    connection: sa.Connection, job_id: str, caller: Caller, *, lock: bool = False
) -> sa.RowMapping:
    """The job's row. Raises DeadLetterNotFound, also for what is no dead letter, or not the caller's."""
    row = queries.find_job(connection, job_id, scope_of(caller), lock=lock)
    if row is None or row["dead_letter_reason"] is None:
        raise DeadLetterNotFound(
            f"there is no dead letter {job_id}; GET /jobs/{job_id} tells what became of it", job_id=job_id
        )
    return row


def _with_defaults(spec: JobSpec, job_type: JobType) -> JobSpec:
    """The spec with the job type's defaults where the request said nothing."""
    own, said = job_type.own_defaults, spec.model_fields_set
    missing = {name: value for name, value in own.items() if name not in said} if own else {}
    for name in {"unique_key", "concurrency_key"} & missing.keys():
        missing[name] = job_type.fill_in(missing[name], spec.parameters)
    if "concurrency_limit" in missing and "concurrency_key" not in {*missing, *said}:
        del missing["concurrency_limit"]
    return spec.model_copy(update=missing) if missing else spec


def _tie(
    connection: sa.Connection, prepared: Sequence[Prepared], made: Sequence[str | None], *, now: datetime
) -> None:
    """Let those of the jobs that were made wait for what they depend on. Raises UnknownDependency."""
    new = [(p.row, p.scope) for p, job_id in zip(prepared, made, strict=True) if job_id and p.spec.depends_on]
    if new:
        dependencies.tie(connection, new, now=now)


def _new_view(prepared: Prepared, now: datetime) -> dict[str, Any]:
    """A just-made job as the API answers it, without reading it back."""
    row, spec = prepared.row, prepared.spec
    columns: dict[str, Any] = dict.fromkeys(models.jobs.c.keys())
    columns |= {name: getattr(row, name) for name in NewJob.__slots__}
    columns |= {
        "parameters": spec.parameters,
        "tags": list(spec.tags),
        "metadata": spec.metadata,
        "webhook_events": list(spec.webhook_events) if spec.webhook_events else None,
        "progress": 0,
        "attempt": 0,
        "retry_count": 0,
        "webhook_delivered": False,
        "webhook_attempts": 0,
        "on_dependency_failure": spec.on_dependency_failure,
        "created_at": now,
        "updated_at": now,
    }
    if isinstance(row, LinkedJob):
        columns |= {name: getattr(row, name) for name in LinkedJob.__slots__}
        columns["depends_on"] = list(spec.parents)
    return queries.view(columns)


def _answers(
    connection: sa.Connection, prepared: Sequence[Prepared], made: Sequence[str | None], *, now: datetime
) -> dict[str, Answer | None]:
    """By the id of the row to be: the new job, or what `_holder` says.

    Holders are put off in the order of their keys, so that two batches do not lock each other out.
    """
    pairs = sorted(zip(prepared, made, strict=True), key=lambda pair: pair[0].row.unique_key or "")
    return {p.row.id: _new_view(p, now) if new else _holder(connection, p, now=now) for p, new in pairs}


def _holder(connection: sa.Connection, prepared: Prepared, *, now: datetime) -> Answer | None:
    """The active job that holds the unique key; an error where the request wants one, or may not see it.

    One that is debounced waits on. None when there is none any more.
    """
    row = queries.find_active(connection, Scope(prepared.row.tenant_id), prepared.row.unique_key or "")
    if row is None:
        return None
    visible = prepared.scope.subject in (None, row["created_by"])
    if visible and prepared.spec.debounce_seconds:
        if row["job_type"] != prepared.row.job_type:
            return _taken(prepared.row.unique_key, row)
        waits = debounce.put_off(connection, row["id"], prepared.row, now=now)
        job = queries.find_job(connection, row["id"], prepared.scope) if waits else None
        return None if job is None else queries.view(job)
    if visible and prepared.spec.on_conflict == "return_existing":
        return queries.view(row)
    return _taken(prepared.row.unique_key, row if visible else None)


def _replay(prepared: Prepared, key: Key, kept: Kept | None) -> Answer:
    """The first answer; of a new job it is kept without the parameters, which came along again."""
    try:
        answer = idempotency.replay(key, kept)
    except LanewayError as error:
        return error
    if answer["parameters"] is None:
        said = prepared.spec.parameters
        answer["parameters"] = shown(said) if prepared.row.job_type == HTTP_REQUEST else said
    return answer


def _taken(key: str | None, holder: sa.RowMapping | None) -> UniqueKeyTaken:
    facts = {} if holder is None else {"job_id": holder["id"]}
    return UniqueKeyTaken(f"an active job holds the unique key {key!r}", **facts)


def in_utc(moment: datetime, name: str) -> datetime:
    """The moment in UTC. Raises Unprocessable, which points at the field `name`."""
    try:
        return moment.astimezone(UTC)
    except OverflowError:  # the first and last hours of what datetime can hold, in another zone
        detail = "the moment is outside of the years 1 to 9999 in UTC"
        error = FieldError(f"/{name}", detail, "moment_out_of_range")
        raise Unprocessable(f"{name}: {detail}", errors=(error,)) from None
