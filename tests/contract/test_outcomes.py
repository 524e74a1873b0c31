"""What follows from a job's end is written with it, or not at all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from factories import (
    NOW,
    TENANT,
    WORKER,
    add_job,
    at_once,
    events_of,
    hold_of,
    job_row,
    new_job,
    rows_of,
    status_of,
)
from laneway import models
from laneway.clock import new_id
from laneway.db import Database
from laneway.domain.events import EVENT_OF
from laneway.domain.retry import RetryPolicy
from laneway.domain.states import FINAL, JobStatus
from laneway.engine import progress
from laneway.engine.context import Progress
from laneway.engine.outcomes import Claimed, carry_out, error_record
from laneway.engine.transitions import (
    Applied,
    BackOff,
    Cancel,
    Claim,
    Complete,
    Expire,
    Fail,
    ForceComplete,
    Move,
    Outcome,
    Refused,
    Release,
    Retry,
    Stop,
    TimeOut,
    create,
)

HOOK = "https://example.org/hook"
ERROR = error_record("E", "m", category="transient", traceback="secret frames")
LATER = NOW + timedelta(seconds=5)


def settle(database: Database, moves: Sequence[Move]) -> list[Outcome]:
    with database.write() as connection:
        return carry_out(connection, moves, now=LATER, actor=f"worker:{WORKER}")


def running(database: Database, **columns: Any) -> tuple[str, int, str]:
    return hold_of(database, add_job(database, JobStatus.RUNNING, **({"webhook_url": HOOK} | columns)))


def ended(database: Database, status: JobStatus, **columns: Any) -> str:
    """The id of a job that has just come to `status` by its own move."""
    columns = {"webhook_url": HOOK} | columns
    if status is JobStatus.CANCELLED:
        job_id = add_job(database, **columns)
        settle(database, [Cancel(job_id, by="bob")])
    elif status is JobStatus.EXPIRED:
        job_id = add_job(database, expires_at=NOW, **columns)
        settle(database, [Expire(job_id)])
    else:
        hold = running(database, **columns)
        job_id = hold[0]
        settle(
            database,
            [
                {
                    JobStatus.COMPLETED: Complete(*hold, result='{"n":1}'),
                    JobStatus.FAILED: Fail(*hold, error=ERROR),
                    JobStatus.TIMEOUT: TimeOut(*hold, error=ERROR),
                }[status]
            ],
        )
    assert status_of(database, job_id) == status
    return job_id


@pytest.mark.parametrize("status", sorted(FINAL))
def test_an_end_that_nobody_narrowed_is_told_to_the_jobs_url(database: Database, status: JobStatus) -> None:
    job_id = ended(database, status)
    [message] = rows_of(database, models.webhook_messages)
    [delivery] = rows_of(database, models.webhook_deliveries)
    assert (message["job_id"], message["job_seq"], message["event_type"]) == (job_id, 2, EVENT_OF[status])
    assert (message["tenant_id"], message["created_by"]) == (TENANT, "alice")
    assert (delivery["message_id"], delivery["url"]) == (message["id"], HOOK)
    assert (delivery["status"], delivery["next_at"]) == ("pending", LATER)
    body = json.loads(message["payload"])
    assert (body["type"], body["timestamp"]) == (EVENT_OF[status], "2026-01-01T12:00:05.000000Z")
    assert (body["data"]["job_id"], body["data"]["status"]) == (job_id, status)


@pytest.mark.parametrize("status", sorted(FINAL))
def test_an_end_is_told_only_when_it_is_subscribed(database: Database, status: JobStatus) -> None:
    others = [event.value for event in EVENT_OF.values() if event is not EVENT_OF[status]]
    ended(database, status, webhook_events=others)
    assert rows_of(database, models.webhook_messages) == []
    ended(database, status, webhook_events=[EVENT_OF[status].value])
    assert [m["event_type"] for m in rows_of(database, models.webhook_messages)] == [EVENT_OF[status]]


def test_a_job_without_a_url_tells_nobody(database: Database) -> None:
    ended(database, JobStatus.COMPLETED, webhook_url=None)
    assert rows_of(database, models.webhook_messages) == []


def test_what_is_no_end_is_told_to_nobody(database: Database) -> None:
    job_id = add_job(database, webhook_url=HOOK)
    settle(database, [Claim(job_id, new_id(), WORKER, NOW)])
    settle(database, [Release(*hold_of(database, job_id))])
    settle(database, [BackOff(*running(database), LATER)])
    settle(database, [Complete(job_id, 1, new_id())])  # refused
    assert rows_of(database, models.webhook_messages) == []


def test_a_batch_tells_of_each_end_once(database: Database) -> None:
    holds = [running(database) for _ in range(50)]
    forced = add_job(database, webhook_url=HOOK)
    outcomes = settle(database, [*(Complete(*hold) for hold in holds), ForceComplete(forced)])
    assert all(isinstance(outcome, Applied) for outcome in outcomes)
    settle(database, [Complete(*hold) for hold in holds])
    messages = rows_of(database, models.webhook_messages)
    assert {m["job_id"] for m in messages} == {*(hold[0] for hold in holds), forced}
    assert len(messages) == len(rows_of(database, models.webhook_deliveries)) == 51


def test_the_payload_is_the_job_without_parameters_and_traceback(database: Database) -> None:
    job_id = ended(database, JobStatus.FAILED, parameters={"secret": 1}, metadata={"k": "v"}, tags=["t"])
    [message] = rows_of(database, models.webhook_messages)
    assert b"secret" not in message["payload"]
    data = json.loads(message["payload"])["data"]
    assert set(data) == {
        "job_id",
        "tenant_id",
        "created_by",
        "job_type",
        "queue",
        "priority",
        "title",
        "description",
        "tags",
        "metadata",
        "status",
        "status_reason",
        "progress",
        "progress_message",
        "progress_details",
        "result",
        "error",
        "attempt",
        "retry_count",
        "max_retries",
        "retry_delay_seconds",
        "retry_backoff",
        "retry_max_delay_seconds",
        "retry_jitter",
        "timeout_seconds",
        "unique_key",
        "concurrency_key",
        "concurrency_limit",
        "webhook_url",
        "webhook_events",
        "dead_letter_reason",
        "cancelled_by",
        "batch_id",
        "chain_id",
        "chain_step",
        "depends_on",
        "on_dependency_failure",
        "scheduled_job_id",
        "cancelled_at",
        "created_at",
        "updated_at",
        "scheduled_for",
        "expires_at",
        "queued_at",
        "started_at",
        "finished_at",
        "next_retry_at",
    }
    assert (data["job_id"], data["metadata"], data["tags"]) == (job_id, {"k": "v"}, ["t"])
    assert data["error"] == {"type": "E", "message": "m", "category": "transient", "traceback": None}
    assert (data["dead_letter_reason"], data["attempt"]) == ("exhausted", 1)
    assert data["finished_at"] == data["updated_at"] == "2026-01-01T12:00:05.000000Z"


def test_an_end_and_its_message_are_rolled_back_together(database: Database) -> None:
    hold = running(database)

    def fail() -> None:
        with database.write() as connection:
            carry_out(connection, [Complete(*hold)], now=NOW, actor="t")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert status_of(database, hold[0]) == "running"
    assert len(events_of(database, hold[0])) == 1
    assert rows_of(database, models.webhook_messages) == rows_of(database, models.webhook_deliveries) == []


def test_a_second_end_after_a_retry_is_a_message_of_its_own(database: Database) -> None:
    job_id = ended(database, JobStatus.FAILED)
    settle(database, [Retry(job_id)])
    settle(database, [Cancel(job_id, by="bob")])
    seqs = {m["job_seq"]: m["event_type"] for m in rows_of(database, models.webhook_messages)}
    assert seqs == {2: "job.failed", 4: "job.cancelled"}


def test_of_two_settlers_at_once_one_tells(database: Database) -> None:
    hold = running(database)
    at_once([lambda: settle(database, [Complete(*hold)])] * 4 + [lambda: settle(database, [Stop(*hold)])] * 4)
    [message] = rows_of(database, models.webhook_messages)
    assert message["event_type"] == EVENT_OF[JobStatus(status_of(database, hold[0]))]


# A wish to stop


@pytest.mark.parametrize("kind", [BackOff, Release])
def test_a_job_that_is_to_stop_ends_cancelled_where_it_would_have_waited_again(
    database: Database, kind: type[BackOff] | type[Release]
) -> None:
    hold = running(database, cancel_requested_at=NOW, cancelled_by="bob")
    other = running(database)
    move = BackOff(*hold, LATER, error=ERROR) if kind is BackOff else Release(*hold, crash=1)
    stopped, released = settle(database, [move, Release(*other)])
    assert isinstance(stopped, Applied)
    assert (stopped.move, stopped.status) == (Stop(*hold), JobStatus.CANCELLED)
    assert isinstance(released, Applied)
    assert status_of(database, other[0]) == "queued"
    row = job_row(database, hold[0])
    assert (row["status"], row["cancelled_by"], row["finished_at"]) == ("cancelled", "bob", LATER)
    assert [event["action"] for event in events_of(database, hold[0])] == ["create", "stop"]
    assert [m["event_type"] for m in rows_of(database, models.webhook_messages)] == ["job.cancelled"]


def test_an_ending_by_itself_counts_also_when_the_job_was_to_stop(database: Database) -> None:
    hold = running(database, cancel_requested_at=NOW)
    settle(database, [Complete(*hold)])
    assert status_of(database, hold[0]) == "completed"


def test_a_stale_worker_stops_nothing(database: Database) -> None:
    job_id, attempt, token = running(database, cancel_requested_at=NOW, attempt=2)
    moves = [Release(job_id, attempt - 1, token), Release(job_id, attempt, new_id())]
    for move in moves:
        assert settle(database, [move]) == [Refused(move, JobStatus.RUNNING, 2)]
    assert status_of(database, job_id) == "running"


# Claims and progress


def test_a_claimed_job_knows_what_deciding_its_fate_needs(database: Database) -> None:
    job = new_job(retry_jitter=True, max_retries=7, timeout_seconds=9, parameters='{"a": 1}')
    with database.write() as connection:
        create(connection, [job], now=NOW)
    token = new_id()
    [outcome] = settle(database, [Claim(job.id, token, WORKER, NOW)])
    assert isinstance(outcome, Applied)
    assert Claimed.of(outcome.row, token) == Claimed(
        job_id=job.id,
        attempt=1,
        lease_token=token,
        tenant_id=TENANT,
        lane="normal",
        job_type="demo.echo",
        parameters='{"a": 1}',
        timeout_seconds=9,
        retry_count=0,
        crash_count=0,
        retry_policy=RetryPolicy(7, 10.0, 2.0, 100.0, True),
    )


def save(database: Database, hold: tuple[str, int, str], percent: int, **fields: Any) -> dict[str, Any]:
    """The job's row after `percent` was saved by who holds `hold`."""
    claimed = Claimed(*hold, TENANT, "normal", "t", "{}", 1, 0, 0, RetryPolicy())
    with database.write() as connection:
        progress.save(connection, [(claimed, Progress(percent, **fields))], now=LATER)
    return job_row(database, hold[0])


def test_progress_is_kept_by_its_holder_and_does_not_fall(database: Database) -> None:
    hold = running(database)
    row = save(database, hold, 40, message="half", details='{"a":1}')
    assert (row["progress"], row["progress_message"], row["progress_details"]) == (40, "half", {"a": 1})
    assert (row["version"], row["event_seq"]) == (2, 1)  # seen by readers, and no transition
    assert save(database, hold, 40, message="still")["progress_message"] == "still"
    assert save(database, hold, 39, message="back")["progress_message"] == "still"


def test_progress_of_a_stale_attempt_a_wrong_token_or_an_ended_job_changes_nothing(
    database: Database,
) -> None:
    job_id, attempt, token = hold = running(database, attempt=2)
    before = job_row(database, job_id)
    assert save(database, (job_id, attempt - 1, token), 50) == before
    assert save(database, (job_id, attempt, new_id()), 50) == before
    settle(database, [Complete(*hold)])
    ended = job_row(database, job_id)
    assert save(database, hold, 100, message="late") == ended


def test_nothing_to_save_is_no_statement(database: Database) -> None:
    with database.read() as connection:
        progress.save(connection, [], now=NOW)
        assert connection.execute(sa.select(sa.func.count()).select_from(models.jobs)).scalar() == 0
