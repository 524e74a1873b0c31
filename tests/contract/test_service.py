"""The operations as their callers see them, on both stores."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from factories import (
    NOW,
    OTHER_TENANT,
    TENANT,
    add_job,
    at_once,
    change,
    events_of,
    hold_of,
    job_row,
    rows_of,
    status_of,
)
from laneway import models
from laneway.clock import FrozenClock, SystemClock, new_id
from laneway.db import Database
from laneway.domain.spec import JobSpec
from laneway.domain.states import FINAL, WAITING, JobStatus
from laneway.engine import queries
from laneway.engine.access.callers import Caller, Role
from laneway.engine.group_commit import GroupCommit
from laneway.engine.outcomes import carry_out
from laneway.engine.queries import JobFilter, Scope
from laneway.engine.registry import JobType, Registry
from laneway.engine.service import MAX_METADATA_BYTES, JobService, Prepared
from laneway.engine.transitions import BackOff, Cancel, Complete, Release
from laneway.errors import (
    IllegalTransition,
    InvalidCursor,
    InvalidParameters,
    InvalidPayload,
    JobNotFound,
    NotFinished,
    PayloadTooLarge,
    StorageUnavailable,
    UniqueKeyTaken,
    UnknownJobType,
    Unprocessable,
    WebhookUrlRefused,
)
from laneway.lanes.memory_lanes import MemoryLanes
from laneway.lanes.rq_lanes import RqLanes
from laneway.settings import Settings
from servers import PostgresServer, RedisServer, wait_until

ALICE = Caller(TENANT, "alice", Role.USER)
BOB = Caller(TENANT, "bob", Role.USER)
OPERATOR = Caller(TENANT, "olga", Role.OPERATOR)
STRANGER = Caller(OTHER_TENANT, "alice", Role.ADMIN)
ANY = JobFilter()


def greet(name: str = "you", times: int = 1) -> str:
    return name * times


def render(**anything: Any) -> None:
    pass


def known_types() -> Registry:
    registry = Registry()
    registry.add(JobType("demo.greet", greet))
    registry.add(JobType("demo.render", render, queue="renders", max_retries=0, timeout_seconds=9))
    return registry


@pytest.fixture
def lanes() -> MemoryLanes:
    return MemoryLanes()


@pytest.fixture
def service(database: Database, lanes: MemoryLanes, clock: FrozenClock) -> JobService:
    return JobService(database, lanes, Settings(), known_types(), clock=clock)


def spec(**fields: Any) -> JobSpec:
    return JobSpec(**({"job_type": "demo.greet"} | fields))


def enqueue(service: JobService, caller: Caller = ALICE, **fields: Any) -> dict[str, Any]:
    """The answer; raises what the caller would be told."""
    [answer] = service.enqueue([service.prepare(spec(**fields), caller)])
    if isinstance(answer, Exception):
        raise answer
    return answer


# Making jobs


def test_an_answer_is_what_a_later_look_finds(service: JobService, lanes: MemoryLanes) -> None:
    asked: dict[str, Any] = {
        "parameters": {"name": "é", "times": 2},
        "priority": "high",
        "title": "T",
        "description": "D",
        "tags": ("a", "b"),
        "metadata": {"k": [1, None]},
        "expires_at": NOW + timedelta(days=1),
        "webhook_url": "https://example.org/hook",
        "webhook_events": ("job.failed",),
        "unique_key": "k",
        "concurrency_key": "c",
        "concurrency_limit": 2,
    }
    answer = enqueue(service, **asked)
    assert answer | {"position": 1} == service.get(answer["id"], ALICE)
    assert (answer["status"], answer["parameters"], answer["progress"]) == ("queued", asked["parameters"], 0)
    assert lanes.contents("high") == [answer["id"]]


def test_a_plain_job_is_answered_as_it_is_kept(service: JobService) -> None:
    answer = enqueue(service)
    assert answer | {"position": 1} == service.get(answer["id"], ALICE)
    assert (answer["max_retries"], answer["timeout_seconds"]) == (3, 3600)


def test_a_job_types_defaults_hold_where_the_request_says_nothing(
    service: JobService, lanes: MemoryLanes
) -> None:
    answer = enqueue(service, job_type="demo.render")
    assert (answer["queue"], answer["max_retries"], answer["timeout_seconds"]) == ("renders", 0, 9)
    assert lanes.contents("renders") == [answer["id"]]
    said = enqueue(service, job_type="demo.render", queue="default", max_retries=3, timeout_seconds=60)
    assert (said["queue"], said["max_retries"], said["timeout_seconds"]) == ("default", 3, 60)


def test_a_job_for_later_is_scheduled_and_rings_nobody(service: JobService, lanes: MemoryLanes) -> None:
    for fields in ({"delay_seconds": 1}, {"scheduled_for": NOW + timedelta(seconds=1)}):
        answer = enqueue(service, **fields)
        assert (answer["status"], answer["queued_at"]) == ("scheduled", None)
        assert answer["scheduled_for"] == "2026-01-01T12:00:01.000000Z"
        assert answer == service.get(answer["id"], ALICE)
    assert lanes.contents("normal") == []


def test_a_job_for_a_moment_that_has_passed_is_queued_at_once(service: JobService) -> None:
    assert enqueue(service, scheduled_for=NOW)["status"] == "queued"
    assert enqueue(service, delay_seconds=0)["status"] == "queued"


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"job_type": "demo.unknown"}, UnknownJobType),
        ({"parameters": {"times": "many"}}, InvalidParameters),
        ({"parameters": {"nobody": 1}}, InvalidParameters),
        ({"parameters": {"name": "\0"}}, InvalidPayload),
        ({"title": "\0"}, InvalidPayload),
        ({"description": "a\0"}, InvalidPayload),
        ({"unique_key": "\0"}, InvalidPayload),
        ({"tags": ("\0",)}, InvalidPayload),
        ({"expires_at": datetime.max.replace(tzinfo=timezone(timedelta(hours=-1)))}, Unprocessable),
        ({"scheduled_for": datetime.max.replace(tzinfo=timezone(timedelta(hours=-1)))}, Unprocessable),
        ({"parameters": {"name": "x" * 256 * 1024}}, PayloadTooLarge),
        ({"metadata": {"k": "x" * MAX_METADATA_BYTES}}, PayloadTooLarge),
        ({"webhook_url": "http://169.254.169.254/"}, WebhookUrlRefused),
    ],
)
def test_what_is_wrong_is_refused_before_anything_is_written(
    service: JobService, fields: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        enqueue(service, **fields)
    assert rows_of(service.database, models.jobs) == []


def test_metadata_is_taken_at_its_limit(service: JobService) -> None:
    assert MAX_METADATA_BYTES == 16 * 1024
    enqueue(service, metadata={"k": "x" * (MAX_METADATA_BYTES - len('{"k":""}'))})
    with pytest.raises(PayloadTooLarge):
        enqueue(service, metadata={"k": "x" * (MAX_METADATA_BYTES - len('{"k":""}') + 1)})


def test_a_unique_key_in_use_is_answered_with_its_holder(service: JobService, lanes: MemoryLanes) -> None:
    first = enqueue(service, unique_key="k", parameters={"name": "first"})
    assert enqueue(service, unique_key="k", parameters={"name": "second"}) == first
    assert lanes.contents("normal") == [first["id"]]
    assert enqueue(service, STRANGER, unique_key="k")["id"] != first["id"]


def test_a_key_whose_holder_ends_while_the_next_job_is_made_is_free(
    service: JobService, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On PostgreSQL the insert commits by itself: the holder may end before it is looked for."""
    first = enqueue(service, unique_key="k")
    find_active = queries.find_active

    def too_late(connection: sa.Connection, scope: Scope, key: str) -> sa.RowMapping | None:
        monkeypatch.setattr(queries, "find_active", find_active)
        carry_out(connection, [Cancel(first["id"], by="bob")], now=NOW, actor="bob")
        return find_active(connection, scope, key)

    monkeypatch.setattr(queries, "find_active", too_late)
    second = enqueue(service, unique_key="k")
    assert (second["id"] != first["id"], second["status"]) == (True, "queued")


