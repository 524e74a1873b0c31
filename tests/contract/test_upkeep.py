"""The sweeps: what falls due, expires, is lost with its worker, or is lost from its lane."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from factories import (
    NOW,
    TENANT,
    WORKER,
    add_job,
    add_schedule,
    add_worker,
    at_once,
    events_of,
    hold_of,
    job_row,
    rows_of,
    status_of,
)
from laneway import models
from laneway.clock import FrozenClock, SystemClock, new_id
from laneway.db import Database
from laneway.domain.states import FINAL, JobStatus
from laneway.engine import leases, upkeep
from laneway.engine.outcomes import carry_out
from laneway.engine.reaper import Reaper
from laneway.engine.transitions import Claim, Complete
from laneway.engine.upkeep import RING_GRACE
from laneway.lanes.backend import Due, Lack, LaneBackend
from laneway.lanes.memory_lanes import MemoryLanes
from laneway.lanes.rq_lanes import RqLanes
from laneway.scheduler.ticker import BREATH_SECONDS, Ticker
from laneway.settings import Settings
from servers import RedisServer

WINDOW = 5
LEASE = 30.0
CRASH_LIMIT = 3


# What falls due


def test_what_is_due_is_queued_and_rung_and_the_rest_is_left(database: Database) -> None:
    soon = NOW + timedelta(microseconds=1)
    scheduled = add_job(database, JobStatus.SCHEDULED, scheduled_for=NOW, queued_at=None, lane="high")
    retrying = add_job(database, JobStatus.RETRYING, next_retry_at=NOW - timedelta(hours=1), lane="low")
    early = add_job(database, JobStatus.SCHEDULED, scheduled_for=soon)
    waits = add_job(database, JobStatus.RETRYING, next_retry_at=soon)
    others = [add_job(database, status) for status in JobStatus if status not in ("scheduled", "retrying")]
    before = [job_row(database, job_id) for job_id in (early, waits, *others)]
    assert upkeep.promote(database, now=NOW) == [("low", retrying, TENANT), ("high", scheduled, TENANT)]
    for job_id in (scheduled, retrying):
        row = job_row(database, job_id)
        assert (row["status"], row["queued_at"], row["next_retry_at"]) == ("queued", NOW, None)
        assert [event["actor"] for event in events_of(database, job_id)] == ["alice", "scheduler"]
    assert [job_row(database, job_id) for job_id in (early, waits, *others)] == before
    assert upkeep.promote(database, now=NOW) == []


def test_a_retry_of_a_job_that_was_scheduled_once_waits_for_its_retry(database: Database) -> None:
    late = NOW + timedelta(minutes=1)
    add_job(database, JobStatus.RETRYING, scheduled_for=NOW, next_retry_at=late)
    assert upkeep.promote(database, now=NOW) == []
    assert len(upkeep.promote(database, now=late)) == 1


def test_one_sweep_promotes_no_more_than_its_limit(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert upkeep.SWEEP_LIMIT == 500
    monkeypatch.setattr(upkeep, "SWEEP_LIMIT", 3)
    ids = [add_job(database, JobStatus.SCHEDULED, scheduled_for=NOW) for _ in range(4)]
    assert [job_id for _, job_id, _ in upkeep.promote(database, now=NOW)] == ids[:3]
    assert [job_id for _, job_id, _ in upkeep.promote(database, now=NOW)] == ids[3:]


def test_eight_schedulers_promote_each_job_once(database: Database) -> None:
    ids = [add_job(database, JobStatus.SCHEDULED, scheduled_for=NOW) for _ in range(40)]
    results = at_once([lambda: upkeep.promote(database, now=NOW)] * 8)
    assert sorted(job_id for r in results if isinstance(r, list) for _, job_id, _ in r) == sorted(ids), (
        results
    )
    assert all(len(events_of(database, job_id)) == 2 for job_id in ids)


def test_the_next_due_moment_is_that_of_the_first_waiting_job(database: Database) -> None:
    assert upkeep.next_due(database) is None
    add_job(database, JobStatus.SCHEDULED, scheduled_for=NOW + timedelta(seconds=9))
    add_job(database, JobStatus.QUEUED, scheduled_for=NOW)
    assert upkeep.next_due(database) == NOW + timedelta(seconds=9)
    add_job(database, JobStatus.RETRYING, next_retry_at=NOW + timedelta(seconds=8))
    assert upkeep.next_due(database) == NOW + timedelta(seconds=8)


def test_waiting_jobs_expire_at_their_moment_and_running_or_ended_ones_never(database: Database) -> None:
    hook = "https://example.org/"
    ids = {status: add_job(database, status, expires_at=NOW, webhook_url=hook) for status in JobStatus}
    later = add_job(database, expires_at=NOW + timedelta(microseconds=1))
    assert upkeep.expire(database, now=NOW) == 3
    expired = {status for status in JobStatus if status_of(database, ids[status]) == "expired"}
    assert expired == {"scheduled", "blocked", "queued", "expired"}
    assert status_of(database, later) == "queued"
    assert [m["event_type"] for m in rows_of(database, models.webhook_messages)] == ["job.expired"] * 3
    assert upkeep.expire(database, now=NOW) == 0


# What dies with its worker


class Watched:
    """A reaper that has looked at the workers for long enough to judge them."""

    def __init__(self, database: Database, clock: FrozenClock) -> None:
        self.database, self.clock = database, clock
        self.reaper = Reaper(database, clock, lease_seconds=LEASE, crash_limit=CRASH_LIMIT)

    def sweep_for(
        self, seconds: float, *, beating: dict[str, list[str]] | None = None
    ) -> list[tuple[str, str]]:
        """Sweep every five seconds while the workers in `beating` beat with what they hold."""
        rung = self.reaper.sweep()
        for _ in range(int(seconds / 5)):
            self.clock.advance(seconds=5)
            for worker_id, held in (beating or {}).items():
                leases.beat(self.database, worker_id=worker_id, held=held)
            rung += self.reaper.sweep()
        return rung


@pytest.fixture
def watched(database: Database, clock: FrozenClock) -> Watched:
    return Watched(database, clock)


def held_by(database: Database, worker_id: str, **columns: Any) -> str:
    return add_job(database, JobStatus.RUNNING, **({"worker_id": worker_id, "lane": "high"} | columns))


def state_of(database: Database, worker_id: str) -> str:
    return next(str(row["state"]) for row in rows_of(database, models.workers) if row["id"] == worker_id)


def test_the_jobs_of_a_silent_worker_wait_again_after_one_lease(database: Database, watched: Watched) -> None:
    worker_id = add_worker(database)
    job_id = held_by(database, worker_id)
    assert watched.sweep_for(LEASE - 5) == []
    assert (status_of(database, job_id), state_of(database, worker_id)) == ("running", "active")
    watched.clock.advance(seconds=5)
    assert watched.reaper.sweep() == [("high", job_id, TENANT)]
    row = job_row(database, job_id)
    assert (row["status"], row["crash_count"], row["retry_count"], row["attempt"]) == ("queued", 1, 0, 1)
    assert state_of(database, worker_id) == "dead"
    event = events_of(database, job_id)[-1]
    assert (event["action"], event["actor"], event["error"]["type"]) == ("release", "scheduler", "WorkerLost")


def test_a_healthy_worker_keeps_its_job_for_ever(database: Database, watched: Watched) -> None:
    worker_id = add_worker(database)
    job_id = held_by(database, worker_id)
    token = hold_of(database, job_id)[2]
    assert watched.sweep_for(10 * LEASE, beating={worker_id: [token]}) == []
    assert status_of(database, job_id) == "running"


def test_the_third_worker_that_a_job_takes_down_makes_it_poison(database: Database, watched: Watched) -> None:
    fresh = held_by(database, add_worker(database), crash_count=CRASH_LIMIT - 2)
    third = held_by(database, add_worker(database), crash_count=CRASH_LIMIT - 1)
    assert watched.sweep_for(LEASE) == [("high", fresh, TENANT)]
    row = job_row(database, third)
    assert (row["status"], row["dead_letter_reason"], row["crash_count"]) == ("failed", "poison", CRASH_LIMIT)
    assert row["error"]["category"] == "crash"


def test_a_job_that_was_to_stop_is_cancelled_when_its_worker_dies(
    database: Database, watched: Watched
) -> None:
    job_id = held_by(database, add_worker(database), cancel_requested_at=NOW)
    assert watched.sweep_for(LEASE) == []
    assert status_of(database, job_id) == "cancelled"


@pytest.mark.parametrize("owner", ["gone", "unknown"])
def test_what_a_worker_left_behind_is_released_at_once_and_without_blame(
    database: Database, watched: Watched, owner: str
) -> None:
    worker_id = add_worker(database, state="gone") if owner == "gone" else new_id()
    job_id = held_by(database, worker_id, crash_count=CRASH_LIMIT - 1)
    assert watched.reaper.sweep() == [("high", job_id, TENANT)]
    assert job_row(database, job_id)["crash_count"] == CRASH_LIMIT - 1


def test_a_job_whose_living_worker_does_not_know_of_it_is_released_without_blame(
    database: Database, watched: Watched
) -> None:
    worker_id = add_worker(database)
    known, lost = held_by(database, worker_id), held_by(database, worker_id)
    beating = {worker_id: [hold_of(database, known)[2]]}
    assert watched.sweep_for(5, beating=beating) == []
    assert watched.sweep_for(10, beating=beating) == [("high", lost, TENANT)]
    assert job_row(database, lost)["crash_count"] == 0
    assert status_of(database, known) == "running"


def test_a_worker_that_left_in_the_last_moment_is_not_called_dead(
    database: Database, watched: Watched
) -> None:
    worker_id = add_worker(database)
    watched.sweep_for(LEASE - 5)
    leases.leave(database, worker_id=worker_id)
    watched.reaper._declare_dead(worker_id, 0)
    assert state_of(database, worker_id) == "gone"


def test_a_worker_that_beats_in_the_last_moment_is_not_called_dead(
    database: Database, watched: Watched
) -> None:
    worker_id = add_worker(database)
    leases.beat(database, worker_id=worker_id, held=[])
    watched.reaper._declare_dead(worker_id, 0)
    assert state_of(database, worker_id) == "active"


def test_what_a_dead_worker_still_reports_is_refused(database: Database, watched: Watched) -> None:
    worker_id = add_worker(database)
    job_id = held_by(database, worker_id)
    hold = hold_of(database, job_id)
    watched.sweep_for(LEASE)
    assert leases.beat(database, worker_id=worker_id, held=[]) is None
    with database.write() as connection:
        [outcome] = carry_out(connection, [Complete(*hold)], now=NOW, actor="t")
    assert status_of(database, job_id) == "queued"
    assert outcome.status is JobStatus.QUEUED


def test_eight_reapers_take_a_job_back_once(database: Database, clock: FrozenClock) -> None:
    worker_id = add_worker(database, state="dead")
    ids = [held_by(database, worker_id) for _ in range(10)]
    reapers = [Reaper(database, clock, lease_seconds=LEASE, crash_limit=CRASH_LIMIT) for _ in range(8)]
    results = at_once([reaper.sweep for reaper in reapers])
    assert sorted(job_id for r in results if isinstance(r, list) for _, job_id, _ in r) == sorted(ids), (
        results
    )
    assert all(job_row(database, job_id)["crash_count"] == 1 for job_id in ids)


# What is lost from its lane


@pytest.fixture(params=["memory", "redis"])
def lanes(request: pytest.FixtureRequest) -> Iterator[LaneBackend]:
    backend: LaneBackend
    if request.param == "memory":
        backend = MemoryLanes(window=WINDOW)
    else:
        backend = RqLanes(request.getfixturevalue("redis_url"), clock=SystemClock(), window=WINDOW)
    yield backend
    backend.close()


def queued(database: Database, count: int, *, lane: str = "normal", age: timedelta = RING_GRACE) -> list[str]:
    """Ids of rows queued one millisecond apart, the last of them `age` ago."""
    moments = [NOW - age - timedelta(milliseconds=count - 1 - n) for n in range(count)]
    return [add_job(database, lane=lane, queued_at=moment) for moment in moments]


def push(lanes: LaneBackend, ids: list[str], *, lane: str = "normal") -> int:
    return lanes.push([Due(lane, job_id, TENANT) for job_id in ids])


def reconcile(database: Database, lanes: LaneBackend) -> int:
    return upkeep.reconcile(database, lanes, window=WINDOW, now=NOW)


def claim_all(database: Database, ids: list[str]) -> None:
    with database.write() as connection:
        carry_out(connection, [Claim(i, new_id(), WORKER, NOW) for i in ids], now=NOW, actor="t")


def test_after_a_flush_every_lane_is_rung_again_in_order(database: Database, lanes: LaneBackend) -> None:
    normal, high = queued(database, WINDOW), queued(database, 2, lane="q-high")
    push(lanes, normal)
    push(lanes, high, lane="q-high")
    for lane in ("normal", "q-high"):
        lanes.purge(lane)
    assert reconcile(database, lanes) == WINDOW + 2
    assert lanes.contents("normal") == normal
    assert lanes.contents("q-high") == high
    assert not lanes.backlog("normal").waiting
    assert reconcile(database, lanes) == 0


def test_what_was_lost_from_the_head_goes_back_to_the_head(database: Database, lanes: LaneBackend) -> None:
    ids = queued(database, 4)
    push(lanes, ids)
    assert lanes.take(["normal"], 2, worker_name="dies") == ids[:2]
    assert reconcile(database, lanes) == 2
    assert lanes.contents("normal") == ids


def test_a_lane_holds_the_oldest_rows_and_the_flag_falls_once_all_fit(
    database: Database, lanes: LaneBackend
) -> None:
    ids = queued(database, WINDOW + 1)
    assert push(lanes, ids) == WINDOW
    assert lanes.backlog("normal").waiting
    assert reconcile(database, lanes) == 0
    assert lanes.contents("normal") == ids[:WINDOW]
    assert lanes.backlog("normal").waiting  # one row is still outside
    claim_all(database, lanes.take(["normal"], 1, worker_name="w"))
    assert reconcile(database, lanes) == 1
    assert lanes.contents("normal") == ids[1:]
    assert not lanes.backlog("normal").waiting


def test_rows_outside_a_full_lane_go_in_as_it_empties_in_their_order(
    database: Database, lanes: LaneBackend
) -> None:
    ids = queued(database, 3 * WINDOW)
    push(lanes, ids)
    run: list[str] = []
    while taken := lanes.take(["normal"], 2, worker_name="w"):
        claim_all(database, taken)
        run += taken
        reconcile(database, lanes)
    assert run == ids


def test_of_a_well_filled_lane_only_the_head_is_compared(
    database: Database, lanes: LaneBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "HEAD", 4)
    lanes.window = window = 12
    ids = queued(database, window + 2)
    push(lanes, ids)

    def sweep() -> int:
        return upkeep.reconcile(database, lanes, window=window, now=NOW)

    lanes.take(["normal"], 2, worker_name="dies")
    assert sweep() == 2  # lost at the head: back at once
    assert lanes.contents("normal") == ids[:window]
    claim_all(database, lanes.take(["normal"], 2, worker_name="w"))
    assert sweep() == 0  # more than three quarters: the rows outside wait
    claim_all(database, lanes.take(["normal"], 1, worker_name="w"))
    assert sweep() == 2
    assert lanes.contents("normal") == ids[3:]


def test_a_row_that_may_be_on_its_way_is_left_alone(database: Database, lanes: LaneBackend) -> None:
    [old] = queued(database, 1)
    [young] = queued(database, 1, age=RING_GRACE - timedelta(microseconds=1))
    assert reconcile(database, lanes) == 1
    assert lanes.contents("normal") == [old]
    assert not lanes.backlog("normal").waiting  # the young one's own push must not be refused
    assert push(lanes, [young]) == 1
    assert lanes.contents("normal") == [old, young]


def test_a_row_whose_push_was_refused_is_rung_however_young_and_the_flag_falls(
    database: Database, lanes: LaneBackend
) -> None:
    """Otherwise a lane that once was full would stay slow for as long as jobs keep coming."""
    first = queued(database, WINDOW + 1)
    push(lanes, first)
    claim_all(database, first)
    lanes.take(["normal"], WINDOW, worker_name="w")
    young = queued(database, 2, age=timedelta(0))
    assert push(lanes, young) == 0
    assert reconcile(database, lanes) == 2
    assert lanes.contents("normal") == young
    assert not lanes.backlog("normal").waiting


def test_a_refusal_while_the_rows_are_read_keeps_the_flag_up(database: Database, lanes: LaneBackend) -> None:
    ids = queued(database, WINDOW + 1)
    push(lanes, ids)
    claim_all(database, lanes.take(["normal"], 2, worker_name="w"))
    seen = lanes.backlog("normal")
    push(lanes, [new_id()])
    lanes.refill("normal", [Lack(TENANT, [], ids[WINDOW:], True)], refusals_seen=seen.refusals)
    assert lanes.backlog("normal").waiting


def test_ids_that_no_row_stands_behind_do_no_harm(database: Database, lanes: LaneBackend) -> None:
    ids = queued(database, 2)
    push(lanes, ["stale", ids[0], "forged"])
    assert reconcile(database, lanes) == 1
    assert lanes.contents("normal") == ["stale", ids[0], "forged", ids[1]]


def test_only_queued_rows_are_rung(database: Database, lanes: LaneBackend) -> None:
    for status in JobStatus:
        if status is not JobStatus.QUEUED:
            add_job(database, status, queued_at=NOW - timedelta(hours=1))
    assert reconcile(database, lanes) == 0
    assert lanes.contents("normal") == []


# The scheduler


def ticker(database: Database, lanes: LaneBackend, clock: FrozenClock, **settings: Any) -> Ticker:
    return Ticker(database, lanes, Settings(**settings), clock=clock)


def test_one_tick_promotes_expires_reaps_and_reconciles(database: Database, clock: FrozenClock) -> None:
    lanes = MemoryLanes()
    due = add_job(database, JobStatus.SCHEDULED, scheduled_for=NOW)
    late = add_job(database, JobStatus.SCHEDULED, scheduled_for=NOW + timedelta(hours=1), expires_at=NOW)
    orphan = held_by(database, add_worker(database, state="dead"), lane="normal")
    [lost] = queued(database, 1, age=timedelta(hours=1))
    assert ticker(database, lanes, clock).tick()
    assert sorted(lanes.contents("normal")) == sorted([due, orphan, lost])
    assert status_of(database, late) == "expired"


def test_a_tick_without_redis_does_the_rest_and_says_that_it_failed(
    database: Database, clock: FrozenClock, own_redis_server: RedisServer
) -> None:
    lanes = RqLanes(own_redis_server.url, clock=SystemClock())
    own_redis_server.stop()
    due = add_job(database, JobStatus.SCHEDULED, scheduled_for=NOW)
    late = add_job(database, expires_at=NOW)
    assert not ticker(database, lanes, clock).tick()
    assert (status_of(database, due), status_of(database, late)) == ("queued", "expired")
    lanes.close()


def test_the_scheduler_sleeps_until_the_next_is_due_and_never_longer_than_a_tick(
    database: Database, clock: FrozenClock
) -> None:
    scheduler = ticker(database, MemoryLanes(), clock, tick_seconds=1.0)
    assert scheduler.turn() == 1.0
    add_job(database, JobStatus.SCHEDULED, scheduled_for=NOW + timedelta(seconds=5))
    assert scheduler.turn() == 1.0
    slot = NOW + timedelta(seconds=0.5)
    add_schedule(database, anchor_at=slot, next_slot=slot, due_at=slot)
    assert scheduler.turn() == 0.5
    add_job(database, JobStatus.RETRYING, next_retry_at=NOW + timedelta(seconds=0.25))
    assert scheduler.turn() == 0.25
    add_job(database, JobStatus.SCHEDULED, scheduled_for=NOW + timedelta(milliseconds=1))
    assert scheduler.turn() == BREATH_SECONDS


def test_between_two_rounds_the_scheduler_does_only_what_has_a_time(
    database: Database, clock: FrozenClock
) -> None:
    lanes = MemoryLanes()
    scheduler = ticker(database, lanes, clock)
    job_id = add_job(database, JobStatus.SCHEDULED, scheduled_for=NOW)
    late = add_job(database, expires_at=NOW)
    add_schedule(database)
    scheduler.turn()
    [run] = [row["id"] for row in rows_of(database, models.jobs) if row["scheduled_job_id"]]
    assert sorted(lanes.contents("normal")) == sorted([job_id, run])
    assert status_of(database, late) == "queued"


def test_the_scheduler_does_not_spin_while_a_due_job_cannot_be_promoted(
    database: Database, clock: FrozenClock
) -> None:
    add_job(database, JobStatus.SCHEDULED, scheduled_for=NOW)
    with database.write() as connection:  # a migration under way, say
        connection.execute(sa.text("ALTER TABLE job_events RENAME TO job_events_moved"))
    scheduler = ticker(database, MemoryLanes(), clock, tick_seconds=1.0)
    assert [scheduler.turn() for _ in range(3)] == [1.0] * 3


def test_what_nobody_expected_ends_the_scheduler(
    database: Database, clock: FrozenClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In either of its threads: a process that does half its work would look alive."""

    def broken(_: Ticker) -> bool:
        raise ZeroDivisionError

    for name in ("tick", "turn"):
        with monkeypatch.context() as patch:
            patch.setattr(Ticker, name, broken)
            with pytest.raises(ZeroDivisionError):
                ticker(database, MemoryLanes(), clock).run(threading.Event())


# What must hold


def test_no_final_row_is_ever_swept(database: Database, clock: FrozenClock) -> None:
    past = {"expires_at": NOW, "scheduled_for": NOW, "queued_at": NOW - timedelta(hours=1)}
    ids = [add_job(database, status, **past) for status in FINAL]
    before = [job_row(database, job_id) for job_id in ids]
    lanes = MemoryLanes()
    ticker(database, lanes, clock).tick()
    assert [job_row(database, job_id) for job_id in ids] == before
    assert lanes.contents("normal") == []
