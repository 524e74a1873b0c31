"""What a POST is answered while a store fails in every way it can, and when too many jobs wait.

Never a 202 for what is not written; always when to come back; and no restart once the store is well again.
"""

from __future__ import annotations

import multiprocessing
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
import sqlalchemy as sa

from api_client import LocalApi, claim, complete
from factories import TENANT, add_job, change
from fault_proxy import FaultProxy
from laneway import db, models
from laneway.clock import FrozenClock
from laneway.db import Database
from laneway.domain.payload import MAX_BYTES
from laneway.domain.spec import JobSpec, Priority
from laneway.domain.states import JobStatus
from laneway.engine import admission
from laneway.errors import Overloaded, QuotaQueued
from servers import PostgresServer, RedisServer, wait_until
from waiting_jobs import OPERATOR, OTHER, ask, fill, service_on

JOB = {"job_type": "demo.noop"}


class SmallServer(PostgresServer):
    """One whose connections are soon used up."""

    SETTINGS = (*PostgresServer.SETTINGS, "max_connections=14", "superuser_reserved_connections=0")


@pytest.fixture
def small_server() -> Iterator[SmallServer]:
    with SmallServer() as server:
        yield server


@dataclass(frozen=True)
class Site:
    """An API on a PostgreSQL behind a proxy, and the ways past it."""

    api: LocalApi
    proxy: FaultProxy
    direct: str  # libpq's URL

    def runtime_database(self) -> Database:
        return self.api.app.state.runtime.database  # type: ignore[no-any-return]

    def execute(self, *statements: str) -> None:
        with psycopg.connect(self.direct, autocommit=True) as connection:
            for statement in statements:
                connection.execute(statement.encode())


@contextmanager
def site_on(server: PostgresServer, local: Any) -> Iterator[Site]:
    url = sa.make_url(server.fresh())
    with FaultProxy(server.folder / ".s.PGSQL.5432") as proxy:
        through = url.set(host="127.0.0.1", port=proxy.port, query={})
        api = local(database_url=through.render_as_string(False), statement_seconds=1)
        direct = f"postgresql://postgres@/{url.database}?host={server.folder}"
        yield Site(api, proxy, direct)


@pytest.fixture
def site(postgres_server: PostgresServer, local: Any) -> Iterator[Site]:
    with site_on(postgres_server, local) as started:
        yield started


def refused(response: httpx.Response) -> bool:
    """Whether it is the answer of an API without its store (its form is checked by `Reference`)."""
    if response.status_code != 503 or response.json()["code"] != "storage_unavailable":
        return False
    return 2 <= int(response.headers["retry-after"]) <= 10


# PostgreSQL


@contextmanager
def refusing(site: Site) -> Iterator[None]:
    site.proxy.refuse()
    yield
    site.proxy.heal()


@contextmanager
def resetting(site: Site) -> Iterator[None]:
    site.proxy.reset()
    yield
    site.proxy.heal()


@contextmanager
def hung(site: Site) -> Iterator[None]:
    site.proxy.blackhole()
    yield
    site.proxy.heal()


@contextmanager
def slow(site: Site) -> Iterator[None]:
    site.proxy.delay(3)
    yield
    site.proxy.heal()


@contextmanager
def pool_exhausted(site: Site) -> Iterator[None]:
    engine = site.runtime_database().engine
    with ExitStack() as held:
        for _ in range(db.POOL_SIZE):
            held.enter_context(engine.connect())
        yield


@contextmanager
def locked(site: Site) -> Iterator[None]:
    with psycopg.connect(site.direct) as connection:
        connection.execute("LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE")
        yield


@contextmanager
def disk_full(site: Site) -> Iterator[None]:
    site.execute(
        "CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION "
        "'could not extend file \"base/5/1\": No space left on device' USING ERRCODE = '53100'; END $$",
        "CREATE TRIGGER full_disk BEFORE INSERT ON jobs EXECUTE FUNCTION full_disk()",
    )
    yield
    site.execute("DROP TRIGGER full_disk ON jobs")


Way = Callable[[Site], AbstractContextManager[None]]
ALL_AWAY: list[Way] = [refusing, resetting, hung, slow, pool_exhausted]


