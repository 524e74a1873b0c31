"""Batches: many jobs by one call, accepted as a whole or not at all, and what is known of them together.

All rows of a batch are written in one transaction, a few hundred with each statement, so a crash leaves
all or nothing. When a batch ends is found in `engine/batch_ends.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import sqlalchemy as sa
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from laneway import models
from laneway.clock import new_id
from laneway.domain.flow import StepSpec, read_reference, references
from laneway.domain.spec import JobSpec
from laneway.domain.states import FINAL, JobStatus
from laneway.engine import dependencies, idempotency, queries
from laneway.engine.access.callers import Caller
from laneway.engine.batch_ends import counts_of, status_of
from laneway.engine.cancels import ActiveJobs, Cancelled, Manner, cancel_all
from laneway.engine.idempotency import Key
from laneway.engine.outcomes import carry_out
from laneway.engine.plans import plan_of
from laneway.engine.queries import JobFilter, Scope, stamp
from laneway.engine.service import NO_ROOM, JobService, Prepared, scope_of
from laneway.engine.transitions import Applied, LinkedJob, Retry, create
from laneway.errors import (
    BatchNotFound,
    Conflict,
    FieldError,
    LanewayError,
    UniqueKeyTaken,
    Unprocessable,
)
from laneway.lanes.backend import Due

MAX_JOBS = 10_000
MAX_TOLD = 100
"""Errors of a batch that is refused; the rest of it is not looked at."""

CHUNK_ROWS = 500
CALLBACKS = ("on_success", "on_complete", "on_failure")
_FACTS = {"id", "total", "enqueued", *(status.value for status in FINAL)}

b = models.batches.c
j = models.jobs.c

View = dict[str, Any]


class BatchSpec(BaseModel):
    """A batch, without its jobs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    job_type: str | None = Field(None, description="Of `items`, and of those `jobs` that name none.")
    defaults: dict[str, Any] = Field(
        default_factory=dict, description="Fields of `POST /jobs` that each job has unless it says otherwise."
    )
    on_invalid: Literal["reject", "skip"] = Field(
        "reject", description="What one invalid job means: no batch, or a batch without it."
    )
    on_success: StepSpec | None = Field(None, description="A job to be made when all jobs completed.")
    on_complete: StepSpec | None = Field(None, description="A job to be made when all jobs ended.")
    on_failure: StepSpec | None = Field(None, description="A job to be made when all ended, some otherwise.")


@dataclass(frozen=True, slots=True)
class Rejected:
    """A job that is not in its batch: its place in the request, and why."""

    index: int
    code: str
    detail: str
    errors: tuple[FieldError, ...] = ()

    @property
    def view(self) -> View:
        told = [{"pointer": e.pointer, "detail": e.detail, "code": e.code} for e in self.errors]
        return {"index": self.index, "code": self.code, "detail": self.detail, "errors": told}


@dataclass(slots=True)
class Draft:
    """A checked batch: its jobs to be, in order, and those that were left out."""

    callbacks: dict[str, Any]
    on_invalid: str
    total: int = 0
    jobs: list[tuple[int, Prepared]] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)


def check(
    service: JobService,
    spec: BatchSpec,
    jobs: Iterable[tuple[str, Mapping[str, Any] | LanewayError]],
    caller: Caller,
) -> Draft:
    """Check each job like `POST /jobs` does, without I/O. `jobs` come with the JSON Pointer to each.

    Where that points into `items`, it is to the parameters of the job.

    Raises Unprocessable, with the first MAX_TOLD errors, when one is invalid and that means no batch, and
    when none is left.
    """
    unknown = sorted(set(spec.defaults) - set(JobSpec.model_fields))
    if unknown:
        errors = tuple(
            FieldError(f"/defaults/{name[:100]}", "there is no such field", "extra_forbidden")
            for name in unknown
        )
        raise Unprocessable("defaults: fields that no job has", errors=errors[:MAX_TOLD])
    draft = Draft(_callbacks(service, spec, caller), spec.on_invalid)
    defaults = spec.defaults | ({"job_type": spec.job_type} if spec.job_type is not None else {})
    told: list[FieldError] = []
    for index, (pointer, given) in enumerate(jobs):
        draft.total += 1
        try:
            if isinstance(given, LanewayError):
                raise given
            job = service.prepare(JobSpec.model_validate(defaults | dict(given)), caller)
            draft.jobs.append((index, _row_only(job)))
        except (LanewayError, ValidationError) as error:
            rejected = _rejected(index, pointer, error)
            if spec.on_invalid == "skip":
                draft.rejected.append(rejected)
                continue
            told += rejected.errors or [FieldError(pointer, rejected.detail, rejected.code)]
            if len(told) >= MAX_TOLD:
                break
    if told:
        raise Unprocessable(
            "the batch holds invalid jobs, and none of it was accepted", errors=tuple(told[:MAX_TOLD])
        )
    if not draft.jobs:
        errors = tuple(error for each in draft.rejected for error in each.errors)[:MAX_TOLD]
        raise Unprocessable("none of the batch's jobs is valid", errors=errors)
    return draft