def test_a_unique_key_in_use_is_refused_when_the_caller_wants_that(service: JobService) -> None:
    holder = enqueue(service, unique_key="k")
    with pytest.raises(UniqueKeyTaken) as caught:
        enqueue(service, unique_key="k", on_conflict="reject")
    assert caught.value.facts == {"job_id": holder["id"]}
    service.cancel(holder["id"], ALICE)
    assert enqueue(service, unique_key="k", on_conflict="reject")["id"] != holder["id"]


def test_a_batch_answers_each_of_its_jobs(service: JobService, lanes: MemoryLanes) -> None:
    specs = [
        spec(unique_key="k"),
        spec(),
        spec(unique_key="k"),
        spec(unique_key="k", on_conflict="reject"),
        spec(delay_seconds=5),
    ]
    answers = service.enqueue([service.prepare(s, ALICE) for s in specs])
    assert isinstance(answers[3], UniqueKeyTaken)
    jobs = [answer for answer in answers if isinstance(answer, dict)]
    assert jobs[2]["id"] == jobs[0]["id"]
    assert lanes.contents("normal") == [jobs[0]["id"], jobs[1]["id"]]
    assert len(rows_of(service.database, models.jobs)) == 3


def test_one_key_asked_for_by_eight_at_once_makes_one_job(service: JobService, lanes: MemoryLanes) -> None:
    answers = at_once([lambda: enqueue(service, unique_key="k")["id"]] * 8)
    assert len(set(answers)) == 1, answers
    assert lanes.contents("normal") == [answers[0]]


