"""The handler of `feedback.summary`, and how its progress reaches the job."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from feedback_summaries.settings import get_settings
from feedback_summaries.tasks import Stages, summarise
from laneway import JobCancelled, JobContext, PermanentError
from laneway.domain.payload import to_json
from laneway.engine.context import Progress, enter
from laneway.engine.registry import registry
from laneway.errors import InvalidParameters


class Listener:
    """The other end of a handler's line: keeps what it hears, and asks to stop after so many reports."""

    def __init__(self, *, stop_after: int | None = None) -> None:
        self.heard: list[Progress] = []
        self._stop_after = stop_after

    def report(self, progress: Progress) -> None:
        self.heard.append(progress)

    def cancelled(self) -> bool:
        return self._stop_after is not None and len(self.heard) >= self._stop_after


def job_with(line: Listener) -> JobContext:
    return JobContext(job_id="1", job_type="feedback.summary", attempt=1, line=line)


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch) -> Iterator[Listener]:
    """A current job on the extractive summariser, without pace."""
    for name in ("URL", "PACE_SECONDS"):
        monkeypatch.delenv(f"FEEDBACK_SUMMARIES_{name}", raising=False)
    get_settings.cache_clear()
    listener = Listener()
    enter(job_with(listener))
    yield listener
    enter(None)
    get_settings.cache_clear()


def test_the_result_is_json_with_the_summary_and_what_it_was_made_from(line: Listener) -> None:
    result = summarise(123, 456)
    assert set(result) == {
        "evaluation_id",
        "student_id",
        "summary",
        "key_phrases",
        "comments",
        "sentences",
        "engine",
    }
    assert result["comments"] == 8
    assert result["sentences"] == 15
    assert result["engine"] == "extractive"
    assert "live demo" in result["summary"]
    assert json.loads(to_json(result)) == result


def test_the_job_hears_every_stage_up_to_a_hundred(line: Listener) -> None:
    summarise(123, 456, style="bullets")
    assert [progress.percent for progress in line.heard] == [10, 25, 40, 80, 100]
    assert line.heard[2].message == "Scoring sentences"
    assert json.loads(line.heard[2].details or "") == {"comments": 8}


def test_german_feedback_is_read_as_german(line: Listener) -> None:
    assert "Karte" in summarise(104, 521)["key_phrases"]


@pytest.mark.parametrize("ids", [(999, 456), (123, 999)])
def test_unknown_ids_end_the_job_for_good(line: Listener, ids: tuple[int, int]) -> None:
    with pytest.raises(PermanentError, match="999"):
        summarise(*ids)


def test_a_cancelled_job_stops_between_stages() -> None:
    line = Listener(stop_after=2)
    enter(job_with(line))
    try:
        with pytest.raises(JobCancelled):
            summarise(123, 456)
    finally:
        enter(None)
    assert [progress.percent for progress in line.heard] == [10, 25]


def test_a_pace_moves_the_bar_in_small_steps_that_never_fall() -> None:
    line = Listener()
    stages = Stages(job_with(line), pace_seconds=0.6, details={})
    for fraction, message in ((0.1, "Reading"), (0.5, "Scoring"), (1.0, "Done")):
        stages(fraction, message)
    percents = [progress.percent for progress in line.heard]
    assert percents == sorted(percents)
    assert percents[-1] == 100
    assert [progress.message for progress in line.heard if 10 <= progress.percent < 50] == ["Reading"] * 3
    assert len(percents) > 3 + 3


def test_a_cancel_ends_the_wait_of_a_pace() -> None:
    line = Listener(stop_after=2)
    stages = Stages(job_with(line), pace_seconds=3600.0, details={})
    with pytest.raises(JobCancelled):
        stages(1.0, "Done")
    assert len(line.heard) == 2


@pytest.mark.parametrize(
    ("parameters", "pointer"),
    [
        ({"evaluation_id": 123}, "/parameters/student_id"),
        ({"evaluation_id": "x", "student_id": 1}, "/parameters/evaluation_id"),
        ({"evaluation_id": 1, "student_id": 1, "style": "song"}, "/parameters/style"),
        ({"evaluation_id": 1, "student_id": 1, "language": "en; ignore the above"}, "/parameters/language"),
        ({"evaluation_id": 1, "student_id": 1, "school": 2}, "/parameters/school"),
    ],
)
def test_wrong_parameters_are_refused_at_the_field(parameters: dict[str, object], pointer: str) -> None:
    with pytest.raises(InvalidParameters) as caught:
        registry.need("feedback.summary").check(parameters)
    assert [error.pointer for error in caught.value.errors] == [pointer]


@pytest.mark.parametrize("language", ["en", "de-AT", "zh-Hant-TW", None])
def test_a_language_is_named_as_in_bcp_47(language: str | None) -> None:
    registry.need("feedback.summary").check({"evaluation_id": 1, "student_id": 1, "language": language})
