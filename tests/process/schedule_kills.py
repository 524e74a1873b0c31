"""Schedulers that are killed, stopped, and see wrong times of day: is each slot decided exactly once?

`python -m process.schedule_kills` is the whole run: 5 schedules of 60 slots, 8 schedulers on PostgreSQL and 2
on SQLite, 20 SIGKILL, 10 SIGSTOP, clocks of the schedulers and of the database that jump by an hour; then the
same with mutants that must be found. With the word `nursery` it is a process that has all modules loaded and
forks schedulers, so that a killed one is replaced at once.
"""

from __future__ import annotations

import argparse
import os
import select
import signal
import sys
import tempfile
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

import sqlalchemy as sa
from cronsim import CronSim

from chaos.ground import ChaosPostgres
from factories import WORKER, schedule_columns
from laneway.cli import migrate
from laneway.clock import SystemClock, new_id
from laneway.engine import slots
from laneway.engine.outcomes import carry_out
from laneway.engine.slot_plan import Skipped, slot_after
from laneway.engine.transitions import Applied, Claim, Complete
from laneway.models import jobs, schedule_ends, schedule_runs, schedules
from process.stack import SHORT_LEASE, Stack
from servers import RedisServer

MUTANT = "SCHEDULE_KILLS_MUTANT"
FORK_SECONDS = 120.0  # for the first, before which everything is imported
HOUR = 3600.0
PATIENCE_SECONDS = 90.0

j, r, s = jobs.c, schedule_runs.c, schedules.c


@dataclass(frozen=True, slots=True)
class Size:
    """How much of everything."""

    slots: int
    schedulers: int
    kills: int
    stops: int
    jumps: int

    @property
    def faults(self) -> list[str]:
        return ["kill"] * self.kills + ["stop"] * self.stops + ["jump"] * self.jumps


WHOLE = Size(slots=60, schedulers=8, kills=20, stops=10, jumps=10)


@dataclass(slots=True)
class Report:
    """What came of a run; the lists must be empty."""

    faults: Counter[str] = field(default_factory=Counter)
    decided: Counter[str] = field(default_factory=Counter)
    undecided: list[str] = field(default_factory=list)  # slots without a run or a reason
    doubled: list[str] = field(default_factory=list)  # slots, or jobs, that are there twice
    strange: list[str] = field(default_factory=list)  # what agrees with nothing
    early: list[str] = field(default_factory=list)  # jobs seen before their slot

    @property
    def wrong(self) -> list[str]:
        return [*self.undecided, *self.doubled, *self.strange, *self.early]

    def __str__(self) -> str:
        faults = ", ".join(f"{count} {name}" for name, count in sorted(self.faults.items()))
        decided = ", ".join(f"{count} {name}" for name, count in sorted(self.decided.items()))
        return (
            f"{faults}; slots: {decided}; {len(self.undecided)} undecided, {len(self.doubled)} doubled, "
            f"{len(self.strange)} strange, {len(self.early)} early {self.wrong[:5]}"
        )


class Nursery:
    """Forks schedulers: `laneway scheduler`, each with a clock of its own."""

    def __init__(self, stack: Stack, mutant: str) -> None:
        pipes = [stack.folder / name for name in ("orders", "pids")]
        for pipe in pipes:
            os.mkfifo(pipe)
        self._orders, self._pids = (os.open(pipe, os.O_RDWR) for pipe in pipes)
        command = [sys.executable, "-m", "process.schedule_kills", "nursery", *pipes]
        self._process = stack.start("nursery", *command, **SHORT_LEASE, **{MUTANT: mutant})

    def fork(self, clock: Path) -> int:
        """The process id of a new scheduler, whose clock is wrong by what that file says."""
        os.write(self._orders, f"{clock}\n".encode())
        ready, _, _ = select.select([self._pids], [], [], FORK_SECONDS)
        assert ready, self._process.said()
        return int(os.read(self._pids, 20))

    def close(self) -> None:
        os.close(self._orders)
        os.close(self._pids)


@dataclass(slots=True)
class Mortal:
    """A scheduler, and the file that says how wrong its clock is."""

    pid: int
    clock: Path

    def send(self, how: signal.Signals) -> None:
        os.kill(self.pid, how)


