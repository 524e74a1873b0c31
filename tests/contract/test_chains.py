"""Chains, on both stores: what starts when, how a run ends, and what is told of it."""

from __future__ import annotations

from collections.abc import Sequence
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
    TENANT,
    add_endpoint,
    at_once,
    change,
    job_row,
    rows_of,
    status_of,
)
from flow_ground import ALICE, FAILS, OLGA, Ground, returned
from laneway import models
from laneway.clock import FrozenClock
from laneway.db import Database
from laneway.domain.flow import ChainSpec
from laneway.domain.states import FINAL
from laneway.engine import chain_runs, chains
from laneway.engine.access.callers import Caller, Role
from laneway.engine.doctor import examine
from laneway.engine.endings import Ending, Raised, Returned
from laneway.engine.outcomes import Claimed
from laneway.engine.retention import Retention, delete_jobs, prune
from laneway.errors import ChainNotFound, ChainRunNotFound, Conflict, InvalidParameters, UnknownJobType

DONE = Returned(None)
STEP: dict[str, Any] = {"job_type": "t.step"}


@pytest.fixture
def ground(database: Database, clock: FrozenClock) -> Ground:
    return Ground(database, clock=clock)


def made(ground: Ground, *definition: Any, execute: bool = True, **fields: Any) -> dict[str, Any]:
    spec = ChainSpec.model_validate({"name": "c", "chain_definition": definition} | fields)
    return chains.create(ground.service, chains.check(ground.service, spec, ALICE), ALICE, execute=execute)


def now(ground: Ground, chain: dict[str, Any]) -> dict[str, Any]:
    return chains.get(ground.service, chain["id"], ALICE)


def job_of(ground: Ground, chain: dict[str, Any], number: int) -> str:
    job_id = now(ground, chain)["steps"][number]["job_id"]
    assert job_id is not None
    return str(job_id)


def using(reference: str) -> dict[str, Any]:
    return STEP | {"parameters": {"given": {"$result": reference}}}


def where(ground: Ground, chain: dict[str, Any]) -> list[str | None]:
    return [step["status"] for step in now(ground, chain)["steps"]]


def test_steps_run_one_after_the_other_and_hand_on_their_results(ground: Ground) -> None:
    chain = made(ground, STEP, using("step_0.rows.1"), using("step_0"))
    assert (chain["status"], chain["current_step"], chain["total_steps"]) == ("running", 0, 3)
    assert where(ground, chain) == ["queued", None, None]
    second = ground.run(job_of(ground, chain, 0), returned({"rows": [1, {"id": 7}]}))
    assert second == [("normal", job_of(ground, chain, 1), TENANT)]
    assert job_row(ground.database, second[0][1])["parameters"] == {"given": {"id": 7}}
    at = now(ground, chain)
    assert (at["current_step"], at["progress_percent"]) == (1, 33)
    assert at["results"] == {"step_0": {"rows": [1, {"id": 7}]}}
    ground.run(second[0][1], returned("b"))
    ground.run(job_of(ground, chain, 2), returned([3]))
    at = now(ground, chain)
    assert (at["status"], at["current_step"], at["progress_percent"]) == ("completed", 3, 100)
    assert at["results"] == {"step_0": {"rows": [1, {"id": 7}]}, "step_1": "b", "step_2": [3]}
    row = job_row(ground.database, job_of(ground, chain, 2))
    assert (row["chain_id"], row["chain_step"], row["created_by"]) == (chain["id"], 2, "alice")
    assert ground.unfollowed() == []


def test_a_group_runs_side_by_side_inside_a_sequence(ground: Ground) -> None:
    chain = made(ground, STEP, [STEP, STEP], {"parallel": [using("step_1"), STEP]}, using("step_3"))
    due = ground.run(job_of(ground, chain, 0))
    assert [each.job_id for each in due] == [job_of(ground, chain, 1), job_of(ground, chain, 2)]
    assert ground.run(due[1][1]) == []
    assert where(ground, chain) == ["completed", "queued", "completed", None, None, None]
    due = ground.run(due[0][1], returned("x"))
    assert len(due) == 2
    assert job_row(ground.database, due[0][1])["parameters"] == {"given": "x"}
    ground.drain(lambda _: DONE)
    assert now(ground, chain)["status"] == "completed"


