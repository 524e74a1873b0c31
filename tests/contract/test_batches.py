"""Batches, on both stores: all or nothing, exact counts, one end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import sqlalchemy as sa

from factories import (
    NOW,
    TENANT,
    add_endpoint,
    at_once,
    change,
    job_row,
    rows_of,
    status_of,
)
from flow_ground import ALICE, FAILS, OLGA, Ground
from laneway import models
from laneway.clock import FrozenClock, new_id
from laneway.db import Database
from laneway.domain.states import FINAL, JobStatus
from laneway.engine import batch_ends, batches
from laneway.engine.access.callers import Caller, Role
from laneway.engine.batches import MAX_TOLD, BatchSpec
from laneway.engine.cancels import Manner
from laneway.engine.endings import Returned
from laneway.engine.idempotency import Key, Replayed
from laneway.engine.outcomes import carry_out
from laneway.engine.retention import Retention, prune
from laneway.engine.transitions import ForceComplete
from laneway.errors import (
    BatchNotFound,
    IdempotencyKeyReused,
    QuotaQueued,
    UniqueKeyTaken,
    UnknownDependency,
    Unprocessable,
)
from laneway.lanes.backend import Due

DONE = Returned(None)
CALLBACK = {"job_type": "t.step", "parameters": {"id": {"$result": "batch.id"}}, "queue": "after"}


@pytest.fixture
def ground(database: Database, clock: FrozenClock) -> Ground:
    return Ground(database, clock=clock)


def draft(ground: Ground, jobs: Sequence[Mapping[str, Any]], *, caller: Caller = ALICE, **fields: Any) -> Any:
    spec = BatchSpec.model_validate({"job_type": "t.step"} | fields)
    numbered = ((f"/jobs/{number}", job) for number, job in enumerate(jobs))
    return batches.check(ground.service, spec, numbered, caller)


def made(
    ground: Ground,
    jobs: int | Sequence[Mapping[str, Any]],
    *,
    caller: Caller = ALICE,
    key: Key | None = None,
    **fields: Any,
) -> dict[str, Any]:
    wanted = [{"parameters": {"n": n}} for n in range(jobs)] if isinstance(jobs, int) else jobs
    return batches.make(ground.service, draft(ground, wanted, caller=caller, **fields), caller, key=key)


def now(ground: Ground, batch: Mapping[str, Any]) -> dict[str, Any]:
    return batches.get(ground.service, batch["id"], ALICE)


def jobs_of(ground: Ground, batch: Mapping[str, Any]) -> list[str]:
    j = models.jobs.c
    with ground.database.read() as connection:
        found = sa.select(j.id).where(j.batch_id == batch["id"]).order_by(j.id)
        return list(connection.execute(found).scalars())


def callbacks(ground: Ground) -> list[dict[str, Any]]:
    return [dict(row) for row in rows_of(ground.database, models.jobs) if row["queue"] == "after"]


def test_a_batch_is_its_jobs_and_is_counted_exactly(ground: Ground) -> None:
    batch = made(ground, 3, defaults={"priority": "high", "tags": ["b"]})
    assert (batch["status"], batch["total"], batch["enqueued"], batch["rejected"]) == ("running", 3, 3, [])
    ids = jobs_of(ground, batch)
    assert ground.lanes.contents("high") == ids
    rows = [job_row(ground.database, job_id) for job_id in ids]
    assert [row["parameters"] for row in rows] == [{"n": 0}, {"n": 1}, {"n": 2}]
    assert {(row["priority"], tuple(row["tags"]), row["created_by"]) for row in rows} == {
        ("high", ("b",), "alice")
    }
    held = ground.start(*ids[:2])
    assert now(ground, batch)["counts"] == dict.fromkeys(JobStatus, 0) | {"queued": 1, "running": 2}
    ground.end((held[0], DONE), (held[1], FAILS))
    at = now(ground, batch)
    assert at["counts"] == dict.fromkeys(JobStatus, 0) | {"queued": 1, "completed": 1, "failed": 1}
    assert (at["status"], at["progress_percent"], at["finished_at"]) == ("running", 66, None)
    ground.run(ids[2])
    at = now(ground, batch)
    assert (at["status"], at["progress_percent"]) == ("failed", 100)
    assert at["counts"] == dict.fromkeys(JobStatus, 0) | {"completed": 2, "failed": 1}
    assert at["finished_at"] is not None
    assert ground.unfollowed() == []


@pytest.mark.parametrize("well", [True, False])
def test_callbacks_are_made_once_by_the_last_end(ground: Ground, well: bool) -> None:
    names = ("on_success", "on_complete", "on_failure")
    asked: dict[str, Any] = {name: CALLBACK | {"title": name} for name in names}
    add_endpoint(ground.database, "batch.completed")
    batch = made(ground, 3, **asked)
    held = ground.start(*jobs_of(ground, batch))
    assert ground.end((held[0], DONE), (held[1], DONE)) == []
    due = ground.end((held[2], DONE if well else FAILS))
    made_by_it = callbacks(ground)
    assert sorted(row["title"] for row in made_by_it) == sorted(
        ("on_complete", "on_success" if well else "on_failure")
    )
    assert sorted(due) == sorted(Due("after", row["id"], row["tenant_id"]) for row in made_by_it)
    assert {row["parameters"]["id"] for row in made_by_it} == {batch["id"]}
    assert {row["batch_id"] for row in made_by_it} == {None}
    told = now(ground, batch)["callbacks"]
    assert {told[row["title"]]["job_id"] for row in made_by_it} == {row["id"] for row in made_by_it}
    [(_, data)] = ground.messages("batch.completed")
    assert (data["batch_id"], data["status"]) == (batch["id"], "completed" if well else "failed")
    assert data["counts"]["completed"] == (3 if well else 2)


def test_a_callback_learns_how_the_batch_ended(ground: Ground) -> None:
    facts = {name: {"$result": f"batch.{name}"} for name in ("total", "enqueued", "completed", "failed")}
    batch = made(ground, 2, on_complete=CALLBACK | {"parameters": facts})
    ids = jobs_of(ground, batch)
    ground.run(ids[0])
    ground.run(ids[1], FAILS)
    [callback] = callbacks(ground)
    assert callback["parameters"] == {"total": 2, "enqueued": 2, "completed": 1, "failed": 1}


@pytest.mark.parametrize("reference", ["batch", "batch.result", "step_0", "batch.id.x"])
def test_a_callback_may_refer_to_its_batch_alone(ground: Ground, reference: str) -> None:
    with pytest.raises(Unprocessable) as refused:
        made(ground, 1, on_complete=CALLBACK | {"parameters": {"x": {"$result": reference}}})
    assert [e.pointer for e in refused.value.errors] == ["/on_complete/parameters"]


def test_one_invalid_job_means_no_batch(ground: Ground) -> None:
    jobs: list[dict[str, Any]] = [
        {},
        {"job_type": "t.unknown"},
        {"job_type": "t.count", "parameters": {"number": "x"}},
        {"priority": "urgent", "nonsense": 1},
    ]
    with pytest.raises(Unprocessable) as refused:
        made(ground, jobs)
    assert [e.pointer for e in refused.value.errors] == [
        "/jobs/1/job_type",
        "/jobs/2/parameters/number",
        "/jobs/3/priority",
        "/jobs/3/nonsense",
    ]
    assert rows_of(ground.database, models.jobs) == rows_of(ground.database, models.batches) == []


def test_invalid_jobs_can_be_left_out(ground: Ground) -> None:
    jobs: list[dict[str, Any]] = [{}, {"job_type": "t.unknown"}, {}, {"priority": "urgent"}]
    batch = made(ground, jobs, on_invalid="skip")
    assert (batch["total"], batch["enqueued"]) == (4, 2)
    assert [(each["index"], each["code"]) for each in batch["rejected"]] == [
        (1, "unknown_job_type"),
        (3, "invalid_request"),
    ]
    assert batch["rejected"][1]["errors"][0]["pointer"] == "/jobs/3/priority"
    with pytest.raises(Unprocessable, match="none of the batch's jobs is valid"):
        made(ground, jobs[1:2], on_invalid="skip")


def test_a_refusal_tells_so_many_errors_and_looks_no_further(ground: Ground) -> None:
    looked: list[int] = []

    def jobs() -> Any:
        for number in range(MAX_TOLD + 50):
            looked.append(number)
            yield f"/jobs/{number}", {"priority": "x"}

    with pytest.raises(Unprocessable) as refused:
        batches.check(ground.service, BatchSpec(job_type="t.step"), jobs(), ALICE)
    assert len(refused.value.errors) == len(looked) == MAX_TOLD


def test_defaults_are_fields_of_jobs(ground: Ground) -> None:
    with pytest.raises(Unprocessable) as refused:
        made(ground, 1, defaults={"priority": "low", "prioritty": "high"})
    assert [e.pointer for e in refused.value.errors] == ["/defaults/prioritty"]


def test_a_unique_key_that_is_taken_means_no_batch_or_one_without_it(ground: Ground) -> None:
    ground.enqueue(unique_key="k")
    jobs: list[dict[str, Any]] = [{}, {"unique_key": "k"}, {"unique_key": "l"}, {"unique_key": "l"}]
    with pytest.raises(UniqueKeyTaken, match="job 1"):
        made(ground, jobs)
    assert len(rows_of(ground.database, models.jobs)) == 1
    batch = made(ground, jobs, on_invalid="skip")
    assert (batch["enqueued"], [each["index"] for each in batch["rejected"]]) == (2, [1, 3])
    with pytest.raises(UniqueKeyTaken):
        made(ground, jobs[1:2], on_invalid="skip")


def test_there_is_room_for_all_of_a_batch_or_for_none(database: Database, clock: FrozenClock) -> None:
    ground = Ground(database, clock=clock, waiting_per_tenant=5)
    made(ground, 3)
    with pytest.raises(QuotaQueued):
        made(ground, 3)
    assert len(rows_of(database, models.jobs)) == 3
    assert made(ground, 2)["enqueued"] == 2


def test_a_crash_in_the_middle_leaves_nothing(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "CHUNK_ROWS", 2)
    real: Any = batches.create  # type: ignore[attr-defined]
    calls: list[int] = []

    def dies(*given: Any, **how: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*given, **how)

    with monkeypatch.context() as crash:
        crash.setattr(batches, "create", dies)
        with pytest.raises(KeyboardInterrupt):
            made(ground, 10)
    assert rows_of(ground.database, models.jobs) == rows_of(ground.database, models.batches) == []
    assert made(ground, 10)["enqueued"] == 10


def test_jobs_of_a_batch_may_wait_for_others(ground: Ground) -> None:
    parent = ground.enqueue()["id"]
    batch = made(ground, [{"depends_on": [parent]}, {}])
    assert now(ground, batch)["counts"]["blocked"] == 1
    ground.run(parent, FAILS)
    ground.run(jobs_of(ground, batch)[1])
    assert (now(ground, batch)["status"], now(ground, batch)["counts"]["cancelled"]) == ("failed", 1)
    with pytest.raises(UnknownDependency):
        made(ground, [{"depends_on": [new_id()]}, {}])


def test_a_batch_whose_jobs_cannot_run_ends_by_the_sweep(ground: Ground) -> None:
    parent = ground.enqueue()["id"]
    ground.run(parent, FAILS)
    batch = made(ground, [{"depends_on": [parent]}], on_failure=CALLBACK)
    ground.sweep()
    assert now(ground, batch)["status"] == "failed"
    assert len(callbacks(ground)) == 1


def test_a_cancel_ends_the_batch(ground: Ground) -> None:
    batch = made(ground, 4, on_complete=CALLBACK)
    [running] = ground.start(jobs_of(ground, batch)[0])
    at, done = batches.cancel(ground.service, batch["id"], ALICE, Manner("enough"))
    assert (done.cancelled, done.cancelling, at["finished_at"]) == (3, 1, None)
    ground.end((running, DONE))
    assert (now(ground, batch)["status"], now(ground, batch)["counts"]["cancelled"]) == ("failed", 3)
    assert len(callbacks(ground)) == 1


def test_what_failed_is_tried_again_and_the_batch_ends_again(ground: Ground) -> None:
    batch = made(ground, 3, on_success=CALLBACK | {"title": "well"}, on_failure=CALLBACK | {"title": "ill"})
    ids = jobs_of(ground, batch)
    for job_id in ids[:2]:
        ground.run(job_id, FAILS)
    ground.run(ids[2])
    assert batches.count_failed(ground.service, batch["id"], ALICE) == 2
    again = batches.retry_failed(ground.service, batch["id"], ALICE)
    assert (again["retried"], again["status"], again["finished_at"]) == (2, "running", None)
    assert again["counts"]["queued"] == 2
    ground.run(ids[0])
    ground.run(ids[1])
    assert now(ground, batch)["status"] == "completed"
    assert [row["title"] for row in callbacks(ground)] == ["ill", "well"]
    assert batches.retry_failed(ground.service, batch["id"], ALICE)["retried"] == 0
    assert now(ground, batch)["status"] == "completed"


def test_a_single_retry_opens_its_batch_too(ground: Ground) -> None:
    batch = made(ground, 1)
    [job_id] = jobs_of(ground, batch)
    ground.run(job_id, FAILS)
    ground.service.retry(job_id, ALICE)
    assert (now(ground, batch)["status"], now(ground, batch)["finished_at"]) == ("running", None)


def test_a_key_makes_one_batch_and_is_answered_alike(ground: Ground) -> None:
    key = Key.of(ALICE, "createBatch", "k", request=b"1")
    first = made(ground, 2, key=key)
    again = made(ground, 2, key=key)
    assert isinstance(again, Replayed)
    assert (dict(again), len(rows_of(ground.database, models.jobs))) == (first, 2)
    with pytest.raises(IdempotencyKeyReused):
        made(ground, 2, key=replace(key, request=Key.of(ALICE, "x", "k", request=b"2").request))


def test_nobody_sees_the_batches_of_another(ground: Ground) -> None:
    batch = made(ground, 1)
    bob, stranger = Caller(TENANT, "bob", Role.USER), Caller(new_id(), "alice", Role.ADMIN)
    for caller in (bob, stranger):
        asked: list[Callable[[], object]] = [
            partial(batches.get, ground.service, batch["id"], caller),
            partial(batches.cancel, ground.service, batch["id"], caller, Manner()),
            partial(batches.retry_failed, ground.service, batch["id"], caller),
            partial(batches.jobs, ground.service, batch["id"], caller, statuses=(), limit=5, cursor=None),
        ]
        for ask in asked:
            with pytest.raises(BatchNotFound):
                ask()
        assert batches.page(ground.service, caller, limit=5, cursor=None) == ([], None)
    assert batches.get(ground.service, batch["id"], OLGA)["id"] == batch["id"]


def test_lists_are_paged_newest_first(ground: Ground) -> None:
    ids = [made(ground, 2)["id"] for _ in range(3)]
    page, cursor = batches.page(ground.service, ALICE, limit=2, cursor=None)
    rest, end = batches.page(ground.service, ALICE, limit=2, cursor=cursor)
    assert ([each["id"] for each in page + rest], end) == (ids[::-1], None)
    assert {each["counts"]["queued"] for each in page} == {2}
    jobs, cursor = batches.jobs(
        ground.service, ids[0], ALICE, statuses=(JobStatus.QUEUED,), limit=1, cursor=None
    )
    assert jobs[0]["batch_id"] == ids[0]
    assert cursor is not None


def test_a_batch_is_kept_until_its_jobs_are_gone(ground: Ground) -> None:
    batch = made(ground, 2)
    first, second = jobs_of(ground, batch)
    ground.run(first)
    keep = Retention.of_all_but_dead_letters(timedelta(days=1))
    later = NOW + timedelta(days=2)
    assert prune(ground.database, keep, now=later).jobs == 0
    ground.run(second)
    assert (pruned := prune(ground.database, keep, now=later)).jobs == 2
    assert pruned.groups == 1
    with pytest.raises(BatchNotFound):
        now(ground, batch)


@pytest.mark.parametrize("lock_below", [1_000, 2])
def test_ends_at_the_same_moment_end_the_batch_once(
    database: Database, lock_below: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where more are ended at once than the count near the end is taken under a lock for."""
    monkeypatch.setattr(batch_ends, "LOCK_BELOW", lock_below)
    add_endpoint(database, "batch.completed")
    for _ in range(3):
        ground = Ground(database)
        batch = made(ground, 6, on_complete=CALLBACK)
        held = ground.start(*jobs_of(ground, batch))
        before = len(callbacks(ground))
        ends = [partial(ground.end, (job, DONE)) for job in held]
        answers = at_once(ends)
        assert not [answer for answer in answers if isinstance(answer, Exception)]
        while ground.unfollowed():
            ground.sweep()
        at = now(ground, batch)
        assert (at["status"], at["counts"]["completed"]) == ("completed", 6)
        assert len(callbacks(ground)) == before + 1
    assert len(ground.messages("batch.completed")) == 3


