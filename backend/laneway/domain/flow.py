"""Chains and what may start next: pure rules.

A chain's steps are numbered as they are written, from 0. Its stages follow each other; the steps of one
stage run side by side. A sequence has a stage for each step, or for each group of steps that is written as
a list or as `{"parallel": […]}`; a parallel chain is one stage.

A step's parameters may hold `{"$result": "step_0.path"}` wherever a value may stand: when the step falls
due, it is replaced by what step 0 returned, or by what is found in that under `path` (keys and, for lists,
numbers, with dots in between). Only a step of an earlier stage can be named, so no chain waits for itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from laneway.domain.spec import MAX_SECONDS, JobSpec
from laneway.domain.states import FINAL, JobStatus

MAX_STEPS = 100
REFERENCE = "$result"

_NOT_IN_A_STEP = (
    *("depends_on", "scheduled_for", "expires_at", "unique_key", "on_conflict"),
    "debounce_seconds",
)
_REFERENCE = re.compile(r"([a-z]+(?:_\d{1,9})?)((?:\.[^.]+)*)")
_BEFORE_ITS_FIRST_RUN = frozenset({JobStatus.SCHEDULED, JobStatus.BLOCKED, JobStatus.QUEUED})

Stages = Sequence[Sequence[int]]


class ExecutionMode(StrEnum):
    """Whether the steps of a chain run one after the other or all at once."""

    SEQUENTIAL = "sequential"
    PARALLEL = "parallel"


class StepSpec(JobSpec):
    """A step: a job that is made when its turn comes. It waits for its chain alone."""

    @model_validator(mode="after")
    def _is_a_step(self) -> Self:
        if said := self.model_fields_set.intersection(_NOT_IN_A_STEP):
            raise ValueError(f"a step has no {sorted(said)[0]}")
        if self.target is not None and self.target.headers:
            raise ValueError("the target of a step has no headers: they may be secret, and a chain is shown")
        return self

    @property
    def referring(self) -> Any:
        """What of it may hold references to results."""
        return self.parameters if self.target is None else self.target.body


class GroupSpec(BaseModel):
    """Steps that run side by side."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    parallel: Annotated[tuple[StepSpec, ...], Field(min_length=1, max_length=MAX_STEPS)]


Item = StepSpec | GroupSpec | Annotated[tuple[StepSpec, ...], Field(min_length=1, max_length=MAX_STEPS)]


