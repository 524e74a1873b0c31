"""Jobs that wait for others, on both stores."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from random import Random
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from factories import (
    NOW,
    OTHER_TENANT,
    TENANT,
    add_endpoint,
    add_job,
    at_once,
    change,
    events_of,
    job_row,
    rows_of,
    status_of,
)
from flow_ground import ALICE, FAILS, OLGA, Ground
from laneway import models
from laneway.clock import FrozenClock, new_id
from laneway.db import Database
from laneway.domain.spec import MAX_DEPENDENCIES, JobSpec
from laneway.domain.states import FINAL, JobStatus
from laneway.engine import dependencies, flow
from laneway.engine.cancels import ActiveJobs, Manner, cancel_all
from laneway.engine.endings import Raised, Returned, TimedOut
from laneway.engine.outcomes import carry_out
from laneway.engine.queries import JobFilter
from laneway.engine.retention import delete_jobs
from laneway.engine.transitions import Cancel
from laneway.engine.upkeep import expire
from laneway.errors import UnknownDependency

DONE = Returned(None)


@pytest.fixture
def ground(database: Database, clock: FrozenClock) -> Ground:
    return Ground(database, clock=clock)


def test_a_job_waits_for_all_it_depends_on_and_says_for_how_many(ground: Ground) -> None:
    a, b = ground.enqueue()["id"], ground.enqueue()["id"]
    waiting = ground.enqueue(depends_on=[a, b])
    assert (waiting["status"], waiting["status_reason"]) == ("blocked", "waits_for_jobs: 2")
    assert (waiting["depends_on"], waiting["on_dependency_failure"]) == ([a, b], "cancel")
    assert ground.run(b) == []
    assert job_row(ground.database, waiting["id"])["status_reason"] == "waits_for_jobs: 1"
    assert ground.run(a) == [("normal", waiting["id"], TENANT)]
    row = job_row(ground.database, waiting["id"])
    assert (row["status"], row["status_reason"], row["dependencies_left"]) == ("queued", None, 0)
    assert [event["action"] for event in events_of(ground.database, waiting["id"])] == ["create", "enqueue"]
    assert rows_of_dependencies(ground) == []


def rows_of_dependencies(ground: Ground) -> list[tuple[str, str]]:
    d = models.job_dependencies.c
    with ground.database.read() as connection:
        return [tuple(row) for row in connection.execute(sa.select(d.parent_id, d.job_id))]


def test_jobs_that_ended_long_ago_count(ground: Ground) -> None:
    ended = [add_job(ground.database, JobStatus.COMPLETED) for _ in range(2)]
    waiting = ground.enqueue(depends_on=ended)
    assert status_of(ground.database, waiting["id"]) == "queued"
    assert waiting["id"] in ground.lanes.contents("normal")
    failed = add_job(ground.database, JobStatus.FAILED, dead_letter_reason="permanent")
    cancelled = ground.enqueue(depends_on=[ended[0], failed])
    row = job_row(ground.database, cancelled["id"])
    assert (row["status"], row["status_reason"]) == ("cancelled", f"dependency_failed: {failed}")
    runs = ground.enqueue(depends_on=[failed], on_dependency_failure="run")
    assert status_of(ground.database, runs["id"]) == "queued"


def test_a_job_that_is_named_twice_is_one_dependency(ground: Ground) -> None:
    parent = ground.enqueue()["id"]
    waiting = ground.enqueue(depends_on=[parent, parent.upper()])
    assert waiting["status_reason"] == "waits_for_jobs: 1"
    ground.run(parent)
    assert status_of(ground.database, waiting["id"]) == "queued"


@pytest.mark.parametrize("end", ["failed", "timeout", "cancelled", "expired"])
def test_a_failure_cancels_those_that_wait_and_those_that_wait_for_them(ground: Ground, end: str) -> None:
    add_endpoint(ground.database, "job.cancelled")
    parent = ground.enqueue(expires_at=NOW + timedelta(seconds=5), max_retries=0)["id"]
    child = ground.enqueue(depends_on=[parent])["id"]
    other = ground.enqueue(depends_on=[parent], on_dependency_failure="run")["id"]
    grandchild = ground.enqueue(depends_on=[child])["id"]
    if end == "cancelled":
        ground.service.cancel(parent, ALICE)
    elif end == "expired":
        assert expire(ground.database, now=NOW + timedelta(seconds=6)) == 1
    else:
        change(ground.database, models.jobs, parent, max_retries=0)
        ground.run(parent, FAILS if end == "failed" else TimedOut(1, ""))
    assert status_of(ground.database, parent) == end
    reasons = {row["id"]: row["status_reason"] for row in rows_of(ground.database, models.jobs)}
    assert status_of(ground.database, child) == status_of(ground.database, grandchild) == "cancelled"
    assert (reasons[child], reasons[grandchild]) == (
        f"dependency_failed: {parent}",
        f"dependency_failed: {child}",
    )
    assert status_of(ground.database, other) == "queued"
    told = {data["job_id"] for _, data in ground.messages("job.cancelled")}
    assert {child, grandchild} <= told
    assert ground.unfollowed() == []


def test_what_is_not_there_for_the_caller_cannot_be_waited_for(ground: Ground) -> None:
    foreign = add_job(ground.database, tenant_id=OTHER_TENANT)
    bobs = add_job(ground.database, created_by="bob")
    mine = ground.enqueue()["id"]
    for unknown in (foreign, bobs, new_id()):
        with pytest.raises(UnknownDependency) as refused:
            ground.enqueue(depends_on=[mine, unknown])
        assert [(e.pointer, e.code) for e in refused.value.errors] == [
            ("/depends_on/1", "unknown_dependency")
        ]
    assert ground.enqueue(caller=OLGA, depends_on=[bobs])["status"] == "blocked"
    assert len(rows_of(ground.database, models.jobs)) == 4


def test_one_bad_dependency_never_fails_its_neighbours(ground: Ground) -> None:
    parent = ground.enqueue()["id"]
    specs = [
        JobSpec(job_type="t.step"),
        JobSpec(job_type="t.step", depends_on=[new_id()]),
        JobSpec(job_type="t.step", depends_on=[parent]),
    ]
    answers = ground.service.enqueue([ground.service.prepare(spec, ALICE) for spec in specs])
    assert [getattr(a, "code", None) or a["status"] for a in answers] == [  # type: ignore[index]
        "queued",
        "unknown_dependency",
        "blocked",
    ]


def test_as_many_dependencies_as_the_limit_says_and_no_more(ground: Ground) -> None:
    parents = [add_job(ground.database) for _ in range(MAX_DEPENDENCIES + 1)]
    assert ground.enqueue(depends_on=parents[:-1])["status_reason"] == f"waits_for_jobs: {MAX_DEPENDENCIES}"
    with pytest.raises(ValueError, match=f"at most {MAX_DEPENDENCIES} items"):
        ground.enqueue(depends_on=parents)


def test_a_time_and_a_dependency_do_not_go_together(ground: Ground) -> None:
    with pytest.raises(ValueError, match="not both"):
        ground.enqueue(depends_on=[new_id()], delay_seconds=5)


def test_a_parent_that_is_tried_again_is_waited_for_until_it_has_ended(ground: Ground) -> None:
    parent = ground.enqueue(max_retries=1)["id"]
    child = ground.enqueue(depends_on=[parent])["id"]
    ground.run(parent, Raised("Flaky", "once", in_seconds=0.0))
    assert (status_of(ground.database, parent), status_of(ground.database, child)) == ("retrying", "blocked")


def test_cancelling_a_job_that_waits_leaves_its_parent_alone(ground: Ground) -> None:
    parent = ground.enqueue()["id"]
    child = ground.enqueue(depends_on=[parent])["id"]
    ground.service.cancel(child, ALICE)
    assert ground.run(parent) == []
    assert (status_of(ground.database, parent), status_of(ground.database, child)) == (
        "completed",
        "cancelled",
    )


def test_a_child_that_is_retried_does_not_wait_again(ground: Ground) -> None:
    parent = ground.enqueue()["id"]
    child = ground.enqueue(depends_on=[parent])["id"]
    ground.run(parent, FAILS)
    assert ground.service.retry(child, ALICE)["status"] == "queued"


def test_jobs_of_one_bulk_cancel_take_along_what_waits_for_them(ground: Ground) -> None:
    parents = [ground.enqueue(queue="bulk")["id"] for _ in range(3)]
    child = ground.enqueue(depends_on=parents)["id"]
    cancel_all(ground.service, OLGA, ActiveJobs(JobFilter(queue="bulk")), Manner())
    assert status_of(ground.database, child) == "cancelled"


def test_an_ended_parent_is_kept_until_its_children_know(ground: Ground) -> None:
    parent = ground.enqueue()["id"]
    child = ground.enqueue(depends_on=[parent])["id"]
    columns = {"status": "completed", "finished_at": NOW, "progress": 100, "event_seq": 3}
    change(ground.database, models.jobs, parent, **columns)  # by a worker of an older release
    with ground.database.write() as connection:
        assert delete_jobs(connection, [parent]) == []
    assert ground.sweep() == [("normal", child, TENANT)]
    with ground.database.write() as connection:
        assert delete_jobs(connection, [parent]) == [parent]


def test_a_step_does_so_much_and_the_sweep_the_rest(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dependencies, "MAX_RELEASED", 4)
    parent = ground.enqueue()["id"]
    children = [ground.enqueue(depends_on=[parent])["id"] for _ in range(7)]
    ground.run(parent)
    assert 0 < sum(status_of(ground.database, child) == "queued" for child in children) < 7
    while ground.unfollowed():
        assert ground.sweep()
    assert {status_of(ground.database, child) for child in children} == {"queued"}
    assert rows_of_dependencies(ground) == []


def test_a_long_line_of_failures_is_followed_in_steps(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flow, "MAX_ROUNDS", 2)
    line = [ground.enqueue()["id"]]
    for _ in range(6):
        line.append(ground.enqueue(depends_on=[line[-1]])["id"])
    ground.run(line[0], FAILS)
    assert status_of(ground.database, line[-1]) == "blocked"
    while ground.unfollowed():
        ground.sweep()
    assert [status_of(ground.database, each) for each in line] == ["failed"] + ["cancelled"] * 6


def test_an_end_is_kept_although_what_follows_cannot_be_done(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = ground.enqueue()["id"]
    child = ground.enqueue(depends_on=[parent])["id"]
    real = dependencies.release

    def half_done(*given: Any, **how: Any) -> None:
        real(*given, **how)
        raise ZeroDivisionError

    with monkeypatch.context() as broken:
        broken.setattr(dependencies, "release", half_done)
        ground.run(parent)
    assert (status_of(ground.database, parent), status_of(ground.database, child)) == (
        "completed",
        "blocked",
    )
    assert ground.sweep() == [("normal", child, TENANT)]


@pytest.mark.parametrize("seed", range(6))
def test_a_parent_that_ends_at_the_same_moment_is_not_missed(database: Database, seed: int) -> None:
    ground = Ground(database, rng=Random(seed))
    parents = [ground.enqueue()["id"] for _ in range(6)]
    held = ground.start(*parents)
    asked = [
        partial(ground.enqueue, depends_on=ground.rng.sample(parents, ground.rng.randint(1, 6)))
        for _ in range(6)
    ]
    ends = [partial(ground.end, (job, DONE if n % 3 else FAILS)) for n, job in enumerate(held)]
    calls: list[Callable[[], object]] = [*asked, *ends]
    ground.rng.shuffle(calls)
    answers = at_once(calls)
    assert not [answer for answer in answers if isinstance(answer, Exception)]
    for row in rows_of(database, models.jobs):
        if row["depends_on"]:
            ended_badly = {parents[0], parents[3]}.intersection(row["depends_on"])
            assert row["status"] == ("cancelled" if ended_badly else "queued"), dict(row)
    assert rows_of_dependencies(ground) == []


def test_two_parents_that_end_together_free_their_child_once(database: Database) -> None:
    ground = Ground(database)
    for _ in range(5):
        parents = [ground.enqueue()["id"] for _ in range(4)]
        child = ground.enqueue(depends_on=parents)["id"]
        ends = at_once([partial(ground.end, (job, DONE)) for job in ground.start(*parents)])
        assert sorted(map(len, ends)) == [0, 0, 0, 1]  # type: ignore[arg-type]
        assert [event["action"] for event in events_of(database, child)] == ["create", "enqueue"]


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(seed=st.integers(0, 2**32), size=st.integers(2, 12), failing=st.floats(0, 0.5))
def test_in_any_graph_a_job_starts_after_what_it_waits_for(
    database: Database, seed: int, size: int, failing: float
) -> None:
    rng = Random(seed)
    ground = Ground(database, rng=rng)
    parents: dict[str, list[str]] = {}
    runs_anyway: set[str] = set()
    bad: set[str] = set()
    made: list[str] = []
    while len(made) < size or ground.queued() or ground.running:
        if len(made) < size and rng.random() < 0.5:
            chosen = rng.sample(made, rng.randint(0, min(4, len(made))))
            anyway = rng.random() < 0.3
            job = ground.enqueue(depends_on=chosen, on_dependency_failure="run" if anyway else "cancel")
            made.append(job["id"])
            parents[job["id"]] = chosen
            runs_anyway |= {job["id"]} if anyway else set()
        elif queued := ground.queued():
            ground.start(rng.choice(queued))
        elif ground.running:
            held = rng.choice(ground.running)
            fails = rng.random() < failing
            bad |= {held.job_id} if fails else set()
            ground.end((held, FAILS if fails else DONE))
    started = [job_id for what, job_id in ground.log if what == "start"]
    place = {entry: number for number, entry in enumerate(ground.log)}
    statuses = {job_id: status_of(database, job_id) for job_id in made}
    for job_id in made:
        assert statuses[job_id] in FINAL
        over = [parent for parent in parents[job_id] if statuses[parent] != "completed"]
        if over and job_id not in runs_anyway:
            assert statuses[job_id] == "cancelled"
            assert job_id not in started
        else:
            assert statuses[job_id] == ("failed" if job_id in bad else "completed")
            for parent in parents[job_id]:
                if statuses[parent] != "cancelled":
                    assert place["end", parent] < place["start", job_id]
    assert rows_of_dependencies(ground) == []
    assert ground.unfollowed() == []


def test_a_cancelled_graph_leaves_nothing_behind(ground: Ground) -> None:
    parent = ground.enqueue()["id"]
    ids = [ground.enqueue(depends_on=[parent])["id"] for _ in range(5)]
    with ground.database.write() as connection:
        carry_out(connection, [Cancel(i, by="x") for i in [*ids, parent]], now=NOW, actor="x")
    assert rows_of_dependencies(ground) == []
    assert {status_of(ground.database, each) for each in ids} == {"cancelled"}