@pytest.mark.parametrize("way", ALL_AWAY, ids=lambda way: way.__name__)
def test_while_postgresql_is_away_nothing_is_accepted_and_it_recovers_by_itself(site: Site, way: Way) -> None:
    api = site.api
    job_id = api.make()["id"]
    with way(site):
        assert all(refused(api.post("/jobs", json=JOB)) for _ in range(4))
        assert refused(api.get(f"/jobs/{job_id}"))
        assert refused(api.post(f"/jobs/{job_id}/cancel"))
        assert api.get("//livez", key=None).status_code == 200
        ready = api.get("//readyz", key=None)
        assert (ready.status_code, ready.json()["database"]) == (503, "away")
    wait_until(lambda: api.get("//readyz", key=None).status_code == 200, what="the API is ready again")
    wait_until(lambda: api.post("/jobs", json=JOB).status_code == 202, what="jobs are accepted again")
    assert api.get(f"/jobs/{job_id}").json()["status"] == "queued"


@pytest.mark.parametrize("way", [locked, disk_full], ids=lambda way: way.__name__)
def test_while_postgresql_cannot_write_jobs_none_is_accepted_and_none_is_half_written(
    site: Site, way: Way
) -> None:
    api = site.api
    api.make()
    with way(site):
        assert all(refused(api.post("/jobs", json=JOB)) for _ in range(3))
    assert api.post("/jobs", json=JOB).status_code == 202
    assert api.count_jobs() == 2
    with api.database.read() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(models.job_events)) == 2


def test_a_server_that_became_a_replica_is_left_and_found_again_as_a_master(
    own_postgres_server: PostgresServer, local: Any
) -> None:
    with site_on(own_postgres_server, local) as site:
        api = site.api
        job_id = api.make()["id"]
        site.execute("ALTER SYSTEM SET default_transaction_read_only = on", "SELECT pg_reload_conf()")
        wait_until(lambda: refused(api.post("/jobs", json=JOB)), what="its sessions only read")
        assert all(refused(api.post("/jobs", json=JOB)) for _ in range(3))
        assert refused(api.get(f"/jobs/{job_id}")), "what a replica says may be old"
        site.execute(
            "SET default_transaction_read_only = off",
            "ALTER SYSTEM RESET default_transaction_read_only",
            "SELECT pg_reload_conf()",
        )
        wait_until(lambda: api.post("/jobs", json=JOB).status_code == 202, what="jobs are accepted again")
        assert api.get(f"/jobs/{job_id}").status_code == 200


def test_terminated_sessions_are_replaced(site: Site) -> None:
    api = site.api
    accepted = 0
    for _ in range(5):
        api.make()
        accepted += 1
        site.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name = 'laneway' AND datname = current_database()"
        )
        answers = [api.post("/jobs", json=JOB) for _ in range(3)]
        assert all(a.status_code == 202 or refused(a) for a in answers)
        accepted += sum(a.status_code == 202 for a in answers)
        wait_until(lambda: api.get("//readyz", key=None).status_code == 200, what="the API is ready again")
    api.database.dispose()
    assert api.count_jobs() == accepted


def test_a_server_without_a_free_connection_is_away_for_those_who_have_none(
    small_server: SmallServer, local: Any
) -> None:
    with site_on(small_server, local) as site, ExitStack() as held:
        api = site.api
        api.make()
        api.database.dispose()
        site.runtime_database().dispose()
        with suppress(psycopg.OperationalError):
            for _ in range(20):
                held.enter_context(psycopg.connect(site.direct))
        assert all(refused(api.post("/jobs", json=JOB)) for _ in range(3))
        assert refused(api.get("/jobs"))
        held.close()
        wait_until(lambda: api.post("/jobs", json=JOB).status_code == 202, what="jobs are accepted again")


def test_once_the_database_is_silent_nobody_else_waits_for_it(site: Site) -> None:
    api = site.api
    api.make()
    site.proxy.blackhole()
    with ExitStack() as stack:
        asked = [stack.enter_context(api.asking("POST", "/jobs", json=JOB)) for _ in range(50)]
        asked += [stack.enter_context(api.asking("GET", "/jobs")) for _ in range(150)]
        assert all(refused(answer()) for answer in asked)
    dialled = site.proxy.connections
    assert all(refused(api.get("/jobs")) for _ in range(5))
    assert site.proxy.connections <= dialled + 1
    site.proxy.heal()
    wait_until(lambda: api.post("/jobs", json=JOB).status_code == 202, what="jobs are accepted again")


