"""Workers that claim and settle jobs with concurrency keys as fast as they can, to be killed any time."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from random import Random
from typing import Any

import sqlalchemy as sa

from laneway.clock import SystemClock, new_id
from laneway.db import Database
from laneway.domain.spec import Priority
from laneway.engine import concurrency, leases
from laneway.engine.endings import Ending, Raised, Returned
from laneway.engine.exchange import Holder, exchange
from laneway.engine.outcomes import Claimed
from laneway.models import jobs

LANES = [priority.value for priority in Priority]
HANDS = 3  # jobs that a worker holds at once

# Claims and what ends them, numbered as the store made them: a slot is taken before it is given to another.
_TRIGGERS = {
    "sqlite": [
        "CREATE TABLE slot_log (n INTEGER PRIMARY KEY AUTOINCREMENT, tenant_id TEXT, key TEXT, step INTEGER)",
        "CREATE TRIGGER slot_taken AFTER UPDATE OF status ON jobs"
        " WHEN new.status = 'running' AND old.status <> 'running' BEGIN INSERT INTO slot_log"
        " (tenant_id, key, step) VALUES (new.tenant_id, new.concurrency_key, 1); END",
        "CREATE TRIGGER slot_left AFTER UPDATE OF status ON jobs"
        " WHEN new.status <> 'running' AND old.status = 'running' BEGIN INSERT INTO slot_log"
        " (tenant_id, key, step) VALUES (new.tenant_id, new.concurrency_key, -1); END",
    ],
    "postgresql": [
        "CREATE TABLE slot_log (n bigserial PRIMARY KEY, tenant_id text, key text, step integer)",
        "CREATE FUNCTION slot_moved() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " INSERT INTO slot_log (tenant_id, key, step) VALUES (new.tenant_id, new.concurrency_key,"
        " CASE WHEN new.status = 'running' THEN 1 ELSE -1 END); RETURN NULL; END $$",
        "CREATE TRIGGER slot_moved AFTER UPDATE ON jobs FOR EACH ROW"
        " WHEN ((new.status = 'running') <> (old.status = 'running')) EXECUTE FUNCTION slot_moved()",
    ],
}


def keep_a_log(database: Database) -> None:
    """From now on the store notes each job that begins or ceases to run."""
    with database.write() as connection:
        for statement in _TRIGGERS[database.dialect]:
            connection.exec_driver_sql(statement)


@dataclass(slots=True)
class Peaks:
    """The most jobs that ran at once, of each key and of each tenant, and how many do now."""

    keys: Counter[str] = field(default_factory=Counter)
    tenants: Counter[str] = field(default_factory=Counter)
    now: int = 0

    @classmethod
    def of(cls, database: Database) -> Peaks:
        peaks = cls()
        running: Counter[str] = Counter()
        with database.read() as connection:
            log = connection.execute(sa.text("SELECT tenant_id, key, step FROM slot_log ORDER BY n")).all()
        for tenant, key, step in log:
            peaks.now += step
            for most, name in ((peaks.keys, key), (peaks.tenants, tenant)):
                if name is not None:
                    running[name] += step
                    most[name] = max(most[name], running[name])
        return peaks


@dataclass(slots=True)
class Crew:
    """`count` workers on the store of `url`, which may be killed."""

    url: str
    count: int
    mutant: str = ""
    rng: Random = field(default_factory=lambda: Random(11))
    _workers: dict[str, BaseProcess] = field(default_factory=dict)
    _context: Any = None

    def __enter__(self) -> Crew:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__])
        for _ in range(self.count):
            self._start()
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers.values():
            worker.kill()
            worker.join()

    def _start(self) -> None:
        worker_id = new_id()
        seed = self.rng.randrange(10**6)
        worker = self._context.Process(
            target=work, args=(self.url, worker_id, seed, self.mutant), daemon=True
        )
        worker.start()
        self._workers[worker_id] = worker

    def kill_one(self, database: Database) -> None:
        """SIGKILL, and what a reaper does a lease later: its jobs go back. Another takes its place."""
        worker_id = self.rng.choice(sorted(self._workers))
        worker = self._workers.pop(worker_id)
        worker.kill()
        worker.join()
        leases.leave(database, worker_id=worker_id, state="dead")
        self._start()


def work(url: str, worker_id: str, seed: int, mutant: str) -> None:
    """Take what is queued, hold it for a turn or two, end it in one of several ways."""
    if mutant == "no lock":
        concurrency._lock = lambda _connection, _slots: None
    rng, clock, idle = Random(seed), SystemClock(), threading.Event()
    database = Database(url, pool_size=2)
    leases.register(database, worker_id=worker_id, name=str(os.getpid()), lanes=LANES)
    holder = Holder(worker_id, ["demo.echo"], 10**6, rng)
    held: list[Claimed] = []
    while True:
        ended = [(job, _ending(rng)) for job in held if rng.random() < 0.7]
        gone = {job.lease_token for job, _ in ended}
        wanted = [(job_id, new_id()) for job_id in _find(database, rng, HANDS - len(held) + len(ended))]
        if not ended and not wanted:
            idle.wait(0.005)
            continue
        done = exchange(database, holder, ended=ended, wanted=wanted, news={}, now=clock.now())
        held = [job for job in held if job.lease_token not in gone] + done.claimed


def _ending(rng: Random) -> Ending:
    return Raised("Broken", "again", in_seconds=0.0) if rng.random() < 0.15 else Returned("1")


def _find(database: Database, rng: Random, count: int) -> list[str]:
    """Some of the first that are queued: what lanes would hand out, ids of others' jobs among it."""
    j = jobs.c
    first = sa.select(j.id).where(j.status == "queued").order_by(j.queued_at, j.id).limit(12)
    with database.read() as connection:
        found = list(connection.execute(first).scalars())
    return rng.sample(found, min(count, len(found)))