def test_a_parallel_chain_starts_all_at_once(ground: Ground) -> None:
    chain = made(ground, STEP, STEP, STEP, execution_mode="parallel")
    assert where(ground, chain) == ["queued"] * 3
    ground.drain(lambda _: DONE)
    assert now(ground, chain)["status"] == "completed"


def test_a_step_is_the_job_that_was_asked_for(ground: Ground) -> None:
    step = STEP | {"priority": "high", "queue": "emails", "title": "t", "tags": ["a"], "delay_seconds": 60}
    chain = made(ground, STEP, step | {"timeout_seconds": 7, "max_retries": 1, "metadata": {"k": 1}})
    assert ground.run(job_of(ground, chain, 0)) == []
    row = job_row(ground.database, job_of(ground, chain, 1))
    wanted = {"lane": "emails-high", "title": "t", "tags": ["a"], "metadata": {"k": 1}, "max_retries": 1}
    assert {name: row[name] for name in wanted} == wanted
    assert (row["status"], row["scheduled_for"]) == ("scheduled", NOW + timedelta(seconds=60))


def test_nothing_starts_after_a_failed_step(ground: Ground) -> None:
    chain = made(ground, STEP, STEP, STEP)
    ground.run(job_of(ground, chain, 0))
    assert ground.run(job_of(ground, chain, 1), FAILS) == []
    at = now(ground, chain)
    assert (at["status"], at["error_message"]) == ("failed", "step 1: Broken: it broke")
    assert (at["current_step"], at["progress_percent"]) == (2, 66)
    assert where(ground, chain) == ["completed", "failed", None]


def test_a_retry_within_a_step_is_no_failure(ground: Ground) -> None:
    chain = made(ground, STEP | {"max_retries": 1}, STEP)
    ground.run(job_of(ground, chain, 0), Raised("Flaky", "once", in_seconds=0.0))
    assert (now(ground, chain)["status"], where(ground, chain)) == ("running", ["retrying", None])


def test_a_failure_drops_those_of_its_group_that_have_not_begun(ground: Ground) -> None:
    chain = made(ground, [STEP, STEP, STEP | {"delay_seconds": 60}, STEP], STEP)
    [running] = ground.start(job_of(ground, chain, 3))
    ground.run(job_of(ground, chain, 0), FAILS)
    assert where(ground, chain) == ["failed", "cancelled", "cancelled", "running", None]
    assert now(ground, chain)["status"] == "running"
    ground.end((running, DONE))
    assert (now(ground, chain)["status"], where(ground, chain)[3:]) == ("failed", ["completed", None])
    assert ground.unfollowed() == []


def test_a_chain_that_does_not_stop_goes_on_and_has_failed_all_the_same(ground: Ground) -> None:
    chain = made(ground, STEP, STEP, using("step_0"), STEP, stop_on_failure=False)
    ground.run(job_of(ground, chain, 0), FAILS)
    ground.run(job_of(ground, chain, 1))
    at = now(ground, chain)
    assert (at["steps"][2]["status"], at["steps"][2]["job_id"]) == ("failed", None)
    assert at["steps"][2]["error"] == "step_0: step_0 did not complete"
    ground.run(job_of(ground, chain, 3))
    at = now(ground, chain)
    assert (at["status"], at["error_message"]) == ("failed", "step 0: Broken: it broke")


@pytest.mark.parametrize("stop", [True, False])
def test_a_missing_result_fails_its_step_clearly(ground: Ground, stop: bool) -> None:
    chain = made(ground, STEP, [using("step_0.rows"), STEP], STEP, stop_on_failure=stop)
    due = ground.run(job_of(ground, chain, 0), returned({"lines": []}))
    at = now(ground, chain)
    said = "step_0.rows: there is no 'rows' in the result step_0"
    assert (at["steps"][1]["status"], at["steps"][1]["error"]) == ("failed", said)
    if stop:
        assert (due, at["status"], at["error_message"]) == ([], "failed", f"step 1: {said}")
    else:
        assert (len(due), at["status"]) == (1, "running")
        ground.drain(lambda _: DONE)
        assert now(ground, chain)["status"] == "failed"


