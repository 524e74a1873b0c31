"""Runs of chains: the step that is next is made a job in the transaction that ends the one before it.

Whoever moves a run holds its row, so that of several steps that end at the same moment the last one sees
the others. A run is moved by the ends of its jobs alone: to stop it is a wish in its row, written by
itself (`ask_runs_to_stop`), and then its jobs are stopped like any others. So nobody waits for a job while
holding a run: steps that shall not run are dropped only where nobody else has them at that moment, and a
sweep drops the rest.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from laneway import models
from laneway.domain.events import SystemEvent
from laneway.domain.flow import ResultMissing, Turn, read_reference, references, turn
from laneway.domain.states import FINAL, WAITING, JobStatus
from laneway.engine import transitions
from laneway.engine.plans import make
from laneway.engine.queries import stamp
from laneway.engine.telling import tell_of
from laneway.engine.transitions import Applied, Cancel, LinkedJob
from laneway.errors import LanewayError
from laneway.lanes.backend import Due

BY = "laneway"
MAX_ERROR_MESSAGE = 1000

j = models.jobs.c
r = models.chain_runs.c


@dataclass(slots=True)
class Moved:
    """What became of runs: `due` are jobs that may start, `dropped` the ends of others.

    `unsure` are runs of which somebody else had a step that was to be dropped: look again.
    """

    due: list[Due] = field(default_factory=list)
    dropped: list[Applied] = field(default_factory=list)
    told: bool = False
    unsure: set[str] = field(default_factory=set)


@dataclass(slots=True)
class _Run:
    row: sa.RowMapping
    states: dict[int, JobStatus]
    jobs: dict[int, str]
    errors: dict[str, str]
    new: list[LinkedJob] = field(default_factory=list)
    drop: list[str] = field(default_factory=list)
    ended: Turn | None = None

    @property
    def plans(self) -> Sequence[Mapping[str, Any]]:
        plans: Sequence[Mapping[str, Any]] = self.row["plan"]["steps"]
        return plans

    def next(self) -> Turn:
        return turn(
            self.row["plan"]["stages"],
            self.states,
            stop_on_failure=self.row["stop_on_failure"],
            stopping=self.row["stopping"] is not None,
        )

    @property
    def status(self) -> JobStatus:
        """How it ended."""
        if self.ended is not None and self.ended.complete:
            return JobStatus.COMPLETED
        return JobStatus(self.row["stopping"] or JobStatus.FAILED)


def advance(connection: sa.Connection, run_ids: Collection[str], *, now: datetime) -> Moved:
    """Start what is due in these runs and end those that are through; a few statements for all of them."""
    moved = Moved()
    active = sa.select(models.chain_runs).where(r.id.in_(run_ids), r.finished_at.is_(None)).order_by(r.id)
    rows = connection.execute(active.with_for_update()).mappings().all()
    if not rows:
        return moved
    runs = _read(connection, rows)
    _take_turns(connection, runs, now=now)
    new = [job for run in runs for job in run.new]
    if new:
        transitions.create(connection, new, now=now)
        moved.due = [Due(job.lane, job.id, job.tenant_id) for job in new if job.status == JobStatus.QUEUED]
    drop = [job_id for run in runs for job_id in run.drop]
    if drop:
        free = sa.select(j.id).where(j.id.in_(drop), j.status.in_(WAITING)).order_by(j.id)
        ids = connection.execute(free.with_for_update(skip_locked=True)).scalars().all()
        moves = [Cancel(job_id, by=BY, reason="the chain stops") for job_id in ids]
        outcomes = transitions.apply(connection, moves, now=now, actor=BY) if moves else []
        moved.dropped = [o for o in outcomes if isinstance(o, Applied)]
        gone = {o.row["id"] for o in moved.dropped}
        moved.unsure = {run.row["id"] for run in runs if not gone.issuperset(run.drop)}
    moved.told = _write(connection, [run for run in runs if run.ended or run.new or run.errors], now=now)
    return moved


def ask_runs_to_stop(
    connection: sa.Connection,
    chosen: Sequence[sa.ColumnElement[bool]],
    *,
    status: JobStatus,
    by: str,
    reason: str | None,
    now: datetime,
) -> list[str]:
    """Write the wish into the rows of active runs: no step starts any more. The first wish counts.

    Returns the ids of those that had none.
    """
    values = {"stopping": status.value, "stopped_by": by, "stop_reason": reason}
    asked = sa.update(models.chain_runs).where(*chosen, r.finished_at.is_(None), r.stopping.is_(None))
    changed = asked.values(values | {"version": r.version + 1, "updated_at": now}).returning(r.id)
    return list(connection.execute(changed).scalars())


def _read(connection: sa.Connection, rows: Sequence[sa.RowMapping]) -> list[_Run]:
    steps: dict[str, dict[int, tuple[str, JobStatus]]] = defaultdict(dict)
    made = sa.select(j.id, j.chain_run_id, j.chain_step, j.status).where(
        j.chain_id.in_({row["chain_id"] for row in rows}), j.chain_run_id.in_([row["id"] for row in rows])
    )
    for job in connection.execute(made):
        steps[job.chain_run_id][job.chain_step] = (job.id, JobStatus(job.status))
    return [
        _Run(
            row,
            {number: status for number, (_, status) in steps[row["id"]].items()}
            | {int(number): JobStatus.FAILED for number in row["step_errors"]},
            {number: job_id for number, (job_id, _) in steps[row["id"]].items()},
            dict(row["step_errors"]),
        )
        for row in rows
    ]


def _take_turns(connection: sa.Connection, runs: Sequence[_Run], *, now: datetime) -> None:
    """Let each run go as far as it gets: further than one stage only where steps cannot be made jobs."""
    going = list(runs)
    while going:
        turns = [(run, run.next()) for run in going]
        results = _results(connection, turns)
        going = []
        for run, next_ in turns:
            if next_.ended:
                run.ended = next_
            elif next_.start:
                if not _start(run, next_.start, results[run.row["id"]], now=now):
                    going.append(run)
            else:
                run.drop = [run.jobs[step] for step in next_.drop]


def _start(run: _Run, steps: Sequence[int], results: Mapping[str, Any], *, now: datetime) -> bool:
    """Whether jobs were made. Of a stage that stops its chain, all steps are made or none."""
    made: dict[int, LinkedJob] = {}
    for step in steps:
        try:
            made[step] = make(
                run.plans[step],
                results,
                tenant_id=run.row["tenant_id"],
                created_by=run.row["created_by"],
                now=now,
                chain_id=run.row["chain_id"],
                chain_run_id=run.row["id"],
                chain_step=step,
                linked=True,
            )
        except (ResultMissing, LanewayError) as error:
            run.errors[str(step)] = str(error)[:MAX_ERROR_MESSAGE]
            run.states[step] = JobStatus.FAILED
    if run.row["stop_on_failure"] and len(made) < len(steps):
        run.states |= dict.fromkeys(made, JobStatus.CANCELLED)
        return False
    run.states |= {step: JobStatus(job.status) for step, job in made.items()}
    run.new += made.values()
    return bool(made)


def _results(
    connection: sa.Connection, turns: Sequence[tuple[_Run, Turn]]
) -> defaultdict[str, dict[str, Any]]:
    """By run: what its completed steps returned, of those that the steps to be started refer to."""
    wanted = {
        (run.row["id"], int(read_reference(each)[0].partition("_")[2]))
        for run, next_ in turns
        for step in next_.start
        for each in references(run.plans[step]["parameters"])
    }
    found: defaultdict[str, dict[str, Any]] = defaultdict(dict)
    if wanted:
        returned = sa.select(j.chain_run_id, j.chain_step, j.result).where(
            j.chain_id.in_({run.row["chain_id"] for run, _ in turns}),
            j.chain_run_id.in_({run_id for run_id, _ in wanted}),
            j.chain_step.in_({step for _, step in wanted}),
            j.status == JobStatus.COMPLETED,
        )
        for row in connection.execute(returned):
            if (row.chain_run_id, row.chain_step) in wanted:
                found[row.chain_run_id][f"step_{row.chain_step}"] = row.result
    return found


def _write(connection: sa.Connection, runs: Sequence[_Run], *, now: datetime) -> bool:
    """Write where runs are, and tell of those that ended; whether anybody hears of it."""
    if not runs:
        return False
    messages = _error_messages(connection, [run for run in runs if run.ended and not run.ended.complete])
    changes = [
        {
            "run_id": run.row["id"],
            "status": (run.status if run.ended else JobStatus.RUNNING).value,
            "step_errors": run.errors,
            "error_message": messages.get(run.row["id"]),
            "finished_at": now if run.ended else None,
        }
        for run in runs
    ]
    connection.execute(
        sa.update(models.chain_runs)
        .where(r.id == sa.bindparam("run_id"))
        .values(
            **{name: sa.bindparam(name) for name in changes[0] if name != "run_id"},
            version=r.version + 1,
            updated_at=now,
        ),
        changes,
    )
    told = False
    for event in (SystemEvent.CHAIN_COMPLETED, SystemEvent.CHAIN_FAILED):
        ended = [
            (run.row, "end", _said(run, messages.get(run.row["id"]), now=now))
            for run in runs
            if run.ended is not None and run.ended.complete == (event is SystemEvent.CHAIN_COMPLETED)
        ]
        if ended:
            told |= tell_of(connection, event, ended, now=now)
    return told


def _said(run: _Run, error_message: str | None, *, now: datetime) -> dict[str, Any]:
    row = run.row
    return {
        "chain_id": row["chain_id"],
        "run_id": row["id"],
        "name": row["name"],
        "status": run.status.value,
        "error_message": error_message,
        "total_steps": len(run.plans),
        "started_at": stamp(row["created_at"]),
        "finished_at": stamp(now),
    }


def _error_messages(connection: sa.Connection, runs: Sequence[_Run]) -> dict[str, str]:
    """By run: why it did not complete, which is what its first bad step says, or who stopped it."""
    bad = {run.row["id"]: _first_bad(run) for run in runs}
    job_ids = {run.jobs[step] for run in runs if (step := bad[run.row["id"]]) in run.jobs}
    errors: dict[str, Any] = {}
    if job_ids:
        read = sa.select(j.id, j.error, j.status_reason).where(j.id.in_(job_ids))
        errors = {row.id: row.error for row in connection.execute(read)}
    messages = {}
    for run in runs:
        step = bad[run.row["id"]]
        if run.row["stopping"] is not None:
            messages[run.row["id"]] = (
                run.row["stop_reason"] or f"{run.row['stopping']} by {run.row['stopped_by']}"
            )
        elif step is not None and str(step) in run.errors:
            messages[run.row["id"]] = f"step {step}: {run.errors[str(step)]}"
        elif step is not None:
            error = errors.get(run.jobs.get(step, ""))
            why = f"{error['type']}: {error['message']}" if error else run.states[step].value
            messages[run.row["id"]] = f"step {step}: {why}"
    return {run_id: message[:MAX_ERROR_MESSAGE] for run_id, message in messages.items()}


def _first_bad(run: _Run) -> int | None:
    over = FINAL - {JobStatus.COMPLETED}
    own = (step for step, state in sorted(run.states.items()) if state in over - {JobStatus.CANCELLED})
    return next(own, next((step for step, state in sorted(run.states.items()) if state in over), None))