def with_id(prepared: Prepared, job_id: str) -> Prepared:
    return replace(prepared, row=replace(prepared.row, id=job_id))


def test_a_row_that_the_store_refuses_never_fails_its_neighbours(service: JobService) -> None:
    taken = enqueue(service)["id"]
    batch = [service.prepare(spec(), ALICE) for _ in range(16)]
    batch[5] = with_id(batch[5], taken)
    answers = service.enqueue(batch)
    assert [n for n, answer in enumerate(answers) if isinstance(answer, Exception)] == [5]
    assert isinstance(answers[5], sa.exc.IntegrityError)
    assert len(rows_of(service.database, models.jobs)) == 16


def test_grouped_callers_get_their_own_answers(service: JobService) -> None:
    taken = enqueue(service)["id"]
    group = GroupCommit(service.create)

    async def ask() -> list[dict[str, Any] | BaseException]:
        asked = [service.prepare(spec(parameters={"times": n}), ALICE) for n in range(50)]
        asked[7] = with_id(asked[7], taken)
        return await asyncio.gather(*(group.add(p) for p in asked), return_exceptions=True)

    answers = asyncio.run(ask())
    group.close()
    assert isinstance(answers.pop(7), sa.exc.IntegrityError)
    assert [a["parameters"]["times"] for a in answers if isinstance(a, dict)] == [
        n for n in range(50) if n != 7
    ]


@pytest.mark.parametrize("url", ["postgresql+psycopg://nobody@/none?host={folder}", "sqlite:///{folder}"])
def test_without_a_store_every_job_is_refused_as_one_to_try_again(
    url: str, clock: FrozenClock, tmp_path: Path
) -> None:
    database = Database(url.format(folder=tmp_path))
    lanes = MemoryLanes()
    service = JobService(database, lanes, Settings(), known_types(), clock=clock)
    answers = service.enqueue([service.prepare(spec(), ALICE) for _ in range(3)])
    assert [type(answer) for answer in answers] == [StorageUnavailable] * 3
    assert lanes.contents("normal") == []
    database.dispose()


def test_a_store_that_comes_back_takes_jobs_again(
    own_postgres_server: PostgresServer, clock: FrozenClock
) -> None:
    database = Database(own_postgres_server.fresh())
    service = JobService(database, MemoryLanes(), Settings(), known_types(), clock=clock)
    kept = enqueue(service)["id"]
    own_postgres_server.kill()
    with pytest.raises(StorageUnavailable):
        enqueue(service)
    own_postgres_server.start()
    again = enqueue(service)["id"]
    assert {row["id"] for row in rows_of(database, models.jobs)} == {kept, again}
    database.dispose()