def test_results_that_are_too_large_together_fail_the_step(ground: Ground) -> None:
    parameters = {"a": {"$result": "step_0"}, "b": {"$result": "step_0"}}
    chain = made(ground, STEP, STEP | {"parameters": parameters})
    ground.run(job_of(ground, chain, 0), returned("x" * 200_000))
    assert "may be at most" in now(ground, chain)["error_message"]


def test_a_chain_is_checked_like_its_jobs_and_points_at_the_step(ground: Ground) -> None:
    with pytest.raises(UnknownJobType) as unknown:
        made(ground, STEP, [STEP, {"job_type": "t.unknown"}])
    assert [e.pointer for e in unknown.value.errors] == ["/chain_definition/1/1/job_type"]
    wrong = {"job_type": "t.count", "parameters": {"number": "many"}}
    with pytest.raises(InvalidParameters) as invalid:
        made(ground, {"parallel": [wrong]})
    assert [e.pointer for e in invalid.value.errors] == ["/chain_definition/0/parallel/0/parameters/number"]
    later = {"job_type": "t.count", "parameters": {"number": {"$result": "step_0"}}}
    assert made(ground, STEP, later)["status"] == "running"


def test_a_run_that_takes_too_long_is_stopped(ground: Ground, clock: FrozenClock) -> None:
    chain = made(ground, [STEP, STEP], STEP, timeout_seconds=60)
    [running] = ground.start(job_of(ground, chain, 0))
    clock.advance(seconds=59)
    ground.sweep()
    assert where(ground, chain) == ["running", "queued", None]
    clock.advance(seconds=1)
    ground.sweep()
    at = now(ground, chain)
    assert (at["status"], at["cancelling"], where(ground, chain)) == (
        "running",
        True,
        ["running", "cancelled", None],
    )
    assert job_row(ground.database, running.job_id)["cancel_requested_at"] is not None
    ground.end((running, DONE))
    at = now(ground, chain)
    assert (at["status"], at["cancelling"]) == ("timeout", False)
    assert at["error_message"] == "the run took longer than the chain's timeout"


def test_a_cancel_ends_what_waits_and_asks_what_runs(ground: Ground) -> None:
    chain = made(ground, [STEP, STEP], STEP)
    [running] = ground.start(job_of(ground, chain, 0))
    at = chains.cancel(ground.service, chain["id"], ALICE, reason="enough")
    assert (at["status"], at["cancelling"]) == ("running", True)
    assert where(ground, chain) == ["running", "cancelled", None]
    ground.end((running, DONE))
    at = now(ground, chain)
    assert (at["status"], at["error_message"], at["cancelling"]) == ("cancelled", "enough", False)
    with pytest.raises(Conflict):
        chains.cancel(ground.service, chain["id"], ALICE)


def test_a_cancel_of_what_waits_ends_the_run_at_once(ground: Ground) -> None:
    chain = made(ground, STEP, STEP)
    assert chains.cancel(ground.service, chain["id"], ALICE)["status"] == "cancelled"
    assert ground.lanes.contents("normal") == []


def test_a_cancel_that_broke_off_is_gone_on_with(ground: Ground) -> None:
    chain = made(ground, STEP, STEP)
    change(ground.database, models.chain_runs, now(ground, chain)["run_id"], stopping="cancelled")
    ground.sweep()
    assert now(ground, chain)["status"] == "cancelled"


def test_a_step_that_a_caller_cancels_is_a_step_that_failed(ground: Ground) -> None:
    chain = made(ground, STEP, STEP)
    ground.service.cancel(job_of(ground, chain, 0), ALICE)
    assert now(ground, chain)["status"] == "failed"


