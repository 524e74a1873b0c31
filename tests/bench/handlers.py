"""Laneway's job types of the benchmark. RQ runs `records.record` itself."""

from __future__ import annotations

import threading

from bench.records import record
from laneway.engine.context import JobContext
from laneway.engine.registry import register_job_function
from laneway.sdk.decorators import background_job


@background_job("bench.record")
def noop(number: int) -> None:
    record(number)


register_job_function("bench.record_forked", record, isolation="fork")


@background_job("bench.hold")
def hold(number: int, job: JobContext) -> None:
    """Runs until it is killed; the next attempt ends at once."""
    record(number)
    if job.attempt == 1:
        threading.Event().wait()