@pytest.mark.parametrize(("fields", "made"), [({"unique_key": "order-1"}, 1), ({}, 2)], ids=["key", "no key"])
def test_a_lost_answer_is_no_202_and_a_unique_key_finds_what_was_written(
    site: Site, fields: dict[str, str], made: int
) -> None:
    """The commit arrives and its reply does not: a 503, which says that nobody knows."""
    api = site.api
    api.make()
    order = JOB | {"title": "find-me"} | fields
    site.proxy.lose_reply(to=b"find-me")
    assert refused(api.post("/jobs", json=order))
    assert site.proxy.lost == 1
    site.proxy.heal()
    wait_until(lambda: api.post("/jobs", json=order).status_code == 202, what="the retry is accepted")
    titled = sa.select(models.jobs.c.id).where(models.jobs.c.title == "find-me")
    with api.database.read() as connection:
        written = connection.execute(titled).scalars().all()
    assert len(written) == made
    if fields:
        assert api.make(**fields)["id"] == written[0]


# SQLite


@contextmanager
def on_every_connection(api: LocalApi, pragma: str) -> Iterator[None]:
    database: Database = api.app.state.runtime.database

    def prepare(connection: sqlite3.Connection, _record: Any) -> None:
        connection.execute(f"PRAGMA {pragma}")

    sa.event.listen(database.engine, "connect", prepare)
    database.dispose()
    yield
    sa.event.remove(database.engine, "connect", prepare)
    database.dispose()


@contextmanager
def sqlite_full(api: LocalApi) -> Iterator[None]:
    with api.database.write() as connection:
        pages = connection.scalar(sa.text("PRAGMA page_count"))
    with on_every_connection(api, f"max_page_count={pages}"):
        yield


@contextmanager
def sqlite_read_only(api: LocalApi) -> Iterator[None]:
    with on_every_connection(api, "query_only=ON"):
        yield


@contextmanager
def sqlite_busy(api: LocalApi) -> Iterator[None]:
    with api.database.write():
        yield


@pytest.mark.parametrize("way", [sqlite_full, sqlite_read_only, sqlite_busy], ids=lambda way: way.__name__)
def test_while_sqlite_cannot_write_nothing_is_accepted_and_it_recovers_by_itself(
    local: Any, monkeypatch: pytest.MonkeyPatch, way: Callable[[LocalApi], AbstractContextManager[None]]
) -> None:
    monkeypatch.setattr(db, "SQLITE_BUSY_SECONDS", 0.2)
    api: LocalApi = local()
    job_id = api.make()["id"]
    big = JOB | {"job_type": "demo.echo", "parameters": {"text": "x" * 200_000}}
    with way(api):
        assert all(refused(api.post("/jobs", json=big)) for _ in range(3))
        assert api.get(f"/jobs/{job_id}").status_code == 200, "who only reads is served"
        assert api.get("//readyz", key=None).status_code == 200
    assert api.post("/jobs", json=big).status_code == 202
    assert api.count_jobs() == 2


# Too much


def test_parameters_are_taken_at_their_limit_and_refused_a_byte_past_it(each_api: LocalApi) -> None:
    around = len('{"text":""}')
    for size, status in ((MAX_BYTES, 202), (MAX_BYTES + 1, 413)):
        body = {"job_type": "demo.echo", "parameters": {"text": "x" * (size - around)}}
        assert each_api.post("/jobs", json=body).status_code == status
    assert each_api.count_jobs() == 1


@pytest.fixture
def with_quota(database_url: str, local: Any) -> LocalApi:
    api: LocalApi = local(database_url=database_url, waiting_per_tenant=3)
    return api


def test_a_tenant_has_as_many_jobs_waiting_as_it_may_and_one_more_is_refused(with_quota: LocalApi) -> None:
    api = with_quota
    api.make()
    api.make(delay_seconds=3600)
    last = api.make(priority="critical")["id"]
    response = api.post("/jobs", json=JOB)
    problem = response.json()
    assert (response.status_code, problem["code"]) == (429, "quota_queued")
    assert problem["facts"] == {"waiting": 3, "limit": 3}
    assert 2 <= int(response.headers["retry-after"]) <= 10
    assert api.post("/jobs", key=api.key(tenant="other"), json=JOB).status_code == 202
    complete(api, claim(api, last))
    wait_until(lambda: api.post("/jobs", json=JOB).status_code == 202, what="an end makes room")
    assert api.post("/jobs", json=JOB).status_code == 429