class Ground:
    """Schedules, their mortal schedulers, and somebody who ends the jobs."""

    def __init__(
        self, stack: Stack, size: Size, *, rng: Random, mutant: str, postgres: ChaosPostgres | None
    ) -> None:
        self._stack, self._size, self._rng, self._mutant = stack, size, rng, mutant
        self._postgres = postgres
        self._numbers = iter(range(10_000))
        self._nursery = Nursery(stack, mutant)
        self._clocks: list[Path] = []
        self._over = threading.Event()
        self._seen: dict[str, datetime] = {}
        self._random = Random(rng.random())  # of the thread that ends jobs
        self.report = Report()

    def run(self) -> Report:
        """Make schedules, start schedulers, disturb them until all slots are past, and look."""
        mortal = [self._start() for _ in range(self._size.schedulers)]
        ends = self._make_schedules()
        ender = threading.Thread(target=self._end_jobs)
        ender.start()
        try:
            self._disturb(mortal, ends)
            self._stack.until(lambda: not self._due(), what="every slot is decided", seconds=PATIENCE_SECONDS)
            self._stack.until(
                lambda: not self._active(), what="every run has ended", seconds=PATIENCE_SECONDS
            )
        finally:
            self._over.set()
            ender.join()
            self._nursery.close()
        return self._look()

    def _start(self) -> Mortal:
        clock = self._stack.folder / f"clock-{next(self._numbers)}"
        self._clocks.append(clock)
        return Mortal(self._nursery.fork(clock), clock)

    def _make_schedules(self) -> datetime:
        """Four of an interval that begin in a moment, and one of an expression whose hour is past."""
        begin = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=2)
        last = begin + timedelta(seconds=self._size.slots - 1)
        past = (begin - timedelta(minutes=self._size.slots + 2)).replace(second=0)
        every = {"interval_seconds": 1, "anchor_at": begin, "starts_at": begin, "ends_at": last}
        minutely = {
            "cron_expression": "* * * * *",
            "starts_at": past,
            "ends_at": past + timedelta(minutes=self._size.slots - 1),
        }
        wanted = [
            every | {"overlap": "allow", "misfire": "fire_all"},
            every | {"overlap": "skip", "misfire": "fire_once"},
            every | {"overlap": "queue_one", "misfire": "skip"},
            every | {"overlap": "cancel_running", "misfire": "fire_all", "max_concurrent_runs": 2},
            minutely | {"overlap": "allow", "misfire": "fire_all"},
        ]
        for columns in wanted:
            first = columns["starts_at"]
            row = schedule_columns(next_slot=first, due_at=first, **columns)
            with self._stack.database.write() as connection:
                connection.execute(sa.insert(schedules).values(row))
        return last

    def _disturb(self, mortal: list[Mortal], ends: datetime) -> None:
        """Spread the faults over the time that there is."""
        faults = self._size.faults
        self._rng.shuffle(faults)
        while faults:
            left = max(0.0, (ends - datetime.now(UTC)).total_seconds())
            self._over.wait(min(1.0, left / len(faults)) * self._rng.uniform(0.5, 1.0))
            place = self._rng.randrange(len(mortal))
            victim = mortal[place]
            fault = faults.pop()
            self.report.faults[fault] += 1
            if fault == "kill":
                victim.send(signal.SIGKILL)
                mortal[place] = self._start()
            elif fault == "stop":
                victim.send(signal.SIGSTOP)
                self._over.wait(self._rng.uniform(0.2, 1.5))
                victim.send(signal.SIGCONT)
            else:
                self._jump(victim)
        for path in self._clocks:
            path.unlink(missing_ok=True)
        if self._postgres is not None:
            self._postgres.set_clock(0)

    def _jump(self, victim: Mortal) -> None:
        """A clock is wrong by an hour for a while. Never all of them are ahead."""
        seconds = self._rng.choice((HOUR, -HOUR))
        if self._postgres is not None and self._rng.random() < 0.3:
            for path in self._clocks:
                path.unlink(missing_ok=True)
            self._postgres.set_clock(seconds)
            self._over.wait(2.5)  # within two seconds it is
            self._postgres.set_clock(0)
            self._over.wait(2.5)
        else:
            path = victim.clock
            new = path.with_suffix(".new")
            new.write_text(str(seconds))
            new.rename(path)
            self._over.wait(self._rng.uniform(0.2, 1.0))
            if seconds < 0:  # one that is behind may stay so: others are right
                path.unlink(missing_ok=True)

    def _end_jobs(self) -> None:
        """What workers would do: each job that is queued is claimed and completed, some a little later."""
        while not self._over.wait(0.05):
            try:
                self._end_some()
            except (sa.exc.DBAPIError, sa.exc.TimeoutError) as error:
                print(f"again: {type(error).__name__} {error.__cause__}", flush=True)

    def _end_some(self) -> None:
        now = datetime.now(UTC)
        queued = sa.select(j.id).where(j.status == "queued")
        ids = [row["id"] for row in self._stack.rows(queued)]
        for job_id in ids:
            self._seen.setdefault(job_id, now)
        some = [job_id for job_id in ids if self._random.random() < 0.4]
        if not some:
            return
        with self._stack.database.write() as connection:
            claims = [Claim(job_id, new_id(), WORKER, now) for job_id in some]
            outcomes = carry_out(connection, claims, now=now, actor="t")
            held = [
                Complete(o.move.job_id, o.row["attempt"], o.move.lease_token)
                for o in outcomes
                if isinstance(o, Applied) and isinstance(o.move, Claim)
            ]
            carry_out(connection, held, now=now, actor="t")

    def _due(self) -> int:
        waiting = sa.select(sa.func.count().label("n")).where(r.status == "waiting")
        due = sa.select(sa.func.count().label("n")).where(s.due_at.is_not(None))
        return int(self._stack.rows(due)[0]["n"] + self._stack.rows(waiting)[0]["n"])

    def _active(self) -> int:
        active = sa.select(sa.func.count().label("n")).where(j.finished_at.is_(None))
        uncounted = sa.select(sa.func.count().label("n")).select_from(schedule_ends)
        return int(self._stack.rows(active)[0]["n"] + self._stack.rows(uncounted)[0]["n"])

    # The checker

    def _look(self) -> Report:
        report = self.report
        runs = defaultdict(list)
        for run in self._stack.rows(sa.select(schedule_runs)):
            runs[run["schedule_id"]].append(run)
        made = {row["id"]: row for row in self._stack.rows(sa.select(jobs))}
        claimed: Counter[str] = Counter()
        for schedule in self._stack.rows(sa.select(schedules)):
            wanted = list(_slots_of(schedule))
            decided: Counter[datetime] = Counter()
            for run in runs.pop(schedule["id"], []):
                inside = [slot for slot in wanted if run["slot"] <= slot <= run["last_slot"]]
                decided.update(inside)
                report.decided[run["reason"] or run["status"]] += len(inside)
                if len(inside) != run["slots"] or run["reason"] not in (None, *Skipped):
                    report.strange.append(f"{run['slot']} {run['slots']} {run['reason']}")
                if run["status"] == "started":
                    claimed[run["job_id"]] += 1
                    job = made.get(run["job_id"])
                    if job is None or (job["scheduled_job_id"], job["scheduled_for"]) != (
                        schedule["id"],
                        run["slot"],
                    ):
                        report.strange.append(f"run {run['slot']} has no job of its own")
            report.undecided += [f"{slot}" for slot in wanted if not decided[slot]]
            report.doubled += [f"{slot}" for slot, count in decided.items() if count > 1]
            self._count(schedule, made)
        report.doubled += [job_id for job_id, count in claimed.items() if count > 1]
        report.strange += [f"a job without a run: {job_id}" for job_id in made.keys() - claimed.keys()]
        report.early += [job_id for job_id, at in self._seen.items() if at < made[job_id]["scheduled_for"]]
        return report

    def _count(self, schedule: sa.RowMapping, made: dict[str, sa.RowMapping]) -> None:
        """The schedule's statistics are those of the rows."""
        own = [job for job in made.values() if job["scheduled_job_id"] == schedule["id"]]
        completed = sum(job["status"] == "completed" for job in own)
        said = (schedule["total_runs"], schedule["successful_runs"], schedule["failed_runs"])
        if said != (len(own), completed, 0):
            self.report.strange.append(f"statistics say {said}, rows {(len(own), completed, 0)}")