def make(service: JobService, draft: Draft, caller: Caller, *, key: Key | None = None) -> View:
    """Write the batch and all its jobs, or nothing; the batch with what was `rejected`.

    Raises QuotaQueued or Overloaded when there is no room for all of it, UniqueKeyTaken when an active job
    holds a key of one and that means no batch, UnknownDependency.
    """
    now = service.clock.now()
    batch_id = new_id()
    prepared = [
        replace(each, row=LinkedJob.of(each.row, batch_id=batch_id, linked=True)) for _, each in draft.jobs
    ]
    view: View = {}

    def write(admitted: Sequence[Prepared]) -> list[dict[str, Any] | Exception]:
        nonlocal view
        if len(admitted) < len(prepared):
            return [Unprocessable() for _ in admitted]  # there is no room: the refusals say so
        with service.database.write() as connection:
            if (first := idempotency.begin(connection, key, now=now)) is not None:
                view = first
                return [Unprocessable() for _ in admitted]
            made: list[str | None] = []
            for some in _chunks(prepared):
                ids = create(connection, [p.row for p in some], now=now)
                made += ids
                new = [(p.row, p.scope) for p, job_id in zip(some, ids, strict=True) if job_id]
                dependencies.tie(connection, new, now=now)
            rejected = draft.rejected + _held(draft, made)
            connection.execute(
                sa.insert(models.batches).values(
                    id=batch_id,
                    tenant_id=caller.tenant_id,
                    created_by=caller.subject,
                    total=draft.total,
                    enqueued=sum(job_id is not None for job_id in made),
                    callbacks=draft.callbacks,
                    created_at=now,
                    updated_at=now,
                )
            )
            view = _views(connection, [_find(connection, batch_id, caller)])[0]
            view["rejected"] = [each.view for each in sorted(rejected, key=lambda each: each.index)]
            idempotency.keep(connection, key, view)
        return [{"id": job_id} for job_id in made]

    answers = service.admit(prepared, write)
    if not view:
        raise next(answer for answer in answers if isinstance(answer, NO_ROOM))
    if not isinstance(view, idempotency.Replayed):
        due = [
            Due(p.row.lane, p.row.id, p.row.tenant_id)
            for p in prepared
            if p.row.queued_at is not None or p.spec.depends_on
        ]
        for some in _chunks(due):
            service.ring(some)
    return view


def _row_only(prepared: Prepared) -> Prepared:
    """Without the parameters' objects, which the row holds as text: of ten thousand jobs they are much."""
    return replace(prepared, spec=prepared.spec.model_copy(update={"parameters": {}}))


def _callbacks(service: JobService, spec: BatchSpec, caller: Caller) -> dict[str, Any]:
    """The plans of a batch's callbacks. Raises what `JobService.prepare` does, pointing at the callback."""
    plans = {}
    for name in CALLBACKS:
        callback: StepSpec | None = getattr(spec, name)
        if callback is None:
            continue
        try:
            named = list(references(callback.referring))
            for each in named:
                root, path = read_reference(each)
                if root != "batch" or len(path) != 1 or path[0] not in _FACTS:
                    known = ", ".join(f"batch.{fact}" for fact in sorted(_FACTS))
                    raise ValueError(f"{each[:100]!r} is none of {known}")
            prepared = service.prepare(callback, caller, check_parameters=not named)
        except ValueError as error:
            told = FieldError(f"/{name}/parameters", str(error), "unknown_reference")
            raise Unprocessable(f"{name}: {error}", errors=(told,)) from None
        except LanewayError as error:
            error.errors = tuple(replace(each, pointer=f"/{name}{each.pointer}") for each in error.errors)
            raise
        plans[name] = {"plan": plan_of(prepared.row, delay_seconds=callback.delay_seconds), "job_id": None}
    return plans


