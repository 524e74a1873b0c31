"""Many requests with one unique key make one job, which starts once they have ceased."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from pydantic import ValidationError

from factories import OTHER_TENANT, TENANT, WORKER, add_job, at_once, change, events_of, job_row
from laneway import models
from laneway.clock import FrozenClock, new_id
from laneway.db import Database
from laneway.domain.spec import JobSpec
from laneway.domain.states import JobStatus
from laneway.engine import upkeep
from laneway.engine.access.callers import Caller, Role
from laneway.engine.idempotency import Key
from laneway.engine.outcomes import carry_out
from laneway.engine.queries import JobFilter
from laneway.engine.registry import JobType, Registry
from laneway.engine.service import JobService
from laneway.engine.transitions import BackOff, Claim, Complete
from laneway.errors import UniqueKeyTaken
from laneway.lanes.memory_lanes import MemoryLanes
from laneway.settings import Settings

ALICE = Caller(TENANT, "alice", Role.USER)
BOB = Caller(TENANT, "bob", Role.USER)
STRANGER = Caller(OTHER_TENANT, "sam", Role.USER)


def anything(**parameters: Any) -> Any:
    return parameters


@pytest.fixture
def service(database: Database, clock: FrozenClock) -> JobService:
    registry = Registry()
    for name in ("t.sync", "t.other"):
        registry.add(JobType(name, anything))
    return JobService(database, MemoryLanes(), Settings(), registry, clock=clock)


def trigger(service: JobService, caller: Caller = ALICE, **fields: Any) -> dict[str, Any]:
    """The answer to a request that is debounced by a minute. Raises what is the answer."""
    wanted = {"job_type": "t.sync", "unique_key": "k", "debounce_seconds": 60} | fields
    [answer] = service.enqueue([service.prepare(JobSpec.model_validate(wanted), caller)])
    if isinstance(answer, Exception):
        raise answer
    return answer


def fall_due(service: JobService, clock: FrozenClock) -> list[str]:
    return [due[1] for due in upkeep.promote(service.database, now=clock.now())]


def claim(service: JobService, job_id: str) -> None:
    with service.database.write() as connection:
        move = Claim(job_id, new_id(), WORKER, service.clock.now())
        carry_out(connection, [move], now=service.clock.now(), actor="t")


def row(service: JobService, job_id: str) -> dict[str, Any]:
    return job_row(service.database, job_id)


def test_each_further_request_puts_the_job_off_and_replaces_what_it_says(
    service: JobService, clock: FrozenClock
) -> None:
    first = trigger(service, parameters={"n": 1}, title="one", tags=["a"], metadata={"m": 1})
    began = clock.now()
    clock.advance(seconds=50)
    second = trigger(service, parameters={"n": 2}, title="two", tags=["b"], metadata={"m": 2})
    assert second["id"] == first["id"]
    assert (second["status"], second["parameters"], second["title"]) == ("scheduled", {"n": 2}, "two")
    assert (second["tags"], second["metadata"]) == (["b"], {"m": 2})
    assert row(service, first["id"])["scheduled_for"] == began + timedelta(seconds=110)
    event = events_of(service.database, first["id"])[-1]
    assert (event["action"], event["reason"], event["status"]) == ("change", "debounce", "scheduled")
    jobs, _ = service.page(ALICE, JobFilter(tag="b"), limit=5, cursor=None, mine=False)
    assert [job["id"] for job in jobs] == [first["id"]]
    assert service.page(ALICE, JobFilter(tag="a"), limit=5, cursor=None, mine=False) == ([], None)
    clock.advance(seconds=59)
    assert fall_due(service, clock) == []
    clock.advance(seconds=1)
    assert fall_due(service, clock) == [first["id"]]


def test_after_its_end_the_next_request_makes_another(service: JobService, clock: FrozenClock) -> None:
    first = trigger(service)
    clock.advance(seconds=60)
    fall_due(service, clock)
    claim(service, first["id"])
    with service.database.write() as connection:
        held = row(service, first["id"])
        moves = [Complete(first["id"], 1, held["lease_token"], result="1")]
        carry_out(connection, moves, now=clock.now(), actor="t")
    assert trigger(service)["id"] != first["id"]


@pytest.mark.parametrize("status", [JobStatus.QUEUED, JobStatus.BLOCKED, JobStatus.RETRYING])
def test_a_job_that_waits_for_something_else_keeps_its_place(
    service: JobService, clock: FrozenClock, status: JobStatus
) -> None:
    waiting = add_job(service.database, status, unique_key="k", job_type="t.sync")
    before = row(service, waiting)
    answer = trigger(service, parameters={"n": 2})
    assert (answer["id"], answer["status"], answer["parameters"]) == (waiting, status, {"n": 2})
    after = row(service, waiting)
    for name in ("queued_at", "scheduled_for", "next_retry_at", "status"):
        assert after[name] == before[name]


def test_while_one_runs_another_waits_for_the_time_after_the_last_request(
    service: JobService, clock: FrozenClock
) -> None:
    running = add_job(service.database, JobStatus.RUNNING, unique_key="k", job_type="t.sync")
    second = trigger(service, parameters={"n": 2})
    assert (second["id"] != running, second["status"], second["unique_key"]) == (True, "scheduled", "k")
    assert trigger(service, parameters={"n": 3})["id"] == second["id"]
    old = row(service, running)
    assert (old["status"], old["unique_key"], old["parameters"]) == ("running", None, {"x": 1})
    with service.database.write() as connection:  # it may fail, and come again: it needs no key for that
        moves = [BackOff(running, 1, old["lease_token"], clock.now())]
        carry_out(connection, moves, now=clock.now(), actor="t")
    assert row(service, running)["status"] == "retrying"


def test_eight_requests_at_once_make_one_job(service: JobService) -> None:
    answers = at_once([lambda n=n: trigger(service, parameters={"n": n}) for n in range(8)])
    assert {isinstance(answer, dict) and answer["id"] for answer in answers} == {answers[0]["id"]}  # type: ignore[index]
    assert len(events_of(service.database, answers[0]["id"])) == 8  # type: ignore[index]
    jobs, _ = service.page(ALICE, JobFilter(), limit=5, cursor=None, mine=False)
    assert len(jobs) == 1


def test_of_several_in_one_group_the_last_counts(service: JobService) -> None:
    specs = [
        JobSpec(job_type="t.sync", unique_key=key, debounce_seconds=60, parameters={"n": n})
        for n, key in enumerate("zazaz")
    ]
    answers = service.enqueue([service.prepare(spec, ALICE) for spec in specs])
    ids = [answer["id"] for answer in answers if isinstance(answer, dict)]
    assert (len(ids), len(set(ids))) == (5, 2)
    assert row(service, ids[-1])["parameters"] == {"n": 4}
    assert row(service, ids[-2])["parameters"] == {"n": 3}


def test_a_request_that_comes_again_with_its_idempotency_key_puts_nothing_off(
    service: JobService, clock: FrozenClock
) -> None:
    def ask(name: str, number: int) -> dict[str, Any]:
        spec = JobSpec(job_type="t.sync", unique_key="k", debounce_seconds=60, parameters={"n": number})
        key = Key.of(ALICE, "createJob", name, request=str(number).encode())
        [answer] = service.enqueue([service.prepare(spec, ALICE, key=key)])
        assert isinstance(answer, dict)
        return answer

    first = ask("one", 1)
    clock.advance(seconds=10)
    second = ask("two", 2)
    assert (second["id"], second["parameters"]) == (first["id"], {"n": 2})
    due = row(service, first["id"])["scheduled_for"]
    clock.advance(seconds=10)
    assert ask("one", 1)["parameters"] == {"n": 1}
    assert (row(service, first["id"])["scheduled_for"], row(service, first["id"])["parameters"]) == (
        due,
        {"n": 2},
    )


def test_nobody_is_shown_or_put_off_by_another(service: JobService) -> None:
    first = trigger(service, parameters={"n": 1})
    with pytest.raises(UniqueKeyTaken):
        trigger(service, BOB, parameters={"n": 2})
    assert trigger(service, STRANGER)["id"] != first["id"]
    assert row(service, first["id"])["parameters"] == {"n": 1}


def test_a_job_of_another_type_holds_its_key(service: JobService) -> None:
    first = trigger(service)
    with pytest.raises(UniqueKeyTaken) as taken:
        trigger(service, job_type="t.other")
    assert taken.value.facts == {"job_id": first["id"]}


def test_what_the_first_request_said_of_its_end_stays(service: JobService, clock: FrozenClock) -> None:
    expires_at = clock.now() + timedelta(hours=1)
    first = trigger(service, expires_at=expires_at, max_retries=7)
    trigger(service, max_retries=1)
    kept = row(service, first["id"])
    assert (kept["expires_at"], kept["max_retries"]) == (expires_at, 7)


BAD: list[dict[str, Any]] = [
    {"debounce_seconds": 0},
    {"debounce_seconds": 86_401},
    {"debounce_seconds": 60, "unique_key": None},
    {"debounce_seconds": 60, "on_conflict": "reject"},
    {"debounce_seconds": 60, "delay_seconds": 5},
    {"debounce_seconds": 60, "scheduled_for": "2030-01-01T00:00:00Z"},
    {"debounce_seconds": 60, "depends_on": [WORKER]},
]


@pytest.mark.parametrize("fields", BAD, ids=str)
def test_what_does_not_go_together_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        JobSpec.model_validate({"job_type": "t.sync", "unique_key": "k"} | fields)


@pytest.mark.parametrize("seconds", [1, 86_400])
def test_a_second_and_a_day_are_taken(seconds: int) -> None:
    assert JobSpec(job_type="t.sync", unique_key="k", debounce_seconds=seconds).debounce_seconds == seconds


def test_a_changed_job_is_not_lost_when_it_had_ended_meanwhile(service: JobService) -> None:
    first = trigger(service)
    change(service.database, models.jobs, first["id"], status="cancelled", finished_at=service.clock.now())
    assert trigger(service)["id"] != first["id"]
