"""The stores themselves refuse rows that must not be, whoever writes them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
import sqlalchemy as sa

from laneway import models
from laneway.clock import new_id
from laneway.db import Database
from laneway.domain.states import FINAL, JobStatus

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
TENANT = new_id()


def job(**changes: Any) -> dict[str, Any]:
    """A row of `jobs` that waits in a lane, but for `changes`."""
    row: dict[str, Any] = {
        "id": new_id(),
        "tenant_id": TENANT,
        "created_by": "test",
        "job_type": "demo.echo",
        "parameters": {},
        "queue": "default",
        "priority": "normal",
        "lane": "normal",
        "tags": [],
        "metadata": {},
        "timeout_seconds": 60,
        "max_retries": 3,
        "retry_delay_seconds": 1.0,
        "retry_backoff": 2.0,
        "retry_max_delay_seconds": 60.0,
        "retry_jitter": True,
        "status": "queued",
        "queued_at": NOW,
    }
    return row | changes


RUNNING = {"status": "running", "lease_token": new_id(), "worker_id": new_id(), "attempt": 1}
LEGAL: dict[JobStatus, dict[str, Any]] = {
    JobStatus.SCHEDULED: {"status": "scheduled", "queued_at": None, "scheduled_for": NOW},
    JobStatus.BLOCKED: {"status": "blocked", "queued_at": None},
    JobStatus.QUEUED: {"status": "queued"},
    JobStatus.RUNNING: RUNNING,
    JobStatus.RETRYING: {"status": "retrying", "next_retry_at": NOW},
    JobStatus.COMPLETED: {"status": "completed", "finished_at": NOW, "progress": 100},
    **{status: {"status": str(status), "finished_at": NOW} for status in FINAL - {JobStatus.COMPLETED}},
}
ILLEGAL: list[tuple[str, dict[str, Any]]] = [
    ("status", {"status": "paused"}),
    ("priority", {"priority": "urgent"}),
    ("running_has_lease", RUNNING | {"lease_token": None}),
    ("running_has_lease", {"lease_token": new_id()}),
    ("running_has_worker", RUNNING | {"worker_id": None}),
    ("running_has_worker", {"worker_id": new_id()}),
    ("final_has_end", {"status": "failed"}),
    ("final_has_end", {"finished_at": NOW}),
    ("retrying_has_time", {"status": "retrying"}),
    ("retrying_has_time", {"next_retry_at": NOW}),
    ("scheduled_has_time", {"status": "scheduled"}),
    ("queued_has_time", {"queued_at": None}),
    ("progress_percent", {"progress": 101}),
    ("progress_percent", {"progress": -1}),
    ("completed_is_100", {"status": "completed", "finished_at": NOW, "progress": 99}),
    ("counts", {"attempt": -1}),
    ("counts", {"retry_count": -1}),
    ("counts", {"crash_count": -1}),
]


def insert(store: Database, table: sa.Table, **row: Any) -> None:
    with store.write() as connection:
        connection.execute(table.insert().values(row))


@pytest.mark.parametrize("status", JobStatus)
def test_a_job_may_be_in_every_status(database: Database, status: JobStatus) -> None:
    insert(database, models.jobs, **job(**LEGAL[status]))


@pytest.mark.parametrize(("rule", "changes"), ILLEGAL, ids=[rule for rule, _ in ILLEGAL])
def test_a_job_that_breaks_a_rule_is_refused_by_name(
    database: Database, rule: str, changes: dict[str, Any]
) -> None:
    with pytest.raises(sa.exc.IntegrityError, match=f"ck_jobs_{rule}"):
        insert(database, models.jobs, **job(**changes))


def test_every_check_on_jobs_has_a_row_that_breaks_it() -> None:
    checks = {str(c.name) for c in models.jobs.constraints if isinstance(c, sa.CheckConstraint)}
    assert {f"ck_jobs_{rule}" for rule, _ in ILLEGAL} == checks


@pytest.mark.parametrize(
    "column", [c.name for c in models.jobs.columns if not c.nullable and not c.server_default]
)
def test_a_job_without_what_it_needs_is_refused(database: Database, column: str) -> None:
    with pytest.raises(sa.exc.IntegrityError):
        insert(database, models.jobs, **job(**{column: None}))


def test_one_active_job_holds_a_unique_key_and_a_finished_one_lets_go(database: Database) -> None:
    finished = {"status": "failed", "finished_at": NOW}
    insert(database, models.jobs, **job(unique_key="k", **finished))
    insert(database, models.jobs, **job(unique_key="k", **finished))
    insert(database, models.jobs, **job(unique_key="k"))
    with pytest.raises(sa.exc.IntegrityError):
        insert(database, models.jobs, **job(unique_key="k"))
    insert(database, models.jobs, **job(unique_key="k", tenant_id=new_id()))


def test_a_transition_is_recorded_once(database: Database) -> None:
    event = {
        "job_id": new_id(),
        "seq": 1,
        "tenant_id": TENANT,
        "action": "claim",
        "status": "running",
        "attempt": 1,
        "at": NOW,
        "actor": "test",
    }
    insert(database, models.job_events, **event)
    with pytest.raises(sa.exc.IntegrityError):
        insert(database, models.job_events, **event)


def test_a_delivery_needs_its_message(database: Database) -> None:
    with pytest.raises(sa.exc.IntegrityError):
        insert(database, models.webhook_deliveries, **delivery())


@pytest.mark.parametrize(
    ("rule", "changes"),
    [
        ("status", {"status": "lost"}),
        ("sending_has_owner", {"status": "sending"}),
        ("sending_has_owner", {"lease_owner": new_id()}),
        ("delivered_has_time", {"status": "delivered"}),
        ("delivered_has_time", {"delivered_at": NOW}),
    ],
    ids=["status", "sending without owner", "owner without sending", "no time", "time too soon"],
)
def test_a_delivery_that_breaks_a_rule_is_refused(
    database: Database, rule: str, changes: dict[str, Any]
) -> None:
    insert(
        database,
        models.webhook_messages,
        id="msg_1",
        tenant_id=TENANT,
        created_by="test",
        job_id=new_id(),
        job_seq=1,
        event_type="job.completed",
        payload=b"{}",
    )
    with pytest.raises(sa.exc.IntegrityError, match=f"ck_webhook_deliveries_{rule}"):
        insert(database, models.webhook_deliveries, **delivery(**changes))
    insert(database, models.webhook_deliveries, **delivery())
    with pytest.raises(sa.exc.IntegrityError):  # one message goes to one address once
        insert(database, models.webhook_deliveries, **delivery())


def delivery(**changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": new_id(),
        "tenant_id": TENANT,
        "created_by": "test",
        "message_id": "msg_1",
        "job_id": new_id(),
        "url": "https://example.org/hook",
        "status": "pending",
        "max_attempts": 8,
        "next_at": NOW,
    }
    return row | changes
