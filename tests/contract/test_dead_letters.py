"""Dead letters looked at, retried and deleted, one and many, on both stores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
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
    job_row,
    rows_of,
    status_of,
)
from laneway import models
from laneway.clock import FrozenClock, first_id, new_id
from laneway.db import Database
from laneway.domain.retry import DeadLetterReason
from laneway.domain.states import FINAL, JobStatus
from laneway.engine import dead_letters
from laneway.engine.access.callers import Caller, Role
from laneway.engine.dead_letters import MAX_SAMPLE, Bulk, DeadLetterFilter, purge, retry_all
from laneway.engine.outcomes import carry_out
from laneway.engine.queries import JobFilter
from laneway.engine.registry import Registry
from laneway.engine.service import JobService
from laneway.engine.transitions import Fail, Retry
from laneway.engine.upkeep import promote
from laneway.errors import Conflict, DeadLetterNotFound, InvalidCursor, StorageUnavailable
from laneway.lanes.memory_lanes import MemoryLanes
from laneway.settings import Settings

ALICE = Caller(TENANT, "alice", Role.USER)
BOB = Caller(TENANT, "bob", Role.USER)
OPERATOR = Caller(TENANT, "olga", Role.OPERATOR)
STRANGER = Caller(OTHER_TENANT, "alice", Role.ADMIN)
EVERY = DeadLetterFilter()
HOUR = timedelta(hours=1)


@pytest.fixture
def lanes() -> MemoryLanes:
    return MemoryLanes()


@pytest.fixture
def service(database: Database, lanes: MemoryLanes, clock: FrozenClock) -> JobService:
    return JobService(database, lanes, Settings(), Registry(), clock=clock)


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dead_letters, "BATCH_ROWS", 3)


def dead(database: Database, status: JobStatus = JobStatus.FAILED, **columns: Any) -> str:
    return add_job(database, status, **({"dead_letter_reason": "exhausted", "attempt": 4} | columns))


def statuses(database: Database, ids: Sequence[str]) -> list[str]:
    return [status_of(database, job_id) for job_id in ids]


# Looking


def found(service: JobService, caller: Caller = OPERATOR, **wanted: Any) -> list[str]:
    page, following = service.page(caller, DeadLetterFilter(**wanted), limit=50, cursor=None, mine=False)
    assert following is None
    return [job["id"] for job in page]


def test_the_list_holds_dead_letters_and_nothing_else_newest_first(
    service: JobService, database: Database
) -> None:
    for status in JobStatus:
        add_job(database, status)
    ids = [dead(database), dead(database, JobStatus.TIMEOUT, dead_letter_reason="timeout")]
    dead(database, tenant_id=OTHER_TENANT)
    assert found(service) == ids[::-1]


def test_a_filter_finds_what_it_says_and_its_moments_are_exclusive(
    service: JobService, database: Database
) -> None:
    plain = dead(database, id=first_id(NOW))
    other = dead(
        database,
        id=first_id(NOW + HOUR),
        job_type="demo.other",
        queue="emails",
        dead_letter_reason="poison",
        created_at=NOW + HOUR,
        finished_at=NOW + 2 * HOUR,
    )
    for wanted in (
        {"job_type": "demo.other"},
        {"queue": "emails"},
        {"reason": DeadLetterReason.POISON},
        {"created_after": NOW},
        {"finished_after": NOW},
    ):
        assert found(service, **wanted) == [other]
    for wanted in (
        {"job_type": "demo.echo", "queue": "default", "reason": DeadLetterReason.EXHAUSTED},
        {"created_before": NOW + HOUR},
        {"finished_before": NOW + 2 * HOUR},
    ):
        assert found(service, **wanted) == [plain]
    assert found(service, created_after=NOW + HOUR) == found(service, finished_before=NOW) == []


def test_pages_follow_one_another_and_a_cursor_is_for_its_own_list(
    service: JobService, database: Database
) -> None:
    ids = [dead(database) for _ in range(5)]
    first, cursor = service.page(OPERATOR, EVERY, limit=3, cursor=None, mine=False)
    second, end = service.page(OPERATOR, EVERY, limit=3, cursor=cursor, mine=False)
    assert [job["id"] for job in first + second] == ids[::-1]
    assert end is None
    others: list[Any] = [DeadLetterFilter(queue="default"), JobFilter()]
    for wanted in others:
        with pytest.raises(InvalidCursor):
            service.page(OPERATOR, wanted, limit=3, cursor=cursor, mine=False)


def test_users_see_their_own_and_others_their_tenants(service: JobService, database: Database) -> None:
    mine, bobs = dead(database), dead(database, created_by="bob")
    assert found(service, ALICE) == [mine]
    assert found(service, OPERATOR) == [bobs, mine]
    assert found(service, STRANGER) == []
    assert dead_letters.get(service, mine, ALICE) == service.get(mine, ALICE)
    for caller in (BOB, STRANGER):
        with pytest.raises(DeadLetterNotFound):
            dead_letters.get(service, mine, caller)


@pytest.mark.parametrize("status", JobStatus)
def test_a_job_that_is_no_dead_letter_is_not_found(
    service: JobService, database: Database, status: JobStatus
) -> None:
    job_id = add_job(database, status)
    for ask in (dead_letters.get, dead_letters.delete):
        with pytest.raises(DeadLetterNotFound):
            ask(service, job_id, OPERATOR)
    assert status_of(database, job_id) == status


# Deleting one


def test_a_dead_letter_is_deleted_with_all_that_hangs_on_it(service: JobService, database: Database) -> None:
    job_id, kept = dead(database), dead(database)
    dead_letters.delete(service, job_id, OPERATOR)
    assert [row["id"] for row in rows_of(database, models.jobs)] == [kept]
    assert events_of(database, job_id) == []
    assert len(events_of(database, kept)) == 1
    with pytest.raises(DeadLetterNotFound):
        dead_letters.delete(service, job_id, OPERATOR)


def ended_with_a_webhook(database: Database) -> str:
    job_id = add_job(database, JobStatus.RUNNING, webhook_url="https://example.org/hook")
    row = job_row(database, job_id)
    with database.write() as connection:
        move = Fail(job_id, row["attempt"], row["lease_token"], error='{"type":"E"}')
        carry_out(connection, [move], now=NOW, actor="w")
    return job_id


def test_a_dead_letter_whose_webhook_is_not_delivered_is_kept(
    service: JobService, database: Database
) -> None:
    job_id = ended_with_a_webhook(database)
    with pytest.raises(Conflict, match="webhook"):
        dead_letters.delete(service, job_id, OPERATOR)
    assert purge(service, OPERATOR, EVERY) == Bulk(dry_run=False, skipped=1)
    assert status_of(database, job_id) == "failed"


# Retrying many


def test_many_are_retried_oldest_first_and_their_lanes_rung(
    service: JobService, database: Database, lanes: MemoryLanes, small_batches: None
) -> None:
    ids = [dead(database) for _ in range(7)]
    left = [add_job(database, status) for status in FINAL]
    foreign = dead(database, tenant_id=OTHER_TENANT)
    before = statuses(database, [*left, foreign])
    done = retry_all(service, OPERATOR, EVERY)
    assert done == Bulk(dry_run=False, count=7, sample_ids=tuple(ids))
    assert statuses(database, ids) == ["queued"] * 7
    assert lanes.contents("normal") == ids
    assert {events_of(database, job_id)[-1]["actor"] for job_id in ids} == {"olga"}
    assert {job_row(database, job_id)["retry_count"] for job_id in ids} == {0}
    assert statuses(database, [*left, foreign]) == before


def test_a_filter_narrows_what_is_retried(service: JobService, database: Database) -> None:
    poison, exhausted = dead(database, dead_letter_reason="poison"), dead(database)
    assert retry_all(service, OPERATOR, DeadLetterFilter(reason=DeadLetterReason.POISON)).count == 1
    assert statuses(database, [poison, exhausted]) == ["queued", "failed"]


@pytest.mark.parametrize("bulk", [retry_all, purge])
def test_a_dry_run_says_what_would_be_done_and_changes_nothing(
    service: JobService, database: Database, bulk: Callable[..., Bulk]
) -> None:
    ids = [dead(database) for _ in range(MAX_SAMPLE + 2)]
    before = rows_of(database, models.jobs)
    assert bulk(service, OPERATOR, EVERY, dry_run=True) == Bulk(
        dry_run=True, count=len(ids), sample_ids=tuple(ids[:MAX_SAMPLE])
    )
    assert bulk(service, OPERATOR, EVERY, limit=3, dry_run=True) == Bulk(
        dry_run=True, count=3, sample_ids=tuple(ids[:3]), remaining=len(ids) - 3
    )
    assert rows_of(database, models.jobs) == before


@pytest.mark.parametrize("bulk", [retry_all, purge])
@pytest.mark.parametrize("limit", [5, 6, 7])
def test_a_call_stops_at_its_limit_and_says_what_remains(
    service: JobService, database: Database, small_batches: None, bulk: Callable[..., Bulk], limit: int
) -> None:
    ids = [dead(database) for _ in range(6)]
    done = bulk(service, OPERATOR, EVERY, limit=limit)
    assert (done.count, done.remaining, done.sample_ids) == (
        min(limit, 6),
        max(0, 6 - limit),
        tuple(ids[:limit]),
    )
    again = bulk(service, OPERATOR, EVERY, limit=limit)
    assert (again.count, again.remaining) == (max(0, 6 - limit), 0)
    assert found(service) == []


@pytest.mark.parametrize("bulk", [retry_all, purge])
def test_a_transaction_has_no_more_rows_than_a_batch(
    service: JobService,
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
    bulk: Callable[..., Bulk],
) -> None:
    sizes = []

    def watch(name: str) -> None:
        honest = getattr(dead_letters, name)

        def counted(connection: sa.Connection, rows: Sequence[Any], **how: Any) -> Any:
            sizes.append(len(rows))
            return honest(connection, rows, **how)

        monkeypatch.setattr(dead_letters, name, counted)

    watch("carry_out")
    watch("delete_jobs")
    row = job_row(database, dead(database))
    with database.write() as connection:
        rows = [row | {"id": new_id()} for _ in range(500)]
        connection.execute(sa.insert(models.jobs), rows)
    assert bulk(service, OPERATOR, EVERY).count == 501
    assert sizes == [500, 1]


def test_what_was_retried_before_a_crash_stays_and_the_same_call_goes_on(
    service: JobService,
    database: Database,
    lanes: MemoryLanes,
    small_batches: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ids = [dead(database) for _ in range(7)]
    carried: list[Any] = []

    def crash(*args: Any, **how: Any) -> Any:
        carried.append(args)
        done = carry_out(*args, **how)
        if len(carried) == 2:
            raise RuntimeError("the process dies before its second commit")
        return done

    monkeypatch.setattr(dead_letters, "carry_out", crash)
    with pytest.raises(RuntimeError):
        retry_all(service, OPERATOR, EVERY)
    assert statuses(database, ids) == ["queued"] * 3 + ["failed"] * 4
    assert retry_all(service, OPERATOR, EVERY) == Bulk(dry_run=False, count=4, sample_ids=tuple(ids[3:]))
    assert [len(events_of(database, job_id)) for job_id in ids] == [2] * 7
    assert lanes.contents("normal") == ids


def test_a_database_that_goes_away_in_the_middle_is_said_and_nothing_is_lost(
    service: JobService, database: Database, small_batches: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [dead(database) for _ in range(4)]
    carried: list[Any] = []

    def away(*args: Any, **how: Any) -> Any:
        carried.append(args)
        if len(carried) == 2:
            raise sa.exc.OperationalError("UPDATE", {}, Exception("gone"))
        return carry_out(*args, **how)

    monkeypatch.setattr(dead_letters, "carry_out", away)
    with pytest.raises(StorageUnavailable):
        retry_all(service, OPERATOR, EVERY)
    assert statuses(database, ids) == ["queued"] * 3 + ["failed"]
    assert retry_all(service, OPERATOR, EVERY).count == 1


def test_a_rate_spreads_them_over_time(
    service: JobService, database: Database, lanes: MemoryLanes, clock: FrozenClock, small_batches: None
) -> None:
    ids = [dead(database) for _ in range(5)]
    done = retry_all(service, OPERATOR, EVERY, rate=2)
    assert (done.count, done.last_due_at) == (5, NOW + timedelta(seconds=2))
    rows = [job_row(database, job_id) for job_id in ids]
    assert [(row["status"], (row["next_retry_at"] - NOW).total_seconds()) for row in rows] == [
        ("retrying", half / 2) for half in range(5)
    ]
    assert lanes.contents("normal") == []
    assert events_of(database, ids[0])[-1]["action"] == "retry_later"
    assert [due.job_id for due in promote(database, now=clock.advance(seconds=1))] == ids[:3]
    assert job_row(database, ids[0])["next_retry_at"] is None


def test_jobs_whose_key_is_held_are_skipped_and_the_oldest_of_a_key_is_retried(
    service: JobService, database: Database, small_batches: None
) -> None:
    add_job(database, unique_key="held")
    add_job(database, unique_key="free", tenant_id=OTHER_TENANT)
    held = [dead(database, unique_key="held") for _ in range(4)]
    free = [dead(database, unique_key="free") for _ in range(5)]
    plain = dead(database)
    forecast = retry_all(service, OPERATOR, EVERY, dry_run=True)
    assert (forecast.count, forecast.skipped) == (6, 4)
    done = retry_all(service, OPERATOR, EVERY)
    assert done == Bulk(dry_run=False, count=2, sample_ids=(free[0], plain), skipped=8)
    assert statuses(database, [*held, *free]) == ["failed"] * 4 + ["queued"] + ["failed"] * 4
    assert retry_all(service, OPERATOR, EVERY) == Bulk(dry_run=False, skipped=8)


def test_many_of_one_key_are_one_transaction(
    service: JobService, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [dead(database, unique_key="k") for _ in range(8)]
    asked: list[list[str]] = []

    def watched(connection: sa.Connection, moves: Sequence[Retry], **how: Any) -> Any:
        asked.append([move.job_id for move in moves])
        return carry_out(connection, moves, **how)

    monkeypatch.setattr(dead_letters, "carry_out", watched)
    assert retry_all(service, OPERATOR, EVERY).count == 1
    assert asked == [ids[:1]]


def test_a_key_that_is_taken_on_the_way_costs_its_job_and_no_neighbour(
    service: JobService, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [dead(database, unique_key=str(n)) for n in range(4)]
    real = dead_letters.commit_each

    def taken_first(commit: Any, items: Any) -> Any:
        add_job(database, unique_key="1")
        return real(commit, items)

    monkeypatch.setattr(dead_letters, "commit_each", taken_first)
    done = retry_all(service, OPERATOR, EVERY)
    assert (done.count, done.skipped, done.remaining) == (3, 1, 0)
    assert statuses(database, ids) == ["queued", "failed", "queued", "queued"]


def test_calls_at_once_share_the_jobs_out(
    service: JobService, database: Database, lanes: MemoryLanes, small_batches: None
) -> None:
    ids = [dead(database) for _ in range(20)]
    answers = at_once([lambda: retry_all(service, OPERATOR, EVERY)] * 4)
    assert [answer for answer in answers if isinstance(answer, Exception)] == []
    assert sum(answer.count for answer in answers) == 20  # type: ignore[union-attr]
    assert [len(events_of(database, job_id)) for job_id in ids] == [2] * 20
    assert sorted(lanes.contents("normal")) == sorted(ids)


def test_a_job_that_somebody_took_out_meanwhile_is_not_touched(
    service: JobService, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id, other = dead(database), dead(database)
    real = dead_letters.commit_each

    def cancelled_first(commit: Any, items: Any) -> Any:
        service.retry(job_id, OPERATOR)
        service.cancel(job_id, OPERATOR)
        return real(commit, items)

    monkeypatch.setattr(dead_letters, "commit_each", cancelled_first)
    assert retry_all(service, OPERATOR, EVERY).count == 1
    assert statuses(database, [job_id, other]) == ["cancelled", "queued"]


# Deleting many


def test_many_are_deleted_with_all_that_hangs_on_them(
    service: JobService, database: Database, small_batches: None
) -> None:
    ids = [dead(database) for _ in range(7)]
    kept = {add_job(database, status) for status in JobStatus} | {
        dead(database, tenant_id=OTHER_TENANT),
        dead(database, queue="emails"),
    }
    done = purge(service, OPERATOR, DeadLetterFilter(queue="default"))
    assert done == Bulk(dry_run=False, count=7, sample_ids=tuple(ids))
    assert {row["id"] for row in rows_of(database, models.jobs)} == kept
    assert [job_id for job_id in ids if events_of(database, job_id)] == []


def test_purges_and_retries_at_once_do_each_job_once(
    service: JobService, database: Database, small_batches: None
) -> None:
    ids = {dead(database) for _ in range(20)}
    calls: list[Callable[[], Bulk]] = [
        lambda: retry_all(service, OPERATOR, EVERY),
        lambda: purge(service, OPERATOR, EVERY),
    ]
    retried, purged = at_once(calls)
    assert isinstance(retried, Bulk), retried
    assert isinstance(purged, Bulk), purged
    left = {row["id"]: row["status"] for row in rows_of(database, models.jobs)}
    assert retried.count + purged.count == 20
    assert (len(left), set(left.values()) - {"queued"}) == (retried.count, set())
    assert set(left) <= ids
