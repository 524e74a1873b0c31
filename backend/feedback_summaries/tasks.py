"""The job type `feedback.summary`: reads a student's feedback and leaves a summary as its result."""

from __future__ import annotations

from dataclasses import asdict
from math import ceil
from threading import Event
from typing import Annotated, Any

from pydantic import Field

from feedback_summaries import store
from feedback_summaries.settings import get_settings
from feedback_summaries.summariser import Style, summariser_for
from laneway import JobContext, PermanentError, background_job, current_job
from laneway.errors import NotFound

Language = Annotated[str, Field(pattern=r"^[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8})*$", max_length=35)]

STEP_SECONDS = 0.2  # between two looks for a cancel while pacing


@background_job("feedback.summary", queue="default", timeout_seconds=120)
def summarise(
    evaluation_id: int, student_id: int, language: Language | None = None, style: Style = "paragraph"
) -> dict[str, Any]:
    """What the student was told in the evaluation, in three or four sentences.

    `language` (BCP 47) is the evaluation's own unless given. The result holds `evaluation_id`,
    `student_id`, `summary`, `key_phrases` (up to five), how many `comments` and `sentences` were read,
    the `engine` that wrote it, and `tokens` {prompt, completion} where a model counted them. An unknown
    evaluation or student is a PermanentError.
    """
    try:
        evaluation = store.evaluation(evaluation_id)
        comments = store.comments(evaluation_id, student_id)
    except NotFound as error:
        raise PermanentError(str(error)) from None
    settings = get_settings()
    stages = Stages(current_job(), pace_seconds=settings.pace_seconds, details={"comments": len(comments)})
    summary = summariser_for(settings).summarise(
        [comment.text for comment in comments],
        language=language or evaluation.language,
        style=style,
        progress=stages,
    )
    result = {
        "evaluation_id": evaluation_id,
        "student_id": student_id,
        "summary": summary.text,
        "key_phrases": list(summary.key_phrases),
        "comments": len(comments),
        "sentences": summary.sentences_read,
        "engine": summary.engine,
    }
    if summary.tokens:
        result["tokens"] = asdict(summary.tokens)
    return result


class Stages:
    """Passes a summariser's progress on to the job, stops it when the job is cancelled, and may slow it down.

    With `pace_seconds`, the way from 0 to 1 takes at least so long: each stage is stretched by its share, in
    small steps that move the bar and look for a cancel.
    """

    def __init__(self, job: JobContext, *, pace_seconds: float, details: dict[str, Any]) -> None:
        self._job = job
        self._pace = pace_seconds
        self._details = details
        self._fraction = 0.0
        self._message = "Starting"

    def __call__(self, fraction: float, message: str) -> None:
        share = fraction - self._fraction
        steps = ceil(share * self._pace / STEP_SECONDS)
        for step in range(1, steps + 1):
            self._report(self._fraction + share * (step - 1) / steps, self._message)
            Event().wait(share * self._pace / steps)
        self._report(fraction, message)
        self._fraction, self._message = fraction, message

    def _report(self, fraction: float, message: str) -> None:
        self._job.check_cancelled()
        self._job.progress(round(100 * fraction), message, details=self._details)
