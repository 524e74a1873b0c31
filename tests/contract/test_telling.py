"""Who hears what of a job: its own URL and registered endpoints, on both stores."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from random import Random
from typing import Any

import pytest
import sqlalchemy as sa

from factories import (
    NOW,
    OTHER_TENANT,
    TENANT,
    WORKER,
    add_endpoint,
    add_job,
    change,
    hold_of,
    job_row,
    rows_of,
)
from laneway import models
from laneway.api.event_payloads import PAYLOADS, example
from laneway.clock import new_id
from laneway.db import Database
from laneway.domain.events import EventType
from laneway.domain.retry import DeadLetterReason, RetryPolicy
from laneway.domain.states import JobStatus
from laneway.engine import progress
from laneway.engine.context import Progress
from laneway.engine.endings import Returned
from laneway.engine.exchange import Exchanged, Holder, exchange
from laneway.engine.outcomes import Claimed, carry_out, error_record
from laneway.engine.transitions import BackOff, Cancel, Complete, Expire, Fail, Move, Release, Retry, TimeOut
from laneway.webhooks.deliveries import Deliveries, Finished, Room
from laneway.webhooks.messages import supersede_overtaken
from laneway.webhooks.retries import Answer, DeliveryStatus, ErrorClass, Timings, Verdict
from servers import wait_until

HOOK = "https://example.org/hook"
ERROR = error_record("E", "m", category="transient")
LATER = NOW + timedelta(seconds=5)
HOLDER = Holder(WORKER, ["demo.echo"], 3, Random(1))

_TELLING = ("finished_at", "next_retry_at", "cancelled_at", "error", "dead_letter_reason", "result")

Hold = tuple[str, int, str]


def running(database: Database, **columns: Any) -> Hold:
    return hold_of(database, add_job(database, JobStatus.RUNNING, **columns))


def settle(database: Database, *moves: Move) -> None:
    with database.write() as connection:
        carry_out(connection, moves, now=LATER, actor="t")


def save(database: Database, *news: tuple[Hold, int], seconds: float = 1.0) -> bool:
    """Whether a courier was given work by this progress, saved so long after NOW."""
    with database.write() as connection:
        return progress.save_and_tell(
            connection,
            [(_claimed(hold), Progress(percent)) for hold, percent in news],
            now=NOW + timedelta(seconds=seconds),
        )


def _claimed(hold: Hold) -> Claimed:
    return Claimed(*hold, TENANT, "normal", "demo.echo", "{}", 60, 0, 0, RetryPolicy())


def told(database: Database) -> list[tuple[str, str, str]]:
    """Event, URL and status of each delivery, in the order of their making."""
    d, m = models.webhook_deliveries.c, models.webhook_messages.c
    query = sa.select(m.event_type, d.url, d.status).join_from(
        models.webhook_deliveries, models.webhook_messages, m.id == d.message_id
    )
    with database.read() as connection:
        return [tuple(row) for row in connection.execute(query.order_by(d.created_at, d.id))]


def payloads(database: Database, event: str) -> list[dict[str, Any]]:
    """The data of the event's messages, oldest first."""
    rows = sorted(rows_of(database, models.webhook_messages), key=lambda row: row["created_at"])
    return [json.loads(row["payload"])["data"] for row in rows if row["event_type"] == event]


@contextmanager
def statements(database: Database) -> Iterator[list[str]]:
    """What is executed meanwhile, but for BEGIN and COMMIT."""
    seen: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if not statement.startswith("BEGIN"):
            seen.append(" ".join(statement.split()))

    sa.event.listen(database.engine, "before_cursor_execute", note)
    try:
        yield seen
    finally:
        sa.event.remove(database.engine, "before_cursor_execute", note)


# Another attempt, and the end of all attempts


def test_an_attempt_that_failed_is_told_with_the_time_of_the_next(database: Database) -> None:
    hold = running(database, webhook_url=HOOK, webhook_events=["job.retrying"])
    settle(database, BackOff(*hold, LATER, error=ERROR))
    assert told(database) == [("job.retrying", HOOK, "pending")]
    [data] = payloads(database, "job.retrying")
    assert (data["status"], data["next_retry_at"]) == ("retrying", "2026-01-01T12:00:05.000000Z")
    assert (data["retry_count"], data["error"]["type"]) == (1, "E")
    settle(database, Release(*running(database, webhook_url=HOOK, webhook_events=["job.retrying"])))
    assert len(told(database)) == 1  # given back: no attempt failed