class ChainSpec(BaseModel):
    """A chain as its caller describes it. Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(min_length=1, max_length=200)]
    execution_mode: ExecutionMode = ExecutionMode.SEQUENTIAL
    chain_definition: Annotated[tuple[Item, ...], Field(min_length=1, max_length=MAX_STEPS)] = Field(
        description='Steps. In a sequence, a list or `{"parallel": […]}` is a group that runs side by side.'
    )
    stop_on_failure: bool = Field(True, description="Start nothing more once a step has not completed.")
    timeout_seconds: Annotated[int, Field(ge=1, le=MAX_SECONDS)] | None = Field(
        None, description="Of the whole run: what is left of it then is cancelled."
    )

    @model_validator(mode="after")
    def _is_a_chain(self) -> Self:
        if len(self.steps) > MAX_STEPS:
            raise ValueError(f"a chain has at most {MAX_STEPS} steps, and this has {len(self.steps)}")
        if self.execution_mode is ExecutionMode.PARALLEL and len(self.steps) > len(self.chain_definition):
            raise ValueError("the steps of a parallel chain run side by side already; write no groups in it")
        for stage in self.stages:
            for step in stage:
                for reference in references(self.steps[step].referring):
                    self._check(step, stage[0], reference)
        return self

    def _check(self, step: int, first: int, reference: str) -> None:
        root, _ = read_reference(reference)
        name, _, number = root.partition("_")
        if name != "step" or not number:
            raise ValueError(f"step {step}: {reference!r} is no reference; write step_0 or step_0.path")
        if int(number) >= first:
            raise ValueError(f"step {step}: {root} does not end before step {step} starts")

    @property
    def steps(self) -> tuple[StepSpec, ...]:
        return tuple(step for _, step in self.placed_steps())

    def placed_steps(self) -> Iterator[tuple[str, StepSpec]]:
        """Each step, in the order of their numbers, and the JSON Pointer to it."""
        for place, item in enumerate(self.chain_definition):
            pointer = f"/chain_definition/{place}"
            match item:
                case StepSpec():
                    yield pointer, item
                case GroupSpec():
                    for number, step in enumerate(item.parallel):
                        yield f"{pointer}/parallel/{number}", step
                case _:
                    for number, step in enumerate(item):
                        yield f"{pointer}/{number}", step

    @property
    def stages(self) -> tuple[tuple[int, ...], ...]:
        if self.execution_mode is ExecutionMode.PARALLEL:
            return (tuple(range(len(self.steps))),)
        stages: list[tuple[int, ...]] = []
        first = 0
        for item in self.chain_definition:
            match item:
                case StepSpec():
                    size = 1
                case GroupSpec():
                    size = len(item.parallel)
                case _:
                    size = len(item)
            stages.append(tuple(range(first, first + size)))
            first += size
        return tuple(stages)


# What comes next


@dataclass(frozen=True, slots=True)
class Turn:
    """What a run does now. `start`: steps whose turn it is. `drop`: steps that wait and shall not run.

    `ended`: nothing is active and nothing will be; `complete` when each step completed.
    """

    start: tuple[int, ...] = ()
    drop: tuple[int, ...] = ()
    ended: bool = False
    complete: bool = False


def turn(
    stages: Stages, states: Mapping[int, JobStatus], *, stop_on_failure: bool, stopping: bool = False
) -> Turn:
    """What comes next in a run whose steps are where `states` says; those not in it were not started.

    `stopping`: somebody wants the run to end. A step that has begun goes on to its end all the same, with
    its retries: whoever stops a run asks running jobs by themselves.
    """
    for stage in stages:
        if any(step not in states for step in stage):
            return Turn(ended=True) if stopping else Turn(start=tuple(stage))
        failed = any(states[step] in FINAL and states[step] is not JobStatus.COMPLETED for step in stage)
        halting = stopping or (failed and stop_on_failure)
        if any(states[step] not in FINAL for step in stage):
            waiting = (step for step in stage if states[step] in _BEFORE_ITS_FIRST_RUN)
            return Turn(drop=tuple(waiting) if halting else ())
        if failed and stop_on_failure:
            return Turn(ended=True)
    return Turn(ended=True, complete=set(states.values()) == {JobStatus.COMPLETED})


# Results of one step as parameters of another


class ResultMissing(Exception):
    """A reference names what is not there; the message says what."""


def is_reference(value: object) -> bool:
    return isinstance(value, dict) and len(value) == 1 and isinstance(value.get(REFERENCE), str)


def references(value: object) -> Iterator[str]:
    """Every reference in `value`, as it is written."""
    if isinstance(value, dict):
        if is_reference(value):
            yield value[REFERENCE]
        else:
            for item in value.values():
                yield from references(item)
    elif isinstance(value, list):
        for item in value:
            yield from references(item)


def read_reference(reference: str) -> tuple[str, tuple[str, ...]]:
    """`step_0.rows.1` as `("step_0", ("rows", "1"))`. Raises ValueError for what is no reference."""
    found = _REFERENCE.fullmatch(reference) if len(reference) <= 500 else None
    if found is None:
        raise ValueError(f"{reference[:100]!r} is no reference; write step_0 or step_0.path")
    return found[1], tuple(found[2].split(".")[1:])


def resolve(value: Any, results: Mapping[str, Any]) -> Any:
    """`value` with each reference replaced by what it names in `results`. Raises ResultMissing."""
    if isinstance(value, dict):
        if is_reference(value):
            return _look_up(value[REFERENCE], results)
        return {key: resolve(item, results) for key, item in value.items()}
    if isinstance(value, list):
        return [resolve(item, results) for item in value]
    return value


def _look_up(reference: str, results: Mapping[str, Any]) -> Any:
    root, path = read_reference(reference)
    if root not in results:
        raise ResultMissing(f"{reference}: {root} did not complete")
    value = results[root]
    for place, part in enumerate(path):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isascii() and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            where = ".".join((root, *path[:place]))
            raise ResultMissing(f"{reference}: there is no {part!r} in the result {where}")
    return value
