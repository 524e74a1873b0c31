"""What is deleted, when, and with what; and what never is."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from factories import NOW, TENANT, add_job, add_webhook, add_worker, at_once, rows_of, status_of
from laneway import models
from laneway.clock import FrozenClock, new_id
from laneway.db import Database
from laneway.domain.states import ACTIVE, FINAL, JobStatus
from laneway.engine import retention
from laneway.engine.outcomes import carry_out
from laneway.engine.queries import Scope
from laneway.engine.retention import (
    BATCH_ROWS,
    PAYLOADS_ARE_KEPT,
    WORKERS_ARE_KEPT,
    Pruned,
    Retention,
    count,
    delete_jobs,
    prune,
)
from laneway.engine.transitions import Retry
from laneway.engine.webhook_ledger import redeliver
from laneway.errors import DeliveryNotFound
from laneway.lanes.memory_lanes import MemoryLanes
from laneway.scheduler import ticker
from laneway.scheduler.ticker import PRUNE_REST_SECONDS, Ticker
from laneway.settings import Settings
from laneway.webhooks.retries import UNDONE, DeliveryStatus

MONTH = timedelta(days=30)
MICROSECOND = timedelta(microseconds=1)
KEEP = Retention.from_settings(Settings())
OF_A_JOB = (models.job_events, models.webhook_messages, models.webhook_deliveries)


def ended(database: Database, status: JobStatus = JobStatus.COMPLETED, age: timedelta = MONTH) -> str:
    return add_job(database, status, finished_at=NOW - age)


def jobs(database: Database) -> set[str]:
    return {row["id"] for row in rows_of(database, models.jobs)}


def deliveries(database: Database) -> set[str]:
    return {row["id"] for row in rows_of(database, models.webhook_deliveries)}


def delete(database: Database, *ids: str) -> list[str]:
    with database.write() as connection:
        return delete_jobs(connection, ids)


def left_of(database: Database, job_id: str) -> list[str]:
    """The tables that still have rows of the job."""
    with database.read() as connection:
        found = [
            table.name
            for table in OF_A_JOB
            if connection.execute(sa.select(table).where(table.c.job_id == job_id)).first()
        ]
        alone = sa.select(models.webhook_attempts.c.id).where(
            models.webhook_attempts.c.delivery_id.not_in(sa.select(models.webhook_deliveries.c.id))
        )
        assert connection.execute(alone).first() is None
    return found


# Deleting


def test_a_job_goes_with_all_that_hangs_on_it_and_nothing_of_others(database: Database) -> None:
    gone, stays = ended(database), ended(database)
    for job_id in (gone, stays):
        add_webhook(database, job_id)
        add_webhook(database, job_id, "dead")
    assert delete(database, gone) == [gone]
    assert jobs(database) == {stays}
    assert left_of(database, gone) == []
    assert left_of(database, stays) == [table.name for table in OF_A_JOB]
    assert len(rows_of(database, models.webhook_attempts)) == 2


@pytest.mark.parametrize("status", JobStatus)
def test_only_ended_jobs_are_deleted(database: Database, status: JobStatus) -> None:
    job_id = add_job(database, status)
    assert delete(database, job_id, new_id()) == ([job_id] if status in FINAL else [])
    assert jobs(database) == (set() if status in FINAL else {job_id})
    assert left_of(database, job_id) == ([] if status in FINAL else ["job_events"])


@pytest.mark.parametrize("status", ["pending", "sending", "retrying"])
def test_a_job_whose_webhook_is_still_to_be_delivered_stays(database: Database, status: str) -> None:
    waits, free = ended(database), ended(database)
    add_webhook(database, waits)
    add_webhook(database, waits, status)
    assert delete(database, waits, free) == [free]
    assert prune(database, KEEP, now=NOW).jobs == 0
    assert count(database, KEEP, now=NOW).jobs == 0
    assert jobs(database) == {waits}
    assert len(rows_of(database, models.webhook_attempts)) == 2


def test_a_deletion_and_a_retry_at_once_have_one_winner(database: Database) -> None:
    def retry(job_id: str) -> None:
        with database.write() as connection:
            carry_out(connection, [Retry(job_id)], now=NOW, actor="alice")

    for _ in range(10):
        job_id = ended(database, JobStatus.FAILED)
        calls: list[Callable[[], Any]] = [lambda j=job_id: delete(database, j), lambda j=job_id: retry(j)]
        deleted, _ = at_once(calls)
        if deleted:
            assert left_of(database, job_id) == []
        else:
            assert status_of(database, job_id) == "queued"


# What is past its time


@pytest.mark.parametrize("status", [JobStatus.COMPLETED, JobStatus.CANCELLED, JobStatus.EXPIRED])
def test_after_its_days_and_not_before_an_ended_job_is_pruned(database: Database, status: JobStatus) -> None:
    old, young = ended(database, status), ended(database, status, MONTH - MICROSECOND)
    assert count(database, KEEP, now=NOW) == Pruned(jobs=1)
    assert prune(database, KEEP, now=NOW) == Pruned(jobs=1)
    assert jobs(database) == {young}
    assert left_of(database, old) == []
    assert prune(database, KEEP, now=NOW) == Pruned()
    assert prune(database, KEEP, now=NOW + MICROSECOND) == Pruned(jobs=1)


def test_dead_letters_and_active_jobs_are_kept_until_told(database: Database) -> None:
    active = [add_job(database, status, created_at=NOW - 99 * MONTH) for status in ACTIVE]
    dead = [ended(database, status, 99 * MONTH) for status in (JobStatus.FAILED, JobStatus.TIMEOUT)]
    assert prune(database, KEEP, now=NOW) == Pruned()
    told = Retention.from_settings(Settings(keep_failed_days=1))
    assert prune(database, told, now=NOW) == Pruned(jobs=2)
    assert jobs(database) == set(active)
    assert not jobs(database) & set(dead)


def test_settings_say_how_long_and_zero_means_for_ever(database: Database) -> None:
    days = {JobStatus.COMPLETED: 1, JobStatus.CANCELLED: 2, JobStatus.EXPIRED: 2, JobStatus.FAILED: 3}
    days[JobStatus.TIMEOUT] = 3
    settings = Settings(
        keep_completed_days=1, keep_cancelled_days=2, keep_failed_days=3, keep_webhooks_days=4
    )
    assert Retention.from_settings(settings) == Retention(
        {status: timedelta(days=number) for status, number in days.items()}, timedelta(days=4)
    )
    never = Settings(keep_completed_days=0, keep_cancelled_days=0, keep_failed_days=0, keep_webhooks_days=0)
    for status in FINAL:
        add_webhook(database, ended(database, status, 999 * MONTH), at=NOW - 999 * MONTH)
    assert prune(database, Retention.from_settings(never), now=NOW) == Pruned(payloads=len(FINAL))


@pytest.mark.parametrize("status", sorted(frozenset(DeliveryStatus) - UNDONE))
def test_webhooks_of_jobs_that_are_kept_are_pruned_by_themselves(database: Database, status: str) -> None:
    job_id = ended(database, JobStatus.FAILED)
    old = add_webhook(database, job_id, status, at=NOW - MONTH)
    young = add_webhook(database, job_id, status, at=NOW - MONTH + MICROSECOND)
    assert count(database, KEEP, now=NOW) == Pruned(messages=1)
    assert prune(database, KEEP, now=NOW) == Pruned(messages=1)
    assert deliveries(database) == {young}
    assert old not in {row["delivery_id"] for row in rows_of(database, models.webhook_attempts)}
    assert len(rows_of(database, models.webhook_messages)) == 1
    assert jobs(database) == {job_id}


def test_a_message_that_tells_of_no_job_is_pruned_too(database: Database) -> None:
    tested = add_webhook(database, ended(database, JobStatus.FAILED), at=NOW - MONTH)
    for table in (models.webhook_deliveries, models.webhook_messages):
        with database.write() as connection:
            connection.execute(sa.update(table).values(job_id=None))
    assert deliveries(database) == {tested}
    assert prune(database, KEEP, now=NOW) == Pruned(messages=1)
    assert deliveries(database) == set()
    assert rows_of(database, models.webhook_messages) == []


@pytest.mark.parametrize("status", sorted(UNDONE))
def test_what_is_still_to_be_delivered_is_never_pruned(database: Database, status: str) -> None:
    add_webhook(database, ended(database, JobStatus.FAILED), status, at=NOW - 99 * MONTH)
    assert prune(database, KEEP, now=NOW) == Pruned()
    assert count(database, KEEP, now=NOW) == Pruned()
    assert [row["payload"] for row in rows_of(database, models.webhook_messages)] == [b"{}"]


def test_what_is_kept_for_ever_loses_its_payload(database: Database) -> None:
    """A look at it stays possible, another delivery does not."""
    for_ever = Retention.from_settings(Settings(keep_webhooks_days=0))
    job_id = ended(database, JobStatus.FAILED)
    add_webhook(database, job_id, "dead", at=NOW - PAYLOADS_ARE_KEPT)
    add_webhook(database, job_id, "retrying", at=NOW - PAYLOADS_ARE_KEPT)
    add_webhook(database, job_id, at=NOW - PAYLOADS_ARE_KEPT + MICROSECOND)
    assert prune(database, for_ever, now=NOW) == Pruned(payloads=1)
    kept = [row["payload"] for row in rows_of(database, models.webhook_messages)]
    assert sorted(kept, key=bool) == [None, b"{}", b"{}"]
    assert prune(database, for_ever, now=NOW) == Pruned()


def test_a_prune_and_a_redelivery_at_once_have_one_winner(database: Database) -> None:
    def again(delivery_id: str) -> None:
        with database.write() as connection:
            redeliver(connection, Scope(TENANT), delivery_id, now=NOW)

    job_id = ended(database, JobStatus.FAILED)
    for _ in range(10):
        delivery_id = add_webhook(database, job_id, "dead", at=NOW - MONTH)
        calls: list[Callable[[], Any]] = [
            lambda: prune(database, KEEP, now=NOW).messages,
            lambda d=delivery_id: again(d),
        ]
        _, refused = at_once(calls)
        assert (delivery_id in deliveries(database)) == (refused is None)
        assert refused is None or isinstance(refused, DeliveryNotFound)


def test_a_message_stays_for_as_long_as_one_delivery_carries_it(database: Database) -> None:
    job_id = ended(database, JobStatus.FAILED)
    old = add_webhook(database, job_id, at=NOW - MONTH)
    second = add_webhook(database, job_id, "dead", at=NOW - MONTH + MICROSECOND)
    with database.write() as connection:
        d = models.webhook_deliveries
        message = sa.select(d.c.message_id).where(d.c.id == old).scalar_subquery()
        connection.execute(
            sa.update(d).where(d.c.id == second).values(message_id=message, url="https://example.org/2")
        )
    with database.write() as connection:
        m = models.webhook_messages
        carried = sa.select(d.c.message_id)
        connection.execute(sa.delete(m).where(m.c.id.not_in(carried)))
    assert prune(database, KEEP, now=NOW) == Pruned(payloads=1)
    assert deliveries(database) == {old, second}
    assert prune(database, KEEP, now=NOW + MICROSECOND) == Pruned(messages=1)
    assert deliveries(database) == set()


def test_workers_that_left_long_ago_are_pruned_once_they_hold_nothing(database: Database) -> None:
    long_ago = NOW - WORKERS_ARE_KEPT
    ids = {state: add_worker(database, state=state, beat_at=long_ago) for state in ("active", "draining")}
    gone = [add_worker(database, state=state, beat_at=long_ago) for state in ("gone", "dead")]
    holds = add_worker(database, state="dead", beat_at=long_ago)
    add_job(database, JobStatus.RUNNING, worker_id=holds)
    young = add_worker(database, state="gone", beat_at=long_ago + MICROSECOND)
    assert count(database, KEEP, now=NOW) == Pruned(workers=2)
    assert prune(database, KEEP, now=NOW) == Pruned(workers=2)
    left = {row["id"] for row in rows_of(database, models.workers)}
    assert left == {*ids.values(), holds, young}
    assert not left & set(gone)


# Batches


def test_one_batch_takes_no_more_than_its_rows_oldest_first(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert BATCH_ROWS == 500
    monkeypatch.setattr(retention, "BATCH_ROWS", 3)
    ages = [31, 33, 32, 34]
    by_age = {days: ended(database, age=timedelta(days=days)) for days in ages}
    cancelled = ended(database, JobStatus.CANCELLED, timedelta(days=99))
    assert prune(database, KEEP, now=NOW) == Pruned(jobs=3, more=True)
    assert jobs(database) == {by_age[31], cancelled}
    assert prune(database, KEEP, now=NOW) == Pruned(jobs=2)
    assert jobs(database) == set()


def test_of_many_schedulers_each_row_is_deleted_by_one(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "BATCH_ROWS", 5)
    for _ in range(40):
        add_webhook(database, ended(database), at=NOW - MONTH)
        add_webhook(database, ended(database, JobStatus.FAILED), at=NOW - MONTH)

    def until_nothing_is_left() -> list[Pruned]:
        batches = [prune(database, KEEP, now=NOW)]
        while batches[-1].rows:
            batches.append(prune(database, KEEP, now=NOW))
        return batches

    done = [batch for result in at_once([until_nothing_is_left] * 8) for batch in result]  # type: ignore[union-attr]
    while (last := prune(database, KEEP, now=NOW)).rows:
        done.append(last)  # what others had locked when they looked
    assert sum(batch.jobs for batch in done) == 40
    assert max(batch.jobs for batch in done) <= 5
    assert len(jobs(database)) == 40
    assert rows_of(database, models.webhook_deliveries) == []
    assert rows_of(database, models.webhook_messages) == []


def test_an_idle_pruner_takes_no_write_lock(sqlite_url: str) -> None:
    holder, database = Database(sqlite_url), Database(sqlite_url)
    ended(database, age=MONTH - MICROSECOND)
    with holder.write():
        assert prune(database, KEEP, now=NOW) == Pruned()
    for store in (holder, database):
        store.dispose()


@pytest.mark.parametrize(
    ("table", "index"),
    [("jobs", "ix_jobs_ended"), ("webhook_messages", "ix_webhook_messages_created_at")],
)
def test_looking_for_what_to_prune_reads_an_index(database: Database, table: str, index: str) -> None:
    query = (
        retention._ended(JobStatus.COMPLETED, MONTH, now=NOW)
        if table == "jobs"
        else retention._through(MONTH, now=NOW)
    )
    asked = query.limit(1)
    with database.read() as connection:
        if database.dialect == "postgresql":  # of an empty table the planner would read all
            connection.exec_driver_sql("SET LOCAL enable_seqscan = off")
        text = asked.compile(database.engine, compile_kwargs={"literal_binds": True})
        explain = "EXPLAIN" if database.dialect == "postgresql" else "EXPLAIN QUERY PLAN"
        plan = "\n".join(str(row) for row in connection.exec_driver_sql(f"{explain} {text}"))
    assert index in plan


# The scheduler


def test_a_scheduler_prunes_all_that_is_due_then_rests(
    database: Database, clock: FrozenClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "BATCH_ROWS", 2)
    scheduler = Ticker(database, MemoryLanes(), Settings(), clock=clock)
    for _ in range(5):
        ended(database)
    kept = ended(database, JobStatus.FAILED)
    assert scheduler.tick()
    assert jobs(database) == {kept}
    late = ended(database)
    clock.advance(seconds=PRUNE_REST_SECONDS - 0.001)
    assert scheduler.tick()
    assert jobs(database) == {kept, late}
    clock.advance(seconds=0.001)
    assert scheduler.tick()
    assert jobs(database) == {kept}


def test_a_round_leaves_the_rest_to_the_next_when_its_time_is_over(
    database: Database, clock: FrozenClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each batch takes a tenth of a second; a quarter is what a round may spend."""
    monkeypatch.setattr(retention, "BATCH_ROWS", 2)

    def slow(*args: Any, **how: Any) -> Pruned:
        clock.advance(seconds=0.1)
        return prune(*args, **how)

    monkeypatch.setattr(ticker, "prune", slow)
    scheduler = Ticker(database, MemoryLanes(), Settings(), clock=clock)
    for _ in range(9):
        ended(database)
    assert scheduler.tick()
    assert len(jobs(database)) == 3
    assert scheduler.tick()
    assert jobs(database) == set()