def _slots_of(schedule: sa.RowMapping) -> Iterator[datetime]:
    """Every slot of its time, without anything of ours."""
    slot = schedule["starts_at"]
    if schedule["interval_seconds"] is not None:
        while slot <= schedule["ends_at"]:
            yield slot
            slot += timedelta(seconds=schedule["interval_seconds"])
        return
    for slot in CronSim(schedule["cron_expression"], schedule["starts_at"] - timedelta(seconds=1)):
        if slot > schedule["ends_at"]:
            return
        yield slot


def kill(
    stack: Stack, size: Size, *, seed: int, mutant: str = "", postgres: ChaosPostgres | None = None
) -> Report:
    """Run it on this stack."""
    if mutant == "twice":
        _without_unique(stack)
    return Ground(stack, size, rng=Random(seed), mutant=mutant, postgres=postgres).run()


# Mutants


def _without_unique(stack: Stack) -> None:
    with stack.database.write() as connection:
        connection.exec_driver_sql(
            "ALTER TABLE schedule_runs DROP CONSTRAINT uq_schedule_runs_schedule_id_slot"
        )


def _twice() -> None:
    """Nobody locks a schedule, and (see `_without_unique`) a slot may have two runs."""
    plain = sa.Select.with_for_update

    def unlocked(self: Any, *args: Any, **how: Any) -> Any:
        return self if how.get("skip_locked") else plain(self, *args, **how)

    sa.Select.with_for_update = unlocked  # type: ignore[method-assign]
    slots.SCHEDULES_AT_ONCE = 1  # or they lock each other out, and nothing comes of it