def test_without_redis_a_job_is_kept_and_answered(
    database: Database, own_redis_server: RedisServer, clock: FrozenClock
) -> None:
    lanes = RqLanes(own_redis_server.url, clock=SystemClock())
    service = JobService(database, lanes, Settings(), known_types(), clock=clock)
    own_redis_server.stop()
    job_id = enqueue(service)["id"]
    assert service.get(job_id, ALICE)["status"] == "queued"
    assert service.cancel(job_id, ALICE).done
    lanes.close()


# Looking at jobs


def test_who_may_see_a_job(service: JobService) -> None:
    job_id = enqueue(service, ALICE)["id"]
    looks: list[Callable[[Caller], object]] = [
        lambda caller: service.get(job_id, caller),
        lambda caller: service.get_versioned(job_id, caller),
        lambda caller: service.follow(job_id, caller),
        lambda caller: service.cancel(job_id, caller),
        lambda caller: service.result(job_id, caller),
    ]
    for look in looks:
        for caller in (BOB, STRANGER):
            with pytest.raises(JobNotFound):
                look(caller)
    assert status_of(service.database, job_id) == "queued"
    for look in looks:
        look(ALICE)
        look(OPERATOR)


def test_an_unknown_job_is_not_found(service: JobService) -> None:
    for look in (service.get, service.cancel, service.follow):
        with pytest.raises(JobNotFound):
            look(new_id(), OPERATOR)


def test_the_version_grows_with_each_change(service: JobService) -> None:
    job_id = enqueue(service)["id"]
    assert service.get_versioned(job_id, ALICE) == (service.get(job_id, ALICE), 1)
    service.cancel(job_id, ALICE)
    assert service.get_versioned(job_id, ALICE) == (service.get(job_id, ALICE), 2)


@pytest.mark.parametrize("status", JobStatus)
def test_an_ended_job_has_a_result_and_another_has_none_yet(service: JobService, status: JobStatus) -> None:
    job_id = add_job(service.database, status, result={"n": 1} if status in FINAL else None)
    if status in FINAL:
        assert service.result(job_id, ALICE) == {
            "id": job_id,
            "status": status,
            "result": {"n": 1},
            "error": None,
            "finished_at": "2026-01-01T12:00:00.000000Z",
        }
    else:
        with pytest.raises(NotFinished) as caught:
            service.result(job_id, ALICE)
        assert caught.value.facts == {"current_status": status.value}


def test_a_follower_gets_the_events_it_has_not_seen_and_learns_of_the_end(service: JobService) -> None:
    job_id = enqueue(service)["id"]
    assert not service.follow(job_id, ALICE).ended
    service.cancel(job_id, OPERATOR, reason="enough")
    seen = service.follow(job_id, ALICE)
    assert [(e["seq"], e["action"], e["actor"]) for e in seen.events] == [
        (1, "create", "alice"),
        (2, "cancel", "olga"),
    ]
    assert seen.events[1]["reason"] == "enough"
    assert (seen.job, seen.ended) == (service.get(job_id, ALICE), True)
    for after, left in ((1, [2]), (2, [])):
        seen = service.follow(job_id, ALICE, after=after)
        assert ([e["seq"] for e in seen.events], seen.ended) == (left, True)


def walk(
    service: JobService, caller: Caller, wanted: JobFilter = ANY, *, limit: int = 3, mine: bool = False
) -> list[str]:
    """The ids of all pages, in order."""
    ids: list[str] = []
    cursor: str | None = None
    while True:
        page, cursor = service.page(caller, wanted, limit=limit, cursor=cursor, mine=mine)
        assert len(page) == limit or cursor is None
        ids += [job["id"] for job in page]
        if cursor is None:
            return ids


@pytest.mark.parametrize("count", [0, 1, 3, 4, 6, 7])
def test_pages_hold_every_job_once_newest_first(service: JobService, count: int) -> None:
    ids = [enqueue(service)["id"] for _ in range(count)]
    assert walk(service, ALICE) == ids[::-1]


