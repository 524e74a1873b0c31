"""A paused queue: its jobs are accepted, and nothing takes them, on both stores."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import pytest
import sqlalchemy as sa

from factories import NOW, TENANT, WORKER, add_job, add_worker, at_once, rows_of, status_of
from laneway import models
from laneway.clock import FrozenClock, new_id
from laneway.db import Database
from laneway.domain.states import WAITING, JobStatus
from laneway.engine import cancels, doctor, pauses, queues, upkeep
from laneway.engine.access.callers import Caller, Role
from laneway.engine.registry import load
from laneway.engine.service import JobService
from laneway.engine.transitions import Applied, Claim, apply
from laneway.errors import Conflict, QueueNotFound
from laneway.lanes.live import Silence
from laneway.lanes.memory_lanes import MemoryLanes
from laneway.settings import Settings

ADMIN = Caller(TENANT, "ada", Role.ADMIN)


class Heard(Silence):
    """News that counts how often workers were told to look."""

    def __init__(self) -> None:
        self.wishes = self.rings = 0

    def wished(self) -> None:
        self.wishes += 1

    def ring_courier(self) -> None:
        self.rings += 1


@pytest.fixture
def news() -> Heard:
    return Heard()


@pytest.fixture
def service(database: Database, news: Heard, clock: FrozenClock) -> JobService:
    return JobService(database, MemoryLanes(), Settings(), load([]), news=news, clock=clock)


def claimed(database: Database, ids: Sequence[str]) -> list[str]:
    """Those of the jobs that a worker gets."""
    moves = [Claim(job_id, new_id(), WORKER, NOW) for job_id in ids]
    with database.write_once() as connection:
        outcomes = apply(connection, moves, now=NOW, actor="test")
    return [o.row["id"] for o in outcomes if isinstance(o, Applied)]


def test_no_claim_takes_a_job_of_a_paused_queue(service: JobService, database: Database, news: Heard) -> None:
    emails = [add_job(database, queue="emails", lane=lane) for lane in ("emails", "emails-high")]
    other = add_job(database)
    queues.pause(service, "emails", ADMIN)
    assert news.wishes == 1
    assert claimed(database, [*emails, other]) == [other]
    assert [status_of(database, job_id) for job_id in emails] == ["queued", "queued"]
    queues.resume(service, "emails", ADMIN)
    assert news.wishes == 2
    assert claimed(database, emails) == emails


def test_what_begins_after_the_answer_claims_nothing(service: JobService, database: Database) -> None:
    """Claims of many workers around the pause: those that got a job began before it was answered."""
    ids = [add_job(database) for _ in range(24)]
    answered: list[bool] = []

    def take(job_id: str) -> tuple[bool, bool]:
        late = bool(answered)
        return late, bool(claimed(database, [job_id]))

    def pause() -> tuple[bool, bool]:
        queues.pause(service, "default", ADMIN)
        answered.append(True)
        return False, False

    calls = [(lambda job_id=job_id: take(job_id)) for job_id in ids]
    results = at_once([*calls[:12], pause, *calls[12:]])
    assert not [r for r in results if isinstance(r, Exception)]
    assert not [r for r in results if r == (True, True)]
    left = [job_id for job_id in ids if status_of(database, job_id) == "queued"]
    assert claimed(database, [*left, add_job(database)]) == []


def test_lanes_of_a_paused_queue_are_left_alone() -> None:
    lanes = ("emails-high", "high", "emails", "normal", "sms")
    assert pauses.open_lanes(lanes, {"emails"}) == ("high", "normal", "sms")
    assert pauses.open_lanes(lanes, {"default", "sms"}) == ("emails-high", "emails")
    assert pauses.open_lanes(lanes, ()) == lanes


def test_the_reconciler_fills_no_lane_of_a_paused_queue(service: JobService, database: Database) -> None:
    job_id = add_job(database, queue="emails", lane="emails")
    other = add_job(database)
    queues.pause(service, "emails", ADMIN)
    later = NOW + timedelta(minutes=1)
    assert upkeep.reconcile(database, service.lanes, window=100, now=later) == 1
    assert (service.lanes.contents("emails"), service.lanes.contents("normal")) == ([], [other])
    queues.resume(service, "emails", ADMIN)
    assert upkeep.reconcile(database, service.lanes, window=100, now=later) == 1
    assert service.lanes.contents("emails") == [job_id]


def test_the_doctor_misses_nobody_at_a_paused_queue(service: JobService, database: Database) -> None:
    add_job(database)
    late = NOW + timedelta(hours=1)
    add_worker(database, beat_at=late, job_types=["demo.echo"])

    def findings() -> list[str]:
        return [finding.name for finding in doctor.examine(database, now=late)]

    assert "passed_over" in findings()
    assert doctor.missing_from(database, "normal", [], now=late)[0] != []
    queues.pause(service, "default", ADMIN)
    assert "passed_over" not in findings()
    assert doctor.missing_from(database, "normal", [], now=late) == ([], [])


def test_as_many_queues_as_the_limit_says_are_paused(
    service: JobService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queues, "MAX_PAUSED_QUEUES", 3)
    for name in ("a", "b", "c", "c"):
        queues.pause(service, name, ADMIN)
    with pytest.raises(Conflict, match="3 queues are paused"):
        queues.pause(service, "d", ADMIN)
    queues.resume(service, "a", ADMIN)
    queues.pause(service, "d", ADMIN)
    assert pauses.paused_names(service.database) == {"b", "c", "d"}


def test_what_can_be_no_queue_is_not_found(service: JobService) -> None:
    for name in ("high", "emails-high", "", "Emails", "a b", "ä"):
        for call in (queues.pause, queues.resume, queues.purge):
            with pytest.raises(QueueNotFound):
                call(service, name, ADMIN)


def test_two_that_pause_at_once_pause_once(service: JobService) -> None:
    answers = at_once([lambda: queues.pause(service, "emails", ADMIN)] * 4)
    assert [a["paused"] for a in answers if not isinstance(a, Exception)] == [True] * 4
    written = [row["action"] for row in rows_of(service.database, models.audit_log)]
    assert written == ["queue.paused"]


def test_a_purge_goes_in_bounded_steps_and_loses_nothing(
    service: JobService, database: Database, news: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cancels, "BATCH_ROWS", 3)
    waiting = [
        add_job(database, status, queue="emails", lane="emails", webhook_url="https://example.org/")
        for status in sorted(WAITING)
        for _ in range(2)
    ]
    running = add_job(database, JobStatus.RUNNING, queue="emails", lane="emails")
    service.lanes.push([("emails", job_id) for job_id in waiting])
    some = queues.purge(service, "emails", ADMIN, limit=5)
    assert (some.cancelled, some.cancelling, some.remaining) == (5, 0, 3)
    rest = queues.purge(service, "emails", ADMIN, limit=5)
    assert (rest.cancelled, rest.remaining) == (3, 0)
    with database.read() as connection:
        told = connection.execute(
            sa.select(models.webhook_messages.c.job_id).where(
                models.webhook_messages.c.event_type == "job.cancelled"
            )
        ).scalars()
        assert sorted(told) == sorted(waiting)
    assert {status_of(database, job_id) for job_id in waiting} == {"cancelled"}
    assert status_of(database, running) == "running"
    assert service.lanes.contents("emails") == []
    assert news.rings
