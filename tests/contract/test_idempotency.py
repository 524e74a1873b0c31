"""Idempotency keys in the transactions that do the work, on both stores."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import sqlalchemy as sa

from factories import NOW, OTHER_TENANT, TENANT, add_job, at_once, job_row, rows_of
from laneway import models
from laneway.clock import FrozenClock
from laneway.db import Database
from laneway.domain.spec import JobSpec
from laneway.domain.states import JobStatus
from laneway.engine import idempotency
from laneway.engine.access.callers import Caller, Role
from laneway.engine.group_commit import commit_each
from laneway.engine.idempotency import KEPT_FOR, Key, Replayed
from laneway.engine.registry import JobType, Registry
from laneway.engine.retention import Retention, prune
from laneway.engine.service import JobService, Prepared
from laneway.errors import (
    IdempotencyInProgress,
    IdempotencyKeyReused,
    IllegalTransition,
    QuotaQueued,
    UniqueKeyTaken,
)
from laneway.lanes.memory_lanes import MemoryLanes
from laneway.settings import Settings

ALICE = Caller(TENANT, "alice", Role.USER)
BOB = Caller(TENANT, "bob", Role.USER)
STRANGER = Caller(OTHER_TENANT, "alice", Role.USER)


def greet(name: str = "you") -> str:
    return name


def registry() -> Registry:
    known = Registry()
    known.add(JobType("demo.greet", greet))
    return known


@pytest.fixture
def service(database: Database, clock: FrozenClock) -> JobService:
    return JobService(database, MemoryLanes(), Settings(), registry(), clock=clock)


def key(name: str, request: str = "", *, caller: Caller = ALICE, operation: str = "createJob") -> Key:
    return Key.of(caller, operation, name, request=request.encode())


def wish(service: JobService, key: Key | None = None, caller: Caller = ALICE, **fields: Any) -> Prepared:
    return service.prepare(JobSpec(**({"job_type": "demo.greet"} | fields)), caller, key=key)


def ask(service: JobService, *wishes: Prepared) -> list[Any]:
    """The answers, as the group commit hands them out."""
    return list(commit_each(service.create, wishes))


def jobs_in(database: Database) -> set[str]:
    return {row["id"] for row in rows_of(database, models.jobs)}


def keys_in(database: Database) -> list[sa.RowMapping]:
    return rows_of(database, models.idempotency_keys)


def test_the_same_request_is_answered_as_the_first_was(service: JobService, clock: FrozenClock) -> None:
    [first] = ask(service, wish(service, key("a"), parameters={"name": "é"}, tags=("x",)))
    clock.advance(seconds=5)
    service.cancel(first["id"], ALICE)
    [again] = ask(service, wish(service, key("a"), parameters={"name": "é"}, tags=("x",)))
    assert not isinstance(first, Replayed)
    assert isinstance(again, Replayed)
    assert (list(again.items()), again["status"]) == (list(first.items()), "queued")
    assert jobs_in(service.database) == {first["id"]}


def test_an_answer_is_kept_without_the_parameters_that_come_along_again(service: JobService) -> None:
    ask(service, wish(service, key("a"), parameters={"name": "x" * 100_000}))
    [row] = keys_in(service.database)
    assert row["answer"]["parameters"] is None
    assert len(str(row["answer"])) < 3000


def test_the_key_with_another_request_is_refused(service: JobService) -> None:
    [first] = ask(service, wish(service, key("a", "1")))
    [refused] = ask(service, wish(service, key("a", "2")))
    assert isinstance(refused, IdempotencyKeyReused)
    assert jobs_in(service.database) == {first["id"]}


def test_a_key_is_of_one_tenant_caller_and_operation(service: JobService) -> None:
    ask(service, wish(service, key("a")))
    for other, caller in (
        (key("a", caller=BOB), BOB),
        (key("a", caller=STRANGER), STRANGER),
        (key("a", operation="queueFeedbackSummary"), ALICE),
        (key("A"), ALICE),
    ):
        [made] = ask(service, wish(service, other, caller))
        assert isinstance(made, dict)
        assert not isinstance(made, Replayed)
    assert len(jobs_in(service.database)) == 5


def test_of_one_group_each_key_makes_one_job_and_no_neighbour_notices(service: JobService) -> None:
    ask(service, wish(service, key("old", "1")))
    answers = ask(
        service,
        wish(service),
        wish(service, key("a")),
        wish(service, key("a")),
        wish(service, key("a", "other")),
        wish(service, key("old", "1")),
        wish(service, key("old", "2")),
        wish(service),
        wish(service, key("b")),
    )
    kinds = [type(answer) for answer in answers]
    assert kinds == [dict, dict, Replayed, IdempotencyKeyReused, Replayed, IdempotencyKeyReused, dict, dict]
    assert answers[2] == answers[1]
    assert len(jobs_in(service.database)) == 5


@contextmanager
def statements(database: Database) -> Any:
    said: list[str] = []

    def hear(_c: Any, _u: Any, statement: str, *_: Any) -> None:
        said.append(statement)

    sa.event.listen(database.engine, "before_cursor_execute", hear)
    yield said
    sa.event.remove(database.engine, "before_cursor_execute", hear)


def test_a_batch_with_keys_costs_one_statement_more_and_one_without_none(service: JobService) -> None:
    ask(service, wish(service))  # what is counted and cached once
    with statements(service.database) as plain:
        ask(service, *[wish(service) for _ in range(20)])
    with statements(service.database) as keyed:
        ask(service, *[wish(service, key(str(n)) if n % 2 else None) for n in range(20)])
    assert not [each for each in plain if "idempotency" in each]
    assert len(keyed) == len(plain) + 1


def test_at_the_same_moment_one_makes_the_job_and_the_others_find_it(service: JobService) -> None:
    others = [
        JobService(service.database, MemoryLanes(), Settings(), registry(), clock=service.clock)
        for _ in range(8)
    ]

    def post(each: JobService) -> dict[str, Any]:
        while True:
            [answer] = ask(each, wish(each, key("a")))
            if not isinstance(answer, IdempotencyInProgress):
                assert isinstance(answer, dict), answer
                return answer

    answers = at_once([partial(post, each) for each in others])
    assert len({str(sorted(answer.items())) for answer in answers}) == 1  # type: ignore[union-attr]
    assert sum(isinstance(answer, Replayed) for answer in answers) == 7
    assert len(jobs_in(service.database)) == 1


def test_whoever_meets_a_key_under_way_is_told_so_and_its_neighbours_do_not_wait(
    postgres_url: str, clock: FrozenClock
) -> None:
    database = Database(postgres_url)
    service = JobService(database, MemoryLanes(), Settings(), registry(), clock=clock)
    with database.write() as other:  # a request that is stuck in the middle of its transaction
        assert idempotency.begin(other, key("a"), now=NOW) is None
        answers = ask(service, wish(service), wish(service, key("a")), wish(service, key("b")))
        assert [type(answer) for answer in answers] == [dict, IdempotencyInProgress, dict]
        idempotency.keep(other, key("a"), answers[0])
    [found] = ask(service, wish(service, key("a")))
    assert (isinstance(found, Replayed), found) == (True, answers[0])
    database.dispose()


def test_what_fails_keeps_no_key(service: JobService) -> None:
    holder = add_job(service.database, unique_key="taken")
    reject = {"unique_key": "taken", "on_conflict": "reject"}
    answers = ask(service, wish(service, key("a"), **reject), wish(service, key("b")))
    assert [type(answer) for answer in answers] == [UniqueKeyTaken, dict]
    assert len(keys_in(service.database)) == 1
    service.cancel(holder, ALICE)
    [made] = ask(service, wish(service, key("a"), **reject))
    assert not isinstance(made, Replayed | Exception)


def test_a_bad_row_takes_neither_its_neighbours_nor_their_keys_along(service: JobService) -> None:
    first, bad, last = (wish(service, key(name)) for name in "abc")
    object.__setattr__(bad.row, "priority", "none")  # what only the store would notice
    answers = ask(service, first, bad, last)
    assert [isinstance(answer, sa.exc.IntegrityError) for answer in answers] == [False, True, False]
    assert len(keys_in(service.database)) == 2
    again = ask(service, wish(service, key("a")), wish(service, key("b")), wish(service, key("c")))
    assert [isinstance(answer, Replayed) for answer in again] == [True, False, True]


def test_the_active_job_of_a_unique_key_is_an_answer_like_any_other(service: JobService) -> None:
    holder = add_job(service.database, unique_key="taken", parameters={"name": "holder"})
    [first] = ask(service, wish(service, key("a"), unique_key="taken"))
    service.cancel(holder, ALICE)
    [again] = ask(service, wish(service, key("a"), unique_key="taken"))
    assert (first["id"], again) == (holder, first)
    assert again["parameters"] == {"name": "holder"}


def test_a_request_that_was_answered_is_answered_again_also_when_there_is_no_room(
    database: Database, clock: FrozenClock
) -> None:
    service = JobService(database, MemoryLanes(), Settings(waiting_per_tenant=1), registry(), clock=clock)
    [first] = ask(service, wish(service, key("a", "1")))
    answers = ask(
        service,
        wish(service, key("a", "1")),
        wish(service, key("b")),
        wish(service),
        wish(service, key("a", "2")),
    )
    kinds = [type(answer) for answer in answers]
    assert kinds == [Replayed, QuotaQueued, QuotaQueued, IdempotencyKeyReused]
    assert answers[0] == first


def test_a_key_holds_for_a_day_also_before_it_is_swept_away(service: JobService, clock: FrozenClock) -> None:
    [first] = ask(service, wish(service, key("a")))
    clock.advance(seconds=KEPT_FOR.total_seconds() - 0.001)
    [again] = ask(service, wish(service, key("a")))
    assert again == first
    clock.advance(seconds=0.001)
    [new] = ask(service, wish(service, key("a")))
    assert (isinstance(new, Replayed), new["id"] == first["id"]) == (False, False)
    [known] = ask(service, wish(service, key("a")))
    assert known["id"] == new["id"]


def test_the_sweep_takes_the_keys_whose_day_is_over(service: JobService, clock: FrozenClock) -> None:
    ask(service, wish(service, key("a")))
    clock.advance(hours=1)
    ask(service, wish(service, key("b")))
    at = clock.now() - timedelta(hours=1) + KEPT_FOR
    assert prune(service.database, Retention({}), now=at - timedelta(microseconds=1)).keys == 0
    assert prune(service.database, Retention({}), now=at).keys == 1
    assert len(keys_in(service.database)) == 1
    assert len(jobs_in(service.database)) == 2


# Work in one transaction


def test_a_retry_with_a_key_happens_once(service: JobService) -> None:
    job_id = add_job(service.database, JobStatus.FAILED)
    again = partial(service.retry, job_id, ALICE, key=key("a", operation="retryJob"))
    first = again()
    with pytest.raises(IllegalTransition):
        service.retry(job_id, ALICE)
    second = again()
    assert (isinstance(second, Replayed), second) == (True, first)
    assert job_row(service.database, job_id)["event_seq"] == 2


def test_a_refused_retry_keeps_no_key(service: JobService) -> None:
    job_id = add_job(service.database)
    again = partial(service.retry, job_id, ALICE, key=key("a", operation="retryJob"))
    with pytest.raises(IllegalTransition):
        again()
    assert keys_in(service.database) == []
    service.cancel(job_id, ALICE)
    assert not isinstance(again(), Replayed)


def test_of_retries_at_the_same_moment_one_does_it(service: JobService) -> None:
    job_id = add_job(service.database, JobStatus.FAILED)

    def retry() -> dict[str, Any]:
        while True:
            try:
                return service.retry(job_id, ALICE, key=key("a", operation="retryJob"))
            except IdempotencyInProgress:
                pass

    answers = at_once([retry] * 6)
    assert [answer for answer in answers if answer != answers[0]] == []
    assert sum(isinstance(answer, Replayed) for answer in answers) == 5


def test_work_in_many_transactions_is_kept_when_it_is_done(database: Database) -> None:
    done: list[int] = []

    def work(*, fail: bool) -> dict[str, Any]:
        done.append(1)
        if fail:
            raise ConnectionError
        return {"count": len(done)}

    def call(name: str, *, request: str = "", fail: bool = False) -> dict[str, Any]:
        step: Callable[[], dict[str, Any]] = partial(work, fail=fail)
        return idempotency.around(database, key(name, request), step, now=NOW)

    with pytest.raises(ConnectionError):
        call("a", fail=True)
    assert call("a") == {"count": 2}
    assert call("a") == {"count": 2}
    with pytest.raises(IdempotencyKeyReused):
        call("a", request="other")
    assert idempotency.around(database, None, partial(work, fail=False), now=NOW) == {"count": 3}
