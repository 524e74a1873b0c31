"""Of a key, and of a tenant with a limit, no more jobs run at once than may, and whoever waits goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    add_job,
    at_once,
    change,
    events_of,
    hold_of,
    job_row,
    status_of,
)
from laneway import models
from laneway.clock import new_id
from laneway.db import Database
from laneway.domain.states import JobStatus
from laneway.engine import concurrency, positions
from laneway.engine.concurrency import Place
from laneway.engine.endings import Ending, Raised, Returned, TimedOut, Unfinished
from laneway.engine.exchange import Exchanged, Holder, exchange
from laneway.engine.outcomes import Claimed, carry_out, due_of
from laneway.engine.transitions import Cancel, Expire, ForceComplete, Move, Release, Stop
from laneway.lanes.backend import Due

LATER = NOW + timedelta(seconds=5)


def keyed(database: Database, number: int = 0, **columns: Any) -> str:
    """The id of a queued job with the key `k`, limit 1, queued `number` seconds after NOW."""
    moment = NOW + timedelta(seconds=number)
    return add_job(
        database, **({"concurrency_key": "k", "concurrency_limit": 1, "queued_at": moment} | columns)
    )


def take(
    database: Database, ids: Sequence[str] = (), ended: Sequence[tuple[Claimed, Ending]] = ()
) -> Exchanged:
    """A worker settles what ended, and claims the ids."""
    holder = Holder(WORKER, ["demo.echo"], 3, Random(1))
    wanted = [(job_id, new_id()) for job_id in ids]
    return exchange(database, holder, ended=ended, wanted=wanted, news={}, now=LATER)


def claimed(done: Exchanged) -> list[str]:
    return [job.job_id for job in done.claimed]


def statuses(database: Database, ids: Sequence[str]) -> list[tuple[str, str | None]]:
    rows = [job_row(database, job_id) for job_id in ids]
    return [(row["status"], row["status_reason"]) for row in rows]


def limit_tenant(database: Database, limit: int | None) -> None:
    """Make the tenant of the factories, with a limit."""
    with database.write() as connection:
        values = {"id": TENANT, "name": "north", "webhook_secret": "s", "created_by": "t"}
        if not connection.execute(sa.select(models.tenants.c.id).where(models.tenants.c.id == TENANT)).all():
            connection.execute(sa.insert(models.tenants).values(values))
    change(database, models.tenants, TENANT, max_running=limit)


def apply(database: Database, *moves: Move) -> list[Due]:
    with database.write() as connection:
        return [Due(*each) for each in due_of(carry_out(connection, moves, now=LATER, actor="t"))]


BLOCKED_BY_KEY = ("blocked", "concurrency_key")
BLOCKED_BY_TENANT = ("blocked", "tenant_limit")
RUNNING = ("running", None)
QUEUED = ("queued", None)


def test_of_a_key_so_many_jobs_start_as_its_limit_says_the_oldest_first(database: Database) -> None:
    ids = [keyed(database, -number, concurrency_limit=2) for number in range(4)]
    done = take(database, ids)
    assert sorted(claimed(done)) == sorted(ids[2:])
    assert statuses(database, ids) == [BLOCKED_BY_KEY] * 2 + [RUNNING] * 2
    assert [event["action"] for event in events_of(database, ids[0])] == ["create", "block"]
    assert events_of(database, ids[0])[-1]["reason"] == "concurrency_key"


def test_jobs_of_other_keys_and_tenants_and_those_without_one_are_not_held_up(database: Database) -> None:
    first = keyed(database)
    others = [
        keyed(database, concurrency_key="other"),
        keyed(database, tenant_id=OTHER_TENANT),
        add_job(database),
    ]
    waits = keyed(database, 1)
    done = take(database, [first, waits, *others])
    assert sorted(claimed(done)) == sorted([first, *others])
    assert statuses(database, [waits]) == [BLOCKED_BY_KEY]


def test_a_claimed_job_carries_all_that_running_it_needs(database: Database) -> None:
    job_id = keyed(database)
    [job] = take(database, [job_id]).claimed
    assert (job.job_id, job.attempt, job.parameters) == (job_id, 1, '{"x":1}')
    assert hold_of(database, job_id) == (job_id, 1, job.lease_token)


ENDINGS: tuple[Ending, ...] = (
    Returned("1"),
    Raised("E", "m", permanent=True),
    Raised("E", "again"),
    TimedOut(60),
    Unfinished(),
)


@pytest.mark.parametrize("ending", ENDINGS, ids=["complete", "fail", "back off", "time out", "release"])
def test_whatever_ends_an_attempt_wakes_the_next_that_waits(database: Database, ending: Ending) -> None:
    ids = [keyed(database, number) for number in range(3)]
    held = take(database, ids).claimed
    done = take(database, ended=[(held[0], ending)])
    assert done.next == [Due("normal", ids[1], TENANT)]
    assert statuses(database, ids[1:]) == [QUEUED, BLOCKED_BY_KEY]
    assert job_row(database, ids[1])["queued_at"] == NOW + timedelta(seconds=1)  # its old place
    assert claimed(take(database, [ids[1]])) == [ids[1]]


@pytest.mark.parametrize("kind", [Stop, Release, ForceComplete])
def test_so_does_the_move_of_a_reaper_or_an_admin(database: Database, kind: type[Move]) -> None:
    ids = [keyed(database, number) for number in range(2)]
    take(database, ids)
    move = ForceComplete(ids[0]) if kind is ForceComplete else kind(*hold_of(database, ids[0]))
    assert Due("normal", ids[1], TENANT) in apply(database, move)
    assert statuses(database, ids[1:]) == [QUEUED]


@pytest.mark.parametrize("kind", [Cancel, Expire])
def test_so_does_the_end_of_a_job_whose_turn_it_was(database: Database, kind: type[Move]) -> None:
    ids = [keyed(database, number) for number in range(3)]
    [job] = take(database, ids[2:]).claimed
    take(database, ids[:2])
    take(database, ended=[(job, Returned("1"))])
    assert statuses(database, ids[:2]) == [QUEUED, BLOCKED_BY_KEY]
    change(database, models.jobs, ids[0], expires_at=LATER)
    assert apply(database, Cancel(ids[0], by="bob") if kind is Cancel else Expire(ids[0]))
    assert statuses(database, ids[1:2]) == [QUEUED]


def test_the_most_urgent_is_woken_first_then_the_oldest(database: Database) -> None:
    runs = keyed(database, concurrency_limit=9)
    ids = [
        keyed(database, number, priority=priority, lane=priority)
        for number, priority in enumerate(("low", "normal", "critical", "high", "critical"))
    ]
    [job] = take(database, [runs]).claimed
    take(database, ids)
    woken = []
    for _ in ids:
        [due] = take(database, ended=[(job, Returned("1"))]).next
        woken.append(due.job_id)
        [job] = take(database, [due.job_id]).claimed
    assert woken == [ids[2], ids[4], ids[3], ids[1], ids[0]]


def test_who_waits_comes_before_who_comes_now(database: Database) -> None:
    ids = [keyed(database, number) for number in range(3)]
    held = take(database, ids[:2]).claimed
    done = take(database, [ids[2]], ended=[(held[0], Returned("1"))])
    assert (claimed(done), [due.job_id for due in done.next]) == ([], [ids[1]])
    assert statuses(database, ids[1:]) == [QUEUED, BLOCKED_BY_KEY]


def test_each_job_goes_by_its_own_limit(database: Database) -> None:
    ids = [keyed(database, number, concurrency_limit=limit) for number, limit in enumerate((3, 1, 2))]
    done = take(database, ids)
    assert claimed(done) == [ids[0], ids[2]]
    done = take(database, ended=[(done.claimed[1], Returned("1"))])
    assert done.next == []  # one still runs: too many for who waits


def test_a_job_that_is_late_unwanted_paused_or_unknown_stays_where_it_is(database: Database) -> None:
    ids = [
        keyed(database, expires_at=LATER),
        keyed(database, cancel_requested_at=NOW),
        keyed(database, job_type="somebody.elses"),
        keyed(database, queue="reports"),
    ]
    with database.write() as connection:
        paused = {"queue": "reports", "created_by": "op"}
        connection.execute(sa.insert(models.paused_queues).values(paused))
    assert claimed(take(database, ids)) == []
    assert statuses(database, ids) == [QUEUED] * 4


def test_an_id_that_comes_twice_is_claimed_once(database: Database) -> None:
    job_id = keyed(database, concurrency_limit=2)
    assert claimed(take(database, [job_id, job_id])) == [job_id]


def test_a_tenant_runs_no_more_jobs_than_it_may(database: Database) -> None:
    limit_tenant(database, 2)
    other = add_job(database, tenant_id=OTHER_TENANT)
    ids = [add_job(database, queued_at=NOW + timedelta(seconds=number)) for number in range(4)]
    done = take(database, [*ids, other])
    assert sorted(claimed(done)) == sorted([*ids[:2], other])
    assert statuses(database, ids[2:]) == [BLOCKED_BY_TENANT] * 2
    done = take(database, ended=[(job, Returned("1")) for job in done.claimed if job.tenant_id == TENANT])
    assert [due.job_id for due in done.next] == ids[2:]
    assert sorted(claimed(take(database, ids[2:]))) == sorted(ids[2:])


def test_a_job_needs_a_slot_of_its_key_and_one_of_its_tenant(database: Database) -> None:
    limit_tenant(database, 2)
    ids = [keyed(database, 0), keyed(database, 1), add_job(database, queued_at=NOW + timedelta(seconds=2))]
    more = add_job(database, queued_at=NOW + timedelta(seconds=3))
    done = take(database, [*ids, more])
    assert sorted(claimed(done)) == sorted([ids[0], ids[2]])
    assert statuses(database, [ids[1], more]) == [BLOCKED_BY_KEY, BLOCKED_BY_TENANT]
    plain = next(job for job in done.claimed if job.job_id == ids[2])
    assert [due.job_id for due in take(database, ended=[(plain, Returned("1"))]).next] == [more]


def test_of_eight_workers_at_once_so_many_get_a_job_as_may(database: Database) -> None:
    for _ in range(5):
        key = new_id()
        ids = [keyed(database, number, concurrency_key=key, concurrency_limit=3) for number in range(8)]
        took = at_once([lambda job_id=job_id: take(database, [job_id]) for job_id in ids])
        got = [job.job_id for done in took if isinstance(done, Exchanged) for job in done.claimed]
        assert len(got) == 3, took
        assert sorted(status for status, _ in statuses(database, ids)) == ["blocked"] * 5 + ["running"] * 3


def test_whoever_is_blocked_while_another_ends_is_woken(database: Database) -> None:
    """Both at the same moment: either the claim finds the slot free, or the end finds who waits."""
    for _ in range(20):
        key = new_id()
        first, second = (keyed(database, number, concurrency_key=key) for number in range(2))
        [job] = take(database, [first]).claimed
        at_once(
            [
                lambda job=job: take(database, ended=[(job, Returned("1"))]),
                lambda second=second: take(database, [second]),
            ]
        )
        assert status_of(database, second) in ("running", "queued")


# Sweeps


def sweep(database: Database) -> list[str]:
    woken, place = concurrency.sweep(database, now=LATER)
    assert place == Place()
    return [due.job_id for due in woken]


def test_a_sweep_wakes_who_waits_though_there_is_room(database: Database) -> None:
    reason = {"status_reason": "concurrency_key"}
    ids = [keyed(database, number, concurrency_limit=2) for number in range(4)]
    for job_id in ids:
        change(database, models.jobs, job_id, status="blocked", **reason)
    assert sweep(database) == ids[:2]
    assert statuses(database, ids) == [QUEUED] * 2 + [BLOCKED_BY_KEY] * 2


def test_a_sweep_wakes_nobody_whose_slots_are_taken(database: Database) -> None:
    ids = [keyed(database, number) for number in range(2)]
    take(database, ids)
    assert sweep(database) == []
    limit_tenant(database, 1)
    other = add_job(database)
    take(database, [other])
    assert statuses(database, [other]) == [QUEUED] or sweep(database) == []


def test_a_higher_limit_of_a_tenant_and_none_let_more_start(database: Database) -> None:
    limit_tenant(database, 1)
    ids = [add_job(database, queued_at=NOW + timedelta(seconds=number)) for number in range(4)]
    assert claimed(take(database, ids)) == ids[:1]
    assert sweep(database) == []
    limit_tenant(database, 2)
    assert sweep(database) == ids[1:2]
    limit_tenant(database, None)
    assert sweep(database) == ids[2:]


def test_a_sweep_goes_on_where_the_last_one_ended(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(concurrency, "SWEPT_SLOTS", 2)
    ids = [keyed(database, concurrency_key=f"key-{number}") for number in range(5)]
    for job_id in ids:
        change(database, models.jobs, job_id, status="blocked", status_reason="concurrency_key")
    woken, place = concurrency.sweep(database, now=LATER)
    assert sorted(due.job_id for due in woken) == sorted(ids[:2])
    place = Place(concurrency.Slots(TENANT, "key-2"))
    woken, place = concurrency.sweep(database, now=LATER, after=place)
    assert sorted(due.job_id for due in woken) == sorted(ids[3:])


# What it costs


def statements_of(database: Database, work: Callable[[], object]) -> list[str]:
    """The statements of `work`, without those that begin and end transactions."""
    heard: list[str] = []

    def hear(_c: Any, _cursor: Any, statement: str, *_: Any) -> None:
        heard.append(statement)

    sa.event.listen(database.engine, "before_cursor_execute", hear)
    try:
        work()
    finally:
        sa.event.remove(database.engine, "before_cursor_execute", hear)
    return [each for each in heard if not each.startswith("BEGIN")]


def test_where_nothing_needs_a_slot_claims_and_ends_cost_not_one_statement_more(database: Database) -> None:
    limit_tenant(database, None)
    ids = [add_job(database) for _ in range(20)]
    held: list[Claimed] = []
    claims = statements_of(database, lambda: held.extend(take(database, ids[:10]).claimed))
    ends = statements_of(
        database, lambda: take(database, ids[10:], ended=[(job, Returned("1")) for job in held])
    )
    events = 0 if database.dialect == "postgresql" else 1  # there they are part of the statement
    assert len(held) == 10
    assert len(claims) == 1 + events
    assert [
        each for each in ends if "concurrency" in each and not each.lstrip().startswith(("UPDATE", "WITH"))
    ] == []
    assert len([each for each in ends if "jobs" in each and "UPDATE jobs" in each]) == 2


# Where a job stands


def place(database: Database, job_id: str) -> int | None:
    with database.read() as connection:
        row = connection.execute(sa.select(models.jobs).where(models.jobs.c.id == job_id)).mappings().one()
        return positions.position(connection, row)


def test_a_waiting_job_knows_how_many_come_before_it(database: Database) -> None:
    queued = [add_job(database, queued_at=NOW + timedelta(seconds=number)) for number in range(3)]
    add_job(database, tenant_id=OTHER_TENANT, queued_at=NOW - timedelta(hours=1))
    add_job(database, lane="high", priority="high", queued_at=NOW - timedelta(hours=1))
    assert [place(database, job_id) for job_id in queued] == [1, 2, 3]
    runs = keyed(database, 0, lane="high", priority="high")
    waits = [keyed(database, number) for number in range(1, 4)]
    urgent = keyed(database, 9, priority="high", lane="high")
    take(database, [runs])
    take(database, [*waits, urgent])
    assert [place(database, job_id) for job_id in (urgent, *waits)] == [1, 2, 3, 4]
    assert place(database, runs) is None
    assert place(database, add_job(database, JobStatus.BLOCKED, status_reason="waits_for_jobs: 1")) is None


def test_a_job_of_a_full_tenant_stands_in_its_line(database: Database) -> None:
    limit_tenant(database, 1)
    ids = [add_job(database, queued_at=NOW + timedelta(seconds=number)) for number in range(3)]
    take(database, ids)
    assert [place(database, job_id) for job_id in ids] == [None, 1, 2]


def test_far_back_nobody_is_told_where(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    assert positions.MAX_POSITION == 1000
    monkeypatch.setattr(positions, "MAX_POSITION", 2)
    ids = [add_job(database, queued_at=NOW + timedelta(seconds=number)) for number in range(3)]
    assert [place(database, job_id) for job_id in ids] == [1, 2, None]