def _rejected(index: int, pointer: str, error: LanewayError | ValidationError) -> Rejected:
    inside = "/parameters" if pointer.startswith("/items") else ""

    def at(within: str) -> str:
        return (pointer + within.removeprefix(inside))[:200]

    if isinstance(error, LanewayError):
        told = tuple(replace(each, pointer=at(each.pointer)) for each in error.errors)
        return Rejected(index, error.code, str(error), told)
    told = tuple(
        FieldError(at("".join(f"/{part}" for part in each["loc"])), str(each["msg"]), str(each["type"]))
        for each in error.errors(include_url=False, include_context=False, include_input=False)[:MAX_TOLD]
    )
    return Rejected(index, Unprocessable.code, told[0].detail, told)


def _held(draft: Draft, made: Sequence[str | None]) -> list[Rejected]:
    """Those whose unique key an active job holds. Raises UniqueKeyTaken when that means no batch."""
    held = [
        Rejected(index, UniqueKeyTaken.code, f"an active job holds the unique key {p.row.unique_key!r}")
        for (index, p), job_id in zip(draft.jobs, made, strict=True)
        if job_id is None
    ]
    if held and draft.on_invalid == "reject":
        raise UniqueKeyTaken(f"job {held[0].index}: {held[0].detail}; none of the batch was accepted")
    if len(held) == len(made):
        raise UniqueKeyTaken("active jobs hold the unique keys of all the batch's jobs")
    return held


