"""What a handler can say and see."""

from __future__ import annotations

import contextvars
import json
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from laneway.engine.context import (
    MAX_DETAILS_BYTES,
    MAX_MESSAGE,
    JobContext,
    Progress,
    current_job,
    enter,
)
from laneway.errors import InvalidPayload, JobCancelled, PayloadTooLarge


class Paper:
    """A line that keeps what was said."""

    def __init__(self) -> None:
        self.said: list[Progress] = []
        self.stop = False

    def report(self, progress: Progress) -> None:
        self.said.append(progress)

    def cancelled(self) -> bool:
        return self.stop


@pytest.fixture
def line() -> Paper:
    return Paper()


@pytest.fixture
def job(line: Paper) -> JobContext:
    return JobContext(job_id="j", job_type="demo.echo", attempt=2, line=line)


def test_progress_is_said_with_message_and_details(job: JobContext, line: Paper) -> None:
    job.progress(40, "Rendering", details={"page": 3})
    job.progress(41.9)
    assert line.said == [Progress(40, "Rendering", '{"page":3}'), Progress(41)]


def test_progress_never_falls(job: JobContext, line: Paper) -> None:
    for percent in (0, 50, 20, 50, 100, 0):
        job.progress(percent)
    assert [said.percent for said in line.said] == [0, 50, 50, 50, 100, 100]


@pytest.mark.parametrize("percent", [0, 100, 0.0, 100.0])
def test_progress_is_taken_at_its_limits(job: JobContext, line: Paper, percent: float) -> None:
    job.progress(percent)
    assert line.said == [Progress(int(percent))]


@pytest.mark.parametrize("percent", [-0.001, 100.001, -1, 101, math.inf, math.nan])
def test_progress_past_its_limits_is_refused_and_not_said(
    job: JobContext, line: Paper, percent: float
) -> None:
    with pytest.raises(ValueError, match="0 to 100"):
        job.progress(percent)
    assert line.said == []


def test_a_message_is_kept_to_its_limit_and_cut_one_past_it(job: JobContext, line: Paper) -> None:
    assert MAX_MESSAGE == 500
    job.progress(1, "m" * 500)
    job.progress(2, "m" * 501)
    assert [said.message for said in line.said] == ["m" * 500] * 2


@example("a\ud800\0")
@given(st.text())
def test_any_message_can_be_stored(message: str) -> None:
    line = Paper()
    JobContext(job_id="j", job_type="t", attempt=1, line=line).progress(1, message)
    kept = line.said[0].message
    assert kept is not None
    assert "\0" not in kept
    kept.encode()
    if message.isascii() and "\0" not in message:
        assert kept == message[:MAX_MESSAGE]


def test_details_are_taken_at_their_limit_and_refused_one_past_it(job: JobContext, line: Paper) -> None:
    assert MAX_DETAILS_BYTES == 8 * 1024
    fits = {"a": "x" * (MAX_DETAILS_BYTES - len('{"a":""}'))}
    job.progress(1, details=fits)
    assert json.loads(line.said[0].details or "") == fits
    with pytest.raises(PayloadTooLarge):
        job.progress(2, details={"a": fits["a"] + "x"})
    with pytest.raises(InvalidPayload):
        job.progress(2, details={"a": {1, 2}})
    assert len(line.said) == 1


@pytest.mark.parametrize("hundredth", range(101))
def test_a_callback_that_counts_from_nought_to_one_shows_the_percentage_that_was_meant(
    job: JobContext, line: Paper, hundredth: int
) -> None:
    job.progress_callback(hundredth / 100, "m", {"k": 1})
    assert line.said == [Progress(hundredth, "m", '{"k":1}')]


def test_a_wish_to_stop_is_seen_and_raised(job: JobContext, line: Paper) -> None:
    assert not job.cancelled
    job.check_cancelled()
    line.stop = True
    assert job.cancelled
    with pytest.raises(JobCancelled):
        job.check_cancelled()


def test_an_except_for_exception_does_not_swallow_the_stop() -> None:
    assert not issubclass(JobCancelled, Exception)


def test_the_current_job_is_that_of_its_own_context(job: JobContext) -> None:
    def inside() -> JobContext:
        enter(job)
        return current_job()

    assert contextvars.copy_context().run(inside) is job
    with pytest.raises(RuntimeError, match="outside of a job"):
        current_job()


def test_a_job_that_ended_is_current_no_more(job: JobContext) -> None:
    def inside() -> None:
        enter(job)
        enter(None)
        with pytest.raises(RuntimeError):
            current_job()

    contextvars.copy_context().run(inside)
