"""A job in an application's own transaction: it is there exactly when that has committed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

import sdk_tasks  # noqa: F401 - its job types
from factories import job_row, rows_of
from laneway import JobManager, models
from laneway.clock import SystemClock
from laneway.db import Database
from laneway.engine import upkeep
from laneway.engine.access.callers import ensure_tenant
from laneway.engine.registry import load
from laneway.engine.service import JobService
from laneway.errors import InvalidParameters, Unprocessable
from laneway.lanes.memory_lanes import MemoryLanes
from laneway.lanes.rq_lanes import RqLanes
from laneway.sdk.client import LanewayClient
from laneway.sdk.joining import join
from laneway.sdk.local import LocalBackend
from laneway.sdk.memory import MemoryBackend
from laneway.sdk.remote import RemoteBackend
from laneway.settings import Settings
from laneway.webhooks.secrets import SecretBox
from servers import RedisServer, wait_until

ADD = {"job_type": "sdk.add", "parameters": {"a": 1}}


class Base(DeclarativeBase):
    pass


class Order(Base):
    """The application's own table."""

    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)


@pytest.fixture
def lanes() -> MemoryLanes:
    return MemoryLanes()


@pytest.fixture
def backend(database: Database, lanes: MemoryLanes) -> LocalBackend:
    return backend_on(database, lanes)


def backend_on(database: Database, lanes: Any) -> LocalBackend:
    ensure_tenant(database, SecretBox({"k": bytes(32)}), "default")
    settings = Settings(database_url=database.url.render_as_string(hide_password=False))
    return LocalBackend(JobService(database, lanes, settings, load(["sdk_tasks"])))


@pytest.fixture
def engine(database: Database, backend: LocalBackend) -> Iterator[sa.Engine]:
    """The application's own engine on Laneway's database, with its own table."""
    own = sa.create_engine(database.url)
    Base.metadata.create_all(own)
    yield own
    own.dispose()


def jobs_of(database: Database) -> list[str]:
    return [row["id"] for row in rows_of(database, models.jobs)]


def orders_of(engine: sa.Engine) -> int:
    with Session(engine) as session:
        return session.scalars(sa.select(sa.func.count()).select_from(Order)).one()


def rung(lanes: MemoryLanes, job_id: str) -> None:
    wait_until(lambda: lanes.contents("high") == [job_id], what="the job was rung")


def test_a_commit_makes_one_job_and_rings_it(
    backend: LocalBackend, engine: sa.Engine, database: Database, lanes: MemoryLanes
) -> None:
    with Session(engine) as session:
        session.add(Order(id=1))
        job_id = join(backend, session, ADD)
        assert lanes.contents("high") == []
        session.commit()
    rung(lanes, job_id)
    assert jobs_of(database) == [job_id]
    assert (job_row(database, job_id)["status"], orders_of(engine)) == ("queued", 1)


def test_a_rollback_makes_none(
    backend: LocalBackend, engine: sa.Engine, database: Database, lanes: MemoryLanes
) -> None:
    with Session(engine) as session:
        session.add(Order(id=1))
        lost = join(backend, session, ADD)
        session.rollback()
        assert jobs_of(database) == []
        kept = join(backend, session, ADD)
        session.commit()
    rung(lanes, kept)  # and the lost one never
    assert (jobs_of(database), orders_of(engine)) == ([kept], 0)
    assert lost != kept


def test_nobody_is_told_before_the_outermost_commit(
    backend: LocalBackend, engine: sa.Engine, database: Database, lanes: MemoryLanes
) -> None:
    with Session(engine) as session:
        outer = join(backend, session, ADD)
        with session.begin_nested():
            inner = join(backend, session, ADD)
        savepoint = session.begin_nested()
        lost = join(backend, session, ADD)
        savepoint.rollback()
        assert lanes.contents("high") == []
        session.commit()
    wait_until(lambda: {outer, inner} <= set(lanes.contents("high")), what="both were rung")
    assert sorted(jobs_of(database)) == sorted([outer, inner])
    assert lost not in jobs_of(database)


def test_a_plain_connection_will_do(
    backend: LocalBackend, engine: sa.Engine, database: Database, lanes: MemoryLanes
) -> None:
    with engine.connect() as connection:
        lost = join(backend, connection, ADD)
        connection.rollback()
        with connection.begin():
            kept = join(backend, connection, ADD)
    rung(lanes, kept)
    assert jobs_of(database) == [kept] != [lost]