def test_when_too_many_jobs_wait_the_least_urgent_are_refused_first(
    database: Database, clock: FrozenClock
) -> None:
    service = service_on(database, clock, waiting_total=2)
    assert ask(service, "low", "low", "low") == ["ok", "ok", "overloaded"]
    assert ask(service, "low", "normal", "normal", "normal") == ["overloaded", "ok", "ok", "overloaded"]
    assert ask(service, "high", "critical", "normal", "low") == ["ok", "ok", "overloaded", "overloaded"]
    assert ask(service, "low", caller=OTHER) == ["overloaded"], "it is everybody's limit"


def test_the_numbers_are_in_the_refusals(database: Database, clock: FrozenClock) -> None:
    service = service_on(database, clock, waiting_total=1, waiting_per_tenant=2)
    low, high = (JobSpec(job_type="demo.noop", priority=p) for p in (Priority.LOW, Priority.HIGH))
    _, overloaded, _ = service.enqueue([service.prepare(spec, OPERATOR) for spec in (low, low, high)])
    assert isinstance(overloaded, Overloaded)
    assert overloaded.facts == {"waiting": 1, "limit": 1, "priority": "low"}
    [full] = service.enqueue([service.prepare(JobSpec(job_type="demo.noop"), OPERATOR)])
    assert isinstance(full, QuotaQueued)
    assert full.facts == {"waiting": 2, "limit": 2}
    assert all(2 <= (e.retry_after_seconds or 0) <= 10 for e in (overloaded, full))


@pytest.mark.parametrize("status", [JobStatus.QUEUED, JobStatus.SCHEDULED, JobStatus.RETRYING])
def test_what_waits_counts(database: Database, clock: FrozenClock, status: JobStatus) -> None:
    add_job(database, status, tenant_id=TENANT)
    assert ask(service_on(database, clock, waiting_per_tenant=1), "high") == ["quota_queued"]


@pytest.mark.parametrize("status", [JobStatus.RUNNING, JobStatus.COMPLETED, JobStatus.FAILED])
def test_what_runs_or_has_ended_does_not_count(
    database: Database, clock: FrozenClock, status: JobStatus
) -> None:
    add_job(database, status, tenant_id=TENANT)
    assert ask(service_on(database, clock, waiting_per_tenant=1), "high") == ["ok"]


def test_what_was_not_written_takes_no_room(database: Database, clock: FrozenClock) -> None:
    service = service_on(database, clock, waiting_per_tenant=2)
    twice = service.prepare(JobSpec(job_type="demo.noop"), OPERATOR)
    for _ in range(3):
        service.enqueue([twice])
    assert ask(service, "low", "low") == ["ok", "quota_queued"]


def test_a_refusal_rests_on_a_count_not_older_than_a_second(database: Database, clock: FrozenClock) -> None:
    service = service_on(database, clock, waiting_per_tenant=1)
    job_id = add_job(database, tenant_id=TENANT)
    assert ask(service, "low") == ["quota_queued"]
    service.cancel(job_id, OPERATOR)
    assert ask(service, "low") == ["quota_queued"]
    clock.advance(seconds=admission.COUNT_SECONDS)
    assert ask(service, "low") == ["ok"]


@pytest.mark.parametrize("setting", [1, 1000])
def test_a_tenant_with_a_quota_of_its_own_has_that_many_and_not_one_more(
    database: Database, clock: FrozenClock, setting: int
) -> None:
    """Whatever the setting says; the others have what it says."""
    own = {"id": TENANT, "name": "own", "webhook_secret": "s", "created_by": "t", "max_queued": 3}
    with database.write() as connection:
        connection.execute(sa.insert(models.tenants).values(own))
    service = service_on(database, clock, waiting_per_tenant=setting)
    assert ask(service, *["low"] * 5) == ["ok"] * 3 + ["quota_queued"] * 2
    others = ask(service, "low", "low", caller=OTHER)
    assert others == (["ok", "quota_queued"] if setting == 1 else ["ok", "ok"])
    [refused] = service.enqueue([service.prepare(JobSpec(job_type="demo.noop"), OPERATOR)])
    assert isinstance(refused, QuotaQueued)
    assert refused.facts == {"waiting": 3, "limit": 3}