def test_runs_are_kept_and_one_is_active_at_a_time(ground: Ground, clock: FrozenClock) -> None:
    chain = made(ground, STEP, execute=False)
    assert (chain["status"], chain["run_id"], chain["total_steps"]) == ("pending", None, 1)
    first = chains.execute(ground.service, chain["id"], ALICE)
    with pytest.raises(Conflict):
        chains.execute(ground.service, chain["id"], ALICE)
    ground.run(job_of(ground, chain, 0), FAILS)
    clock.advance(seconds=1)
    second = chains.execute(ground.service, chain["id"], ALICE)
    assert first["run_id"] != second["run_id"]
    ground.run(job_of(ground, chain, 0), returned(2))
    runs, _ = chains.runs(ground.service, chain["id"], ALICE, limit=10, cursor=None)
    assert [(run["id"], run["status"]) for run in runs] == [
        (second["run_id"], "completed"),
        (first["run_id"], "failed"),
    ]
    seen = chains.get_run(ground.service, chain["id"], second["run_id"], ALICE)
    assert seen["results"] == {"step_0": 2}
    page, cursor = chains.runs(ground.service, chain["id"], ALICE, limit=1, cursor=None)
    rest, end = chains.runs(ground.service, chain["id"], ALICE, limit=1, cursor=cursor)
    assert ([page[0]["id"], rest[0]["id"]], end) == ([second["run_id"], first["run_id"]], None)


def test_a_chain_is_executed_once_however_many_ask_at_once(ground: Ground) -> None:
    chain = made(ground, STEP, execute=False)
    ask = partial(chains.execute, ground.service, chain["id"], ALICE)
    answers = at_once([ask] * 6)
    assert sum(isinstance(answer, Conflict) for answer in answers) == 5
    assert len(rows_of(ground.database, models.chain_runs)) == len(ground.queued()) == 1


def test_a_change_is_for_later_runs(ground: Ground) -> None:
    chain = made(ground, STEP, STEP)
    spec = ChainSpec.model_validate({"name": "d", "chain_definition": [STEP] * 3, "stop_on_failure": False})
    changed = chains.change(ground.service, chain["id"], ALICE, chains.check(ground.service, spec, ALICE))
    assert (changed["name"], len(changed["chain_definition"]), changed["total_steps"]) == ("d", 3, 2)
    ground.drain(lambda _: DONE)
    assert now(ground, chain)["status"] == "completed"
    assert chains.execute(ground.service, chain["id"], ALICE)["total_steps"] == 3


def test_a_chain_is_deleted_between_runs(ground: Ground) -> None:
    chain = made(ground, STEP)
    with pytest.raises(Conflict):
        chains.delete(ground.service, chain["id"], ALICE)
    job_id = job_of(ground, chain, 0)
    ground.run(job_id)
    chains.delete(ground.service, chain["id"], ALICE)
    with pytest.raises(ChainNotFound):
        now(ground, chain)
    assert rows_of(ground.database, models.chain_runs) == []
    assert status_of(ground.database, job_id) == "completed"


def test_nobody_sees_the_chains_of_another(ground: Ground) -> None:
    chain = made(ground, STEP)
    bob, stranger = (
        Caller(TENANT, "bob", Role.USER),
        Caller("0" * 8 + ALICE.tenant_id[8:], "alice", Role.ADMIN),
    )
    for caller in (bob, stranger):
        for ask in (
            partial(chains.get, ground.service, chain["id"], caller),
            partial(chains.cancel, ground.service, chain["id"], caller),
            partial(chains.execute, ground.service, chain["id"], caller),
            partial(chains.delete, ground.service, chain["id"], caller),
            partial(chains.runs, ground.service, chain["id"], caller, limit=5, cursor=None),
            partial(chains.get_run, ground.service, chain["id"], chain["run_id"], caller),
        ):
            with pytest.raises(ChainNotFound):
                ask()
        assert chains.page(ground.service, caller, limit=5, cursor=None) == ([], None)
    assert chains.get(ground.service, chain["id"], OLGA)["id"] == chain["id"]
    other = made(ground, STEP)
    with pytest.raises(ChainRunNotFound):
        chains.get_run(ground.service, chain["id"], other["run_id"], ALICE)


