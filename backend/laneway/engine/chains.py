"""Chains as callers see them: made, changed, executed, stopped, looked at.

A chain is a definition; executing it makes a run, which goes on with the plan it began with. What moves a
run is `engine/chain_runs.py`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from laneway import models
from laneway.clock import new_id
from laneway.domain.flow import ChainSpec, references
from laneway.domain.payload import to_json
from laneway.domain.states import FINAL, JobStatus
from laneway.engine import idempotency, queries
from laneway.engine.access.callers import Caller
from laneway.engine.cancels import Manner
from laneway.engine.chain_runs import advance, ask_runs_to_stop
from laneway.engine.flow_upkeep import stop_jobs
from laneway.engine.idempotency import Key
from laneway.engine.plans import Plan, plan_of
from laneway.engine.queries import Scope, stamp
from laneway.engine.service import JobService, scope_of
from laneway.errors import ChainNotFound, ChainRunNotFound, Conflict, LanewayError
from laneway.lanes.backend import Due, EndedRun, LanesUnavailable, by_lane

PENDING = "pending"
MAX_RESULTS_BYTES = 1024 * 1024
"""Of the steps' results in one answer: those beyond are left to `GET /jobs/{id}/result`."""

c = models.chains.c
r = models.chain_runs.c
j = models.jobs.c

_Job = sa.Row[*tuple[Any, ...]]
View = dict[str, Any]
Page = tuple[list[View], str | None]


@dataclass(frozen=True, slots=True)
class Checked:
    """A chain that may be made: as its caller wrote it, and as its runs need it."""

    spec: ChainSpec
    plan: dict[str, Any]

    @property
    def steps(self) -> int:
        return len(self.plan["steps"])


def check(service: JobService, spec: ChainSpec, caller: Caller) -> Checked:
    """Check each step like a job, without I/O. Raises what `JobService.prepare` does, pointing at the step.

    Parameters that wait for results are checked when the step runs.
    """
    to_json(spec.name, what="name")
    steps: list[Plan] = []
    for pointer, step in spec.placed_steps():
        waits = next(references(step.referring), None) is not None
        try:
            prepared = service.prepare(step, caller, check_parameters=not waits)
        except LanewayError as error:
            error.errors = tuple(replace(each, pointer=pointer + each.pointer) for each in error.errors)
            raise
        steps.append(plan_of(prepared.row, delay_seconds=step.delay_seconds))
    return Checked(spec, {"stages": spec.stages, "steps": steps})


def create(
    service: JobService, wanted: Checked, caller: Caller, *, execute: bool, key: Key | None = None
) -> View:
    """Write a chain, and begin its first run with `execute`; the chain."""
    now = service.clock.now()
    chain_id = new_id()
    due: list[Due] = []
    with service.database.write() as connection:
        if (first := idempotency.begin(connection, key, now=now)) is not None:
            return first
        connection.execute(
            sa.insert(models.chains).values(
                id=chain_id,
                tenant_id=caller.tenant_id,
                created_by=caller.subject,
                created_at=now,
                updated_at=now,
                **_columns(wanted),
            )
        )
        if execute:
            due = _begin(connection, _find(connection, chain_id, caller), caller, now=now)
        view = _views(connection, [_find(connection, chain_id, caller)], results=True)[0]
        idempotency.keep(connection, key, view)
    service.ring(due)
    return view


def change(service: JobService, chain_id: str, caller: Caller, wanted: Checked) -> View:
    """Make a chain another one; runs that have begun go on as they are. Raises ChainNotFound."""
    with service.database.write() as connection:
        _find(connection, chain_id, caller, lock=True)
        connection.execute(
            sa.update(models.chains)
            .where(c.id == chain_id, c.tenant_id == caller.tenant_id)
            .values(**_columns(wanted), version=c.version + 1, updated_at=service.clock.now())
        )
        return _views(connection, [_find(connection, chain_id, caller)], results=True)[0]


def definition(service: JobService, chain_id: str, caller: Caller) -> View:
    """What a chain's caller may change of it. Raises ChainNotFound."""
    with service.database.read() as connection:
        row = _find(connection, chain_id, caller)
    names = ("name", "execution_mode", "chain_definition", "stop_on_failure", "timeout_seconds")
    return {name: row[name] for name in names}


