"""Schedules as callers see them: made, changed, looked at, run at once. What falls due: `engine/slots.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Self

import sqlalchemy as sa
from pydantic import (
    AfterValidator,
    AliasChoices,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from laneway.clock import new_id
from laneway.db import utc_now
from laneway.domain.cadence import MAX_EXPRESSION, BadCadence, Cadence, Cron, Every, time_zones
from laneway.domain.payload import to_json
from laneway.domain.spec import (
    JOB_TYPE_PATTERN,
    MAX_SECONDS,
    QUEUE_PATTERN,
    JobSpec,
    Priority,
    Seconds,
    priority_of,
    queue_name,
)
from laneway.engine import idempotency, queries
from laneway.engine.access.callers import Caller
from laneway.engine.idempotency import Key
from laneway.engine.queries import Clauses, Scope, equal_to, stamp
from laneway.engine.schedule_ends import uncounted
from laneway.engine.service import JobService, Prepared, scope_of
from laneway.engine.slot_plan import (
    MAX_ACTIVE_RUNS,
    Misfire,
    Overlap,
    Skipped,
    cadence_of,
    due_of,
    slot_after,
)
from laneway.engine.slots import count_start, drop_waiting, insert_runs, job_of, run_row
from laneway.engine.transitions import create
from laneway.errors import Conflict, FieldError, ScheduleNotFound, Unprocessable
from laneway.lanes.backend import Due
from laneway.models import jobs, schedule_runs, schedules, tenants

MAX_SCHEDULES = 1000  # of a tenant
MAX_JITTER_SECONDS = 3600
MAX_PREVIEWED = 50

_MICROSECOND = timedelta(microseconds=1)
_TIMING = frozenset(
    ("cron_expression", "interval_seconds", "timezone", "starts_at", "ends_at", "jitter_seconds", "is_active")
)
_JOB = (
    "job_type",
    "parameters",
    "queue",
    "priority",
    "timeout_seconds",
    "max_retries",
    "retry_delay_seconds",
    "retry_backoff",
    "retry_max_delay_seconds",
    "retry_jitter",
)

s = schedules.c
r = schedule_runs.c
j = jobs.c


def _utc(moment: datetime) -> datetime:
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        raise ValueError("the moment is outside of the years 1 to 9999 in UTC") from None


def _unsaid() -> Any:
    """The default of fields of which null is no value."""
    return None


MomentIn = Annotated[AwareDatetime, AfterValidator(_utc)]
Expression = Annotated[
    str,
    Field(
        min_length=1,
        max_length=MAX_EXPRESSION,
        examples=["30 9 * * 1-5"],
        description="Minute, hour, day of month, month, day of week; or `@hourly`, `@daily`, `@weekly`, "
        "`@monthly`, `@yearly`.",
    ),
]
Interval = Annotated[
    int,
    Field(
        ge=1,
        le=MAX_SECONDS,
        description="So many seconds after each other, counted from `starts_at` or, without, from now.",
    ),
]


class Timing(BaseModel):
    """When a schedule is due: `cron_expression` or `interval_seconds`, exactly one of them."""

    model_config = ConfigDict(extra="forbid")

    cron_expression: Expression | None = None
    interval_seconds: Interval | None = None
    timezone: Annotated[str, Field(max_length=64)] = Field(
        "UTC", description="Whose clocks the expression means: a name of the IANA database."
    )
    starts_at: MomentIn | None = Field(None, description="Not due before.")
    ends_at: MomentIn | None = Field(None, description="Not due after.")


class ScheduleChange(BaseModel):
    """What may be set on a schedule. Fields that are not given stay as they are; null takes away.

    `cron_expression` takes the place of `interval_seconds`, and the other way round.
    """

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(min_length=1, max_length=100)] | None = Field(
        None, description="No other schedule of the tenant has it. The title of its jobs."
    )
    description: Annotated[str, Field(max_length=500)] | None = None
    job_type: Annotated[str, Field(pattern=JOB_TYPE_PATTERN, max_length=100)] = Field(
        default_factory=_unsaid,
        validation_alias=AliasChoices("job_type", "task_type"),
        examples=["demo.echo"],
    )
    parameters: dict[str, Any] = Field(
        default_factory=_unsaid, validation_alias=AliasChoices("parameters", "task_params")
    )
    queue: Annotated[str, Field(pattern=QUEUE_PATTERN), AfterValidator(queue_name)] = Field(
        default_factory=_unsaid, validation_alias=AliasChoices("queue", "queue_name")
    )
    priority: Annotated[Priority, BeforeValidator(priority_of)] = Field(default_factory=_unsaid)
    timeout_seconds: Annotated[int, Field(ge=1, le=MAX_SECONDS)] = Field(default_factory=_unsaid)
    max_retries: Annotated[int, Field(ge=0, le=100)] = Field(default_factory=_unsaid)
    retry_delay_seconds: Seconds = Field(default_factory=_unsaid)
    retry_backoff: Annotated[float, Field(ge=1, le=10, allow_inf_nan=False)] = Field(default_factory=_unsaid)
    retry_max_delay_seconds: Seconds = Field(default_factory=_unsaid)
    retry_jitter: bool = Field(default_factory=_unsaid)
    cron_expression: Expression = Field(default_factory=_unsaid)
    interval_seconds: Interval = Field(default_factory=_unsaid)
    timezone: Annotated[str, Field(max_length=64)] = Field(
        default_factory=_unsaid,
        description="Whose clocks the expression means: a name of the IANA database. Default: UTC.",
    )
    starts_at: MomentIn | None = Field(None, description="Not due before.")
    ends_at: MomentIn | None = Field(None, description="Not due after.")
    jitter_seconds: Annotated[int, Field(ge=0, le=MAX_JITTER_SECONDS)] = Field(
        default_factory=_unsaid,
        description="Each run starts up to so much later, by an amount of its own. Default: 0.",
    )
    is_active: bool = Field(
        default_factory=_unsaid,
        validation_alias=AliasChoices("is_active", "enabled"),
        description="What is due while it is false is not missed. Default: true.",
    )
    max_concurrent_runs: Annotated[int, Field(ge=1, le=MAX_ACTIVE_RUNS)] = Field(
        default_factory=_unsaid, description="Runs that may be active before `overlap` is asked. Default: 1."
    )
    overlap: Overlap = Field(
        default_factory=_unsaid,
        description="What becomes of a run that is due meanwhile: it is skipped, it waits (one at most), it "
        "waits for the oldest, which is cancelled, or it runs too. Default: skip.",
    )
    misfire: Misfire = Field(
        default_factory=_unsaid,
        description="Which of the runs that nobody started within a minute still run. Default: fire_once.",
    )

    @model_validator(mode="after")
    def _one_cadence(self) -> Self:
        if self.cron_expression is not None and self.interval_seconds is not None:
            raise ValueError("give cron_expression or interval_seconds, not both")
        return self

    @property
    def given(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.model_fields_set}


class NewSchedule(ScheduleChange):
    """A schedule to be, and the jobs that its runs are. Job types have defaults for what is left out."""

    job_type: Annotated[str, Field(pattern=JOB_TYPE_PATTERN, max_length=100)] = Field(
        validation_alias=AliasChoices("job_type", "task_type"), examples=["demo.echo"]
    )

    @model_validator(mode="after")
    def _has_a_cadence(self) -> Self:
        if self.cron_expression is None and self.interval_seconds is None:
            raise ValueError("give cron_expression or interval_seconds")
        return self


class Preview(Timing):
    """A timing to try out."""

    count: Annotated[int, Field(ge=1, le=MAX_PREVIEWED)] = Field(5, description="Times to show.")

    @model_validator(mode="after")
    def _one_cadence(self) -> Self:
        if (self.cron_expression is None) == (self.interval_seconds is None):
            raise ValueError("give cron_expression or interval_seconds, exactly one of them")
        return self


@dataclass(frozen=True, slots=True)
class ScheduleFilter:
    """Which schedules a list holds; None means any."""

    is_active: bool | None = None
    job_type: str | None = None

    def clauses(self) -> Clauses:
        active = [] if self.is_active is None else [s.is_active == self.is_active]
        return [*active, *equal_to((s.job_type, self.job_type))]


_DEFAULTS: dict[str, Any] = {
    "timezone": "UTC",
    "jitter_seconds": 0,
    "is_active": True,
    "max_concurrent_runs": 1,
    "overlap": Overlap.SKIP.value,
    "misfire": Misfire.FIRE_ONCE.value,
    "starts_at": None,
    "ends_at": None,
    "cron_expression": None,
    "interval_seconds": None,
    "last_slot": None,
}
_SHOWN = (
    "id",
    "tenant_id",
    "created_by",
    "name",
    "description",
    *_JOB,
    "cron_expression",
    "interval_seconds",
    "timezone",
    "jitter_seconds",
    "is_active",
    "max_concurrent_runs",
    "overlap",
    "misfire",
    "total_runs",
    "successful_runs",
    "failed_runs",
    "skipped_runs",
    "consecutive_failures",
)


@dataclass(frozen=True, slots=True)
class Schedules:
    """What may be asked of schedules. A user sees its own, others their tenant's.

    Methods that name one raise ScheduleNotFound, also for what the caller may not see.
    """

    service: JobService

    def create(self, wanted: NewSchedule, caller: Caller, *, key: Key | None = None) -> dict[str, Any]:
        """The schedule, new; or with an idempotency `key` the one that it made before (Replayed).

        Raises Conflict when its name is taken or the tenant has 1,000; Unprocessable, and what
        `JobService.prepare` raises, for what is wrong.
        """
        given = wanted.given
        job = self._job({name: given[name] for name in _JOB if name in given}, caller)
        with self.service.database.write() as connection:
            now = self._now(connection)
            if (first := idempotency.begin(connection, key, now=now)) is not None:
                return first
            _lock_tenant(connection, caller.tenant_id)  # or two at a time could be one too many
            count = sa.select(sa.func.count()).where(s.tenant_id == caller.tenant_id)
            if connection.execute(count).scalar_one() >= MAX_SCHEDULES:
                raise Conflict(f"a tenant may have {MAX_SCHEDULES} schedules; delete one first")
            row: dict[str, Any] = _DEFAULTS | {"name": None, "description": None} | given | job
            row |= {"id": new_id(), "tenant_id": caller.tenant_id, "created_by": caller.subject}
            row |= {"anchor_at": row["starts_at"] or now, "created_at": now, "updated_at": now}
            row |= _placed(row, now=now)
            self._name_is_free(connection, caller, row)
            connection.execute(sa.insert(schedules).values(_plain(row)))
            made = view(connection, _find(connection, row["id"], caller))
            idempotency.keep(connection, key, made)
        self.service.news.ring_scheduler()
        return made

    def keep(self, wanted: NewSchedule, caller: Caller) -> dict[str, Any]:
        """The caller's schedule of that name as it is wanted: made, or changed to it."""
        mine = sa.select(s.id).where(s.tenant_id == caller.tenant_id, s.name == wanted.name)
        with self.service.database.read() as connection:
            known = connection.execute(mine).scalar()
        if known is None:
            return self.create(wanted, caller)
        return self.change(
            known, ScheduleChange.model_validate(wanted.model_dump(exclude_unset=True)), caller
        )

    def page(
        self, caller: Caller, wanted: ScheduleFilter, *, limit: int, cursor: str | None
    ) -> tuple[list[dict[str, Any]], str | None]:
        """Schedules, newest first, and the cursor of the next page. Raises InvalidCursor."""
        scope = scope_of(caller)
        query = sa.select(schedules).where(*_clauses(scope), *wanted.clauses())
        with self.service.database.read() as connection:
            rows, following = queries.newest_first(
                connection, query, s.id, bound=(scope, wanted), limit=limit, cursor=cursor
            )
            return _views(connection, rows), following

    def get(self, schedule_id: str, caller: Caller) -> dict[str, Any]:
        """One of them."""
        with self.service.database.read() as connection:
            return view(connection, _find(connection, schedule_id, caller))

    def change(self, schedule_id: str, wanted: ScheduleChange, caller: Caller) -> dict[str, Any]:
        """Set what is given. Another timing counts from now on: what was due and not yet run is left.

        Raises what `create` raises.
        """
        given = wanted.given
        with self.service.database.write() as connection:
            before = _find(connection, schedule_id, caller, lock=True)
            now = self._now(connection)
            row: dict[str, Any] = {**before} | given
            if given.keys() & set(_JOB):
                row |= self._job({name: row[name] for name in _JOB}, caller)
            if "cron_expression" in given:
                row["interval_seconds"] = None
            if "interval_seconds" in given:
                row["cron_expression"] = None
            if given.keys() & {"interval_seconds", "starts_at"}:
                row["anchor_at"] = row["starts_at"] or now
            if any(row[name] != before[name] for name in _TIMING):
                row |= _placed(row, now=now)
            if not row["is_active"]:
                drop_waiting(connection, [schedule_id], now=now, reason=Skipped.PAUSED)
            self._name_is_free(connection, caller, row)
            changed = {name: value for name, value in _plain(row).items() if value != before[name]}
            if changed:
                change = sa.update(schedules).where(s.id == schedule_id)
                connection.execute(change.values(**changed, version=s.version + 1, updated_at=now))
            made = view(connection, _find(connection, schedule_id, caller))
        self.service.news.ring_scheduler()
        return made

    def delete(self, schedule_id: str, caller: Caller) -> None:
        """Forget a schedule. Jobs that it has made stay, and run; its runs are forgotten in time."""
        with self.service.database.write() as connection:
            _find(connection, schedule_id, caller, lock=True)
            waiting = sa.delete(schedule_runs).where(r.schedule_id == schedule_id, r.status == "waiting")
            connection.execute(waiting)
            connection.execute(sa.delete(schedules).where(s.id == schedule_id))

    def run(self, schedule_id: str, caller: Caller, *, key: Key | None = None) -> dict[str, Any]:
        """A job of the schedule, now, whatever is due or active, also when it is switched off.

        With an idempotency `key` the one that it made before (Replayed). Raises QuotaQueued, Overloaded.
        """
        service, now = self.service, self.service.clock.now()
        with service.database.read() as connection:
            if key is not None and (known := idempotency.find(connection, [key], now=now)[key.id]):
                return idempotency.replay(key, known)
            schedule = _find(connection, schedule_id, caller)
        row = job_of(schedule, slot=now, now=now)
        spec = JobSpec(job_type=row.job_type, parameters=schedule["parameters"])

        def write(_: Sequence[Prepared]) -> list[dict[str, Any]]:
            with service.database.write() as connection:
                if (first := idempotency.begin(connection, key, now=now)) is not None:
                    return [first]
                _find(connection, schedule_id, caller, lock=True)
                slot, run_id = now, new_id()
                while not insert_runs(
                    connection,
                    [run_row(schedule, slot, run_id, now=now, job_id=row.id, trigger="manual")],
                ):
                    slot += _MICROSECOND  # it is a slot's own moment
                create(connection, [row], now=now)
                count_start(connection, schedule_id, now=now)
                made = queries.find_job(connection, row.id, Scope(caller.tenant_id))
                job = queries.view(made or {})
                idempotency.keep(connection, key, job)
                return [job]

        [answer] = service.admit([Prepared(row, spec, scope_of(caller))], write)
        if isinstance(answer, Exception):
            raise answer
        service.ring([Due(row.lane, row.id, row.tenant_id)])
        return answer

    def runs(
        self, schedule_id: str, caller: Caller, *, limit: int, cursor: str | None
    ) -> tuple[list[dict[str, Any]], str | None]:
        """What was decided about its slots, newest first, and the cursor of the next page."""
        scope = scope_of(caller)
        query = (
            sa.select(schedule_runs, j.status.label("job_status"), j.started_at, j.finished_at)
            .select_from(schedule_runs.outerjoin(jobs, j.id == r.job_id))
            .where(r.schedule_id == schedule_id)
        )
        with self.service.database.read() as connection:
            _find(connection, schedule_id, caller)
            rows, following = queries.newest_first(
                connection, query, r.id, bound=(scope, schedule_id), limit=limit, cursor=cursor
            )
        return [_run_view(row) for row in rows], following

    def preview(self, wanted: Preview) -> dict[str, Any]:
        """The next times of a timing, and what changing clocks do to them. Raises Unprocessable."""
        now = self.service.clock.now()
        row: dict[str, Any] = wanted.model_dump() | {"anchor_at": wanted.starts_at or now}
        cadence = _cadence(row)
        times: list[dict[str, Any]] = []
        slot: datetime | None = now
        zone = Cron("@daily", wanted.timezone).zone
        while slot is not None and len(times) < wanted.count:
            slot = slot_after(row, slot)
            if slot is not None:
                note = cadence.note(slot) if isinstance(cadence, Cron) else None
                local = slot.astimezone(zone).isoformat()
                times.append({"at": stamp(slot), "local": local, "note": note})
        return {"cron_description": cadence.describe(), "timezone": wanted.timezone, "times": times}

    def _now(self, connection: sa.Connection) -> datetime:
        """By whichever clock is behind, as in `engine/slots.py`: one that is ahead passes over no slot."""
        return min(self.service.clock.now(), connection.execute(sa.select(utc_now())).scalar_one())

    def _job(self, asked: dict[str, Any], caller: Caller) -> dict[str, Any]:
        """The columns of the jobs to be, checked as those of `POST /jobs`, with the type's defaults."""
        prepared = self.service.prepare(JobSpec.model_validate(asked), caller)
        made = {name: getattr(prepared.row, name) for name in _JOB if name != "parameters"}
        return made | {"parameters": prepared.spec.parameters}

    def _name_is_free(self, connection: sa.Connection, caller: Caller, row: Mapping[str, Any]) -> None:
        """Of two at the same moment, UNIQUE refuses the second."""
        for name in ("name", "description"):
            to_json(row[name], what=name)
        if row["name"] is not None:
            same = sa.select(s.id).where(
                s.tenant_id == caller.tenant_id, s.name == row["name"], s.id != row["id"]
            )
            if connection.execute(same).first() is not None:
                raise Conflict(f"another schedule of this tenant is called {row['name']!r}")