def test_with_many_active_jobs_one_ended_one_is_kept_in_mind(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_ends, "LOCK_BELOW", 3)
    batch = made(ground, 8)
    ids = jobs_of(ground, batch)
    for job_id in ids[:4]:
        ground.run(job_id)
    assert len(ground.unfollowed()) == 4
    ground.sweep()
    assert len(ground.unfollowed()) == 1
    for job_id in ids[4:]:
        ground.run(job_id)
    ground.sweep()
    assert ground.unfollowed() == []
    assert now(ground, batch)["status"] == "completed"


def test_settling_jobs_of_no_group_costs_no_statement_more(ground: Ground) -> None:
    plain, linked = [ground.enqueue()["id"] for _ in range(4)], jobs_of(ground, made(ground, 8))
    few = _statements(ground, partial(ground.end, *((job, DONE) for job in ground.start(*plain[:1]))))
    many = _statements(ground, partial(ground.end, *((job, DONE) for job in ground.start(*plain[1:]))))
    assert few == many
    assert not [statement for statement in many if "batch" in statement or "SAVEPOINT" in statement]
    one = _statements(ground, partial(ground.end, *((job, DONE) for job in ground.start(*linked[:1]))))
    five = _statements(ground, partial(ground.end, *((job, DONE) for job in ground.start(*linked[1:6]))))
    assert len(one) == len(five)