def steps_of(service: JobService, chain_id: str, caller: Caller) -> int:
    """How many jobs a run of the chain makes. Raises ChainNotFound."""
    with service.database.read() as connection:
        return len(_find(connection, chain_id, caller)["plan"]["steps"])


def execute(service: JobService, chain_id: str, caller: Caller, *, key: Key | None = None) -> View:
    """Begin a run; the chain. Raises ChainNotFound, Conflict while a run of it is active."""
    now = service.clock.now()
    try:
        with service.database.write() as connection:
            if (first := idempotency.begin(connection, key, now=now)) is not None:
                return first
            due = _begin(connection, _find(connection, chain_id, caller, lock=True), caller, now=now)
            view = _views(connection, [_find(connection, chain_id, caller)], results=True)[0]
            idempotency.keep(connection, key, view)
    except sa.exc.IntegrityError:
        raise Conflict(
            "a run of the chain is active; wait for its end, or cancel it", current_status=JobStatus.RUNNING
        ) from None
    service.ring(due)
    return view


def cancel(
    service: JobService,
    chain_id: str,
    caller: Caller,
    *,
    reason: str | None = None,
    terminate: bool = False,
    grace_seconds: float | None = None,
) -> View:
    """Stop the chain's active run: waiting steps end, running ones are asked to; the chain.

    Raises ChainNotFound, Conflict when no run is active.
    """
    to_json(reason, what="reason")
    now = service.clock.now()
    manner = Manner(reason, terminate, grace_seconds)
    with service.database.write() as connection:
        row = _find(connection, chain_id, caller)
        of_chain = [r.chain_id == chain_id, r.tenant_id == caller.tenant_id]
        ask_runs_to_stop(
            connection, of_chain, status=JobStatus.CANCELLED, by=caller.subject, reason=reason, now=now
        )
        active = sa.select(r.id).where(*of_chain, r.finished_at.is_(None))
        runs = connection.execute(active).scalars().all()
        if not runs:
            [view] = _views(connection, [row], results=False)
            raise Conflict("no run of the chain is active", current_status=view["status"])
    # Committed before the jobs are touched: nobody who ends one of them starts another step from here on.
    with service.database.write() as connection:
        stopped = stop_jobs(connection, runs, by=caller.subject, manner=manner, now=now)
        [view] = _views(connection, [_find(connection, chain_id, caller)], results=True)
    try:
        for lane, ids in by_lane(stopped.ended).items():
            service.lanes.remove(lane, ids)
        service.lanes.mirror_ended([EndedRun(lane, i, JobStatus.CANCELLED) for lane, i in stopped.ended])
    except LanesUnavailable:
        pass  # the ids are harmless: no claim can take a cancelled row
    service.news.changed([*(job_id for _, job_id in stopped.ended), *stopped.asked])
    if stopped.asked:
        service.news.wished()
    if stopped.told:
        service.news.ring_courier()
    return view


def delete(service: JobService, chain_id: str, caller: Caller) -> None:
    """Delete a chain and its runs; their jobs stay. Raises ChainNotFound, Conflict while a run is active."""
    with service.database.write() as connection:
        _find(connection, chain_id, caller, lock=True)
        of_chain = (r.chain_id == chain_id, r.tenant_id == caller.tenant_id)
        active = sa.select(r.id).where(*of_chain, r.finished_at.is_(None))
        if connection.execute(active).first() is not None:
            raise Conflict("a run of the chain is active; cancel it first", current_status=JobStatus.RUNNING)
        connection.execute(sa.delete(models.chain_runs).where(*of_chain))
        connection.execute(sa.delete(models.chains).where(c.id == chain_id, c.tenant_id == caller.tenant_id))


# Looking


def get(service: JobService, chain_id: str, caller: Caller, *, results: bool = True) -> View:
    """The chain and where its newest run is. Raises ChainNotFound."""
    with service.database.read() as connection:
        return _views(connection, [_find(connection, chain_id, caller)], results=results)[0]