def view(connection: sa.Connection, row: Mapping[Any, Any]) -> dict[str, Any]:
    """A schedule as the API answers it."""
    return _views(connection, [row])[0]


def _views(connection: sa.Connection, rows: Sequence[Mapping[Any, Any]]) -> list[dict[str, Any]]:
    ends = uncounted(connection, [row["id"] for row in rows])
    return [_view(row, ends) for row in rows]


def _view(row: Mapping[Any, Any], ends: Mapping[tuple[str, bool], int]) -> dict[str, Any]:
    seen = {name: row[name] for name in _SHOWN}
    seen["successful_runs"] += ends.get((row["id"], True), 0)
    seen["failed_runs"] += ends.get((row["id"], False), 0)
    for name in ("starts_at", "ends_at", "last_run_at", "created_at", "updated_at"):
        seen[name] = stamp(row[name])
    ended = seen["successful_runs"] + seen["failed_runs"]
    seen["success_rate"] = round(100 * seen["successful_runs"] / ended, 1) if ended else None
    seen["next_run_at"] = stamp(row["due_at"])
    try:
        seen["cron_description"] = cadence_of(row).describe()
    except BadCadence as error:  # its time zone is gone
        seen["cron_description"] = str(error)
    return seen


def _run_view(row: Mapping[Any, Any]) -> dict[str, Any]:
    seen = {
        name: row[name] for name in ("id", "slots", "trigger", "status", "reason", "job_id", "job_status")
    }
    seen["scheduled_job_id"] = row["schedule_id"]
    for name in ("slot", "last_slot", "created_at", "started_at", "finished_at"):
        seen[name] = stamp(row[name])
    return seen


