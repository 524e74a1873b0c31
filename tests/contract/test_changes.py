"""Changing jobs that wait, and the races with those who take them, on both stores."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import pytest
import sqlalchemy as sa

from factories import NOW, OTHER_TENANT, TENANT, WORKER, add_job, at_once, events_of, job_row
from laneway import models
from laneway.clock import FrozenClock, new_id
from laneway.db import Database
from laneway.domain.spec import JobChange
from laneway.domain.states import ACTIVE, FINAL, WAITING, JobStatus
from laneway.engine.access.callers import Caller, Role
from laneway.engine.changes import change
from laneway.engine.outcomes import Claimed, carry_out
from laneway.engine.registry import JobType, Registry
from laneway.engine.service import MAX_METADATA_BYTES, JobService
from laneway.engine.transitions import Applied, Claim, Refused
from laneway.errors import (
    IllegalTransition,
    InvalidParameters,
    InvalidPayload,
    JobNotFound,
    PayloadTooLarge,
    PreconditionFailed,
    UnknownJobType,
)
from laneway.lanes.memory_lanes import MemoryLanes
from laneway.settings import Settings

ALICE = Caller(TENANT, "alice", Role.USER)
LATER = NOW + timedelta(hours=1)


def greet(name: str = "you") -> str:
    return name


@pytest.fixture
def lanes() -> MemoryLanes:
    return MemoryLanes()


@pytest.fixture
def service(database: Database, lanes: MemoryLanes, clock: FrozenClock) -> JobService:
    registry = Registry()
    registry.add(JobType("demo.echo", greet))
    return JobService(database, lanes, Settings(), registry, clock=clock)


def wanting(**fields: Any) -> JobChange:
    return JobChange(**fields)


def tags_of(database: Database, job_id: str) -> set[str]:
    t = models.job_tags.c
    with database.read() as connection:
        return set(connection.execute(sa.select(t.tag).where(t.job_id == job_id)).scalars())


def test_each_field_is_changed_in_the_row_and_told_as_an_event(service: JobService) -> None:
    job_id = add_job(service.database)
    wanted = wanting(priority="high", tags=["a", "b", "a"], metadata={"k": 1}, parameters={"name": "é"})
    job, version = change(service, job_id, ALICE, wanted)
    assert (job["priority"], job["tags"], job["metadata"]) == ("high", ["a", "b", "a"], {"k": 1})
    assert (job["parameters"], job["status"], version) == ({"name": "é"}, "queued", 2)
    assert service.get_versioned(job_id, ALICE) == (job, 2)
    told = events_of(service.database, job_id)[-1]
    assert (told["seq"], told["action"], told["status"], told["actor"]) == (2, "change", "queued", "alice")
    assert told["reason"] == "metadata, parameters, priority, tags"
    assert tags_of(service.database, job_id) == {"a", "b"}
    change(service, job_id, ALICE, wanting(tags=["c"]))
    assert tags_of(service.database, job_id) == {"c"}
    change(service, job_id, ALICE, wanting(tags=[]))
    assert tags_of(service.database, job_id) == set()


def test_what_is_not_given_stays(service: JobService) -> None:
    job_id = add_job(service.database, tags=["a"], metadata={"k": 1}, title="T")
    before = job_row(service.database, job_id)
    change(service, job_id, ALICE, wanting(metadata={}))
    after = job_row(service.database, job_id)
    changed = {name for name in before if before[name] != after[name]}
    assert changed <= {"metadata", "version", "event_seq", "updated_at"}
    assert after["metadata"] == {}


def test_a_queued_job_moves_to_its_new_lane(service: JobService, lanes: MemoryLanes) -> None:
    job_id = add_job(service.database)
    lanes.push([("normal", job_id)])
    change(service, job_id, ALICE, wanting(priority="critical"))
    assert (lanes.contents("normal"), lanes.contents("critical")) == ([], [job_id])
    assert job_row(service.database, job_id)["lane"] == "critical"
    emails = add_job(service.database, queue="emails", lane="emails")
    change(service, emails, ALICE, wanting(priority=0))
    assert job_row(service.database, emails)["lane"] == "emails-low"


def test_a_job_that_is_not_queued_is_in_no_lane_before_and_after(
    service: JobService, lanes: MemoryLanes
) -> None:
    for status in WAITING - {JobStatus.QUEUED}:
        job_id = add_job(service.database, status)
        job, _ = change(service, job_id, ALICE, wanting(priority="high"))
        assert (job["status"], lanes.contents("high")) == (status, [])
        assert job_row(service.database, job_id)["lane"] == "high"


def test_a_scheduled_job_is_put_off_or_brought_forward(service: JobService, lanes: MemoryLanes) -> None:
    job_id = add_job(service.database, JobStatus.SCHEDULED, scheduled_for=LATER)
    job, _ = change(service, job_id, ALICE, wanting(scheduled_for=LATER + timedelta(days=1)))
    assert (job["status"], job["scheduled_for"]) == ("scheduled", "2026-01-02T13:00:00.000000Z")
    job, _ = change(service, job_id, ALICE, wanting(scheduled_for=NOW, priority="high"))
    assert (job["status"], lanes.contents("high")) == ("queued", [job_id])
    actions = [event["action"] for event in events_of(service.database, job_id)]
    assert actions == ["create", "change", "change", "enqueue"]


def test_only_a_scheduled_job_has_a_moment_to_change(service: JobService) -> None:
    for status in WAITING - {JobStatus.SCHEDULED}:
        job_id = add_job(service.database, status)
        with pytest.raises(IllegalTransition) as refused:
            change(service, job_id, ALICE, wanting(scheduled_for=LATER))
        assert refused.value.facts == {"current_status": status}
        assert job_row(service.database, job_id)["version"] == 1


def test_what_does_not_wait_stays_as_it_is(service: JobService) -> None:
    for status in FINAL | (ACTIVE - WAITING):
        job_id = add_job(service.database, status)
        before = job_row(service.database, job_id)
        with pytest.raises(IllegalTransition) as refused:
            change(service, job_id, ALICE, wanting(priority="high", tags=["x"]))
        assert refused.value.facts == {"current_status": status}
        assert job_row(service.database, job_id) == before
        assert tags_of(service.database, job_id) == set()


def test_a_change_of_another_version_is_refused(service: JobService) -> None:
    job_id = add_job(service.database)
    for version in (0, 2):
        with pytest.raises(PreconditionFailed):
            change(service, job_id, ALICE, wanting(priority="low"), expected=partial(int.__eq__, version))
    _, version = change(service, job_id, ALICE, wanting(priority="low"), expected=partial(int.__eq__, 1))
    assert version == 2


def test_what_may_not_be_seen_cannot_be_changed(service: JobService) -> None:
    job_id = add_job(service.database)
    for caller in (Caller(TENANT, "bob", Role.USER), Caller(OTHER_TENANT, "alice", Role.ADMIN)):
        with pytest.raises(JobNotFound):
            change(service, job_id, caller, wanting(priority="low"))
    change(service, job_id, Caller(TENANT, "olga", Role.OPERATOR), wanting(priority="low"))


WRONG: list[tuple[dict[str, Any], type[Exception]]] = [
    ({"parameters": {"nome": "x"}}, InvalidParameters),
    ({"parameters": {"name": "a\0b"}}, InvalidPayload),
    ({"parameters": {"name": "x" * 2**18}}, PayloadTooLarge),
    ({"metadata": {"x": "y" * MAX_METADATA_BYTES}}, PayloadTooLarge),
    ({"tags": ["a\0"]}, InvalidPayload),
]


def test_what_the_stores_or_the_type_cannot_take_is_refused(service: JobService) -> None:
    job_id = add_job(service.database)
    for fields, error in WRONG:
        with pytest.raises(error):
            change(service, job_id, ALICE, wanting(**fields))
    unknown = add_job(service.database, job_type="no.such")
    with pytest.raises(UnknownJobType):
        change(service, unknown, ALICE, wanting(parameters={}))
    assert job_row(service.database, job_id)["version"] == 1


def test_the_last_moment_there_is_is_kept_in_utc(service: JobService) -> None:
    job_id = add_job(service.database, JobStatus.SCHEDULED, scheduled_for=LATER)
    last = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)
    assert change(service, job_id, ALICE, wanting(scheduled_for=last))[0]["scheduled_for"].startswith("9999")


# Races


def claim(database: Database, job_id: str) -> Applied | Refused:
    with database.write() as connection:
        [outcome] = carry_out(connection, [Claim(job_id, new_id(), WORKER, NOW)], now=NOW, actor="worker:w")
    return outcome


@pytest.mark.parametrize("turn", range(6))
def test_a_worker_gets_the_old_job_or_the_whole_new_one(service: JobService, turn: int) -> None:
    """Changes and claims at the same moment, of many jobs."""
    database = service.database
    ids = [add_job(database, parameters={"name": "old"}) for _ in range(4)]
    wanted = wanting(parameters={"name": "new"}, tags=["new"], metadata={"new": True})
    calls: list[Callable[[], Any]] = []
    for job_id in ids:
        pair: list[Callable[[], Any]] = [
            partial(change, service, job_id, ALICE, wanted),
            partial(claim, database, job_id),
        ]
        calls += pair if turn % 2 else pair[::-1]
    answers = at_once(calls)
    for number, job_id in enumerate(ids):
        pair_of = answers[2 * number : 2 * number + 2]
        changed, claimed = pair_of if turn % 2 else pair_of[::-1]
        row = job_row(database, job_id)
        actions = [event["action"] for event in events_of(database, job_id)]
        assert isinstance(claimed, Applied)
        got = Claimed.of(claimed.row, row["lease_token"]).parameters
        if isinstance(changed, tuple):
            assert actions == ["create", "change", "claim"]
            assert (got, row["tags"], row["metadata"]) == ('{"name":"new"}', ["new"], {"new": True})
            assert tags_of(database, job_id) == {"new"}
        else:
            assert isinstance(changed, IllegalTransition), changed
            assert changed.facts == {"current_status": "running"}
            assert actions == ["create", "claim"]
            assert (got, row["tags"]) == ('{"name":"old"}', [])
            assert tags_of(database, job_id) == set()
        assert [event["seq"] for event in events_of(database, job_id)] == list(range(1, len(actions) + 1))


def test_of_changes_with_one_version_at_the_same_moment_one_is_made(service: JobService) -> None:
    job_id = add_job(service.database)
    calls = [
        partial(change, service, job_id, ALICE, wanting(tags=[f"t{n}"]), expected=partial(int.__eq__, 1))
        for n in range(6)
    ]
    answers = at_once(calls)
    assert sum(isinstance(answer, tuple) for answer in answers) == 1
    assert sum(isinstance(answer, PreconditionFailed) for answer in answers) == 5
    assert tags_of(service.database, job_id) == set(job_row(service.database, job_id)["tags"])
