"""The feedback there is to read: evaluations, the students in them, and what was said to each.

It ships as `data/feedback.json`, is checked when first read, and never changes while the process runs.
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from laneway.errors import NotFound

Identity = Annotated[int, Field(ge=1)]
Line = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=100)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Comment(_Record):
    """What one person wrote to one student."""

    comment_id: Identity
    author: Literal["teacher", "peer"]
    text: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=2000)]


class StudentFeedback(_Record):
    """All that was written to one student in one evaluation, in the order it came in."""

    student_id: Identity
    name: Line
    comments: Annotated[tuple[Comment, ...], Field(min_length=1)]


class Evaluation(_Record):
    """One occasion on which a class gave feedback. `language` is BCP 47."""

    evaluation_id: Identity
    title: Line
    subject: Line
    course: Line
    teacher: Line
    language: Literal["en", "de"]
    students: Annotated[tuple[StudentFeedback, ...], Field(min_length=1)]


class Feedback(_Record):
    """The whole file. Ids are unique: evaluations and comments in all, students within an evaluation."""

    evaluations: tuple[Evaluation, ...]

    @model_validator(mode="after")
    def _ids_are_unique(self) -> Self:
        _refuse_twice("evaluation_id", [e.evaluation_id for e in self.evaluations])
        for evaluation in self.evaluations:
            _refuse_twice("student_id", [s.student_id for s in evaluation.students])
        _refuse_twice(
            "comment_id", [c.comment_id for e in self.evaluations for s in e.students for c in s.comments]
        )
        return self


def _refuse_twice(what: str, ids: list[int]) -> None:
    seen: set[int] = set()
    for number in ids:
        if number in seen:
            raise ValueError(f"{what} {number} is there twice")
        seen.add(number)


@cache
def _load() -> dict[int, Evaluation]:
    text = resources.files("feedback_summaries").joinpath("data/feedback.json").read_text(encoding="utf-8")
    return {e.evaluation_id: e for e in Feedback.model_validate_json(text).evaluations}


def evaluations() -> tuple[Evaluation, ...]:
    """Every evaluation, in the order of the file."""
    return tuple(_load().values())


def evaluation(evaluation_id: int) -> Evaluation:
    """The evaluation. Raises NotFound."""
    try:
        return _load()[evaluation_id]
    except KeyError:
        raise NotFound(f"There is no evaluation {evaluation_id}", evaluation_id=evaluation_id) from None


def student_ids(evaluation_id: int) -> tuple[int, ...]:
    """The students who were given feedback in the evaluation. Raises NotFound."""
    return tuple(student.student_id for student in evaluation(evaluation_id).students)


def comments(evaluation_id: int, student_id: int) -> tuple[Comment, ...]:
    """What was said to the student in the evaluation. Raises NotFound when either is unknown."""
    for student in evaluation(evaluation_id).students:
        if student.student_id == student_id:
            return student.comments
    raise NotFound(
        f"Student {student_id} was given no feedback in evaluation {evaluation_id}",
        evaluation_id=evaluation_id,
        student_id=student_id,
    )