def page(service: JobService, caller: Caller, *, limit: int, cursor: str | None) -> Page:
    """Chains, newest first, without results, and the cursor of the next page. Raises InvalidCursor."""
    scope = scope_of(caller)
    query = sa.select(models.chains).where(*_whose(models.chains, scope))
    with service.database.read() as connection:
        rows, following = queries.newest_first(
            connection, query, c.id, bound=(scope, "chains"), limit=limit, cursor=cursor
        )
        return _views(connection, rows, results=False), following


def runs(service: JobService, chain_id: str, caller: Caller, *, limit: int, cursor: str | None) -> Page:
    """A chain's runs, newest first, without results. Raises ChainNotFound, InvalidCursor."""
    bound = (scope_of(caller), ("runs", chain_id))
    query = sa.select(models.chain_runs).where(r.chain_id == chain_id, r.tenant_id == caller.tenant_id)
    with service.database.read() as connection:
        _find(connection, chain_id, caller)
        rows, following = queries.newest_first(
            connection, query, r.id, bound=bound, limit=limit, cursor=cursor
        )
        return list(_run_views(connection, rows, results=False).values()), following


def get_run(service: JobService, chain_id: str, run_id: str, caller: Caller) -> View:
    """A run with its steps and results. Raises ChainNotFound, ChainRunNotFound."""
    with service.database.read() as connection:
        _find(connection, chain_id, caller)
        query = sa.select(models.chain_runs).where(
            r.id == run_id, r.chain_id == chain_id, r.tenant_id == caller.tenant_id
        )
        row = connection.execute(query).mappings().first()
        if row is None:
            raise ChainRunNotFound(f"the chain has no run {run_id}", run_id=run_id)
        return _run_views(connection, [row], results=True)[run_id]


def _whose(table: sa.Table, scope: Scope) -> list[sa.ColumnElement[bool]]:
    mine = [table.c.tenant_id == scope.tenant_id]
    return mine if scope.subject is None else [*mine, table.c.created_by == scope.subject]


def _find(connection: sa.Connection, chain_id: str, caller: Caller, *, lock: bool = False) -> sa.RowMapping:
    query = sa.select(models.chains).where(c.id == chain_id, *_whose(models.chains, scope_of(caller)))
    row = connection.execute(query.with_for_update() if lock else query).mappings().first()
    if row is None:
        raise ChainNotFound(f"there is no chain {chain_id}", chain_id=chain_id)
    return row


def _columns(wanted: Checked) -> dict[str, Any]:
    said = wanted.spec.model_dump(mode="json", exclude_unset=True, include={"chain_definition"})
    return {
        "name": wanted.spec.name,
        "execution_mode": wanted.spec.execution_mode.value,
        "chain_definition": said["chain_definition"],
        "plan": wanted.plan,
        "stop_on_failure": wanted.spec.stop_on_failure,
        "timeout_seconds": wanted.spec.timeout_seconds,
    }


def _begin(connection: sa.Connection, row: sa.RowMapping, caller: Caller, *, now: datetime) -> list[Due]:
    """Write a run and its first steps; what is to be rung. Raises IntegrityError while another is active."""
    run_id = new_id()
    seconds = row["timeout_seconds"]
    connection.execute(
        sa.insert(models.chain_runs).values(
            id=run_id,
            tenant_id=row["tenant_id"],
            created_by=caller.subject,
            chain_id=row["id"],
            name=row["name"],
            plan=row["plan"],
            stop_on_failure=row["stop_on_failure"],
            status=JobStatus.RUNNING.value,
            step_errors={},
            deadline_at=None if seconds is None else now + timedelta(seconds=seconds),
            created_at=now,
            updated_at=now,
        )
    )
    return advance(connection, [run_id], now=now).due


def _views(connection: sa.Connection, rows: Sequence[sa.RowMapping], *, results: bool) -> list[View]:
    newest = (
        sa.select(r.id)
        .where(r.chain_id == c.id)
        .order_by(r.id.desc())
        .limit(1)
        .correlate(models.chains)
        .scalar_subquery()
    )
    ids = [row["id"] for row in rows]
    of_chains = sa.select(models.chain_runs).where(
        r.id.in_(sa.select(newest).select_from(models.chains).where(c.id.in_(ids)))
    )
    found = connection.execute(of_chains).mappings().all() if rows else []
    runs = {view["chain_id"]: view for view in _run_views(connection, found, results=results).values()}
    return [_view(row, runs.get(row["id"])) for row in rows]


