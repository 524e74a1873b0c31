"""Rows to begin with: jobs in every status, workers, what they hold, and what became of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, TypeVar

import sqlalchemy as sa

from laneway import models
from laneway.clock import new_id
from laneway.db import Database
from laneway.domain.states import FINAL, JobStatus
from laneway.engine.transitions import NewJob

R = TypeVar("R")

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
TENANT = "01980000-0000-7000-8000-00000000000a"
OTHER_TENANT = "01980000-0000-7000-8000-00000000000b"
WORKER = "01980000-0000-7000-8000-0000000000ff"

_NEW_JOB = NewJob(
    id="",
    tenant_id=TENANT,
    created_by="alice",
    job_type="demo.echo",
    parameters='{"x":1}',
    queue="default",
    priority="normal",
    lane="normal",
    title=None,
    description=None,
    tags="[]",
    metadata="{}",
    scheduled_for=None,
    expires_at=None,
    timeout_seconds=60,
    max_retries=3,
    retry_delay_seconds=10.0,
    retry_backoff=2.0,
    retry_max_delay_seconds=100.0,
    retry_jitter=False,
    unique_key=None,
    webhook_url=None,
    webhook_events=None,
    status=JobStatus.QUEUED.value,
    queued_at=NOW,
)


def new_job(**fields: Any) -> NewJob:
    """A row to be, for `transitions.create`: queued on the normal lane, but for `fields`."""
    return replace(_NEW_JOB, **({"id": new_id()} | fields))


def add_job(database: Database, status: JobStatus = JobStatus.QUEUED, **columns: Any) -> str:
    """The id of a new job in `status`, with the event a real one would have; `columns` win."""
    running = status is JobStatus.RUNNING
    row: dict[str, Any] = {
        "id": new_id(),
        "tenant_id": TENANT,
        "created_by": "alice",
        "job_type": "demo.echo",
        "parameters": {"x": 1},
        "queue": "default",
        "priority": "normal",
        "lane": "normal",
        "tags": [],
        "metadata": {},
        "timeout_seconds": 60,
        "max_retries": 3,
        "retry_delay_seconds": 10.0,
        "retry_backoff": 2.0,
        "retry_max_delay_seconds": 100.0,
        "retry_jitter": False,
        "status": status.value,
        "event_seq": 1,
        "attempt": 1 if running else 0,
        "queued_at": NOW,
        "scheduled_for": NOW if status is JobStatus.SCHEDULED else None,
        "next_retry_at": NOW if status is JobStatus.RETRYING else None,
        "lease_token": new_id() if running else None,
        "worker_id": WORKER if running else None,
        "started_at": NOW if running else None,
        "finished_at": NOW if status in FINAL else None,
        "progress": 100 if status is JobStatus.COMPLETED else 0,
        "created_at": NOW,
        "updated_at": NOW,
    } | columns
    event = {
        "job_id": row["id"],
        "seq": row["event_seq"],
        "tenant_id": row["tenant_id"],
        "action": "create",
        "status": status.value,
        "attempt": row["attempt"],
        "at": NOW,
        "actor": "alice",
    }
    with database.write() as connection:
        connection.execute(sa.insert(models.jobs).values(row))
        connection.execute(sa.insert(models.job_events).values(event))
    return str(row["id"])


def add_worker(database: Database, *, state: str = "active", **columns: Any) -> str:
    """The id of a new worker's row."""
    row: dict[str, Any] = {
        "id": new_id(),
        "name": "w",
        "host": "h",
        "pid": 1,
        "version": "0",
        "lanes": ["normal"],
        "state": state,
        "held": [],
    } | columns
    with database.write() as connection:
        connection.execute(sa.insert(models.workers).values(row))
    return str(row["id"])


def add_webhook(
    database: Database,
    job_id: str,
    status: str = "delivered",
    *,
    at: datetime = NOW,
    job_seq: int | None = None,
    next_at: datetime | None = None,
    **attempt: Any,
) -> str:
    """The id of a delivery of one of the job's webhooks, with its message and one attempt at `at`."""
    owned = {"tenant_id": TENANT, "created_by": "alice", "created_at": at, "updated_at": at}
    m = models.webhook_messages
    with database.write() as connection:
        others = sa.select(sa.func.count()).select_from(m).where(m.c.job_id == job_id)
        message = {
            "id": f"msg_{new_id()}",
            "job_id": job_id,
            "job_seq": job_seq or connection.execute(others).scalar_one() + 1,
            "event_type": "job.completed",
            "payload": b"{}",
        }
        delivery = {
            "id": new_id(),
            "message_id": message["id"],
            "job_id": job_id,
            "url": "https://example.org/",
            "status": status,
            "attempt_count": 1,
            "max_attempts": 3,
            "next_at": next_at or at,
            "lease_owner": new_id() if status == "sending" else None,
            "delivered_at": at if status == "delivered" else None,
        }
        made = {"id": new_id(), "delivery_id": delivery["id"], "number": 1, "started_at": at, "total_ms": 1}
        connection.execute(sa.insert(m).values(owned | message))
        connection.execute(sa.insert(models.webhook_deliveries).values(owned | delivery))
        connection.execute(sa.insert(models.webhook_attempts).values(owned | made | attempt))
    return str(delivery["id"])