def test_lists_are_paged_newest_first(ground: Ground) -> None:
    ids = [made(ground, STEP)["id"] for _ in range(3)]
    page, cursor = chains.page(ground.service, ALICE, limit=2, cursor=None)
    rest, end = chains.page(ground.service, ALICE, limit=2, cursor=cursor)
    assert ([each["id"] for each in page + rest], end) == (ids[::-1], None)
    assert all(each["results"] == {} for each in page)


def test_answers_hold_only_so_much_of_the_results(ground: Ground) -> None:
    chain = made(ground, *[STEP] * 6)
    ground.drain(lambda _: returned("x" * 200_000))
    at = now(ground, chain)
    assert (list(at["results"]), at["results_truncated"]) == ([f"step_{n}" for n in range(5)], True)


def test_a_step_is_kept_while_its_run_goes_on_and_the_run_until_its_steps_are_gone(
    ground: Ground, clock: FrozenClock
) -> None:
    chain = made(ground, STEP, STEP)
    first = job_of(ground, chain, 0)
    ground.run(first, returned(1))
    keep = Retention.of_all_but_dead_letters(timedelta(days=1))
    later = NOW + timedelta(days=2)
    assert prune(ground.database, keep, now=later).jobs == 0
    with ground.database.write() as connection:
        assert delete_jobs(connection, [first]) == []
    ground.run(job_of(ground, chain, 1))
    pruned = prune(ground.database, keep, now=later)
    assert (pruned.jobs, pruned.groups) == (2, 1)
    assert now(ground, chain)["status"] == "pending"


def test_an_end_by_a_worker_of_an_older_release_is_followed_by_the_sweep(ground: Ground) -> None:
    chain = made(ground, STEP, STEP)
    columns = {"status": "completed", "finished_at": NOW, "progress": 100, "event_seq": 3, "result": 5}
    change(ground.database, models.jobs, job_of(ground, chain, 0), **columns)
    assert [f.name for f in examine(ground.database, now=NOW + timedelta(hours=1))].count("unfollowed_ends")
    assert ground.sweep() == [("normal", job_of(ground, chain, 1), TENANT)]


def test_the_doctor_finds_a_run_that_nobody_stopped(ground: Ground) -> None:
    made(ground, STEP, timeout_seconds=60)
    names = [f.name for f in examine(ground.database, now=NOW + timedelta(seconds=100))]
    assert "late_chains" not in names
    names = [f.name for f in examine(ground.database, now=NOW + timedelta(seconds=121))]
    assert "late_chains" in names


@pytest.mark.parametrize("how", ["completed", "failed", "cancelled"])
def test_exactly_one_event_tells_of_the_end(ground: Ground, how: str) -> None:
    add_endpoint(ground.database, "chain.*")
    chain = made(ground, STEP, [STEP, STEP])
    ground.run(job_of(ground, chain, 0))
    held = ground.start(job_of(ground, chain, 1), job_of(ground, chain, 2))
    if how == "cancelled":
        chains.cancel(ground.service, chain["id"], ALICE)
    ground.end((held[0], DONE))
    ground.end((held[1], FAILS if how == "failed" else DONE))
    [(event, data)] = ground.messages("chain.completed", "chain.failed")
    ended = "completed" if how == "cancelled" else how  # all its steps completed before they could stop
    assert (event, data["status"]) == (f"chain.{ended}", ended)
    assert (data["chain_id"], data["run_id"], data["total_steps"]) == (chain["id"], chain["run_id"], 3)


