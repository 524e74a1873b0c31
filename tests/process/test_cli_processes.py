"""`laneway api`, `worker`, `scheduler` and `courier` as processes: signals, ports, what they take along."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import stat
from pathlib import Path

import pytest

from laneway.clock import SystemClock
from laneway.db import Database
from laneway.domain.spec import JobSpec
from laneway.engine.access.callers import Caller, Role, ensure_tenant
from laneway.engine.registry import load
from laneway.engine.service import JobService
from laneway.lanes.rq_lanes import RqLanes
from laneway.settings import Settings
from laneway.webhooks.secrets import SecretBox
from laneway_process import Running, alive, family, laneway, member
from servers import wait_until


@pytest.fixture
def stores(sqlite_url: str, redis_url: str, tmp_path: Path) -> dict[str, object]:
    return {"LANEWAY_DATABASE_URL": sqlite_url, "LANEWAY_REDIS_URL": redis_url, "LANEWAY_DATA_DIR": tmp_path}


def queue_some(stores: dict[str, object], *specs: JobSpec) -> list[str]:
    """Queue jobs as the API does; their ids."""
    settings = Settings(database_url=stores["LANEWAY_DATABASE_URL"], redis_url=stores["LANEWAY_REDIS_URL"])
    database = Database(settings.database)
    lanes = RqLanes(settings.redis_url, clock=SystemClock(), window=settings.lane_window)
    try:
        tenant_id = ensure_tenant(database, SecretBox({"k": bytes(32)}), "default")
        service = JobService(database, lanes, settings, load(()))
        caller = Caller(tenant_id, "test", Role.ADMIN)
        return [job["id"] for job in service.enqueue([service.prepare(spec, caller) for spec in specs])]
    finally:
        lanes.close()
        database.dispose()


def statuses(stores: dict[str, object]) -> dict[str, str]:
    """The status of each job, by id."""
    with sqlite3.connect(str(stores["LANEWAY_DATABASE_URL"]).removeprefix("sqlite:///")) as store:
        found = dict(store.execute("SELECT id, status FROM jobs").fetchall())
    store.close()
    return found


def test_a_burst_worker_runs_all_that_waits_and_leaves(stores: dict[str, object]) -> None:
    ids = queue_some(
        stores,
        *(JobSpec(job_type="demo.noop", priority=priority) for priority in ("low", "critical", "normal")),
        JobSpec(job_type="demo.noop", queue="emails"),
        JobSpec(job_type="demo.noop", queue="other"),
    )
    ended = laneway(
        *("worker", "--burst", "--concurrency", "2", "--no-courier", "--queues", "default,emails"), **stores
    )
    assert ended.returncode == 0, ended.stderr
    assert list(map(statuses(stores).get, ids)) == ["completed"] * 4 + ["queued"]


@pytest.mark.parametrize("queues", ["", ",", "Emails", "emails-high"])
def test_a_queue_that_can_have_no_jobs_is_a_usage_error(queues: str, stores: dict[str, object]) -> None:
    refused = laneway("worker", "--queues", queues, **stores)
    assert refused.returncode == 2
    assert "--queues" in refused.stderr


def test_a_worker_whose_task_module_is_broken_says_which(stores: dict[str, object]) -> None:
    refused = laneway("worker", LANEWAY_TASKS="no_such_module", **stores)
    assert refused.returncode == 1
    assert "LANEWAY_TASKS" in refused.stderr
    assert "No module named 'no_such_module'" in refused.stderr


def test_a_courier_that_dies_is_started_again(stores: dict[str, object], tmp_path: Path) -> None:
    with Running(tmp_path, "worker", "--concurrency", 1, **stores) as worker:
        first = member(worker.process.pid, "courier")
        worker.says("courier_started")
        os.kill(first, signal.SIGKILL)
        worker.says("courier_died")
        wait_until(
            lambda: member(worker.process.pid, "courier") != first,
            what="another courier runs",
            evidence=worker.evidence,
        )
        everything = family(worker.process.pid)
        assert worker.stop() == 0
        assert alive(everything) == set()


def test_a_worker_without_a_courier_has_none(stores: dict[str, object], tmp_path: Path) -> None:
    with Running(tmp_path, "worker", "--concurrency", 1, "--no-courier", **stores) as worker:
        worker.says("worker_started")
        assert worker.stop() == 0
        assert "courier_started" not in worker.err


def test_what_a_worker_started_dies_with_it(stores: dict[str, object], tmp_path: Path) -> None:
    with Running(tmp_path, "worker", "--concurrency", 1, **stores) as worker:
        worker.says("courier_started")
        everything = family(worker.process.pid)
        assert len(everything) >= 3  # itself, the nursery, the courier
        worker.stop(signal.SIGKILL)
        wait_until(lambda: not alive(everything), what="nothing is left", evidence=worker.evidence)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("command", ["scheduler", "courier"])
def test_a_process_that_is_told_to_stop_leaves_with_zero(
    command: str, how: signal.Signals, stores: dict[str, object], tmp_path: Path
) -> None:
    with Running(tmp_path, command, **stores) as process:
        process.says(f"{command}_started")
        assert process.stop(how) == 0, process.evidence()
        assert "Traceback" not in process.err


def test_a_scheduler_queues_what_falls_due(stores: dict[str, object], tmp_path: Path) -> None:
    (job_id,) = queue_some(stores, JobSpec(job_type="demo.noop", delay_seconds=0.2))
    with Running(tmp_path, "scheduler", **stores) as process:
        wait_until(
            lambda: statuses(stores)[job_id] == "queued", what="the job is queued", evidence=process.evidence
        )
        assert process.stop() == 0


def test_an_api_makes_a_private_admin_key_and_leaves_with_zero(
    stores: dict[str, object], tmp_path: Path
) -> None:
    for _ in range(2):  # the second start finds the key
        with Running(tmp_path, "api", "--port", 0, **stores) as process:
            process.says("api_starting")
            port = wait_until(
                lambda: listening(process.process.pid), what="it listens", evidence=process.evidence
            )
            asked = laneway("stats", LANEWAY_URL=f"http://127.0.0.1:{port}", LANEWAY_DATA_DIR=tmp_path)
            assert asked.returncode == 0, asked.stderr
            assert process.stop() == 0, process.evidence()
            assert "Traceback" not in process.err
    assert stat.S_IMODE((tmp_path / "admin.key").stat().st_mode) == 0o600


@pytest.mark.parametrize("command", ["api", "dev"])
def test_a_port_that_is_taken_is_refused_in_one_line(
    command: str, stores: dict[str, object], tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        refused = laneway(command, "--port", port, **stores)
    assert refused.returncode == 1
    assert refused.stderr == (
        f"laneway: port {port} of 127.0.0.1 is taken: stop what listens there, or name another with --port\n"
    )


def listening(pid: int) -> int | None:
    """A TCP port that the process listens on (proc(5), net/tcp), if any."""
    sockets = set()
    for handle in Path(f"/proc/{pid}/fd").iterdir():
        try:
            sockets.add(os.readlink(handle))
        except OSError:
            continue  # closed since
    for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
            return int(fields[1].rpartition(":")[2], 16)
    return None
