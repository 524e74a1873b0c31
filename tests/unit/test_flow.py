"""The rules of chains: what may be written, what starts next, which result goes where."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from laneway.domain.flow import MAX_STEPS, ChainSpec, ResultMissing, Turn, references, resolve, turn
from laneway.domain.states import ACTIVE, FINAL, JobStatus

S = JobStatus
A: dict[str, Any] = {"job_type": "t.a"}


def chain(*definition: Any, **fields: Any) -> ChainSpec:
    return ChainSpec.model_validate({"name": "c", "chain_definition": definition} | fields)


def after(reference: str) -> dict[str, Any]:
    return A | {"parameters": {"x": [{"deep": {"$result": reference}}]}}


def test_steps_are_numbered_as_they_are_written() -> None:
    spec = chain(A, [A, A], {"parallel": [A, A, A]}, A)
    assert spec.stages == ((0,), (1, 2), (3, 4, 5), (6,))
    assert [pointer for pointer, _ in spec.placed_steps()] == [
        "/chain_definition/0",
        "/chain_definition/1/0",
        "/chain_definition/1/1",
        "/chain_definition/2/parallel/0",
        "/chain_definition/2/parallel/1",
        "/chain_definition/2/parallel/2",
        "/chain_definition/3",
    ]
    assert chain(A, A, execution_mode="parallel").stages == ((0, 1),)


def test_a_chain_has_as_many_steps_as_the_limit_says_and_no_more() -> None:
    assert len(chain(*[A] * (MAX_STEPS - 2), [A, A]).steps) == MAX_STEPS
    for definition in ([A] * (MAX_STEPS + 1), [*[A] * (MAX_STEPS - 1), [A, A]], [[A] * (MAX_STEPS + 1)]):
        with pytest.raises(ValidationError):
            chain(*definition)


@pytest.mark.parametrize(
    "definition",
    [
        [],
        [[]],
        [{"parallel": []}],
        [[[A]]],
        [{"parallel": [{"parallel": [A]}]}],
        [A | {"depends_on": ["01980000-0000-7000-8000-00000000000a"]}],
        [A | {"unique_key": "k"}],
        [A | {"scheduled_for": "2026-01-01T00:00:00Z"}],
        [A | {"expires_at": "2026-01-01T00:00:00Z"}],
        [A | {"what": 1}],
        ["t.a"],
        [after("step_0")],
        [A, after("step_1")],
        [A, after("step_2"), A],
        [A, [A, after("step_1")]],
        [A, after("stop_0")],
        [A, after("step_0.")],
        [A, after("step_0..x")],
        [A, after("step_x")],
        [A, after("step")],
        [A, after("")],
        [A, after("step_0" + ".x" * 300)],
    ],
)
def test_what_is_no_chain_is_refused(definition: list[Any]) -> None:
    with pytest.raises(ValidationError):
        chain(*definition)


def test_groups_are_for_sequences() -> None:
    with pytest.raises(ValidationError, match="no groups"):
        chain([A, A], execution_mode="parallel")


def test_a_step_may_refer_to_any_stage_before_its_own() -> None:
    assert chain(A, [A, after("step_0.a.0")], after("step_2"), after("step_0")).stages


# What comes next

SEQUENCE = ((0,), (1, 2), (3,))


def states(text: str) -> dict[int, JobStatus]:
    """A status for each step by its first letter, `-` for one that was not started, `t` for timeout."""
    letters = {status.value[0]: status for status in (S.QUEUED, S.RUNNING, S.COMPLETED, S.FAILED, S.TIMEOUT)}
    return {number: letters[letter] for number, letter in enumerate(text) if letter != "-"}


@pytest.mark.parametrize(
    ("where", "stop", "stopping", "expected"),
    [
        ("----", True, False, Turn(start=(0,))),
        ("q---", True, False, Turn()),
        ("r---", True, False, Turn()),
        ("c---", True, False, Turn(start=(1, 2))),
        ("ccr-", True, False, Turn()),
        ("ccc-", True, False, Turn(start=(3,))),
        ("cccc", True, False, Turn(ended=True, complete=True)),
        ("f---", True, False, Turn(ended=True)),
        ("f---", False, False, Turn(start=(1, 2))),
        ("cfr-", True, False, Turn()),
        ("cfq-", True, False, Turn(drop=(2,))),
        ("cfq-", False, False, Turn()),
        ("cfc-", True, False, Turn(ended=True)),
        ("ctc-", False, False, Turn(start=(3,))),
        ("cfcc", False, False, Turn(ended=True)),
        ("----", True, True, Turn(ended=True)),
        ("q---", True, True, Turn(drop=(0,))),
        ("r---", True, True, Turn()),
        ("c---", True, True, Turn(ended=True)),
        ("cccc", True, True, Turn(ended=True, complete=True)),
    ],
)
def test_what_comes_next(where: str, stop: bool, stopping: bool, expected: Turn) -> None:
    assert turn(SEQUENCE, states(where), stop_on_failure=stop, stopping=stopping) == expected


@settings(max_examples=300, derandomize=True)
@given(seed=st.integers(0, 2**32))
def test_a_run_that_is_followed_ends_once_and_in_order(seed: int) -> None:
    rng = Random(seed)
    sizes = [rng.randint(1, 3) for _ in range(rng.randint(1, 5))]
    numbers = iter(range(sum(sizes)))
    stages = [[next(numbers) for _ in range(size)] for size in sizes]
    stage_of = {step: number for number, stage in enumerate(stages) for step in stage}
    stop = rng.random() < 0.5
    where: dict[int, JobStatus] = {}
    while not (next_ := turn(stages, where, stop_on_failure=stop)).ended:
        failed = [step for step, state in where.items() if state in FINAL - {S.COMPLETED}]
        for step in next_.start:
            assert all(where[before] in FINAL for before in stage_of if stage_of[before] < stage_of[step])
            assert not (stop and failed)
            where[step] = S.QUEUED
        for step in next_.drop:
            assert stop
            assert failed
            where[step] = S.CANCELLED
        active = [step for step, state in where.items() if state in ACTIVE]
        if active:
            where[rng.choice(active)] = rng.choice([S.RUNNING, S.COMPLETED, S.COMPLETED, S.FAILED])
    assert not ACTIVE.intersection(where.values())
    assert next_.complete == (len(where) == len(stage_of) and set(where.values()) == {S.COMPLETED})


# Results


def test_results_arrive_where_they_are_referred_to() -> None:
    results = {"step_0": {"rows": [{"id": 7}], "n": None}, "step_1": [1, 2]}
    asked = {
        "whole": {"$result": "step_1"},
        "in": [{"id": {"$result": "step_0.rows.0.id"}}, {"$result": "step_1.1"}],
        "none": {"$result": "step_0.n"},
        "as it is": {"$result": 5, "x": {"$results": "step_0"}},
    }
    assert list(references(asked)) == ["step_1", "step_0.rows.0.id", "step_1.1", "step_0.n"]
    assert resolve(asked, results) == {
        "whole": [1, 2],
        "in": [{"id": 7}, 2],
        "none": None,
        "as it is": {"$result": 5, "x": {"$results": "step_0"}},
    }


@pytest.mark.parametrize(
    ("reference", "why"),
    [
        ("step_2", "step_2 did not complete"),
        ("step_0.x", "there is no 'x' in the result step_0"),
        ("step_0.rows.1", "there is no '1' in the result step_0.rows"),
        ("step_0.rows.-1", "there is no '-1' in the result step_0.rows"),
        ("step_0.rows.²", "there is no"),
        ("step_0.rows.0.id.x", "there is no 'x' in the result step_0.rows.0.id"),
    ],
)
def test_what_is_missing_is_said(reference: str, why: str) -> None:
    with pytest.raises(ResultMissing, match=why):
        resolve({"x": {"$result": reference}}, {"step_0": {"rows": [{"id": 7}]}})