def _early() -> None:
    """The process's own clock is believed."""
    slots.utc_now = lambda: sa.literal(datetime(9000, 1, 1, tzinfo=UTC), s.due_at.type)  # type: ignore[misc]


def _passes_over() -> None:
    """The schedule moves on by the clock, not by its slots."""
    from laneway.engine import slot_plan

    plan = slot_plan.plan

    def jumps(schedule: Any, *, active: int, waiting: bool, now: datetime) -> Any:
        made = plan(schedule, active=active, waiting=waiting, now=now)
        following = slot_after(schedule, SystemClock().now())
        return slot_plan.Plan(made.decisions[:1], following, made.displaces)

    slots.plan = jumps


MUTANTS = {"twice": _twice, "early": _early, "passes_over": _passes_over}


def nursery(orders: str, pids: str) -> None:
    """Fork a scheduler for each line that is read: the file of its clock. No thread, no connection."""
    from laneway.cli import migrate, processes  # noqa: F401
    from laneway.scheduler import ticker  # noqa: F401

    if name := os.environ.get(MUTANT):
        MUTANTS[name]()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the dead
    said = os.open(pids, os.O_RDWR)
    with open(orders, encoding="utf-8") as lines:
        while line := lines.readline():
            pid = os.fork()
            if not pid:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _set_clock(Path(line.strip()))
                try:
                    processes.scheduler()
                finally:
                    os._exit(1)
            os.write(said, str(pid).encode())


def _set_clock(path: Path) -> None:
    right = SystemClock.now

    def now(self: SystemClock) -> datetime:
        try:
            return right(self) + timedelta(seconds=float(path.read_text()))
        except FileNotFoundError:
            return right(self)

    SystemClock.now = now  # type: ignore[method-assign]


@contextmanager
def on_postgres(folder: Path) -> Iterator[tuple[Stack, ChaosPostgres]]:
    """A stack on a PostgreSQL whose clock can be set, where libfaketime is installed."""
    with (
        ChaosPostgres() as postgres,
        RedisServer() as redis,
        Stack(postgres.fresh(), redis.url, folder) as stack,
    ):
        yield stack, postgres


@contextmanager
def on_sqlite(folder: Path) -> Iterator[Stack]:
    url = f"sqlite:///{folder / 'laneway.db'}"
    migrate.upgrade(url)
    with RedisServer() as redis, Stack(url, redis.url, folder) as stack:
        yield stack


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m process.schedule_kills", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=("postgresql", "sqlite", *MUTANTS))
    options = parser.parse_args()
    failed = False
    for name in ("postgresql", "sqlite", *MUTANTS):
        if options.only not in (None, name):
            continue
        with tempfile.TemporaryDirectory() as text:
            folder = Path(text)
            if name == "sqlite":
                size = Size(WHOLE.slots, 2, WHOLE.kills, WHOLE.stops, WHOLE.jumps)
                with on_sqlite(folder) as stack:
                    report = kill(stack, size, seed=options.seed)
            else:
                mutant = name if name in MUTANTS else ""
                with on_postgres(folder) as (stack, postgres):
                    clock = postgres if postgres.has_clock else None
                    report = kill(stack, WHOLE, seed=options.seed, mutant=mutant, postgres=clock)
        print(f"{name}: {report}", flush=True)
        failed |= bool(report.wrong) != (name in MUTANTS)
    raise SystemExit(int(failed))


if __name__ == "__main__":
    nursery(*sys.argv[2:]) if sys.argv[1:2] == ["nursery"] else main()