def add_endpoint(database: Database, *event_types: str, **columns: Any) -> str:
    """The id of a new endpoint that hears `event_types`."""
    row: dict[str, Any] = {
        "id": new_id(),
        "tenant_id": TENANT,
        "created_by": "bob",
        "url": "https://example.net/endpoint",
        "event_types": list(event_types),
        "filters": {},
        "format": "standard",
        "status": "enabled",
        "enabled_at": NOW,
        "secret": "sealed",
        "old_secrets": [],
        "sign_with": "v1",
        "timeout_seconds": 10.0,
        "retry_schedule": [1.0],
        "max_in_flight": 8,
        "in_order": False,
    } | columns
    with database.write() as connection:
        connection.execute(sa.insert(models.webhook_endpoints).values(row))
    return str(row["id"])


def schedule_columns(**columns: Any) -> dict[str, Any]:
    """A schedule's row: every minute in UTC from NOW on, but for `columns`."""
    row: dict[str, Any] = {
        "id": new_id(),
        "tenant_id": TENANT,
        "created_by": "alice",
        "name": None,
        "job_type": "demo.echo",
        "parameters": {"x": 1},
        "queue": "default",
        "priority": "normal",
        "timeout_seconds": 60,
        "max_retries": 3,
        "retry_delay_seconds": 10.0,
        "retry_backoff": 2.0,
        "retry_max_delay_seconds": 100.0,
        "retry_jitter": False,
        "cron_expression": None,
        "interval_seconds": None,
        "timezone": "UTC",
        "starts_at": None,
        "ends_at": None,
        "jitter_seconds": 0,
        "max_concurrent_runs": 1,
        "overlap": "skip",
        "misfire": "fire_once",
        "is_active": True,
        "anchor_at": NOW,
        "last_slot": None,
        "next_slot": NOW,
        "due_at": NOW,
    } | columns
    if row["cron_expression"] is None and row["interval_seconds"] is None:
        row["interval_seconds"] = 60
    return row


def add_schedule(database: Database, **columns: Any) -> str:
    """The id of a new schedule."""
    row = schedule_columns(**columns)
    with database.write() as connection:
        connection.execute(sa.insert(models.schedules).values(row))
    return str(row["id"])


def change(database: Database, table: sa.Table, row_id: str, **columns: Any) -> None:
    """Write `columns` past the engine: what another process, or an operator, would have done."""
    with database.write() as connection:
        connection.execute(sa.update(table).where(table.c.id == row_id).values(columns))


def job_row(database: Database, job_id: str) -> dict[str, Any]:
    """All columns of a job."""
    with database.read() as connection:
        found = connection.execute(sa.select(models.jobs).where(models.jobs.c.id == job_id))
        return {str(name): value for name, value in found.mappings().one().items()}


def status_of(database: Database, job_id: str) -> str:
    return str(job_row(database, job_id)["status"])


def hold_of(database: Database, job_id: str) -> tuple[str, int, str]:
    """What the holder of a running job names: its id, attempt and lease token."""
    row = job_row(database, job_id)
    return job_id, row["attempt"], row["lease_token"]


def events_of(database: Database, job_id: str) -> list[dict[str, Any]]:
    """The job's events, in order, without the number of their transaction."""
    e = models.job_events
    with database.read() as connection:
        found = connection.execute(sa.select(e).where(e.c.job_id == job_id).order_by(e.c.seq))
        return [{str(k): value for k, value in row.items() if k != "tx"} for row in found.mappings()]


def rows_of(database: Database, table: sa.Table) -> list[sa.RowMapping]:
    with database.read() as connection:
        return list(connection.execute(sa.select(table).order_by(table.c.id)).mappings())


def at_once(calls: Sequence[Callable[[], R]]) -> list[R | Exception]:
    """What each of `calls` returned or raised, in order; all start together, each in its own thread."""
    barrier = threading.Barrier(len(calls))

    def run(call: Callable[[], R]) -> R | Exception:
        barrier.wait(30)
        try:
            return call()
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))