def _chunks(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    return (items[first : first + CHUNK_ROWS] for first in range(0, len(items), CHUNK_ROWS))


# Looking


def get(service: JobService, batch_id: str, caller: Caller) -> View:
    """The batch, its jobs counted by status. Raises BatchNotFound."""
    with service.database.read() as connection:
        return _views(connection, [_find(connection, batch_id, caller)])[0]


def page(
    service: JobService, caller: Caller, *, limit: int, cursor: str | None
) -> tuple[list[View], str | None]:
    """Batches, newest first, and the cursor of the next page. Raises InvalidCursor."""
    scope = scope_of(caller)
    query = sa.select(models.batches).where(*_whose(scope))
    with service.database.read() as connection:
        rows, following = queries.newest_first(
            connection, query, b.id, bound=(scope, "batches"), limit=limit, cursor=cursor
        )
        return _views(connection, rows), following


def jobs(
    service: JobService,
    batch_id: str,
    caller: Caller,
    *,
    statuses: Sequence[JobStatus],
    limit: int,
    cursor: str | None,
) -> tuple[list[View], str | None]:
    """The batch's jobs, newest first. Raises BatchNotFound, InvalidCursor."""
    get_row(service, batch_id, caller)
    wanted = JobFilter(tuple(statuses), batch_id=batch_id)
    return service.page(caller, wanted, limit=limit, cursor=cursor, mine=False)


def get_row(service: JobService, batch_id: str, caller: Caller) -> sa.RowMapping:
    """The batch's row. Raises BatchNotFound."""
    with service.database.read() as connection:
        return _find(connection, batch_id, caller)


def _whose(scope: Scope) -> list[sa.ColumnElement[bool]]:
    mine = [b.tenant_id == scope.tenant_id]
    return mine if scope.subject is None else [*mine, b.created_by == scope.subject]


def _find(connection: sa.Connection, batch_id: str, caller: Caller) -> sa.RowMapping:
    query = sa.select(models.batches).where(b.id == batch_id, *_whose(scope_of(caller)))
    row = connection.execute(query).mappings().first()
    if row is None:
        raise BatchNotFound(f"there is no batch {batch_id}", batch_id=batch_id)
    return row


def _views(connection: sa.Connection, rows: Sequence[sa.RowMapping]) -> list[View]:
    active = [row["id"] for row in rows if row["counts"] is None]
    counted = counts_of(connection, active) if active else {}
    return [_view(row, counted.get(row["id"], row["counts"])) for row in rows]


def _view(row: sa.RowMapping, counted: Mapping[str, int]) -> View:
    counts = {status.value: counted.get(status, 0) for status in JobStatus}
    ended = sum(counts[status] for status in FINAL)
    # A batch whose end is not written yet runs still: what follows from it has not happened.
    status = JobStatus.RUNNING if row["finished_at"] is None else status_of(counts)
    return {
        "id": row["id"],
        "tenant_id": row["tenant_id"],
        "created_by": row["created_by"],
        "status": status.value,
        "total": row["total"],
        "enqueued": row["enqueued"],
        "counts": counts,
        "progress_percent": 100 * ended // row["enqueued"] if row["finished_at"] is None else 100,
        "callbacks": {
            name: {"job_type": each["plan"]["job_type"], "job_id": each["job_id"]}
            for name, each in row["callbacks"].items()
        },
        "created_at": stamp(row["created_at"]),
        "updated_at": stamp(row["updated_at"]),
        "finished_at": stamp(row["finished_at"]),
    }


# Stopping and trying again


def cancel(service: JobService, batch_id: str, caller: Caller, manner: Manner) -> tuple[View, Cancelled]:
    """Cancel the batch's active jobs, a part at a time; the batch, and what became of them.

    Raises BatchNotFound.
    """
    get_row(service, batch_id, caller)
    done = cancel_all(service, caller, ActiveJobs(JobFilter(batch_id=batch_id)), manner)
    return get(service, batch_id, caller), done


def count_failed(service: JobService, batch_id: str, caller: Caller) -> int:
    """How many of the batch's jobs `retry_failed` would try again. Raises BatchNotFound."""
    get_row(service, batch_id, caller)
    with service.database.read() as connection:
        some = sa.select(sa.func.count()).select_from(models.jobs).where(*_failed(batch_id, caller))
        return connection.execute(some).scalar_one()


def retry_failed(service: JobService, batch_id: str, caller: Caller, *, key: Key | None = None) -> View:
    """Queue the batch's failed and timed-out jobs again, all of them or none; the batch, with `retried`.

    The batch is open again, and ends again. Jobs whose unique key an active job holds are left alone.
    Raises BatchNotFound, Conflict when such a job comes up meanwhile.
    """
    now = service.clock.now()
    due: list[Due] = []
    try:
        with service.database.write() as connection:
            if (first := idempotency.begin(connection, key, now=now)) is not None:
                return first
            _find(connection, batch_id, caller)
            failed = sa.select(j.id).where(*_failed(batch_id, caller)).order_by(j.id)
            ids = connection.execute(failed.with_for_update()).scalars().all()
            for some in _chunks(ids):
                moves = [Retry(job_id, reason="with its batch") for job_id in some]
                outcomes = carry_out(connection, moves, now=now, actor=caller.subject)
                due += [
                    Due(o.row["lane"], o.row["id"], o.row["tenant_id"])
                    for o in outcomes
                    if isinstance(o, Applied)
                ]
            view = _views(connection, [_find(connection, batch_id, caller)])[0] | {"retried": len(due)}
            idempotency.keep(connection, key, view)
    except sa.exc.IntegrityError:
        raise Conflict("an active job has taken a unique key of these; try again") from None
    for some in _chunks(due):
        service.ring(some)
        service.news.changed([job.job_id for job in some])
    return view


def _failed(batch_id: str, caller: Caller) -> list[sa.ColumnElement[bool]]:
    holder = models.jobs.alias("holder")
    held = sa.exists().where(
        holder.c.tenant_id == j.tenant_id,
        holder.c.unique_key == j.unique_key,
        holder.c.unique_key.is_not(None),
        holder.c.finished_at.is_(None),
    )
    return [
        j.batch_id == batch_id,
        j.tenant_id == caller.tenant_id,
        j.status.in_((JobStatus.FAILED, JobStatus.TIMEOUT)),
        ~held,
    ]
