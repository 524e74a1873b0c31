"""An ended job run again because somebody asked, on both stores."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from factories import (
    NOW,
    OTHER_TENANT,
    TENANT,
    WORKER,
    add_job,
    at_once,
    events_of,
    hold_of,
    job_row,
    status_of,
)
from laneway.clock import FrozenClock, new_id
from laneway.db import Database
from laneway.domain.payload import MAX_BYTES
from laneway.domain.states import FINAL, RULES, Action, JobStatus
from laneway.engine.access.callers import Caller, Role
from laneway.engine.endings import Raised
from laneway.engine.outcomes import MAX_TRACEBACK, Claimed, carry_out, decide
from laneway.engine.registry import JobType, Registry
from laneway.engine.service import JobService
from laneway.engine.transitions import Applied, Claim, Enqueue
from laneway.errors import (
    DeadLetterNotFound,
    IllegalTransition,
    InvalidParameters,
    InvalidPayload,
    JobNotFound,
    PayloadTooLarge,
    UniqueKeyTaken,
    UnknownJobType,
)
from laneway.lanes.memory_lanes import MemoryLanes
from laneway.settings import Settings

ALICE = Caller(TENANT, "alice", Role.USER)
BOB = Caller(TENANT, "bob", Role.USER)
OPERATOR = Caller(TENANT, "olga", Role.OPERATOR)
STRANGER = Caller(OTHER_TENANT, "alice", Role.ADMIN)
RETRIED = sorted(RULES[Action.RETRY].sources)


def echo(x: int = 0, text: str = "") -> None: ...


@pytest.fixture
def lanes() -> MemoryLanes:
    return MemoryLanes()


@pytest.fixture
def service(database: Database, lanes: MemoryLanes, clock: FrozenClock) -> JobService:
    registry = Registry()
    registry.add(JobType("demo.echo", echo))
    return JobService(database, lanes, Settings(), registry, clock=clock)


@pytest.mark.parametrize("status", RETRIED)
def test_an_ended_job_is_queued_again_and_its_lane_rung(
    service: JobService, database: Database, lanes: MemoryLanes, status: JobStatus
) -> None:
    job_id = add_job(database, status, attempt=4, retry_count=3, crash_count=2, error={"type": "E"})
    job = service.retry(job_id, ALICE)
    assert job == service.get(job_id, ALICE)
    assert (job["status"], job["attempt"], job["retry_count"]) == ("queued", 4, 0)
    assert (job["error"], job["finished_at"], job["dead_letter_reason"]) == (None, None, None)
    assert job_row(database, job_id)["crash_count"] == 0
    assert lanes.contents("normal") == [job_id]
    last = events_of(database, job_id)[-1]
    assert (last["action"], last["actor"], last["reason"]) == ("retry", "alice", None)


@pytest.mark.parametrize("status", sorted(set(JobStatus) - set(RETRIED)))
def test_any_other_job_is_left_alone(service: JobService, database: Database, status: JobStatus) -> None:
    job_id = add_job(database, status)
    before = job_row(database, job_id)
    with pytest.raises(IllegalTransition) as refused:
        service.retry(job_id, ALICE)
    assert refused.value.facts == {"current_status": status}
    assert job_row(database, job_id) == before


def test_the_attempts_count_on(service: JobService, database: Database) -> None:
    job_id = add_job(database, JobStatus.FAILED, attempt=4)
    service.retry(job_id, ALICE)
    with database.write() as connection:
        carry_out(connection, [Claim(job_id, new_id(), WORKER, NOW)], now=NOW, actor="w")
    assert hold_of(database, job_id)[1] == 5


def test_other_parameters_take_the_place_of_the_jobs_own(service: JobService, database: Database) -> None:
    job_id = add_job(database, JobStatus.FAILED)
    assert service.retry(job_id, ALICE, parameters={"text": "é"})["parameters"] == {"text": "é"}
    assert events_of(database, job_id)[-1]["reason"] == "with other parameters"


@pytest.mark.parametrize(
    ("job_type", "parameters", "error"),
    [
        ("demo.echo", {"y": 1}, InvalidParameters),
        ("demo.echo", {"text": "\0"}, InvalidPayload),
        ("demo.echo", {"text": "x" * (MAX_BYTES - 10)}, PayloadTooLarge),
        ("demo.gone", {}, UnknownJobType),
    ],
)
def test_parameters_that_a_new_job_could_not_have_are_refused(
    service: JobService, database: Database, job_type: str, parameters: dict[str, Any], error: type[Exception]
) -> None:
    job_id = add_job(database, JobStatus.FAILED, job_type=job_type)
    before = job_row(database, job_id)
    with pytest.raises(error):
        service.retry(job_id, ALICE, parameters=parameters)
    assert job_row(database, job_id) == before


def test_the_largest_parameters_are_taken(service: JobService, database: Database) -> None:
    job_id = add_job(database, JobStatus.FAILED)
    text = "x" * (MAX_BYTES - len('{"text":""}'))
    assert service.retry(job_id, ALICE, parameters={"text": text})["status"] == "queued"


def test_a_job_of_a_type_that_is_not_known_here_may_be_retried_as_it_is(
    service: JobService, database: Database
) -> None:
    assert (
        service.retry(add_job(database, JobStatus.FAILED, job_type="demo.gone"), ALICE)["status"] == "queued"
    )


def test_who_may_not_see_a_job_cannot_retry_it(service: JobService, database: Database) -> None:
    job_id = add_job(database, JobStatus.FAILED)
    for caller in (BOB, STRANGER):
        with pytest.raises(JobNotFound):
            service.retry(job_id, caller)
    with pytest.raises(JobNotFound):
        service.retry(new_id(), ALICE)
    assert status_of(database, job_id) == "failed"
    assert service.retry(job_id, OPERATOR)["status"] == "queued"


@pytest.mark.parametrize(("caller", "facts"), [(OPERATOR, {"job_id"}), (ALICE, set())])
def test_while_another_job_holds_the_unique_key_nothing_is_changed(
    service: JobService, database: Database, caller: Caller, facts: set[str]
) -> None:
    job_id = add_job(database, JobStatus.FAILED, unique_key="k", error={"type": "E"}, result={"r": 1})
    before = job_row(database, job_id)
    holder = add_job(database, unique_key="k", created_by="bob")
    with pytest.raises(UniqueKeyTaken) as taken:
        service.retry(job_id, caller, parameters={"x": 2})
    assert taken.value.facts == dict.fromkeys(facts, holder)
    assert job_row(database, job_id) == before
    assert len(events_of(database, job_id)) == 1
    service.cancel(holder, OPERATOR)
    assert service.retry(job_id, caller)["status"] == "queued"


def test_of_many_retries_at_once_one_counts(
    service: JobService, database: Database, lanes: MemoryLanes
) -> None:
    job_id = add_job(database, JobStatus.FAILED)
    answers = at_once([lambda: service.retry(job_id, ALICE)] * 8)
    assert len([answer for answer in answers if isinstance(answer, dict)]) == 1
    assert len([answer for answer in answers if isinstance(answer, IllegalTransition)]) == 7
    assert [event["action"] for event in events_of(database, job_id)] == ["create", "retry"]
    assert lanes.contents("normal") == [job_id]


def test_of_two_jobs_with_one_key_retried_at_once_one_is_queued(
    service: JobService, database: Database
) -> None:
    ids = [add_job(database, JobStatus.FAILED, unique_key="k") for _ in range(2)]
    answers = at_once([lambda job_id=job_id: service.retry(job_id, ALICE) for job_id in ids])  # type: ignore[misc]
    assert sorted(type(answer).__name__ for answer in answers) == ["UniqueKeyTaken", "dict"]
    assert sorted(status_of(database, job_id) for job_id in ids) == ["failed", "queued"]


@pytest.mark.parametrize("status", sorted(FINAL))
def test_as_a_dead_letter_only_a_dead_letter_is_retried(
    service: JobService, database: Database, status: JobStatus
) -> None:
    with pytest.raises(DeadLetterNotFound):
        service.retry(add_job(database, status), ALICE, dead_letter=True)
    if status in (JobStatus.FAILED, JobStatus.TIMEOUT):
        dead = add_job(database, status, dead_letter_reason="exhausted")
        assert service.retry(dead, ALICE, dead_letter=True)["status"] == "queued"


# What is kept of each attempt


def test_every_attempt_keeps_its_error_its_worker_and_its_times(database: Database) -> None:
    """What `GET /jobs/{id}/attempts` is made of outlives the next attempt and a caller's retry."""
    job_id = add_job(database, max_retries=1)
    clock = FrozenClock(NOW)

    def attempt(worker: str, trace: str) -> None:
        token = new_id()
        with database.write() as connection:
            [claim] = carry_out(
                connection,
                [Claim(job_id, token, worker, clock.now())],
                now=clock.now(),
                actor=f"worker:{worker}",
            )
        assert isinstance(claim, Applied)
        clock.advance(seconds=7)
        ending = Raised("ValueError", "bad", trace)
        move = decide(
            Claimed.of(claim.row, token),
            ending,
            now=clock.now(),
            rng=Random(1),
            crash_limit=3,
        )
        with database.write() as connection:
            carry_out(connection, [move], now=clock.now(), actor=f"worker:{worker}")
        clock.advance(seconds=60)

    first, second = new_id(), new_id()
    attempt(first, "one" + "x" * MAX_TRACEBACK)
    row = job_row(database, job_id)
    assert (row["status"], row["retry_count"]) == ("retrying", 1)
    assert (row["next_retry_at"] - NOW).total_seconds() == 7 + 10
    with database.write() as connection:
        carry_out(connection, [Enqueue(job_id)], now=clock.now(), actor="scheduler")
    assert job_row(database, job_id)["next_retry_at"] is None
    attempt(second, "two")
    row = job_row(database, job_id)
    assert (row["status"], row["retry_count"], row["dead_letter_reason"]) == ("failed", 1, "exhausted")
    JobService(database, MemoryLanes(), Settings(), Registry(), clock=clock).retry(job_id, ALICE)
    events = events_of(database, job_id)
    claims = {e["attempt"]: e for e in events if e["action"] == "claim"}
    ends = {e["attempt"]: e for e in events if e["error"] is not None}
    assert [claims[n]["actor"] for n in (1, 2)] == [f"worker:{first}", f"worker:{second}"]
    assert [(ends[n]["at"] - claims[n]["at"]).total_seconds() for n in (1, 2)] == [7, 7]
    assert [ends[n]["error"]["traceback"] for n in (1, 2)] == ["x" * MAX_TRACEBACK, "two"]
    assert {ends[n]["error"]["category"] for n in (1, 2)} == {"transient"}