def _cadence(row: Mapping[str, Any]) -> Cadence:
    """Checked. Raises Unprocessable that points at what is wrong."""
    if row["timezone"] not in time_zones():
        detail = f"{row['timezone']!r} is no time zone; a name is like 'Europe/Berlin'"
        raise _wrong("/timezone", detail, "unknown_timezone")
    if row["starts_at"] and row["ends_at"] and row["ends_at"] < row["starts_at"]:
        raise _wrong("/ends_at", "it ends before it starts", "ends_before_start")
    if row["cron_expression"] is None:
        return Every(row["interval_seconds"], row["anchor_at"])
    try:
        return Cron.checked(row["cron_expression"], row["timezone"])
    except BadCadence as error:
        raise _wrong("/cron_expression", str(error), "invalid_cron_expression") from None


def _wrong(pointer: str, detail: str, code: str) -> Unprocessable:
    return Unprocessable(detail, errors=(FieldError(pointer, detail, code),))


def _placed(row: Mapping[str, Any], *, now: datetime) -> dict[str, Any]:
    """Where a schedule goes on: after now, and after all that was decided."""
    _cadence(row)
    after = now if row["last_slot"] is None else max(now, row["last_slot"])
    slot = slot_after(row, after) if row["is_active"] else None
    return {"next_slot": slot, "due_at": None if slot is None else due_of(row, slot)}


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: getattr(value, "value", value) for name, value in row.items()}


def _clauses(scope: Scope) -> Clauses:
    mine = [s.tenant_id == scope.tenant_id]
    return mine if scope.subject is None else [*mine, s.created_by == scope.subject]


def _find(
    connection: sa.Connection, schedule_id: str, caller: Caller, *, lock: bool = False
) -> sa.RowMapping:
    query = sa.select(schedules).where(s.id == schedule_id, *_clauses(scope_of(caller)))
    row = connection.execute(query.with_for_update() if lock else query).mappings().first()
    if row is None:
        raise ScheduleNotFound(f"there is no schedule {schedule_id}", scheduled_job_id=schedule_id)
    return row


def _lock_tenant(connection: sa.Connection, tenant_id: str) -> None:
    connection.execute(sa.select(tenants.c.id).where(tenants.c.id == tenant_id).with_for_update())
