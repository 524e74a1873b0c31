"""Slots become runs: once each, whoever looks and however many do; what follows from a run's end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from functools import partial
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
    add_schedule,
    at_once,
    change,
    events_of,
    hold_of,
    job_row,
    rows_of,
)
from laneway import models
from laneway.clock import FrozenClock, first_id, new_id
from laneway.db import Database, utc_now
from laneway.domain.states import JobStatus
from laneway.engine import slots
from laneway.engine.admission import Admission
from laneway.engine.outcomes import carry_out
from laneway.engine.schedule_ends import fold_ends
from laneway.engine.slots import Fired, cancel_overtaken, fire, prune_runs, seconds_until_due, start_waiting
from laneway.engine.transitions import Cancel, Claim, Complete, Fail, ForceComplete, Move, Retry, TimeOut
from laneway.settings import Settings

LATER = NOW + timedelta(seconds=5)
MINUTE = timedelta(minutes=1)


@pytest.fixture
def room(database: Database) -> Admission:
    return Admission(database, Settings(), FrozenClock())


def fired(database: Database, room: Admission, now: datetime = NOW) -> Fired:
    return fire(database, room, now=now)


def schedule(database: Database, schedule_id: str) -> sa.RowMapping:
    return next(row for row in rows_of(database, models.schedules) if row["id"] == schedule_id)


def runs(database: Database) -> list[tuple[Any, ...]]:
    """Slot in seconds after NOW, status, reason and slots of each run, by slot."""
    found = sorted(rows_of(database, models.schedule_runs), key=lambda row: row["slot"])
    return [((r["slot"] - NOW).total_seconds(), r["status"], r["reason"], r["slots"]) for r in found]


def job_ids(database: Database) -> list[str]:
    return [row["id"] for row in rows_of(database, models.jobs)]


def run_job(database: Database, job_id: str, *, token: str | None = None) -> tuple[str, int, str]:
    """Claim a queued job; what its holder names."""
    apply(database, Claim(job_id, token or new_id(), WORKER, NOW))
    return hold_of(database, job_id)


def apply(database: Database, *moves: Move) -> None:
    with database.write() as connection:
        carry_out(connection, moves, now=LATER, actor="t")


def fold(database: Database) -> tuple[int, bool]:
    return fold_ends(database, now=LATER)


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


# One run a slot


def test_a_slot_that_is_due_becomes_a_job_and_the_schedule_goes_on(
    database: Database, room: Admission
) -> None:
    schedule_id = add_schedule(
        database, name="nightly", queue="mail", priority="high", parameters={"y": [1]}, max_retries=7
    )
    other = add_schedule(database, next_slot=NOW + MINUTE, due_at=NOW + MINUTE)
    done = fired(database, room)
    [job_id] = job_ids(database)
    assert (done.decided, done.rung) == (1, [("mail-high", job_id, TENANT)])
    row = job_row(database, job_id)
    wanted = {
        "status": "queued",
        "queued_at": NOW,
        "scheduled_for": NOW,
        "scheduled_job_id": schedule_id,
        "tenant_id": TENANT,
        "created_by": "alice",
        "title": "nightly",
        "job_type": "demo.echo",
        "parameters": {"y": [1]},
        "lane": "mail-high",
        "max_retries": 7,
        "timeout_seconds": 60,
    }
    assert {name: row[name] for name in wanted} == wanted
    assert [event["action"] for event in events_of(database, job_id)] == ["create"]
    assert runs(database) == [(0, "started", None, 1)]
    after = schedule(database, schedule_id)
    assert (after["last_slot"], after["next_slot"], after["due_at"]) == (NOW, NOW + MINUTE, NOW + MINUTE)
    assert (after["total_runs"], after["skipped_runs"], after["last_run_at"]) == (1, 0, NOW)
    assert schedule(database, other)["version"] == 1
    assert fired(database, room) == Fired()


def test_of_eight_schedulers_at_once_one_runs_each_slot(database: Database) -> None:
    for _ in range(3):
        add_schedule(database, overlap="allow", interval_seconds=10)
    rooms = [Admission(database, Settings(), FrozenClock()) for _ in range(8)]
    for n in range(4):
        now = NOW + timedelta(seconds=10 * n)
        at_once([partial(fire, database, each, now=now) for each in rooms])
        fired(database, rooms[0], now)  # what a loser of a lock left
    assert runs(database) == [(10.0 * n, "started", None, 1) for n in range(4) for _ in range(3)]
    assert len(job_ids(database)) == 12


def test_who_comes_second_to_a_slot_makes_nothing(database: Database, room: Admission) -> None:
    """As if the lock had not been there: UNIQUE alone decides."""
    schedule_id = add_schedule(database)
    fired(database, room)
    change(database, models.schedules, schedule_id, next_slot=NOW, due_at=NOW, last_slot=None)
    done = fired(database, room)
    assert done.rung == []
    assert len(job_ids(database)) == 1
    assert runs(database) == [(0, "started", None, 1)]
    after = schedule(database, schedule_id)
    assert (after["total_runs"], after["next_slot"]) == (1, NOW + MINUTE)


def test_a_run_is_written_with_its_job_or_not_at_all(
    database: Database, room: Admission, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule_id = add_schedule(database)

    def dies(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    for place in ("create", "_move_on", "tell"):
        with monkeypatch.context() as broken:
            broken.setattr(slots, place, dies)
            with pytest.raises(ZeroDivisionError):
                fired(database, room)
        assert (runs(database), job_ids(database)) == ([], []), place
        assert schedule(database, schedule_id)["next_slot"] == NOW
    fired(database, room)
    assert len(job_ids(database)) == 1


def test_more_schedules_than_one_turn_takes_are_all_fired(
    database: Database, room: Admission, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "SCHEDULES_AT_ONCE", 2)
    for _ in range(5):
        add_schedule(database)
    turns = [fired(database, room).decided for _ in range(4)]
    assert turns == [2, 2, 1, 0]


def test_a_schedule_that_cannot_be_read_any_more_is_switched_off_and_holds_up_no_other(
    database: Database, room: Admission
) -> None:
    gone = add_schedule(database, cron_expression="0 * * * *", timezone="Gone/Away")
    add_schedule(database)
    assert fired(database, room).decided == 1
    after = schedule(database, gone)
    assert (after["is_active"], after["due_at"]) == (False, None)


# Clocks


def test_nothing_is_early_by_the_clock_that_is_behind(database: Database, room: Admission) -> None:
    with database.read() as connection:
        server = connection.execute(sa.select(utc_now())).scalar_one()
    slot = server + timedelta(hours=1)
    add_schedule(database, anchor_at=slot, next_slot=slot, due_at=slot)
    ahead = slot + timedelta(days=1)
    assert fired(database, room, ahead) == Fired()
    wait = seconds_until_due(database, now=ahead)
    assert wait is not None
    assert 3000 < wait <= 3600
    assert runs(database) == []


def test_a_clock_that_falls_back_and_comes_again_passes_over_nothing(
    database: Database, room: Admission
) -> None:
    add_schedule(database, overlap="allow")
    for minutes in (0, 1, -60, 1, 2, -1, 0, 3):
        fired(database, room, NOW + minutes * MINUTE)
    assert runs(database) == [(60.0 * n, "started", None, 1) for n in range(4)]


def test_the_time_until_the_next_slot_is_known(database: Database) -> None:
    assert seconds_until_due(database, now=NOW) is None
    add_schedule(database, is_active=False, next_slot=None, due_at=None)
    add_schedule(database, due_at=NOW + timedelta(seconds=30))
    add_schedule(database, due_at=NOW + timedelta(seconds=7))
    assert seconds_until_due(database, now=NOW) == 7
    assert seconds_until_due(database, now=NOW + timedelta(seconds=9)) == -2


# Misfire, overlap, room


def test_missed_slots_leave_one_row_with_their_number(database: Database, room: Admission) -> None:
    schedule_id = add_schedule(database, interval_seconds=3600, misfire="fire_once")
    fired(database, room, NOW + timedelta(seconds=10_000))
    assert runs(database) == [(0, "skipped", "misfire", 2), (7200, "started", None, 1)]
    after = schedule(database, schedule_id)
    assert (after["total_runs"], after["skipped_runs"]) == (1, 2)
    assert (after["last_slot"], after["next_slot"]) == (
        NOW + timedelta(hours=2),
        NOW + timedelta(hours=3),
    )


def test_a_run_that_is_active_makes_the_next_slot_overlap(database: Database, room: Admission) -> None:
    schedule_id = add_schedule(database)
    fired(database, room)
    fired(database, room, NOW + MINUTE)
    [job_id] = job_ids(database)
    apply(database, Complete(*run_job(database, job_id)))
    fired(database, room, NOW + 2 * MINUTE)
    assert runs(database) == [
        (0, "started", None, 1),
        (60, "skipped", "overlap", 1),
        (120, "started", None, 1),
    ]
    assert schedule(database, schedule_id)["skipped_runs"] == 1


def test_one_run_waits_and_starts_when_there_is_a_place(database: Database, room: Admission) -> None:
    schedule_id = add_schedule(database, overlap="queue_one")
    for n in range(3):
        fired(database, room, NOW + n * MINUTE)
    assert start_waiting(database, room, now=NOW + 3 * MINUTE) == Fired()
    assert [run[1:3] for run in runs(database)] == [
        ("started", None),
        ("waiting", None),
        ("skipped", "overlap"),
    ]
    [first] = job_ids(database)
    apply(database, Complete(*run_job(database, first)))
    rooms = [Admission(database, Settings(), FrozenClock()) for _ in range(4)]
    found = at_once([partial(start_waiting, database, each, now=NOW + 3 * MINUTE) for each in rooms])
    rung = [pair for done in found if isinstance(done, Fired) for pair in done.rung]
    rung += start_waiting(database, room, now=NOW + 3 * MINUTE).rung
    [second] = set(job_ids(database)) - {first}
    assert rung == [("normal", second, TENANT)]
    assert job_row(database, second)["scheduled_for"] == NOW + MINUTE
    assert runs(database)[1][1:3] == ("started", None)
    assert schedule(database, schedule_id)["total_runs"] == 2


def test_the_oldest_run_is_cancelled_for_the_one_that_waits(database: Database, room: Admission) -> None:
    add_schedule(database, overlap="cancel_running")
    fired(database, room)
    [running] = job_ids(database)
    hold = run_job(database, running)
    fired(database, room, NOW + MINUTE)
    assert cancel_overtaken(database, now=NOW + MINUTE).decided == 1
    assert cancel_overtaken(database, now=NOW + MINUTE).decided == 0  # it has been asked
    row = job_row(database, running)
    assert (row["status"], row["cancelled_by"]) == ("running", "scheduler")
    assert row["cancel_requested_at"] == NOW + MINUTE
    fired(database, room, NOW + 2 * MINUTE)  # displaces the one that waits
    assert [run[1:3] for run in runs(database)] == [
        ("started", None),
        ("skipped", "overlap"),
        ("waiting", None),
    ]
    apply(database, Complete(*hold))
    assert len(start_waiting(database, room, now=NOW + 2 * MINUTE).rung) == 1
    [waits] = set(job_ids(database)) - {running}
    fired(database, room, NOW + 3 * MINUTE)
    assert cancel_overtaken(database, now=NOW + 3 * MINUTE).decided == 1
    assert job_row(database, waits)["status"] == "cancelled"  # it had not begun


def test_where_there_is_no_room_the_reason_is_recorded(database: Database) -> None:
    add_schedule(database, overlap="allow", max_concurrent_runs=5)
    full = Admission(database, Settings(waiting_per_tenant=1), FrozenClock())
    fired(database, full)
    full = Admission(database, Settings(waiting_per_tenant=1), FrozenClock())  # which counts anew
    done = fire(database, full, now=NOW + MINUTE)
    assert done.rung == []
    assert runs(database) == [(0, "started", None, 1), (60, "skipped", "quota", 1)]
    add_schedule(database, tenant_id=OTHER_TENANT, priority="low")
    busy = Admission(database, Settings(waiting_total=1), FrozenClock())
    fire(database, busy, now=NOW + MINUTE)
    assert runs(database)[0][1:] in [("started", None, 1), ("skipped", "overloaded", 1)]
    assert {run[2] for run in runs(database)} >= {"quota", "overloaded"}


# What follows from the end of a run


def ended(database: Database, schedule_id: str, *moves: type[Move]) -> None:
    """Runs of the schedule, each ended by a move, one transaction each."""
    for move in moves:
        job_id = add_job(database, JobStatus.RUNNING, scheduled_job_id=schedule_id)
        apply(database, move(*hold_of(database, job_id)))
    fold(database)


def counts(database: Database, schedule_id: str) -> tuple[int, int, int]:
    fold(database)
    row = schedule(database, schedule_id)
    return row["successful_runs"], row["failed_runs"], row["consecutive_failures"]


def test_the_statistics_move_with_the_end_of_a_run(database: Database) -> None:
    schedule_id, other = add_schedule(database), add_schedule(database)
    ended(database, schedule_id, Complete, Fail, TimeOut)
    assert counts(database, schedule_id) == (1, 2, 2)
    ended(database, schedule_id, Complete)
    assert counts(database, schedule_id) == (2, 2, 0)
    waits = add_job(database, scheduled_job_id=schedule_id)
    apply(database, Cancel(waits, by="bob"))
    assert counts(database, schedule_id) == (2, 2, 0)
    apply(database, ForceComplete(add_job(database, scheduled_job_id=schedule_id), result="1"))
    assert counts(database, schedule_id) == (3, 2, 0)
    assert counts(database, other) == (0, 0, 0)


def test_ends_of_one_batch_count_in_their_order(database: Database) -> None:
    schedule_id = add_schedule(database)
    held = [
        hold_of(database, add_job(database, JobStatus.RUNNING, scheduled_job_id=schedule_id))
        for _ in range(5)
    ]
    apply(database, Fail(*held[0]), Fail(*held[1]), Complete(*held[2]), Fail(*held[3]), TimeOut(*held[4]))
    assert counts(database, schedule_id) == (1, 4, 2)


def test_a_stale_end_counts_nothing_and_a_retried_run_counts_again(database: Database) -> None:
    schedule_id = add_schedule(database)
    job_id = add_job(database, JobStatus.RUNNING, scheduled_job_id=schedule_id)
    hold = hold_of(database, job_id)
    apply(database, Fail(*hold))
    apply(database, Complete(*hold))
    assert counts(database, schedule_id) == (0, 1, 1)
    apply(database, Retry(job_id))
    apply(database, Complete(*run_job(database, job_id)))
    assert counts(database, schedule_id) == (1, 1, 0)


def test_an_end_costs_one_statement_more_for_a_batch_with_runs_and_none_without(database: Database) -> None:
    first, second = add_schedule(database), add_schedule(database)
    plain = [hold_of(database, add_job(database, JobStatus.RUNNING)) for _ in range(3)]
    of_schedules = [
        hold_of(database, add_job(database, JobStatus.RUNNING, scheduled_job_id=i))
        for i in (first, second, first)
    ]
    with statements(database) as without:
        apply(database, *[Complete(*hold) for hold in plain])
    with statements(database) as with_runs:
        apply(database, *[Complete(*hold) for hold in of_schedules])
    assert len(with_runs) == len(without) + 1
    assert (counts(database, first)[0], counts(database, second)[0]) == (2, 1)


def test_whoever_holds_a_schedule_holds_up_no_end_of_a_run(postgres_url: str) -> None:
    """A scheduler that is stopped in the middle of its transaction, say."""
    database = Database(postgres_url)
    schedule_id = add_schedule(database)
    job_id = add_job(database, JobStatus.RUNNING, scheduled_job_id=schedule_id)
    with database.write() as stopped:
        stopped.execute(sa.select(models.schedules).with_for_update()).all()
        apply(database, Complete(*hold_of(database, job_id)))
        assert fold(database) == (0, False)
    assert fold(database) == (1, False)
    assert counts(database, schedule_id) == (1, 0, 0)
    database.dispose()


def test_ends_are_counted_once_however_many_count(database: Database) -> None:
    schedule_id, gone = add_schedule(database), new_id()
    for owner in (schedule_id, gone):
        for _ in range(5):
            job_id = add_job(database, JobStatus.RUNNING, scheduled_job_id=owner)
            apply(database, Complete(*hold_of(database, job_id)))
    at_once([partial(fold_ends, database, now=LATER) for _ in range(4)])
    assert counts(database, schedule_id) == (5, 0, 0)
    assert rows_of(database, models.schedule_ends) == []


def test_batches_of_many_schedules_do_not_lock_each_other_out(database: Database) -> None:
    ids = [add_schedule(database) for _ in range(10)]
    batches = []
    for n in range(8):
        order = ids if n % 2 else ids[::-1]
        holds = [hold_of(database, add_job(database, JobStatus.RUNNING, scheduled_job_id=i)) for i in order]
        batches.append([Complete(*hold) for hold in holds])
    outcomes = at_once([partial(apply, database, *batch) for batch in batches])
    assert outcomes == [None] * 8
    assert {counts(database, i) for i in ids} == {(8, 0, 0)}


# What is told


def told(database: Database) -> list[tuple[str, dict[str, Any]]]:
    rows = sorted(rows_of(database, models.webhook_messages), key=lambda row: row["created_at"])
    return [(row["event_type"], json.loads(row["payload"])["data"]) for row in rows]


def test_a_slot_that_did_not_run_is_told_once(database: Database, room: Admission) -> None:
    add_endpoint(database, "schedule.*")
    schedule_id = add_schedule(database, name="hourly", interval_seconds=3600, misfire="skip")
    done = fired(database, room, NOW + timedelta(seconds=7100))
    assert done.told
    data = {
        "schedule_id": schedule_id,
        "name": "hourly",
        "job_type": "demo.echo",
        "slot": "2026-01-01T12:00:00.000000Z",
        "last_slot": "2026-01-01T13:00:00.000000Z",
        "slots": 2,
        "reason": "misfire",
    }
    assert told(database) == [("schedule.missed", data)]


def test_nobody_is_told_who_did_not_ask(database: Database, room: Admission) -> None:
    add_endpoint(database, "schedule.*", tenant_id=OTHER_TENANT)
    add_endpoint(database, "job.*")
    add_schedule(database, misfire="skip")
    assert not fired(database, room, NOW + timedelta(seconds=3600)).told
    assert told(database) == []


def test_three_failures_in_a_row_are_told_once_and_again_after_a_success(database: Database) -> None:
    add_endpoint(database, "schedule.failing")
    schedule_id = add_schedule(database, name="nightly")
    ended(database, schedule_id, Fail, Fail)
    assert told(database) == []
    ended(database, schedule_id, TimeOut, Fail, Fail)
    [(event, data)] = told(database)
    assert event == "schedule.failing"
    assert (data["name"], data["consecutive_failures"]) == ("nightly", 3)
    assert job_row(database, data["last_job_id"])["status"] == "timeout"
    ended(database, schedule_id, Complete, Fail, Fail, Fail)
    assert len(told(database)) == 2


# What is forgotten


def test_runs_are_forgotten_after_30_days(database: Database, room: Admission) -> None:
    add_schedule(database, overlap="queue_one", max_concurrent_runs=1)
    with database.write() as connection:
        for minutes, status in ((0, "started"), (1, "waiting"), (2, "started")):
            slot = NOW + minutes * MINUTE
            row = {
                "id": first_id(slot),
                "tenant_id": TENANT,
                "created_by": "alice",
                "schedule_id": new_id(),
                "slot": slot,
                "slots": 1,
                "last_slot": slot,
                "trigger": "slot",
                "status": status,
                "job_id": new_id() if status == "started" else None,
            }
            connection.execute(sa.insert(models.schedule_runs).values(row))
    later = NOW + timedelta(days=30)
    assert prune_runs(database, now=later) == 0
    assert prune_runs(database, now=later + 2 * MINUTE) == 1
    assert [run[:2] for run in runs(database)] == [(60, "waiting"), (120, "started")]
