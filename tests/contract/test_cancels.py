"""Cancels of one job and of many: what was answered holds, whatever claims and ends jobs meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Any

import pytest
import sqlalchemy as sa

from factories import (
    NOW,
    OTHER_TENANT,
    TENANT,
    add_job,
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
from laneway.domain.spec import Priority
from laneway.domain.states import ACTIVE, FINAL, WAITING, JobStatus
from laneway.engine import cancels
from laneway.engine.access.callers import Caller, Role
from laneway.engine.cancels import BATCH_ROWS, MAX_CANCELLED, ActiveJobs, Cancelled, Manner, cancel_all
from laneway.engine.endings import Returned, Unfinished
from laneway.engine.exchange import Holder, exchange
from laneway.engine.outcomes import Claimed, carry_out
from laneway.engine.queries import JobFilter
from laneway.engine.registry import Registry
from laneway.engine.service import CancelAnswer, JobService
from laneway.engine.transitions import Release
from laneway.errors import IllegalTransition, InvalidPayload, StorageUnavailable
from laneway.lanes.memory_lanes import MemoryLanes
from laneway.settings import Settings
from servers import wait_until

OLGA = Caller(TENANT, "olga", Role.OPERATOR)
EVERY = ActiveJobs(JobFilter(queue="default"))
SOFTLY = Manner()


@pytest.fixture
def lanes() -> MemoryLanes:
    return MemoryLanes()


@pytest.fixture
def service(database: Database, lanes: MemoryLanes, clock: FrozenClock) -> JobService:
    return JobService(database, lanes, Settings(), Registry(), clock=clock)


# Many at once


def test_waiting_jobs_end_and_running_ones_are_asked(service: JobService, lanes: MemoryLanes) -> None:
    database, hook = service.database, "https://example.org/"
    waiting = [add_job(database, status, webhook_url=hook) for status in sorted(WAITING)]
    lanes.push([("normal", job_id) for job_id in waiting])
    running = add_job(database, JobStatus.RUNNING)
    final = [add_job(database, status) for status in FINAL]
    before = [job_row(database, job_id) for job_id in final]
    manner = Manner("maintenance", terminate=True, grace_seconds=2.5)
    assert cancel_all(service, OLGA, EVERY, manner) == Cancelled(4, 1, 0)
    for job_id in waiting:
        row = job_row(database, job_id)
        assert (row["status"], row["cancelled_by"], row["cancel_reason"]) == (
            "cancelled",
            "olga",
            "maintenance",
        )
        assert [(e["action"], e["actor"], e["reason"]) for e in events_of(database, job_id)[1:]] == [
            ("cancel", "olga", "maintenance")
        ]
    row = job_row(database, running)
    assert (row["status"], row["cancel_requested_at"]) == ("running", NOW)
    assert (row["cancel_terminate"], row["cancel_grace_seconds"], row["cancelled_by"]) == (True, 2.5, "olga")
    assert [job_row(database, job_id) for job_id in final] == before
    assert lanes.contents("normal") == []
    assert {m["event_type"] for m in rows_of(database, models.webhook_messages)} == {"job.cancelled"}
    assert len(rows_of(database, models.webhook_messages)) == 4


@pytest.mark.parametrize(
    ("wanted", "columns"),
    [
        (ActiveJobs(JobFilter(statuses=(JobStatus.QUEUED,))), {"status": JobStatus.SCHEDULED}),
        (ActiveJobs(JobFilter(job_type="demo.echo")), {"job_type": "demo.other"}),
        (ActiveJobs(JobFilter(queue="default")), {"queue": "emails"}),
        (ActiveJobs(JobFilter(priority=Priority.NORMAL)), {"priority": "high"}),
        (ActiveJobs(JobFilter(created_after=NOW.replace(year=2025))), {"created_at": NOW.replace(year=2025)}),
        (
            ActiveJobs(JobFilter(created_before=NOW.replace(year=2027))),
            {"created_at": NOW.replace(year=2027)},
        ),
        (EVERY, {"tenant_id": OTHER_TENANT}),
    ],
)
def test_only_jobs_that_fit_all_of_the_filter_are_touched(
    service: JobService, wanted: ActiveJobs, columns: dict[str, Any]
) -> None:
    fits, other = add_job(service.database), add_job(service.database, **columns)
    assert cancel_all(service, OLGA, wanted, SOFTLY, dry_run=True) == Cancelled(0, 0, 1)
    assert status_of(service.database, fits) == "queued"
    assert cancel_all(service, OLGA, wanted, SOFTLY) == Cancelled(1, 0, 0)
    assert status_of(service.database, fits) == "cancelled"
    assert status_of(service.database, other) != "cancelled"


def test_ids_narrow_a_filter_and_those_of_other_tenants_mean_nothing(service: JobService) -> None:
    mine, spared = add_job(service.database), add_job(service.database)
    theirs = add_job(service.database, tenant_id=OTHER_TENANT)
    wanted = ActiveJobs(JobFilter(), (mine, theirs, new_id()))
    assert cancel_all(service, OLGA, wanted, SOFTLY) == Cancelled(1, 0, 0)
    assert [status_of(service.database, j) for j in (mine, spared, theirs)] == [
        "cancelled",
        "queued",
        "queued",
    ]


def test_who_was_asked_before_is_asked_again_only_to_be_killed(service: JobService) -> None:
    job_id = add_job(service.database, JobStatus.RUNNING)
    assert cancel_all(service, OLGA, EVERY, SOFTLY) == Cancelled(0, 1, 0)
    assert cancel_all(service, OLGA, EVERY, SOFTLY) == Cancelled(0, 0, 0)
    assert cancel_all(service, OLGA, EVERY, Manner(terminate=True)) == Cancelled(0, 1, 0)
    assert job_row(service.database, job_id)["cancel_terminate"]
    assert cancel_all(service, OLGA, EVERY, Manner(terminate=True)) == Cancelled(0, 0, 0)


def test_a_call_takes_the_oldest_up_to_its_limit_in_batches(
    service: JobService, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (BATCH_ROWS, MAX_CANCELLED) == (500, 10_000)
    monkeypatch.setattr(cancels, "BATCH_ROWS", 2)
    ids = [add_job(service.database) for _ in range(6)]
    running = add_job(service.database, JobStatus.RUNNING)
    begun = transactions(service.database)
    assert cancel_all(service, OLGA, EVERY, SOFTLY, limit=5) == Cancelled(5, 0, 2)
    assert len(begun) == 4, "three that write, one that counts"
    assert [status_of(service.database, job_id) for job_id in ids] == ["cancelled"] * 5 + ["queued"]
    assert cancel_all(service, OLGA, EVERY, SOFTLY, limit=5).matched == 2
    assert status_of(service.database, running) == "running"
    assert cancel_all(service, OLGA, EVERY, SOFTLY) == Cancelled(0, 0, 0)


def transactions(database: Database) -> list[object]:
    """One item a transaction from now on."""
    begun: list[object] = []
    sa.event.listen(database.engine, "begin", begun.append)
    return begun


def test_a_reason_that_no_store_can_hold_changes_nothing(service: JobService) -> None:
    job_id = add_job(service.database)
    with pytest.raises(InvalidPayload):
        cancel_all(service, OLGA, EVERY, Manner("\0"))
    assert status_of(service.database, job_id) == "queued"


def test_a_job_that_is_locked_comes_last_and_is_not_passed_over(postgres_url: str) -> None:
    """A worker has the first row in hand when the others are cancelled already."""
    database = Database(postgres_url)
    service = JobService(database, MemoryLanes(), Settings(), Registry())
    locked, *others = [add_job(database) for _ in range(3)]
    with database.engine.connect() as worker:
        transaction = worker.begin()
        worker.execute(sa.select(models.jobs.c.id).where(models.jobs.c.id == locked).with_for_update())

        def let_go() -> None:
            wait_until(
                lambda: {status_of(database, job_id) for job_id in others} == {"cancelled"},
                what="the others are cancelled",
            )
            transaction.rollback()

        done, _ = at_once([lambda: cancel_all(service, OLGA, EVERY, SOFTLY), let_go])
    assert done == Cancelled(3, 0, 0)
    assert status_of(database, locked) == "cancelled"
    database.dispose()


# Against claims


@dataclass
class Claimers:
    """Workers that claim whatever waits and give it back or complete it, until they are told to stop."""

    database: Database
    ids: list[str]
    stopping: threading.Event = field(default_factory=threading.Event)
    claims: int = 0

    def work(self, seed: int) -> None:
        rng = Random(seed)
        holder = Holder(new_id(), ("demo.echo",), 3, rng)
        held: list[Claimed] = []
        while not self.stopping.is_set() or held:
            wanted = [] if self.stopping.is_set() else rng.sample(self.ids, 3)
            ended = [(job, Unfinished() if rng.random() < 0.9 else Returned("1")) for job in held]
            try:
                done = exchange(
                    self.database,
                    holder,
                    ended=ended,
                    wanted=[(job_id, new_id()) for job_id in sorted(wanted)],
                    news={},
                    now=SystemClock().now(),
                )
            except StorageUnavailable:
                continue  # two batches that locked each other out: nothing was written
            held = done.claimed
            self.claims += len(held)


def assert_held(database: Database, job_id: str, answer: CancelAnswer | Exception) -> None:
    """Nothing started after the answer."""
    events = events_of(database, job_id)
    actions = [event["action"] for event in events]
    row = job_row(database, job_id)
    if isinstance(answer, IllegalTransition):
        assert row["status"] == "completed", actions
        return
    assert not isinstance(answer, Exception), answer
    assert row["attempt"] == answer.job["attempt"], actions
    if answer.done:
        assert row["status"] == "cancelled", actions
        assert actions[-1] in ("cancel", "stop"), actions
    else:
        assert row["status"] in ("cancelled", "completed"), actions
    if "cancel" in actions:
        assert actions.index("cancel") == len(actions) - 1, actions


@pytest.mark.parametrize("seed", range(3))
def test_nothing_starts_after_an_answered_cancel_however_many_claim(database: Database, seed: int) -> None:
    """Six workers hand the jobs around while four callers cancel them one by one, or all by one call."""
    ids = [add_job(database) for _ in range(60)]
    claimers = Claimers(database, ids)
    service = JobService(database, MemoryLanes(), Settings(), Registry())
    answers: dict[str, CancelAnswer | Exception] = {}

    def cancel_each(some: list[str]) -> None:
        wait_until(lambda: claimers.claims > 100, what="the workers work")
        for job_id in some:
            [answer] = at_once([partial(service.cancel, job_id, OLGA)])
            answers[job_id] = answer

    def cancel_many(some: list[str]) -> None:
        wait_until(lambda: claimers.claims > 100, what="the workers work")
        wanted = ActiveJobs(JobFilter(), tuple(some))
        assert cancel_all(service, OLGA, wanted, SOFTLY).remaining == 0
        for job_id in some:
            row = service.get(job_id, OLGA)
            asked = row["status"] == "cancelled" or row["cancelling"]
            answers[job_id] = (
                CancelAnswer(row, row["status"] == "cancelled") if asked else IllegalTransition(row["status"])
            )

    def cancel_all_then_stop() -> None:
        shares = [ids[n::4] for n in range(4)]
        calls: list[Callable[[], object]] = [partial(cancel_each, share) for share in shares[:2]]
        calls += [partial(cancel_many, share) for share in shares[2:]]
        try:
            problems = [problem for problem in at_once(calls) if isinstance(problem, Exception)]
        finally:
            claimers.stopping.set()
        assert problems == []

    workers: list[Callable[[], object]] = [partial(claimers.work, seed * 10 + n) for n in range(6)]
    problems = [p for p in at_once([*workers, cancel_all_then_stop]) if p is not None]
    assert problems == []
    assert set(answers) == set(ids)
    for job_id in ids:
        assert_held(database, job_id, answers[job_id])
    ends = {status_of(database, job_id) for job_id in ids}
    assert ends <= {"cancelled", "completed"}, ends
    assert "cancelled" in ends


@pytest.mark.parametrize("status", sorted(ACTIVE))
def test_a_cancelled_job_cannot_be_claimed_or_queued_again(service: JobService, status: JobStatus) -> None:
    job_id = add_job(service.database, status, attempt=1)
    answer = service.cancel(job_id, OLGA)
    assert answer.done == (status in WAITING)
    if not answer.done:
        with service.database.write() as connection:
            carry_out(connection, [Release(*hold_of(service.database, job_id))], now=NOW, actor="worker")
    holder = Holder(new_id(), ("demo.echo",), 3, Random(1))
    done = exchange(service.database, holder, ended=(), wanted=[(job_id, new_id())], news={}, now=NOW)
    assert done.claimed == []
    assert status_of(service.database, job_id) == "cancelled"
