"""What the doctor asks of a store: each sentence with a defect that breaks it, and no other."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from factories import NOW, TENANT, add_endpoint, add_job, add_schedule, add_worker, change
from laneway import models
from laneway.clock import SystemClock, new_id
from laneway.db import Database
from laneway.domain.states import FINAL, JobStatus
from laneway.engine import doctor
from laneway.engine.doctor import CHECKS, HEAD, RECENT, SHOWN, clock_ahead, examine, missing_from

LATER = NOW + timedelta(minutes=3)
URL = "https://receiver.example/"
KNOWN = ("demo.echo",)


def found(database: Database, **options: Any) -> dict[str, set[str]]:
    """The ids that break each sentence, by its name."""
    asked: dict[str, Any] = {"now": LATER, "job_types": KNOWN} | options
    return {finding.name: set(finding.ids) for finding in examine(database, **asked)}


def add_message(database: Database, job_id: str, *, seq: int = 1, event_type: str = "job.failed") -> str:
    row: dict[str, Any] = {
        "id": f"msg_{new_id()}",
        "tenant_id": TENANT,
        "created_by": "alice",
        "job_id": job_id,
    }
    row |= {"job_seq": seq, "event_type": event_type, "payload": b"{}"}
    with database.write() as connection:
        connection.execute(sa.insert(models.webhook_messages).values(row))
    return str(row["id"])


def add_delivery(database: Database, message_id: str, job_id: str, **columns: Any) -> str:
    row: dict[str, Any] = {"id": new_id(), "tenant_id": TENANT, "created_by": "alice", "job_id": job_id}
    row |= {"message_id": message_id, "url": URL, "status": "pending", "max_attempts": 3, "next_at": LATER}
    with database.write() as connection:
        connection.execute(sa.insert(models.webhook_deliveries).values(row | columns))
    return str(row["id"])


@pytest.fixture
def healthy(database: Database) -> Database:
    """A store with a job in every status, a worker, and a webhook on its way; busy, and not ill."""
    worker_id = add_worker(database, beat_at=LATER, held=["a token"])
    soon = {"scheduled_for": LATER, "next_retry_at": LATER, "expires_at": LATER, "queued_at": LATER}
    running = {
        "started_at": LATER,
        "timeout_seconds": 1,
        "cancel_requested_at": LATER,
        "worker_id": worker_id,
    }
    for status in JobStatus:
        columns: dict[str, Any] = {"webhook_url": URL, "finished_at": LATER if status in FINAL else None}
        columns |= running if status is JobStatus.RUNNING else {}
        columns |= {n: at for n, at in soon.items() if n != "next_retry_at" or status is JobStatus.RETRYING}
        job_id = add_job(database, status, **columns)
        if status in FINAL:
            message_id = add_message(database, job_id)
            add_delivery(database, message_id, job_id)
    add_job(database, JobStatus.FAILED, webhook_url=URL, webhook_events=["job.completed"], finished_at=LATER)
    told_and_pruned_since = NOW - timedelta(days=2)
    add_job(database, JobStatus.FAILED, webhook_url=URL, finished_at=told_and_pruned_since)
    return database


def test_a_busy_store_is_healthy(healthy: Database) -> None:
    assert found(healthy) == {}
    assert found(healthy, now=LATER + timedelta(minutes=1)) == {}


Defect = Callable[[Database], str]
DEFECTS: list[tuple[str, Defect]] = []


def defect(name: str) -> Callable[[Defect], Defect]:
    """Something that breaks the sentence `name` alone; the function says which id must be shown."""

    def add(plant: Defect) -> Defect:
        DEFECTS.append((name, plant))
        return plant

    return add


def add_running(database: Database, worker_id: str, **columns: Any) -> str:
    return add_job(database, JobStatus.RUNNING, worker_id=worker_id, **columns)


@defect("orphans")
def dead_worker(database: Database) -> str:
    return add_running(database, add_worker(database, state="dead", beat_at=NOW), timeout_seconds=3600)


@defect("orphans")
def worker_that_left(database: Database) -> str:
    return add_running(database, add_worker(database, state="gone", beat_at=NOW), timeout_seconds=3600)


@defect("orphans")
def worker_without_a_row(database: Database) -> str:
    return add_running(database, new_id(), timeout_seconds=3600)


@defect("overdue_runs")
def past_its_timeout(database: Database) -> str:
    started = LATER - timedelta(minutes=5, seconds=61)
    worker_id = add_worker(database, beat_at=LATER, held=["x"])
    return add_running(database, worker_id, started_at=started, timeout_seconds=60)


@defect("overdue_runs")
def past_its_cancel(database: Database) -> str:
    worker_id = add_worker(database, beat_at=LATER, held=["x"])
    asked = {"cancel_requested_at": LATER - timedelta(minutes=5, seconds=11), "cancel_grace_seconds": 10.0}
    return add_running(database, worker_id, timeout_seconds=3600, **asked)


@defect("silent_workers")
def silent(database: Database) -> str:
    return add_worker(database, beat_at=LATER - timedelta(seconds=121))


@defect("late_schedules")
def late_schedule(database: Database) -> str:
    return add_job(database, JobStatus.SCHEDULED, scheduled_for=LATER - timedelta(seconds=61))


@defect("late_slots")
def late_slot(database: Database) -> str:
    late = LATER - timedelta(seconds=61)
    add_schedule(database, next_slot=LATER, due_at=LATER - timedelta(seconds=59))
    return add_schedule(database, next_slot=late, due_at=late)


@defect("late_retries")
def late_retry(database: Database) -> str:
    return add_job(database, JobStatus.RETRYING, next_retry_at=LATER - timedelta(seconds=61))


@defect("late_expiries")
def late_expiry(database: Database) -> str:
    late = LATER - timedelta(seconds=61)
    return add_job(database, JobStatus.QUEUED, expires_at=late, queued_at=LATER)


@defect("unfollowed_ends")
def an_end_that_nothing_followed(database: Database) -> str:
    ended = {"linked": True, "finished_at": LATER - timedelta(seconds=61), "progress": 100}
    return add_job(database, JobStatus.COMPLETED, **ended)


@defect("kept_waiting")
def a_job_that_waits_for_a_free_slot(database: Database) -> str:
    waits = {"concurrency_key": "k", "concurrency_limit": 1, "status_reason": "concurrency_key"}
    return add_job(database, JobStatus.BLOCKED, updated_at=LATER - timedelta(seconds=61), **waits)


@defect("overfull_keys")
def two_that_run_where_one_may(database: Database) -> str:
    key = {"concurrency_key": "k", "concurrency_limit": 1, "gated": True, "started_at": LATER}
    worker = add_worker(database, beat_at=LATER)
    return max(add_running(database, worker, timeout_seconds=3600, **key) for _ in range(2))


@defect("late_chains")
def a_chain_past_its_timeout(database: Database) -> str:
    run = {
        "id": new_id(),
        "tenant_id": TENANT,
        "created_by": "alice",
        "chain_id": new_id(),
        "name": "nightly",
        "plan": [],
        "stop_on_failure": True,
        "status": "running",
        "step_errors": {},
        "deadline_at": LATER - timedelta(seconds=61),
    }
    with database.write() as connection:
        connection.execute(sa.insert(models.chain_runs).values(run))
    return str(run["id"])


@defect("passed_over")
def passed_over(database: Database) -> str:
    add_worker(database, beat_at=LATER, lanes=["emails"])  # holds nothing
    return add_job(database, lane="emails", queued_at=LATER - timedelta(minutes=5, seconds=1))


@defect("no_capable_worker")
def unknown_type(database: Database) -> str:
    add_worker(database, beat_at=LATER)  # has nothing to do, and is not to blame
    return add_job(database, job_type="old.name", queued_at=LATER - timedelta(minutes=6))


@defect("histories")
def another_status(database: Database) -> str:
    job_id = add_job(database, queued_at=LATER)
    change(database, models.jobs, job_id, status="expired", finished_at=NOW)
    return job_id


@defect("histories")
def no_last_event(database: Database) -> str:
    job_id = add_job(database, JobStatus.COMPLETED)
    change(database, models.jobs, job_id, event_seq=2)
    return job_id


@defect("histories")
def a_gap(database: Database) -> str:
    return add_job(database, JobStatus.COMPLETED, event_seq=2)  # the first is not there


@defect("retry_counts")
def too_many_retries(database: Database) -> str:
    return add_job(database, JobStatus.FAILED, retry_count=4, max_retries=3)


@defect("untold_ends")
def untold(database: Database) -> str:
    return add_job(database, JobStatus.FAILED, webhook_url=URL, webhook_events=["job.failed"])


@defect("uncarried_messages")
def uncarried(database: Database) -> str:
    job_id = add_job(database, JobStatus.FAILED, webhook_url=URL)
    return add_message(database, job_id)


@defect("late_deliveries")
def late_delivery(database: Database) -> str:
    job_id = add_job(database, JobStatus.FAILED, webhook_url=URL)
    late = LATER - timedelta(minutes=10, seconds=1)
    return add_delivery(database, add_message(database, job_id), job_id, status="retrying", next_at=late)


def late_for(database: Database, **endpoint: Any) -> str:
    endpoint_id = add_endpoint(database, "job.failed", **endpoint)
    job_id = add_job(database, JobStatus.FAILED)
    to = {"endpoint_id": endpoint_id, "target_id": endpoint_id}
    late = LATER - timedelta(minutes=10, seconds=1)
    return add_delivery(database, add_message(database, job_id), job_id, status="pending", next_at=late, **to)


@defect("late_deliveries")
def late_for_an_endpoint(database: Database) -> str:
    return late_for(database)


def test_what_waits_for_a_paused_endpoint_or_for_its_turn_is_not_late(healthy: Database) -> None:
    late_for(healthy, status="paused")
    late_for(healthy, in_order=True)
    assert found(healthy) == {}


@defect("lost_deliveries")
def lost_delivery(database: Database) -> str:
    job_id = add_job(database, JobStatus.FAILED, webhook_url=URL)
    lease = {"lease_owner": new_id(), "lease_until": LATER - timedelta(minutes=10, seconds=1)}
    return add_delivery(database, add_message(database, job_id), job_id, status="sending", **lease)


@pytest.mark.parametrize(("name", "plant"), [pytest.param(n, p, id=f"{n}-{p.__name__}") for n, p in DEFECTS])
def test_each_defect_breaks_its_sentence_and_no_other(healthy: Database, name: str, plant: Defect) -> None:
    broken = plant(healthy)
    assert found(healthy) == {name: {broken}}


TIMED = ("overdue", "silent", "late", "passed", "lost")


@pytest.mark.parametrize(
    "plant", [pytest.param(p, id=p.__name__) for name, p in DEFECTS if name.startswith(TIMED)]
)
def test_each_limit_is_reached_before_it_is_passed(healthy: Database, plant: Defect) -> None:
    broken = plant(healthy)  # a second past its limit
    assert found(healthy, now=LATER - timedelta(seconds=1)) == {}
    assert [*found(healthy).values()] == [{broken}]


def test_a_transaction_that_stays_open_is_shown_by_its_process_id(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "LONG_TRANSACTION", timedelta(seconds=-1))  # as if five minutes had passed
    monkeypatch.setattr(doctor, "CHECKS", [check for check in CHECKS if check.name == "long_transactions"])
    ours, theirs = Database(postgres_url), Database(postgres_url)
    with theirs.read() as connection:
        pid = connection.execute(sa.text("SELECT pg_backend_pid()")).scalar_one()
        assert str(pid) in found(ours)["long_transactions"]
    monkeypatch.setattr(doctor, "LONG_TRANSACTION", timedelta(minutes=5))
    with theirs.read() as connection:
        connection.execute(sa.text("SELECT 1"))
        assert found(ours) == {}
    ours.dispose()
    theirs.dispose()


def test_every_sentence_has_a_name_a_remedy_and_a_defect() -> None:
    names = [check.name for check in CHECKS]
    assert len(set(names)) == len(names)
    assert set(names) == {name for name, _ in DEFECTS} | {"long_transactions"}
    assert all(check.remedy and check.sentence for check in CHECKS)


def test_ten_ids_of_eleven_are_shown(database: Database) -> None:
    for _ in range(SHOWN + 1):
        add_job(database, JobStatus.SCHEDULED)
    [finding] = examine(database, now=LATER)
    assert len(finding.ids) == SHOWN == 10


def test_a_job_type_that_nobody_was_asked_to_know_is_no_finding(database: Database) -> None:
    add_job(database, job_type="old.name")
    assert found(database, job_types=None) == {}
    assert set(found(database)) == {"no_capable_worker"}


def test_a_job_type_that_only_workers_of_other_lanes_know_is_a_finding(database: Database) -> None:
    busy = {"beat_at": LATER, "held": ["a token"]}
    add_worker(database, job_types=["demo.old"], **busy)
    add_worker(database, lanes=["emails"], job_types=["demo.echo"], **busy)
    add_worker(database, state="draining", job_types=["demo.echo"], **busy)
    job_id = add_job(database, job_type="demo.echo")
    assert found(database, job_types=None) == found(database) == {"no_capable_worker": {job_id}}
    add_worker(database, job_types=["demo.echo"], **busy)
    assert found(database) == {}


def test_what_a_worker_says_it_can_run_counts_more_than_what_is_installed_here(database: Database) -> None:
    add_worker(database, beat_at=LATER, held=["a token"], job_types=["demo.newer"])
    add_job(database, job_type="demo.newer")
    assert found(database) == {}


def test_an_idle_worker_that_does_not_know_the_type_passes_nothing_over(database: Database) -> None:
    add_worker(database, beat_at=LATER, job_types=["demo.old"])
    job_id = add_job(database, queued_at=LATER - timedelta(hours=1))
    assert found(database) == {"no_capable_worker": {job_id}}


def test_a_job_that_waits_behind_busy_workers_is_no_finding(database: Database) -> None:
    add_worker(database, beat_at=LATER, held=["a token"])
    add_worker(database, beat_at=LATER, lanes=["emails"])
    add_worker(database, beat_at=NOW)
    add_job(database, queued_at=LATER - timedelta(hours=1))
    assert set(found(database, lease_seconds=60)) == set()


def test_of_a_lane_the_head_is_looked_at(database: Database) -> None:
    for number in range(HEAD):
        add_job(database, queued_at=NOW + timedelta(microseconds=number))
    last = add_job(database, queued_at=NOW + timedelta(seconds=1), job_type="old.name")
    assert found(database) == {}
    change(database, models.jobs, last, queued_at=NOW - timedelta(seconds=1))
    assert found(database) == {"no_capable_worker": {last}}


def test_of_all_jobs_the_newest_are_looked_at(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    assert RECENT == 10_000
    monkeypatch.setattr(doctor, "RECENT", 3)
    too_often = add_job(database, JobStatus.FAILED, retry_count=4, max_retries=3)
    for _ in range(2):
        add_job(database, JobStatus.FAILED)
    assert found(database) == {"retry_counts": {too_often}}
    add_job(database, JobStatus.FAILED)
    assert found(database) == {}


def test_no_query_reads_a_whole_table_of_jobs_events_or_deliveries(sqlite_url: str) -> None:
    database = Database(sqlite_url)
    add_job(database, queued_at=NOW)
    asked: list[tuple[str, Any]] = []

    @sa.event.listens_for(database.engine, "before_cursor_execute")
    def remember(_c: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if statement.startswith("SELECT"):
            asked.append((statement, parameters))

    found(database)
    missing_from(database, "normal", [new_id()], now=LATER)
    plans = []
    with database.engine.connect() as connection:
        for statement, parameters in list(asked):
            plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
            plans += [(row[-1], statement) for row in plan]
    database.dispose()
    assert len(plans) > len(CHECKS)
    small = ("SCAN recent", "SCAN workers", "SCAN anon_")
    scans = [line for line, _ in plans if line.startswith("SCAN") and not line.startswith(small)]
    assert [line for line in scans if " USING " not in line] == []


# Lanes


def test_a_lane_lacks_what_waited_for_a_minute_and_holds_what_has_ended(database: Database) -> None:
    old, young = add_job(database, queued_at=NOW), add_job(database, queued_at=LATER)
    ended = add_job(database, JobStatus.CANCELLED)
    just_ended = add_job(database, JobStatus.CANCELLED, finished_at=LATER)
    inside = add_job(database, queued_at=NOW)
    elsewhere = add_job(database, queued_at=NOW, lane="high")
    nobody = new_id()
    present = [inside, ended, just_ended, nobody, "not an id", elsewhere]
    assert missing_from(database, "normal", present, now=LATER) == ([old], [ended, nobody, "not an id"])
    assert missing_from(database, "normal", [old, inside, young], now=LATER) == ([], [])


# Clocks


def test_the_clocks_of_store_and_machine_are_compared(database: Database) -> None:
    assert abs(clock_ahead(database, now=SystemClock().now)) < 1
    slow = SystemClock()
    ahead = clock_ahead(database, now=lambda: slow.now() - timedelta(minutes=2))
    assert 119 < ahead < 121