@pytest.mark.parametrize("move", [Fail, TimeOut])
def test_a_dead_letter_is_told_beside_the_end(database: Database, move: type[Fail | TimeOut]) -> None:
    end = "job.failed" if move is Fail else "job.timeout"
    events = [end, "job.dead_lettered"]
    hold = running(database, webhook_url=HOOK, webhook_events=events)
    settle(database, move(*hold, error=ERROR))
    messages = rows_of(database, models.webhook_messages)
    assert {(m["event_type"], m["job_seq"]) for m in messages} == {(event, 2) for event in events}
    assert len({m["id"] for m in messages}) == 2
    [data] = payloads(database, "job.dead_lettered")
    reason = DeadLetterReason.EXHAUSTED if move is Fail else DeadLetterReason.TIMEOUT
    assert (data["job_id"], data["dead_letter_reason"]) == (hold[0], reason)


def test_who_names_no_events_hears_every_end_and_nothing_else(database: Database) -> None:
    hold = running(database, webhook_url=HOOK)
    assert not save(database, (hold, 50))
    settle(database, BackOff(*hold, LATER, error=ERROR))
    assert told(database) == []
    settle(database, Fail(*running(database, webhook_url=HOOK), error=ERROR))
    assert [event for event, _, _ in told(database)] == ["job.failed"]


def test_a_job_that_is_replayed_and_fails_again_is_told_of_as_dead_a_second_time(database: Database) -> None:
    add_endpoint(database, "job.dead_lettered")
    hold = running(database)
    settle(database, Fail(*hold, error=ERROR))
    settle(database, Retry(hold[0]))
    change(
        database, models.jobs, hold[0], status="running", attempt=2, lease_token=new_id(), worker_id=WORKER
    )
    settle(database, Fail(*hold_of(database, hold[0]), error=ERROR))
    assert [event for event, _, _ in told(database)] == ["job.dead_lettered"] * 2


def test_an_endpoint_hears_what_it_asked_for_of_its_own_tenants_jobs(database: Database) -> None:
    add_endpoint(database, "job.retrying", "job.dead_*", url="https://a.example/")
    add_endpoint(database, "job.*", url="https://b.example/", filters={"job_types": ["other"]})
    add_endpoint(database, "*", url="https://c.example/", tenant_id=OTHER_TENANT)
    add_endpoint(database, "job.failed", url="https://d.example/", status="disabled", disabled_at=NOW)
    settle(database, BackOff(*running(database), LATER, error=ERROR), Fail(*running(database), error=ERROR))
    assert sorted(told(database)) == [
        ("job.dead_lettered", "https://a.example/", "pending"),
        ("job.failed", "https://d.example/", "skipped"),
        ("job.retrying", "https://a.example/", "pending"),
    ]


# Progress


def test_progress_is_told_to_the_jobs_url_when_that_asked_for_it(database: Database) -> None:
    hold = running(database, webhook_url=HOOK, webhook_events=["job.progress"])
    assert save(database, (hold, 40))
    [message] = rows_of(database, models.webhook_messages)
    [delivery] = rows_of(database, models.webhook_deliveries)
    assert (message["event_type"], message["job_id"], message["job_seq"]) == ("job.progress", hold[0], None)
    assert (delivery["url"], delivery["status"], delivery["max_attempts"]) == (HOOK, "pending", 2)
    assert delivery["give_up_at"] == NOW + timedelta(seconds=61)
    [data] = payloads(database, "job.progress")
    assert (data["job_id"], data["status"], data["progress"]) == (hold[0], "running", 40)


def test_of_progress_only_the_newest_waits_for_each_target(database: Database) -> None:
    add_endpoint(database, "job.progress", url="https://a.example/")
    add_endpoint(database, "*", url="https://b.example/")
    one = running(database, webhook_url=HOOK, webhook_events=["job.progress"])
    two = running(database)
    for second, percent in enumerate((10, 20, 30)):
        assert save(database, (one, percent), (two, percent), seconds=second)
    rows = rows_of(database, models.webhook_deliveries)
    waiting = [(row["job_id"], row["url"]) for row in rows if row["status"] == "pending"]
    assert sorted(waiting) == sorted(
        [(one[0], HOOK)] + [(job, f"https://{x}.example/") for job in (one[0], two[0]) for x in "ab"]
    )
    assert {row["status"] for row in rows} == {"pending", "superseded"}
    newest = [data["progress"] for data in payloads(database, "job.progress")]
    assert sorted(newest) == [10, 10, 20, 20, 30, 30]
    waits_at = {row["created_at"] for row in rows if row["status"] == "pending"}
    assert waits_at == {NOW + timedelta(seconds=2)}