def test_a_job_for_later_rings_nobody(
    backend: LocalBackend, engine: sa.Engine, database: Database, lanes: MemoryLanes
) -> None:
    with Session(engine) as session, session.begin():
        job_id = join(backend, session, ADD | {"delay_seconds": 60})
    assert job_row(database, job_id)["status"] == "scheduled"
    assert lanes.contents("high") == []


def test_a_refused_job_leaves_the_transaction_as_it_was(
    backend: LocalBackend, engine: sa.Engine, database: Database
) -> None:
    with Session(engine) as session:
        session.add(Order(id=1))
        with pytest.raises(InvalidParameters):
            join(backend, session, ADD | {"parameters": {"a": "many"}})
        session.commit()
    assert (jobs_of(database), orders_of(engine)) == ([], 1)


def test_the_manager_joins_a_session(backend: LocalBackend, engine: sa.Engine, database: Database) -> None:
    async def use_the_manager() -> str:
        with Session(engine) as session:
            job_id = await JobManager(backend).enqueue_in(session, "sdk.add", priority="low", a=1)
            session.commit()
        return job_id

    job = job_row(database, asyncio.run(use_the_manager()))
    assert (job["priority"], job["parameters"]) == ("low", {"a": 1})


def test_a_commit_while_redis_is_down_makes_a_job_that_is_rung_later(
    database: Database, own_redis_server: RedisServer
) -> None:
    lanes = RqLanes(own_redis_server.url, clock=SystemClock())
    backend = backend_on(database, lanes)
    own = sa.create_engine(database.url)
    own_redis_server.stop()
    with Session(own) as session, session.begin():
        job_id = join(backend, session, ADD)
    own.dispose()
    assert job_row(database, job_id)["status"] == "queued"
    own_redis_server.start()

    def is_rung() -> bool:
        upkeep.reconcile(database, lanes, window=100, now=SystemClock().now())
        return lanes.contents("high") == [job_id]

    wait_until(lambda: _quietly(is_rung), what="the reconciler rings it")
    assert jobs_of(database) == [job_id]
    lanes.close()


def _quietly(look: Any) -> Any:
    from laneway.lanes.backend import LanesUnavailable

    try:
        return look()
    except LanesUnavailable:  # its breaker is still shut
        return None


@pytest.mark.skipif(find_spec("greenlet") is None, reason="SQLAlchemy's asyncio needs greenlet")
def test_async_sessions_and_connections_will_do(postgres_url: str) -> None:
    from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

    database, lanes = Database(postgres_url), MemoryLanes()
    jobs = JobManager(backend_on(database, lanes))

    async def use_both() -> list[str]:
        engine = create_async_engine(postgres_url)
        async with AsyncSession(engine) as session:
            await jobs.enqueue_in(session, "sdk.add", a=0)
            await session.rollback()
            kept = [await jobs.enqueue_in(session, "sdk.add", a=1)]
            await session.commit()
        async with engine.connect() as connection:
            await jobs.enqueue_in(connection, "sdk.add", a=0)
            await connection.rollback()
            kept.append(await jobs.enqueue_in(connection, "sdk.add", a=2))
            await connection.commit()
        await engine.dispose()
        return kept

    kept = asyncio.run(use_both())
    wait_until(lambda: sorted(lanes.contents("high")) == sorted(kept), what="both were rung")
    assert sorted(jobs_of(database)) == sorted(kept)
    database.dispose()


# Where it cannot be


def test_another_kind_of_database_is_refused(backend: LocalBackend) -> None:
    foreign: Any = SimpleNamespace(dialect=SimpleNamespace(name="mysql"))
    with pytest.raises(Unprocessable, match="its own database"):
        backend.enqueue_in(foreign, ADD)


def test_a_server_has_no_transaction_to_join() -> None:
    with (
        LanewayClient("http://laneway.test", "key") as client,
        sa.create_engine("sqlite://").connect() as own,
        pytest.raises(RuntimeError, match="LANEWAY_BACKEND=http"),
    ):
        join(RemoteBackend(client), own, ADD)


def test_what_is_no_session_is_refused(backend: LocalBackend) -> None:
    with pytest.raises(TypeError, match="session or connection, not dict"):
        asyncio.run(JobManager(backend).enqueue_in({}, "sdk.add", a=1))


def test_the_memory_backend_shares_its_store() -> None:
    backend = MemoryBackend(Settings(tasks=("sdk_tasks",)))
    try:
        Base.metadata.create_all(backend.engine)
        with Session(backend.engine) as session, session.begin():
            session.add(Order(id=1))
            job_id = join(backend, session, ADD)
        [job] = backend.run_all()
        assert (job["id"], job["status"]) == (job_id, "completed")
    finally:
        backend.close()
