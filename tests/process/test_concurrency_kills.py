"""Workers killed while they hold slots: of no key, and of no tenant, do more jobs ever run than may.

400 jobs and 4 kills, on SQLite half the jobs. SLOT_JOBS and SLOT_KILLS ask for more: 1,500 and 12.
"""

from __future__ import annotations

import os
import threading
import time
from random import Random

import sqlalchemy as sa

from factories import OTHER_TENANT, TENANT, change
from factories import new_job as a_job
from laneway.clock import SystemClock
from laneway.db import Database
from laneway.domain.states import JobStatus
from laneway.engine import concurrency, doctor, upkeep
from laneway.engine.reaper import Reaper
from laneway.engine.transitions import LinkedJob, create
from laneway.models import jobs, tenants
from process.slot_workers import Crew, Peaks, keep_a_log

JOBS = int(os.environ.get("SLOT_JOBS", "400"))
KILLS = int(os.environ.get("SLOT_KILLS", "4"))
KEYS = 5
LIMIT = 2
OF_TENANT = 2
PATIENCE_SECONDS = 120.0
BREATH = threading.Event()


def fill(database: Database, count: int, *, rng: Random) -> None:
    """Nine in ten with one of KEYS keys, the others of a tenant that may run OF_TENANT at once."""
    now = SystemClock().now()
    with database.write() as connection:
        values = {"id": OTHER_TENANT, "name": "south", "webhook_secret": "s", "created_by": "t"}
        connection.execute(sa.insert(tenants).values(values))
        rows = [
            a_job(tenant_id=OTHER_TENANT, queued_at=now, max_retries=100)
            if number % 10 == 0
            else LinkedJob.of(
                a_job(queued_at=now, max_retries=100),
                concurrency_key=f"key-{rng.randrange(KEYS)}",
                concurrency_limit=LIMIT,
            )
            for number in range(count)
        ]
        create(connection, rows, now=now)
    change(database, tenants, OTHER_TENANT, max_running=OF_TENANT)


def run(database: Database, url: str, *, count: int, workers: int, kills: int, mutant: str = "") -> Peaks:
    """Let workers do all the jobs, with kills in between; of a mutant no more than shows it."""
    keep_a_log(database)
    fill(database, count, rng=Random(3))
    reaper = Reaper(database, SystemClock(), lease_seconds=3600.0, crash_limit=10**6)
    ended = sa.select(sa.func.count()).select_from(jobs).where(jobs.c.finished_at.is_not(None))
    until = time.monotonic() + PATIENCE_SECONDS
    killed = 0
    with Crew(url, workers, mutant) as crew:
        while time.monotonic() < until:
            with database.read() as connection:
                done = connection.execute(ended).scalar_one()
            if done == count:
                break
            while killed < kills and done * 2 * kills >= count * (killed + 1):  # all in the first half
                crew.kill_one(database)
                killed += 1
            upkeep.promote(database, now=SystemClock().now())
            reaper.sweep()
            concurrency.sweep(database, now=SystemClock().now())
            if mutant and max(Peaks.of(database).keys.values(), default=0) > LIMIT:
                break
            BREATH.wait(0.02)
    assert mutant or killed == kills
    return Peaks.of(database)


def check(database: Database, peaks: Peaks, *, count: int) -> None:
    with database.read() as connection:
        statuses = dict(
            connection.execute(sa.select(jobs.c.status, sa.func.count()).group_by(jobs.c.status)).all()
        )
    assert statuses == {JobStatus.COMPLETED: count}
    assert len(peaks.keys) == KEYS
    assert max(peaks.keys.values()) == LIMIT
    assert 1 <= peaks.tenants[OTHER_TENANT] <= OF_TENANT
    assert peaks.tenants[TENANT] <= KEYS * LIMIT
    assert peaks.now == 0
    assert doctor.examine(database, now=SystemClock().now()) == []


def test_eight_workers_that_are_killed_never_pass_a_limit(postgres_url: str) -> None:
    database = Database(postgres_url)
    peaks = run(database, postgres_url, count=JOBS, workers=8, kills=KILLS)
    check(database, peaks, count=JOBS)
    database.dispose()


def test_three_workers_on_sqlite_never_pass_a_limit(sqlite_url: str) -> None:
    database = Database(sqlite_url)
    peaks = run(database, sqlite_url, count=JOBS // 2, workers=3, kills=KILLS)
    check(database, peaks, count=JOBS // 2)
    database.dispose()


def test_without_the_lock_a_limit_is_passed_and_seen(postgres_url: str) -> None:
    database = Database(postgres_url)
    peaks = run(database, postgres_url, count=1500, workers=8, kills=0, mutant="no lock")
    assert max(peaks.keys.values()) > LIMIT
    database.dispose()