def test_jobs_that_come_while_pages_are_turned_disturb_nobody(service: JobService) -> None:
    ids = [enqueue(service)["id"] for _ in range(5)]
    page, cursor = service.page(ALICE, ANY, limit=3, cursor=None, mine=False)
    enqueue(service)
    rest, _ = service.page(ALICE, ANY, limit=3, cursor=cursor, mine=False)
    assert [job["id"] for job in page + rest] == ids[::-1]


def test_pages_show_a_user_its_own_and_an_operator_the_tenants(service: JobService) -> None:
    alices, bobs, olgas = (enqueue(service, caller)["id"] for caller in (ALICE, BOB, OPERATOR))
    enqueue(service, STRANGER)
    assert walk(service, ALICE) == walk(service, ALICE, mine=True) == [alices]
    assert walk(service, OPERATOR) == [olgas, bobs, alices]
    assert walk(service, OPERATOR, mine=True) == [olgas]


def test_pages_hold_what_the_filters_want(database: Database, lanes: MemoryLanes) -> None:
    start = datetime.now(UTC)  # ids tell the real time, and ranges go by them too
    clock = FrozenClock(start)
    service = JobService(database, lanes, Settings(), known_types(), clock=clock)
    high = enqueue(service, priority="high")["id"]
    clock.advance(seconds=10)
    render = enqueue(service, job_type="demo.render")["id"]
    clock.advance(seconds=10)
    gone = enqueue(service)["id"]
    service.cancel(gone, ALICE)
    at = start + timedelta(seconds=10)
    for wanted, found in [
        (JobFilter(statuses=(JobStatus.QUEUED,)), [render, high]),
        (JobFilter(statuses=(JobStatus.CANCELLED, JobStatus.FAILED)), [gone]),
        (JobFilter(job_type="demo.render"), [render]),
        (JobFilter(queue="default"), [gone, high]),
        (JobFilter(priority=spec(priority="high").priority), [high]),
        (JobFilter(created_after=at), [gone]),
        (JobFilter(created_before=at), [high]),
        (JobFilter(queue="default", created_before=at), [high]),
    ]:
        assert walk(service, ALICE, wanted, limit=1) == found, wanted


def cursor_of(service: JobService, wanted: JobFilter = ANY) -> str:
    for _ in range(2):
        enqueue(service)
    _, cursor = service.page(ALICE, wanted, limit=1, cursor=None, mine=False)
    assert cursor is not None
    return cursor


def test_a_cursor_is_good_for_its_own_filters_only(service: JobService) -> None:
    cursor = cursor_of(service)
    for other in (
        JobFilter(queue="default"),
        JobFilter(statuses=(JobStatus.QUEUED,)),
        JobFilter(created_after=NOW),
    ):
        with pytest.raises(InvalidCursor):
            service.page(ALICE, other, limit=1, cursor=cursor, mine=False)
    assert len(service.page(ALICE, ANY, limit=1, cursor=cursor, mine=False)[0]) == 1


@pytest.mark.parametrize(
    "bend",
    [
        lambda c: c[:-1],
        lambda c: c + "A",
        lambda c: c + "AAAA",
        lambda c: "é" + c[1:],
        lambda c: " " + c,
        lambda c: c[:-2] + ("A" if c[-2] != "A" else "B") + c[-1],
        lambda c: "W" * 400,
        lambda c: "null",
        lambda c: "%",
        lambda c: "\0",
    ],
)
def test_a_bent_cursor_is_refused(service: JobService, bend: Callable[[str], str]) -> None:
    cursor = bend(cursor_of(service))
    with pytest.raises(InvalidCursor):
        service.page(ALICE, ANY, limit=1, cursor=cursor, mine=False)


# Stopping jobs


@pytest.mark.parametrize("status", sorted(WAITING))
def test_a_waiting_job_is_cancelled_at_once(
    service: JobService, lanes: MemoryLanes, status: JobStatus
) -> None:
    job_id = add_job(service.database, status, webhook_url="https://example.org/")
    lanes.push([("normal", job_id)])
    answer = service.cancel(job_id, ALICE, reason="no more")
    assert answer.done
    assert (answer.job["status"], answer.job["cancelled_by"]) == ("cancelled", "alice")
    assert (answer.job["cancelled_at"], answer.job["cancelling"]) == ("2026-01-01T12:00:00.000000Z", False)
    assert answer.job == service.get(job_id, ALICE)
    assert lanes.contents("normal") == []
    assert [m["event_type"] for m in rows_of(service.database, models.webhook_messages)] == ["job.cancelled"]
    assert service.cancel(job_id, ALICE).done  # asking twice is no error
    assert len(events_of(service.database, job_id)) == 2