def test_what_a_courier_holds_is_not_superseded(database: Database) -> None:
    hold = running(database, webhook_url=HOOK, webhook_events=["job.progress", "job.completed"])
    save(database, (hold, 10))
    [delivery] = rows_of(database, models.webhook_deliveries)
    table = models.webhook_deliveries
    change(database, table, delivery["id"], status="sending", lease_owner=new_id(), lease_until=LATER)
    save(database, (hold, 20))
    settle(database, Complete(*hold))
    assert [(event, status) for event, _, status in told(database)] == [
        ("job.progress", "sending"),
        ("job.progress", "superseded"),
        ("job.completed", "pending"),
    ]


def test_the_end_supersedes_progress_also_where_the_end_is_not_told(database: Database) -> None:
    hold = running(database, webhook_url=HOOK, webhook_events=["job.progress"])
    other = running(database, webhook_url=HOOK, webhook_events=["job.progress"])
    save(database, (hold, 10), (other, 20))
    settle(database, Complete(*hold))
    rows = {row["job_id"]: row["status"] for row in rows_of(database, models.webhook_deliveries)}
    assert rows == {hold[0]: "superseded", other[0]: "pending"}


@pytest.mark.parametrize("overtaken_by", ["the end", "more progress", "nothing"])
def test_a_failed_telling_of_progress_is_not_repeated_once_it_was_overtaken(
    database: Database, overtaken_by: str
) -> None:
    hold = running(database, webhook_url=HOOK, webhook_events=["job.progress"])
    save(database, (hold, 10))
    [first] = rows_of(database, models.webhook_deliveries)
    table = models.webhook_deliveries
    change(database, table, first["id"], status="sending", lease_owner=new_id())
    if overtaken_by == "the end":
        settle(database, Complete(*hold))
    elif overtaken_by == "more progress":
        save(database, (hold, 20), seconds=2)
    change(database, table, first["id"], status="retrying", lease_owner=None)
    with database.write() as connection:
        supersede_overtaken(connection, [first["id"]], now=LATER)
    rows = {row["id"]: row["status"] for row in rows_of(database, table)}
    assert rows.pop(first["id"]) == ("retrying" if overtaken_by == "nothing" else "superseded")
    assert set(rows.values()) <= {"pending"}


def test_a_courier_that_settles_progress_after_the_end_does_not_try_again(database: Database) -> None:
    hold = running(database, webhook_url=HOOK, webhook_events=["job.progress"])
    save(database, (hold, 10))
    courier = Deliveries(database, owner=new_id(), lease_seconds=30)
    [claimed] = courier.turn((), (), Room(64), now=LATER).claimed
    settle(database, Complete(*hold))
    answer = Answer(LATER, Timings(1), error_class=ErrorClass.CONNECT, error="no connection")
    failed = Finished(claimed, answer, Verdict(DeliveryStatus.RETRYING, LATER))
    courier.turn([failed], (), Room(0), now=LATER)
    assert [status for _, _, status in told(database)] == ["superseded"]


def test_a_stale_attempt_tells_no_progress(database: Database) -> None:
    job_id, attempt, token = hold = running(
        database, attempt=2, webhook_url=HOOK, webhook_events=["job.progress"]
    )
    assert not save(database, ((job_id, attempt - 1, token), 50))
    assert not save(database, ((job_id, attempt, new_id()), 50))
    assert save(database, (hold, 50))
    assert not save(database, (hold, 49))  # it never falls
    settle(database, Complete(*hold))
    assert not save(database, (hold, 100))
    assert [status for _, _, status in told(database)] == ["superseded"]


def test_a_disabled_endpoint_is_noted_no_progress(database: Database) -> None:
    add_endpoint(database, "*", status="disabled", disabled_at=NOW)
    assert not save(database, (running(database), 50))
    assert told(database) == []


