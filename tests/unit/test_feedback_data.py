"""The feedback that ships with the example."""

from __future__ import annotations

import json
import re
from importlib import resources

import pytest
from pydantic import ValidationError

from feedback_summaries import store
from feedback_summaries.language import sentences, words
from feedback_summaries.store import Comment, Evaluation, Feedback
from laneway.errors import NotFound

FILE = resources.files("feedback_summaries").joinpath("data/feedback.json")
ALL: list[tuple[Evaluation, int, Comment]] = [
    (evaluation, student.student_id, comment)
    for evaluation in store.evaluations()
    for student in evaluation.students
    for comment in student.comments
]


def test_there_are_enough_evaluations_students_and_comments() -> None:
    assert len(store.evaluations()) >= 6
    assert len({evaluation.teacher for evaluation in store.evaluations()}) >= 6
    assert {evaluation.language for evaluation in store.evaluations()} == {"en", "de"}
    assert len(ALL) >= 600
    for evaluation in store.evaluations():
        assert len(evaluation.students) >= 12, evaluation.title
        for student in evaluation.students:
            assert 4 <= len(student.comments) <= 8, student.name
            assert {comment.author for comment in student.comments} == {"teacher", "peer"}, student.name


def test_the_file_stays_small() -> None:
    assert len(FILE.read_bytes()) < 600_000


def test_no_text_is_there_twice_not_even_with_another_name() -> None:
    seen: dict[str, str] = {}
    for _, student_id, comment in ALL:
        bare = " ".join(words(re.sub(r"\b[A-Z]\w+", "", comment.text))).casefold()
        assert bare not in seen, f"{comment.text!r} to {student_id} is {seen[bare]!r} again"
        seen[bare] = comment.text


def test_hardly_a_sentence_is_there_twice() -> None:
    told = [
        s.casefold() for e, _, c in ALL for s in sentences(c.text, language=e.language) if len(s.split()) > 4
    ]
    assert sorted({s for s in told if told.count(s) > 1}) == []


def test_comments_have_one_to_four_sentences() -> None:
    counts = {c.comment_id: len(sentences(c.text, language=e.language)) for e, _, c in ALL}
    assert {number: count for number, count in counts.items() if not 1 <= count <= 4} == {}


def test_a_student_has_one_name_in_all_evaluations() -> None:
    names: dict[int, set[str]] = {}
    for evaluation in store.evaluations():
        for student in evaluation.students:
            names.setdefault(student.student_id, set()).add(student.name)
    assert {number: found for number, found in names.items() if len(found) > 1} == {}


def test_the_comments_of_a_student_are_found_by_ids() -> None:
    comments = store.comments(123, 456)
    assert "live demo" in comments[0].text
    assert 456 in store.student_ids(123)
    assert store.evaluation(123).course == "12A"


def test_an_unknown_evaluation_is_named_in_the_error() -> None:
    for ask in (
        lambda: store.evaluation(999),
        lambda: store.student_ids(999),
        lambda: store.comments(999, 456),
    ):
        with pytest.raises(NotFound, match="There is no evaluation 999") as caught:
            ask()
        assert caught.value.facts == {"evaluation_id": 999}


def test_an_unknown_student_is_named_in_the_error() -> None:
    with pytest.raises(NotFound, match="Student 301 was given no feedback in evaluation 123") as caught:
        store.comments(123, 301)
    assert caught.value.facts == {"evaluation_id": 123, "student_id": 301}


def _small() -> dict[str, object]:
    comment = {"comment_id": 1, "author": "peer", "text": "Good."}
    student = {"student_id": 7, "name": "A B", "comments": [comment, {**comment, "comment_id": 2}]}
    evaluation = {
        "evaluation_id": 1,
        "title": "T",
        "subject": "S",
        "course": "C",
        "teacher": "M",
        "language": "en",
    }
    return {"evaluations": [{**evaluation, "students": [student]}]}


def test_a_well_formed_file_is_taken() -> None:
    assert Feedback.model_validate(_small()).evaluations[0].students[0].student_id == 7


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('"comment_id": 2', '"comment_id": 1', "comment_id 1 is there twice"),
        ('"comment_id": 2', '"comment_id": 0', "greater than or equal to 1"),
        ('"text": "Good."', '"text": "  "', "at least 1 character"),
        ('"author": "peer"', '"author": "robot"', "'teacher' or 'peer'"),
        ('"language": "en"', '"language": "xx"', "'en' or 'de'"),
        ('"name": "A B"', '"name": "A B", "age": 3', "Extra inputs"),
    ],
)
def test_a_bent_file_is_refused_with_the_reason(old: str, new: str, complaint: str) -> None:
    text = json.dumps(_small())
    assert old in text
    with pytest.raises(ValidationError, match=complaint):
        Feedback.model_validate_json(text.replace(old, new, 1))


@pytest.mark.parametrize("what", ["evaluation_id", "student_id"])
def test_an_id_that_is_there_twice_is_refused(what: str) -> None:
    data = json.loads(json.dumps(_small()))
    twice = data["evaluations"] if what == "evaluation_id" else data["evaluations"][0]["students"]
    twice.append(twice[0])
    with pytest.raises(ValidationError, match=f"{what} .* is there twice"):
        Feedback.model_validate(data)