def test_a_running_job_is_asked_to_stop(service: JobService, clock: FrozenClock) -> None:
    job_id = add_job(service.database, JobStatus.RUNNING)
    answer = service.cancel(job_id, ALICE, reason="no more", grace_seconds=2.5)
    assert not answer.done
    assert (answer.job["status"], answer.job["cancelling"]) == ("running", True)
    row = job_row(service.database, job_id)
    assert (row["cancel_requested_at"], row["cancel_terminate"], row["cancel_grace_seconds"]) == (
        NOW,
        False,
        2.5,
    )
    clock.advance(seconds=5)
    service.cancel(job_id, OPERATOR, terminate=True)
    service.cancel(job_id, ALICE)
    row = job_row(service.database, job_id)
    assert (row["cancel_requested_at"], row["cancel_terminate"]) == (NOW, True)  # the first wish, the hardest
    assert len(events_of(service.database, job_id)) == 1


@pytest.mark.parametrize("status", sorted(FINAL - {JobStatus.CANCELLED}))
def test_a_job_that_ended_otherwise_cannot_be_cancelled(service: JobService, status: JobStatus) -> None:
    job_id = add_job(service.database, status)
    with pytest.raises(IllegalTransition) as caught:
        service.cancel(job_id, ALICE)
    assert caught.value.facts == {"current_status": status.value}


def release(database: Database, hold: tuple[str, int, str]) -> None:
    with database.write() as connection:
        carry_out(connection, [Release(*hold)], now=NOW, actor="worker")


def test_a_cancel_and_an_end_at_once_agree(service: JobService) -> None:
    for _ in range(5):
        job_id = add_job(service.database, JobStatus.RUNNING)
        hold = hold_of(service.database, job_id)

        calls: list[Callable[[], object]] = [
            partial(release, service.database, hold),
            partial(service.cancel, job_id, ALICE),
        ]
        at_once(calls)
        row = job_row(service.database, job_id)
        assert row["status"] == "cancelled" or row["cancel_requested_at"] is None


@pytest.mark.parametrize("move", [BackOff, Complete])
def test_a_cancel_that_meets_a_settling_worker_is_not_lost(
    postgres_url: str, clock: FrozenClock, move: type[BackOff] | type[Complete]
) -> None:
    """The worker's transaction has changed the row and has not committed when the wish comes."""
    database = Database(postgres_url)
    service = JobService(database, MemoryLanes(), Settings(), known_types(), clock=clock)
    job_id = add_job(database, JobStatus.RUNNING)
    hold = hold_of(database, job_id)
    with database.engine.connect() as worker:
        transaction = worker.begin()
        settle = BackOff(*hold, NOW) if move is BackOff else Complete(*hold)
        carry_out(worker, [settle], now=NOW, actor="worker")

        def commit() -> None:
            wait_until(lambda: blocked(database), what="the cancel waits for the row")
            transaction.commit()

        answer, _ = at_once([lambda: service.cancel(job_id, ALICE), commit])
    if move is Complete:
        assert isinstance(answer, IllegalTransition)
    else:
        assert not isinstance(answer, Exception)
        assert answer.done  # type: ignore[union-attr]
        assert status_of(database, job_id) == "cancelled"
    database.dispose()


def blocked(database: Database) -> bool:
    query = (
        "SELECT true FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    )
    with database.read() as connection:
        return connection.execute(sa.text(query)).first() is not None


def test_a_cancel_is_kept_by_the_row_also_when_the_lease_changes_hands(service: JobService) -> None:
    job_id = add_job(service.database, JobStatus.RUNNING)
    service.cancel(job_id, ALICE)
    change(service.database, models.jobs, job_id, worker_id=new_id(), lease_token=new_id())
    release(service.database, hold_of(service.database, job_id))
    assert status_of(service.database, job_id) == "cancelled"