def _statements(ground: Ground, work: Callable[[], object]) -> list[str]:
    seen: list[str] = []

    def see(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        seen.append(statement.split(" VALUES ", maxsplit=1)[0][:60])

    sa.event.listen(ground.database.engine, "before_cursor_execute", see)
    try:
        work()
    finally:
        sa.event.remove(ground.database.engine, "before_cursor_execute", see)
    return seen


def test_jobs_that_are_not_in_the_end_are_not_in_the_count(ground: Ground) -> None:
    """A job that an admin completes later is counted anew, and tells nobody again."""
    batch = made(ground, 1, on_complete=CALLBACK)
    [job_id] = jobs_of(ground, batch)
    ground.run(job_id, FAILS)
    with ground.database.write() as connection:
        carry_out(connection, [ForceComplete(job_id)], now=NOW, actor="root")
    at = now(ground, batch)
    assert (at["status"], at["counts"]["completed"], len(callbacks(ground))) == ("completed", 1, 1)
    assert status_of(ground.database, job_id) in FINAL


def test_an_older_worker_ends_a_batch_with_the_sweep(ground: Ground) -> None:
    batch = made(ground, 1)
    [job_id] = jobs_of(ground, batch)
    columns = {"status": "completed", "finished_at": NOW, "progress": 100, "event_seq": 3}
    change(ground.database, models.jobs, job_id, **columns)
    assert now(ground, batch)["status"] == "running"
    ground.sweep()
    assert now(ground, batch)["status"] == "completed"
