"""Who is alive, what it holds, and what its jobs are asked to do."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from factories import NOW, add_job, add_worker, at_once, change, hold_of, rows_of
from laneway import models
from laneway.clock import new_id
from laneway.db import Database
from laneway.domain.states import JobStatus
from laneway.engine import leases
from laneway.engine.leases import Wish


def test_a_worker_that_registers_is_active_and_holds_nothing(database: Database) -> None:
    worker_id = new_id()
    leases.register(database, worker_id=worker_id, name="n" * 300, lanes=["high", "normal"])
    [row] = rows_of(database, models.workers)
    assert (row["id"], row["name"], row["state"], row["beat"]) == (worker_id, "n" * 200, "active", 0)
    assert (row["lanes"], row["held"]) == (["high", "normal"], [])


def test_a_process_that_lost_its_lease_is_somebody_else_and_gone_in_one_step(database: Database) -> None:
    before, after = add_worker(database, state="draining"), new_id()
    leases.register(database, worker_id=after, name="w", lanes=[], replaces=before)
    assert {row["id"]: row["state"] for row in rows_of(database, models.workers)} == {
        before: "gone",
        after: "active",
    }
    with pytest.raises(sa.exc.IntegrityError):
        leases.register(database, worker_id=before, name="w", lanes=[], replaces=after)
    assert leases.beat(database, worker_id=after, held=[]) == []


def test_who_was_declared_dead_stays_so_when_it_comes_back_as_another(database: Database) -> None:
    dead, after = add_worker(database, state="dead"), new_id()
    leases.register(database, worker_id=after, name="w", lanes=[], replaces=dead)
    assert leases.beat(database, worker_id=dead, held=[]) is None
    assert {row["id"]: row["state"] for row in rows_of(database, models.workers)}[dead] == "dead"


def test_a_beat_counts_up_and_says_what_is_held(database: Database) -> None:
    worker_id, token = add_worker(database), new_id()
    assert leases.beat(database, worker_id=worker_id, held=[token]) == []
    assert leases.beat(database, worker_id=worker_id, held=[]) == []
    assert leases.beat(database, worker_id=worker_id, held=[token]) == []
    [row] = rows_of(database, models.workers)
    assert (row["beat"], row["held"]) == (3, [token])


def test_a_thousand_held_tokens_fit_into_a_beat(database: Database) -> None:
    worker_id, tokens = add_worker(database), [new_id() for _ in range(1_000)]
    leases.beat(database, worker_id=worker_id, held=tokens)
    [row] = rows_of(database, models.workers)
    assert row["held"] == tokens


@pytest.mark.parametrize("state", ["dead", "gone"])
def test_a_worker_that_was_declared_dead_is_told_so(database: Database, state: str) -> None:
    worker_id = add_worker(database, state=state)
    assert leases.beat(database, worker_id=worker_id, held=[]) is None
    assert leases.beat(database, worker_id=new_id(), held=[]) is None
    [row] = rows_of(database, models.workers)
    assert row["beat"] == 0


def test_a_beat_brings_the_wishes_for_the_workers_own_running_jobs(database: Database) -> None:
    worker_id = add_worker(database, state="draining")
    mine = add_job(
        database,
        JobStatus.RUNNING,
        worker_id=worker_id,
        cancel_requested_at=NOW,
        cancel_terminate=True,
        cancel_grace_seconds=2.5,
    )
    plain = add_job(database, JobStatus.RUNNING, worker_id=worker_id, cancel_requested_at=NOW)
    add_job(database, JobStatus.RUNNING, worker_id=worker_id)
    add_job(database, JobStatus.RUNNING, cancel_requested_at=NOW)  # another worker's
    wishes = leases.beat(database, worker_id=worker_id, held=[])
    assert wishes is not None
    assert {wish.job_id: wish for wish in wishes} == {
        mine: Wish(mine, hold_of(database, mine)[2], True, 2.5),
        plain: Wish(plain, hold_of(database, plain)[2], False, None),
    }


def test_a_worker_drains_then_leaves_and_does_not_come_back(database: Database) -> None:
    worker_id = add_worker(database)
    for state, seen in (("draining", "draining"), ("gone", "gone"), ("draining", "gone")):
        leases.leave(database, worker_id=worker_id, state=state)
        assert [row["state"] for row in rows_of(database, models.workers)] == [seen]


def test_a_dead_worker_stays_dead_when_it_leaves(database: Database) -> None:
    worker_id = add_worker(database, state="dead")
    leases.leave(database, worker_id=worker_id)
    assert [row["state"] for row in rows_of(database, models.workers)] == ["dead"]


def test_beats_of_many_workers_at_once_all_count(database: Database) -> None:
    workers = [add_worker(database) for _ in range(8)]

    def beats(worker_id: str) -> None:
        for _ in range(5):
            leases.beat(database, worker_id=worker_id, held=[worker_id])

    assert at_once([lambda w=w: beats(w) for w in workers]) == [None] * 8  # type: ignore[misc]
    assert [(row["beat"], row["held"]) for row in rows_of(database, models.workers)] == [
        (5, [w]) for w in sorted(workers)
    ]


def test_the_slow_path_finds_queued_jobs_as_the_lanes_would_give_them(database: Database) -> None:
    def queued(lane: str, seconds: int, **columns: Any) -> str:
        return add_job(database, lane=lane, queued_at=NOW + timedelta(seconds=seconds), **columns)

    low = queued("low", 0)
    second, first = queued("high", 2), queued("high", 1)
    queued("high", 9)  # too young
    queued("high", 1, job_type="demo.other")
    queued("other", 1)
    add_job(database, JobStatus.SCHEDULED, lane="high")
    change(database, models.jobs, low, title="still there")

    def find(limit: int, types: list[str]) -> list[str]:
        with database.read() as connection:
            before = NOW + timedelta(seconds=2)
            return leases.find_queued(connection, ["high", "low"], types, limit=limit, before=before)

    assert find(10, ["demo.echo"]) == [first, second, low]
    assert find(3, ["demo.echo"]) == [first, second, low]
    assert find(2, ["demo.echo"]) == [first, second]
    assert find(0, ["demo.echo"]) == find(10, []) == []
