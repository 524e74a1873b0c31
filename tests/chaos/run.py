"""One seed: start everything, let the plan happen, heal, wait for rest, and ask the checker."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import sqlalchemy as sa

from chaos import checker, program
from chaos.checker import Violation
from chaos.faults import MENU, Scene, heal_everything
from chaos.ground import Ground
from chaos.history import Facts, History, Op, Run, Series, timeline
from chaos.load import Client, Load, Post
from chaos.plan import STRUCK, Plan, PlannedFault
from chaos.samples import Sampler
from laneway.domain.states import ACTIVE, JobStatus
from laneway.models import batches, chain_runs, jobs, webhook_deliveries

REST_SECONDS = 75.0
SETTLE_SECONDS = 8.0  # after the last fault: a lease, two ticks, and the start of a process
STALL_SECONDS = 15.0  # longer than the longest handler
CANCEL_SECONDS = 20.0
CLOCK_FAULTS = frozenset({"clock_wrong"})
TIMELINES = 3


@dataclass(slots=True)
class Result:
    """What came of a seed. `faults` are those that took hold, `missed` those that met nobody."""

    plan: Plan
    folder: Path
    faults: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    violations: list[Violation] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    timelines: dict[str, list[str]] = field(default_factory=dict)
    series: list[Series] = field(default_factory=list)
    jobs: int = 0
    acknowledged: int = 0
    statuses: dict[str, int] = field(default_factory=dict)
    events: int = 0
    deliveries: int = 0
    restarts: int = 0
    rest_seconds: float = 0.0
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return not (self.violations or self.complaints)


def run(plan: Plan, folder: Path, *, mutant: str = "", grown_percent_per_hour: float | None = None) -> Result:
    """Carry a plan out in `folder`, which keeps everything that was written.

    With `grown_percent_per_hour` the run is long enough to judge whether memory and descriptors grow.
    """
    began = time.monotonic()
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text(json.dumps(plan.as_json(), indent=1))
    result = Result(plan, folder)
    with Ground(folder, store=plan.store, mutant=mutant) as ground, Post(ground) as post:
        scene = Scene(ground, post.moody, post.misbehaviours())
        _wait_until_ready(ground)
        load = Load(plan, ground, post.url)
        with Watcher(ground), Sampler(ground) as sampler:
            calm_from = datetime.now(UTC)
            load.start()
            _disturb(scene, plan, result)
            heal_everything(scene)
            if plan.faults:
                calm_from = datetime.now(UTC) + timedelta(seconds=SETTLE_SECONDS)
            result.complaints += load.finish(60)
            result.rest_seconds = _rest(ground, result)
        if not result.complaints:
            result.complaints += _miscounted(ground)
        rest_at = datetime.now(UTC)
        result.series = sampler.series(grown_percent_per_hour)
        result.complaints += ground.stop_members()
        result.restarts = ground.restarts
        facts = Facts(
            stall_seconds=STALL_SECONDS,
            cancel_seconds=CANCEL_SECONDS,
            clock_error_seconds=None if CLOCK_FAULTS & {f.name for f in plan.faults} else 0.05,
            calm=[(calm_from, rest_at)] if rest_at > calm_from else [],
            series=result.series,
        )
        with program.short_crashes():
            _judge(result, Run.read(ground.database, ground.history_folder, facts))
        result.acknowledged = load.accepted
    result.seconds = time.monotonic() - began
    return result


def _judge(result: Result, seen: Run) -> None:
    result.violations = checker.check(seen)
    result.jobs = len(seen.jobs)
    result.events = sum(map(len, seen.events.values()))
    result.deliveries = len(seen.deliveries)
    for row in seen.jobs.values():
        result.statuses[row["status"]] = result.statuses.get(row["status"], 0) + 1
    for violation in result.violations:
        if violation.job_id is not None and len(result.timelines) < TIMELINES:
            result.timelines[violation.job_id] = timeline(seen, violation.job_id)


def _wait_until_ready(ground: Ground) -> None:
    """Until every API answers and every worker has its children."""
    deadline = time.monotonic() + 60
    client = Client(ground)
    waiting = threading.Event()
    while time.monotonic() < deadline and not ground.restarts:
        try:
            for _ in ground.ports:
                client.call("GET", "/api/v1/jobs?limit=1", next(iter(ground.keys)))
            if all(ground.children(member) for member in ground.of_role("worker")):
                return
        except Exception:  # noqa: S110, BLE001, RUF100 - it is starting
            pass
        waiting.wait(0.1)
    raise AssertionError(f"not ready within 60 s, or something died; look at the logs in {ground.folder}")


def _disturb(scene: Scene, plan: Plan, result: Result) -> None:
    """Inject and heal each fault in its time, in this thread."""
    began = time.monotonic()
    waiting = threading.Event()
    pending = sorted(plan.faults, key=lambda fault: fault.at, reverse=True)
    holding: list[tuple[float, PlannedFault, Iterator[str], Op]] = []
    while pending or holding or time.monotonic() - began < plan.seconds:
        now = time.monotonic() - began
        while pending and pending[-1].at <= now:
            held = _inject(scene, pending.pop(), result)
            if held is not None:
                holding.append(held)
        for each in [each for each in holding if each[0] <= time.monotonic()]:
            holding.remove(each)
            _heal(*each[1:], result)
        waiting.wait(0.02)


def _inject(
    scene: Scene, fault: PlannedFault, result: Result
) -> tuple[float, PlannedFault, Iterator[str], Op] | None:
    op = scene.ground.history.op("fault")
    work = MENU[fault.name](scene, fault)
    try:
        words = next(work)
    except (OSError, psycopg.Error, sa.exc.SQLAlchemyError, AssertionError) as error:
        op.fail(name=fault.name, error=f"{type(error).__name__}: {error}"[:300])
        result.missed.append(fault.name)
        return None
    scene.ground.history.note("fault", name=fault.name, holds=words)
    return time.monotonic() + fault.seconds, fault, work, op


def _heal(fault: PlannedFault, work: Iterator[str], op: Op, result: Result) -> None:
    try:
        next(work, None)
    except (OSError, psycopg.Error, sa.exc.SQLAlchemyError, AssertionError) as error:
        op.fail(name=fault.name, healing=f"{type(error).__name__}: {error}"[:300])
    else:
        op.ok(name=fault.name, healed=True)
    result.faults.append(fault.name if fault.name != STRUCK else f"{fault.strike}@{fault.place}")


def _rest(ground: Ground, result: Result) -> float:
    """Wait until no job, delivery, chain or batch is under way; the seconds it took."""
    began = time.monotonic()
    under_way = ("pending", "sending", "retrying")
    counts = {
        "jobs": sa.select(sa.func.count()).where(jobs.c.status.in_(sorted(ACTIVE))),
        "deliveries": sa.select(sa.func.count()).where(webhook_deliveries.c.status.in_(under_way)),
        "chains": sa.select(sa.func.count()).where(chain_runs.c.finished_at.is_(None)),
        "batches": sa.select(sa.func.count()).where(batches.c.finished_at.is_(None)),
    }
    waiting = threading.Event()
    left: dict[str, int] = {}
    while time.monotonic() - began < REST_SECONDS:
        try:
            with ground.database.read() as connection:
                left = {what: connection.execute(count).scalar_one() for what, count in counts.items()}
        except sa.exc.DBAPIError:
            continue
        if not any(left.values()):
            return time.monotonic() - began
        waiting.wait(0.1)
    result.complaints.append(f"{left} had no end after {REST_SECONDS:g} s")
    return time.monotonic() - began


def _miscounted(ground: Ground) -> list[str]:
    """What the API says of jobs that are under way, when none is."""
    client = Client(ground)
    told = {name: client.call("GET", "/api/v1/queues/stats", name)[1]["jobs"] for name in ground.keys}
    return [
        f"tenant {name} is told of {counts} after the end"
        for name, counts in told.items()
        if any(counts.values())
    ]


class Watcher:
    """Looks at the progress of running jobs as a dashboard would, and writes down what it saw."""

    def __init__(self, ground: Ground) -> None:
        self._ground = ground
        self._history = History(ground.history_folder, "watcher")
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watcher", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._history.close()

    def _run(self) -> None:
        seen: dict[str, tuple[Op, tuple[int, int]]] = {}
        query = sa.select(jobs.c.id, jobs.c.tenant_id, jobs.c.attempt, jobs.c.progress).where(
            jobs.c.status == JobStatus.RUNNING, jobs.c.job_type == "chaos.long"
        )
        while not self._over.wait(0.3):
            try:
                with self._ground.database.read() as connection:
                    rows = connection.execute(query).all()
            except sa.exc.SQLAlchemyError:
                continue
            for row in rows:
                op, before = seen.get(row.id, (self._history.op("progress"), (0, -1)))
                now = (row.attempt, row.progress)
                if now != before:
                    op.ok(tenant=row.tenant_id, job_id=row.id, attempt=row.attempt, percent=row.progress)
                seen[row.id] = op, now
