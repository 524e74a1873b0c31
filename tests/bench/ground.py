"""What one measurement starts from: empty stores, a folder of its own, and both sides' ways in."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import redis
import rq
import sqlalchemy as sa

from bench import handlers, records
from bench.machine import Placement
from bench.programs import Program
from bench.records import Records
from laneway.cli import migrate
from laneway.clock import SystemClock
from laneway.db import Database
from laneway.domain.spec import JobSpec
from laneway.domain.states import Action, JobStatus
from laneway.engine.access.callers import Caller, Role, create_key, ensure_tenant
from laneway.engine.registry import load
from laneway.engine.service import JobService
from laneway.lanes.rq_lanes import RqLanes
from laneway.models import job_events, jobs, workers
from laneway.settings import Settings
from laneway.webhooks.secrets import SecretBox
from servers import PostgresServer, RedisServer, wait_until

STORES = {"PostgreSQL": "postgresql", "SQLite": "sqlite"}
ENQUEUE_BATCH = 256
PATIENCE_SECONDS = 120.0


class DurablePostgres(PostgresServer):
    """As production would run it: what is committed is on the disk (PostgreSQL's own defaults)."""

    SETTINGS = (
        "listen_addresses=",
        "fsync=on",
        "synchronous_commit=on",
        "shared_buffers=128MB",
        "max_connections=100",
        "max_wal_size=1GB",
        "log_min_messages=error",
    )


class Stores:
    """The servers of a whole benchmark: Redis (append-only file, synced each second) and PostgreSQL."""

    def __init__(self, placement: Placement) -> None:
        self._placement = placement
        self._cleanup = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as cleanup, self._placement.for_servers():
            self.redis = cleanup.enter_context(RedisServer(durable=True))
            self.postgres = cleanup.enter_context(DurablePostgres())
            self.folder = Path(tempfile.mkdtemp(prefix="laneway-bench-"))
            cleanup.callback(shutil.rmtree, self.folder)
            self._migrated_sqlite = self.folder / "migrated.db"
            migrate.upgrade(f"sqlite:///{self._migrated_sqlite}")
            self._cleanup = cleanup.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cleanup.__exit__(kind, error, trace)

    def versions(self) -> dict[str, str]:
        with self.redis.client() as client:
            found = {"redis-server": str(client.info("server")["redis_version"])}
        with self.database("postgresql") as url:
            store = Database(url, pool_size=1)
            with store.read() as connection:
                found["postgresql"] = str(connection.execute(sa.text("SHOW server_version")).scalar())
            store.dispose()
        with self.database("sqlite") as url:
            store = Database(url, pool_size=1)
            with store.read() as connection:
                found["sqlite"] = str(connection.execute(sa.text("SELECT sqlite_version()")).scalar())
            store.dispose()
        return found

    @contextmanager
    def database(self, store: str) -> Iterator[str]:
        """The URL of a migrated, empty database that is dropped at the end."""
        if store == "postgresql":
            url = self.postgres.fresh()
            yield url
            self.postgres.drop(url)
        else:
            with tempfile.TemporaryDirectory(dir=self.folder) as folder:
                yield f"sqlite:///{shutil.copy(self._migrated_sqlite, Path(folder) / 'laneway.db')}"

    @contextmanager
    def empty_redis(self) -> Iterator[redis.Redis]:
        with self.redis.client() as client:
            client.flushall()
            yield client


class Ground:
    """One measurement's folder, its records, and the programs started on it."""

    def __init__(self, stores: Stores) -> None:
        self.folder = Path(tempfile.mkdtemp(dir=stores.folder))
        self.records = self.folder / "records"
        self.records.touch()
        self.variables = {records.VARIABLE: str(self.records)}

    def program(self, *role: str, pass_fds: Sequence[int] = ()) -> Program:
        log = self.folder / f"{role[0]}.log"
        return Program(*role, variables=self.variables, log=log, pass_fds=pass_fds)

    def wait_for_records(self, count: int, *programs: Program) -> Records:
        """The records, once there are `count` of them."""

        def written() -> bool:
            for program in programs:
                program.need_alive()
            return records.count_records(self.records) >= count

        wait_until(
            written,
            what=f"{count} jobs began",
            seconds=PATIENCE_SECONDS,
            evidence=lambda: f"{records.count_records(self.records)} did\n{programs[0].words()}",
        )
        return Records.read(self.records)


@dataclass(frozen=True)
class LanewayGround:
    """Laneway on an empty store: the service in this process, and the variables its processes get."""

    ground: Ground
    settings: Settings
    database: Database
    service: JobService

    @classmethod
    @contextmanager
    def on(cls, stores: Stores, store: str) -> Iterator[LanewayGround]:
        """Defaults, but for two limits that would be measured instead of what they guard.

        The lanes' window (the database would keep ids beyond 10,000 until a scheduler comes by) and the
        quota of the limiter, which counts every request all the same.
        """
        ground = Ground(stores)
        with stores.database(store) as url, stores.empty_redis():
            values = {
                "database_url": url,
                "redis_url": stores.redis.url,
                "data_dir": str(ground.folder),
                "tasks": handlers.__name__,
                "lane_window": "1000000",
                "rate_limits": "queue=99999999/60@user,default=99999999/60@user",
            }
            ground.variables |= {f"LANEWAY_{name.upper()}": value for name, value in values.items()}
            settings = Settings(**values)  # type: ignore[arg-type]
            database = Database(settings.database)
            lanes = RqLanes(settings.redis_url, clock=SystemClock(), window=settings.lane_window)
            try:
                yield cls(
                    ground, settings, database, JobService(database, lanes, settings, load(settings.tasks))
                )
            finally:
                lanes.close()
                database.dispose()

    @cached_property
    def tenant_id(self) -> str:
        return ensure_tenant(self.database, SecretBox.from_settings(self.settings), "bench")

    def key(self) -> str:
        """A new API key."""
        return create_key(self.database, tenant_id=self.tenant_id, role=Role.USER)

    def enqueue(self, count: int, *, job_type: str = "bench.record") -> None:
        """Jobs numbered from 0, in batches, through the service that the API calls."""
        caller = Caller(self.tenant_id, "bench", Role.USER)
        for start in range(0, count, ENQUEUE_BATCH):
            specs = [
                JobSpec(job_type=job_type, parameters={"number": number})
                for number in range(start, min(count, start + ENQUEUE_BATCH))
            ]
            for answer in self.service.enqueue([self.service.prepare(spec, caller) for spec in specs]):
                if isinstance(answer, Exception):
                    raise answer

    def count(self, *conditions: sa.ColumnElement[bool]) -> int:
        """How many jobs there are for which these hold."""
        query = sa.select(sa.func.count()).select_from(jobs).where(*conditions)
        with self.database.read() as connection:
            return int(connection.execute(query).scalar_one())

    def wait_until_settled(self, program: Program) -> None:
        wait_until(
            lambda: not self.count(jobs.c.finished_at.is_(None)),
            what="every job has ended",
            seconds=PATIENCE_SECONDS,
            evidence=program.words,
        )

    def need_all_completed_once(self, count: int) -> None:
        """Raise AssertionError unless there are `count` jobs, all completed, with 3 events each.

        A job that was handed back unstarted, because the machine did something else just then, has a
        release and a second claim besides.
        """
        released = job_events.c.action == Action.RELEASE
        needed = sa.func.sum(sa.case((released, -1), else_=1)).label("needed")
        per_job = sa.select(needed).group_by(job_events.c.job_id).subquery()
        spread = sa.select(per_job.c.needed, sa.func.count()).group_by(per_job.c.needed)
        with self.database.read() as connection:
            events = [tuple(row) for row in connection.execute(spread)]
        completed = self.count(jobs.c.status == JobStatus.COMPLETED)
        assert completed == count == self.count(), f"{completed} of {self.count()} jobs completed"
        assert events == [(3, count)], f"(events, jobs with so many): {events}"

    def living_workers(self) -> int:
        query = sa.select(sa.func.count()).select_from(workers).where(workers.c.state == "active")
        with self.database.read() as connection:
            return int(connection.execute(query).scalar_one())


@dataclass(frozen=True)
class RqGround:
    """Stock RQ on an empty Redis."""

    ground: Ground
    url: str
    queue: Any

    @classmethod
    @contextmanager
    def on(cls, stores: Stores) -> Iterator[RqGround]:
        with stores.empty_redis() as client:
            yield cls(Ground(stores), stores.redis.url, rq.Queue("default", connection=client))

    def enqueue(self, count: int) -> None:
        """Jobs numbered from 0, in pipelines, by RQ's own call for many."""
        for start in range(0, count, ENQUEUE_BATCH):
            numbers = range(start, min(count, start + ENQUEUE_BATCH))
            self.queue.enqueue_many([rq.Queue.prepare_data(records.record, args=(n,)) for n in numbers])

    def wait_until_settled(self, count: int, program: Program) -> None:
        wait_until(
            lambda: self.queue.finished_job_registry.count == count,
            what=f"{count} jobs are finished",
            seconds=PATIENCE_SECONDS,
            evidence=program.words,
        )