@pytest.mark.parametrize("seed", range(4))
def test_steps_that_end_at_the_same_moment_are_followed_once(database: Database, seed: int) -> None:
    ground = Ground(database, rng=Random(seed))
    add_endpoint(database, "chain.*")
    chain = made(ground, [STEP] * 5, STEP, stop_on_failure=bool(seed % 2))
    held = ground.start(*(job_of(ground, chain, number) for number in range(5)))
    fails = seed > 1
    ends: Sequence[tuple[Claimed, Ending]] = [
        (job, FAILS if fails and n == 2 else DONE) for n, job in enumerate(held)
    ]
    answers = at_once([partial(ground.end, each) for each in ends])
    assert not [answer for answer in answers if isinstance(answer, Exception)]
    while ground.unfollowed():
        ground.sweep()
    ground.drain(lambda _: DONE)
    at = now(ground, chain)
    assert at["status"] == ("failed" if fails else "completed")
    assert at["steps"][5]["status"] == (None if fails and seed % 2 else "completed")
    assert len(ground.messages("chain.completed", "chain.failed")) == 1


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(seed=st.integers(0, 2**32))
def test_any_chain_keeps_its_promises(database: Database, seed: int) -> None:
    rng = Random(seed)
    ground = Ground(database, rng=rng)
    if not rows_of(database, models.webhook_endpoints):
        add_endpoint(database, "chain.*")
    told_before = len(ground.messages("chain.completed", "chain.failed"))
    definition, stage_of = _any_definition(rng)
    stop = rng.random() < 0.5
    chain = made(ground, *definition, stop_on_failure=stop)
    steps: dict[str, int] = {}
    bad: set[int] = set()

    def how(job: Claimed) -> Ending:
        number = steps[job.job_id] = job_row(database, job.job_id)["chain_step"]
        if rng.random() < 0.2:
            bad.add(number)
            return FAILS
        return returned({"n": number})

    ground.drain(how)
    while ground.unfollowed():
        ground.sweep()
    at = now(ground, chain)
    ran = {(what, steps[job_id]): place for place, (what, job_id) in enumerate(ground.log)}
    for what, number in ran:
        if what == "start":
            for other, stage in stage_of.items():
                if stage < stage_of[number] and ("end", other) in ran:
                    assert ran["end", other] < ran["start", number]
                if stop and stage < stage_of[number]:
                    assert other not in bad
    for number, step in enumerate(at["steps"]):
        assert step["status"] is None or step["status"] in FINAL
        reference = definition_at(definition, number)["parameters"].get("given")
        if step["job_id"] and reference:
            before = int(reference["$result"].split(".")[0].removeprefix("step_"))
            assert job_row(database, step["job_id"])["parameters"] == {"given": before}
    complete = all(step["status"] == "completed" for step in at["steps"])
    assert at["status"] == ("completed" if complete else "failed")
    assert len(ground.messages("chain.completed", "chain.failed")) == told_before + 1


def _any_definition(rng: Random) -> tuple[list[Any], dict[int, int]]:
    definition: list[Any] = []
    stage_of: dict[int, int] = {}
    for stage in range(rng.randint(1, 4)):
        earlier = list(stage_of)
        group = []
        for _ in range(rng.choice((1, 1, 2, 3))):
            reference = {"given": {"$result": f"step_{rng.choice(earlier)}.n"}} if earlier else {}
            group.append(STEP | {"parameters": reference if rng.random() < 0.5 else {}})
            stage_of[len(stage_of)] = stage
        definition.append(group[0] if len(group) == 1 else rng.choice((group, {"parallel": group})))
    return definition, stage_of


def definition_at(definition: list[Any], number: int) -> dict[str, Any]:
    flat: list[dict[str, Any]] = []
    for item in definition:
        flat += item if isinstance(item, list) else item.get("parallel", [item])
    return flat[number]


def test_a_run_is_not_moved_while_another_has_it(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that somebody else holds at that moment is dropped by the sweep."""
    chain = made(ground, [STEP, STEP])
    held = job_of(ground, chain, 1)
    real = sa.Select.with_for_update

    def pass_over(query: Any, **how: Any) -> Any:
        locked = real(query, **how)
        return locked.where(chain_runs.j.id != held) if how.get("skip_locked") else locked

    with monkeypatch.context() as busy:
        busy.setattr(sa.Select, "with_for_update", pass_over)
        ground.run(job_of(ground, chain, 0), FAILS)
    assert where(ground, chain) == ["failed", "queued"]
    ground.sweep()
    assert (where(ground, chain), now(ground, chain)["status"]) == (["failed", "cancelled"], "failed")
