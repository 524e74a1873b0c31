"""What workers and schedulers do while PostgreSQL says nothing, or has no connection to spare."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa

from fault_proxy import FaultProxy
from process.stack import SHORT_LEASE, Stack, is_alive
from servers import PostgresServer

BEATS_OF_A_LEASE = 8  # 3 s of one each 0.4 s


class SmallServer(PostgresServer):
    """One whose connections are soon used up."""

    SETTINGS = (*PostgresServer.SETTINGS, "max_connections=20", "superuser_reserved_connections=0")


@pytest.fixture
def small_server() -> Iterator[SmallServer]:
    with SmallServer() as server:
        yield server


@pytest.fixture
def proxy(postgres_server: PostgresServer) -> Iterator[FaultProxy]:
    with FaultProxy(postgres_server.folder / ".s.PGSQL.5432") as started:
        yield started


@pytest.fixture
def stack(postgres_url: str, redis_url: str, tmp_path: Path) -> Iterator[Stack]:
    with Stack(postgres_url, redis_url, tmp_path) as started:
        yield started


def through(proxy: FaultProxy, stack: Stack) -> dict[str, str]:
    """The environment of a process whose way to the database leads through the proxy."""
    url = stack.database.url.set(host="127.0.0.1", port=proxy.port, query={})
    return {"LANEWAY_DATABASE_URL": url.render_as_string(False)}


def held_job(stack: Stack, folder: Path) -> str:
    """A job that runs until `folder/gate` is there; a second attempt ends at once."""
    parameters = {"ledger": str(folder / "held"), "gate": str(folder / "gate"), "once": True}
    job_id = stack.enqueue("test.hold", parameters)
    stack.wait_for_file(folder / "held")
    return job_id


def test_a_worker_cut_off_from_a_silent_database_stops_its_job_and_another_takes_it(
    stack: Stack, proxy: FaultProxy, tmp_path: Path
) -> None:
    """Only its own way to the database is dead, and no connection breaks: nothing but time tells."""
    cut_off = stack.worker(**SHORT_LEASE, **through(proxy, stack))
    stack.scheduler(**SHORT_LEASE)
    job_id = held_job(stack, tmp_path)
    (child,) = stack.children(cut_off)
    stack.worker(**SHORT_LEASE)
    proxy.blackhole()
    stack.until(lambda: not is_alive(child), what="the worker has stopped its job")
    row = stack.wait(job_id)
    assert (row["attempt"], row["status"]) == (2, "completed")
    proxy.heal()
    cut_off.wait_for("lease_lost")
    stack.until(
        lambda: sum(worker["state"] == "active" for worker in stack.worker_rows()) == 2,
        what="it is back under another id",
    )
    assert stack.events(job_id).count("complete") == 1


def test_a_scheduler_whose_database_was_silent_goes_on_by_itself(stack: Stack, proxy: FaultProxy) -> None:
    scheduler = stack.scheduler(LANEWAY_STATEMENT_SECONDS="1", **through(proxy, stack))
    stack.worker()
    proxy.blackhole()
    scheduler.wait_for("sweep_failed", times=2)
    job_id = stack.enqueue("demo.noop", delay_seconds=0.1)
    proxy.heal()
    stack.wait(job_id)


def test_with_all_connections_taken_a_worker_keeps_its_lease_and_its_jobs_end(
    small_server: SmallServer, redis_url: str, tmp_path: Path
) -> None:
    """Beats have a connection of their own, and so has the reaper; both were there before."""
    url = small_server.fresh()
    with Stack(url, redis_url, tmp_path) as stack, ExitStack() as taken:
        stack.worker(**SHORT_LEASE)
        stack.scheduler(**SHORT_LEASE)
        job_id = held_job(stack, tmp_path)

        def beats() -> int:
            (worker,) = stack.worker_rows()
            return int(worker["beat"])

        wanted = beats() + 2 * BEATS_OF_A_LEASE
        name = sa.make_url(url).database or ""
        with suppress(psycopg.OperationalError):
            for _ in range(30):
                taken.enter_context(
                    psycopg.connect(host=str(small_server.folder), user="postgres", dbname=name)
                )
        with pytest.raises(psycopg.OperationalError, match="too many clients"):
            psycopg.connect(host=str(small_server.folder), user="postgres", dbname=name)
        stack.until(lambda: beats() >= wanted, what="two leases of beats")
        (tmp_path / "gate").touch()
        row = stack.wait(job_id)
        assert (row["attempt"], row["crash_count"]) == (1, 0)