def test_a_new_quota_is_heard_with_the_next_count(database: Database, clock: FrozenClock) -> None:
    own = {"id": TENANT, "name": "own", "webhook_secret": "s", "created_by": "t", "max_queued": 1}
    with database.write() as connection:
        connection.execute(sa.insert(models.tenants).values(own))
    service = service_on(database, clock, waiting_per_tenant=10)
    assert ask(service, "low", "low") == ["ok", "quota_queued"]
    change(database, models.tenants, TENANT, max_queued=None)
    clock.advance(seconds=admission.COUNT_SECONDS)
    assert ask(service, "low", "low") == ["ok", "ok"]


def test_a_quota_is_counted_off_the_hot_path(database: Database, clock: FrozenClock) -> None:
    """One count lets a process answer for a second, or for a twentieth of the limit."""
    service = service_on(database, clock, waiting_per_tenant=1000)
    counts: list[str] = []

    @sa.event.listens_for(database.engine, "before_cursor_execute")
    def _note(_c: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if "AS waiting" in statement:
            counts.append(threading.current_thread().name)

    for _ in range(20):
        assert ask(service, "low") == ["ok"]
    held = JobSpec(job_type="demo.noop", unique_key="k", on_conflict="reject")
    for _ in range(25):
        service.enqueue([service.prepare(held, OPERATOR)])
    assert len(counts) == 1, "24 of the 45 took no room"
    clock.advance(seconds=admission.COUNT_SECONDS)
    ask(service, "low")
    wait_until(lambda: len(counts) == 2, what="it is counted again")
    assert counts[1].startswith("admission")


def test_two_processes_pass_a_quota_by_no_more_than_is_stated(database: Database, tmp_path: Path) -> None:
    quota = 200
    (tmp_path / "ready").mkdir()
    url = database.url.render_as_string(False)
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as processes:
        made = [processes.submit(fill, url, quota, tmp_path / "ready") for _ in range(2)]
        total = sum(future.result(100) for future in made)
    one_share, one_job_a_thread = 10, 4  # of the process that is not the last to count
    assert quota <= total <= quota + one_share + one_job_a_thread
    with database.read() as connection:
        assert total + 2 == connection.scalar(sa.select(sa.func.count()).select_from(models.jobs))


# Redis


@pytest.fixture
def redis_proxy(own_redis_server: RedisServer) -> Iterator[FaultProxy]:
    with FaultProxy(own_redis_server.socket) as proxy:
        yield proxy


def _tell(server: RedisServer, *commands: str) -> None:
    with server.client() as client:
        for command in commands:
            client.execute_command(*command.split())


REDIS_WAYS: dict[str, Callable[[FaultProxy, RedisServer], None]] = {
    "down": lambda proxy, _: proxy.refuse(),
    "hung": lambda proxy, _: proxy.blackhole(),
    "out of memory": lambda _, server: _tell(server, "CONFIG SET maxmemory 1"),
    "a replica": lambda _, server: _tell(server, "REPLICAOF 127.0.0.1 1"),
    "without scripts": lambda _, server: _tell(server, "SCRIPT FLUSH"),
}


@pytest.mark.parametrize("way", REDIS_WAYS)
def test_whatever_redis_does_jobs_are_accepted(
    local: Any, own_redis_server: RedisServer, redis_proxy: FaultProxy, way: str
) -> None:
    api: LocalApi = local(redis_url=f"redis://127.0.0.1:{redis_proxy.port}/0")
    api.make()
    REDIS_WAYS[way](redis_proxy, own_redis_server)
    jobs = [api.make()["id"] for _ in range(5)]
    assert api.post(f"/jobs/{jobs[0]}/cancel").json()["status"] == "cancelled"
    assert api.get("/jobs").status_code == 200
    assert api.count_jobs() == 6
    redis_proxy.heal()
    _tell(own_redis_server, "REPLICAOF NO ONE", "CONFIG SET maxmemory 0")
    with own_redis_server.client() as client:

        def rung() -> bool:
            job_id = api.make()["id"]
            return job_id.encode() in client.lrange("rq:queue:normal", 0, -1)

        wait_until(rung, what="lanes are rung again")