def _view(row: sa.RowMapping, run: View | None) -> View:
    total = len(row["plan"]["steps"])
    where = run or {
        "id": None,
        "status": PENDING,
        "cancelling": False,
        "current_step": 0,
        "total_steps": total,
        "progress_percent": 0,
        "steps": [],
        "results": {},
        "results_truncated": False,
        "error_message": None,
        "started_at": None,
        "finished_at": None,
    }
    own = ("id", "tenant_id", "created_by", "name", "execution_mode", "chain_definition", "stop_on_failure")
    return {
        **{name: row[name] for name in own},
        "timeout_seconds": row["timeout_seconds"],
        **{name: value for name, value in where.items() if name not in ("id", "chain_id", "name")},
        "run_id": where["id"],
        "created_at": stamp(row["created_at"]),
        "updated_at": stamp(row["updated_at"]),
    }


def _run_views(connection: sa.Connection, rows: Sequence[sa.RowMapping], *, results: bool) -> dict[str, View]:
    """Runs as the API answers them, by id, in the order of the rows."""
    jobs: defaultdict[str, dict[int, _Job]] = defaultdict(dict)
    if rows:
        size = sa.func.coalesce(sa.func.length(sa.type_coerce(j.result, sa.Text)), 0).label("size")
        made = sa.select(j.id, j.chain_run_id, j.chain_step, j.status, j.progress, size).where(
            j.chain_id.in_({row["chain_id"] for row in rows}),
            j.chain_run_id.in_([row["id"] for row in rows]),
        )
        for job in connection.execute(made):
            jobs[job.chain_run_id][job.chain_step] = job
    return {row["id"]: _run_view(connection, row, jobs[row["id"]], results=results) for row in rows}


def _run_view(
    connection: sa.Connection, row: sa.RowMapping, jobs: Mapping[int, _Job], *, results: bool
) -> View:
    plans: Sequence[Plan] = row["plan"]["steps"]
    steps = []
    for number, plan in enumerate(plans):
        job = jobs.get(number)
        error = row["step_errors"].get(str(number))
        ended_as = JobStatus.FAILED.value if error is not None else None
        steps.append(
            {
                "step": number,
                "job_type": plan["job_type"],
                "job_id": None if job is None else job.id,
                "status": ended_as if job is None else job.status,
                "progress": 0 if job is None else job.progress,
                "error": error,
            }
        )
    through = [step["status"] in FINAL for step in steps]
    parts = sum(100 if over else step["progress"] for over, step in zip(through, steps, strict=True))
    found, truncated = _results(connection, jobs) if results else ({}, False)
    complete = row["status"] == JobStatus.COMPLETED
    return {
        "id": row["id"],
        "chain_id": row["chain_id"],
        "name": row["name"],
        "status": row["status"],
        "cancelling": row["stopping"] is not None and row["finished_at"] is None,
        "current_step": through.index(False) if False in through else len(steps),
        "total_steps": len(steps),
        "progress_percent": 100 if complete else min(99, parts // len(steps)),
        "steps": steps,
        "results": found,
        "results_truncated": truncated,
        "error_message": row["error_message"],
        "started_at": stamp(row["created_at"]),
        "finished_at": stamp(row["finished_at"]),
    }


def _results(connection: sa.Connection, jobs: Mapping[int, _Job]) -> tuple[dict[str, Any], bool]:
    """What the completed steps returned, first to last, as far as it fits; whether some was left out."""
    fitting: dict[str, int] = {}
    room, truncated = MAX_RESULTS_BYTES, False
    for number, job in sorted(jobs.items()):
        if job.status == JobStatus.COMPLETED:
            if job.size <= room:
                room -= job.size
                fitting[job.id] = number
            else:
                truncated = True
    returned = sa.select(j.id, j.result, j.tenant_id).where(j.id.in_(fitting))
    read = {fitting[job.id]: job.result for job in connection.execute(returned)} if fitting else {}
    return {f"step_{number}": read[number] for number in sorted(read)}, truncated