def test_progress_that_is_claimed_at_the_same_moment_stays_with_its_courier(postgres_url: str) -> None:
    """The UPDATE waits for the claim's lock, and must then look at the row anew."""
    database = Database(postgres_url)
    hold = running(database, webhook_url=HOOK, webhook_events=["job.progress"])
    save(database, (hold, 10))
    d = models.webhook_deliveries
    waiting = sa.text("SELECT 1 FROM pg_locks WHERE NOT granted")
    with ThreadPoolExecutor(1) as pool:
        with database.write() as courier:
            held = {"status": "sending", "lease_owner": new_id(), "lease_until": LATER}
            courier.execute(sa.update(d).values(held))
            ending = pool.submit(settle, database, Complete(*hold))

            def blocked() -> bool:
                with database.read() as connection:
                    return connection.execute(waiting).first() is not None

            wait_until(blocked, what="the end waits for the claim")
        ending.result(20)
    assert [status for _, _, status in told(database)] == ["sending"]
    assert job_row(database, hold[0])["status"] == "completed"
    database.dispose()


# What is said


@pytest.mark.parametrize("event", sorted(EventType))
def test_real_payloads_are_what_the_reference_says(database: Database, event: EventType) -> None:
    given = {"webhook_url": HOOK, "webhook_events": [event.value]}
    waiting = add_job(database, **given, expires_at=NOW)
    hold = running(database, **given)
    match event:
        case EventType.JOB_PROGRESS:
            save(database, (hold, 10))
        case EventType.JOB_COMPLETED:
            settle(database, Complete(*hold, result='{"n":1}'))
        case EventType.JOB_RETRYING:
            settle(database, BackOff(*hold, LATER, error=ERROR))
        case EventType.JOB_TIMEOUT:
            settle(database, TimeOut(*hold, error=ERROR))
        case EventType.JOB_CANCELLED:
            settle(database, Cancel(waiting, by="bob"))
        case EventType.JOB_EXPIRED:
            settle(database, Expire(waiting))
        case EventType.JOB_FAILED | EventType.JOB_DEAD_LETTERED:
            settle(database, Fail(*hold, error=ERROR))
    [data] = payloads(database, event)
    PAYLOADS[event].model_validate(data, strict=False)
    said = example(event)["data"]
    assert set(data) == set(said)
    empty = {name for name, value in data.items() if value is None and name in _TELLING}
    assert empty == {name for name, value in said.items() if value is None and name in _TELLING}


# What it costs


def test_progress_that_nobody_listens_to_is_one_statement(database: Database) -> None:
    add_endpoint(database, "*", tenant_id=OTHER_TENANT)
    holds = [running(database), running(database, webhook_url=HOOK)]
    with statements(database) as seen:
        assert not save(database, *((hold, 50) for hold in holds))
    assert len(seen) == 1
    assert seen[0].startswith("UPDATE jobs")
    assert [job_row(database, hold[0])["progress"] for hold in holds] == [50, 50]


def end(database: Database, holds: Sequence[Hold]) -> Exchanged:
    ended = [(_claimed(hold), Returned(None)) for hold in holds]
    return exchange(database, HOLDER, ended=ended, wanted=(), news={}, now=LATER)


def test_settling_reads_the_endpoints_once_a_batch_and_claiming_never(database: Database) -> None:
    holds = [running(database) for _ in range(20)]
    with statements(database) as seen:
        assert len(end(database, holds).settled) == 20
    settling = 1 if database.dialect == "postgresql" else 2  # SQLite writes the events by themselves
    assert len(seen) == settling + 1
    assert "FROM webhook_endpoints" in seen[-1]
    queued = [add_job(database) for _ in range(5)]
    with statements(database) as seen:
        wanted = [(job_id, new_id()) for job_id in queued]
        exchange(database, HOLDER, ended=(), wanted=wanted, news={}, now=LATER)
    assert len(seen) == settling


def test_telling_costs_as_many_statements_for_twenty_jobs_as_for_one(database: Database) -> None:
    add_endpoint(database, "job.*")
    counts = []
    for many in (1, 20):
        holds = [running(database, webhook_url=HOOK) for _ in range(many)]
        with statements(database) as seen:
            done = end(database, holds)
        assert all(settled.webhook for settled in done.settled)
        counts.append(len(seen))
    settling = 1 if database.dialect == "postgresql" else 2
    # the endpoints, the jobs, the messages, the deliveries, and progress that is superseded
    assert counts == [settling + 5] * 2
