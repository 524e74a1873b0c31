"""Job types of the Python API's tests: known to the test's process and to the workers it starts."""

from __future__ import annotations

import os
import threading
import time
from datetime import UTC, datetime
from typing import Any

from laneway import (
    JobContext,
    PermanentError,
    Retry,
    background_job,
    current_job,
    job_chain,
    retry_on_failure,
)

_never = threading.Event()


@background_job("sdk.add", priority="high")
def add(a: int, b: int = 2) -> dict[str, Any]:
    """The sum, and which job made it."""
    return {"sum": a + b, "job_id": current_job().id}


@background_job("sdk.double")
async def double(job: JobContext, value: int) -> dict[str, Any]:
    job.progress(40, "Doubling", details={"value": value})
    return {"double": 2 * value, "job_id": job.id}


@background_job("sdk.fail", max_retries=1, retry_delay_seconds=0, retry_jitter=False)
def fail(how: str) -> str:
    job = current_job()
    match how:
        case "permanent":
            raise PermanentError("no such account")
        case "once" if job.attempt == 1:
            raise Retry(in_seconds=0)
        case "value":
            raise ValueError(f"attempt {job.attempt}")
    return f"attempt {job.attempt}"


@background_job("sdk.wait_for_cancel", timeout_seconds=60)
def wait_for_cancel(progress_callback: Any) -> None:
    """Goes on until it is cancelled."""
    progress_callback(0.29, "Waiting")
    while True:
        current_job().check_cancelled()
        _never.wait(0.02)


@background_job("sdk.overtime", timeout_seconds=1, max_retries=0)
def overtime() -> None:
    """Outstays its timeout."""
    while True:
        _never.wait(0.02)


@background_job("sdk.parent")
def parent(value: int) -> dict[str, Any]:
    """Enqueues a job, and calls one: the one is a row of its own, the other a part of this job."""
    return {"child": add.delay(value), "called": add(value), "self": current_job().id}


@background_job("sdk.age")
def age(born_at: datetime) -> int:
    """Whole years until 2026."""
    return int((datetime(2026, 1, 1, tzinfo=UTC) - born_at).days // 365.25)


@background_job("sdk.once", unique_key="once-{key}", queue="parked", tags=("one", "two"))
def once(key: str) -> str:
    return key


_calls: dict[str, int] = {}


@background_job("sdk.one_at_a_time", concurrency_key="shop-{shop}", concurrency_limit=1)
def one_at_a_time(shop: int) -> list[float]:
    """From when to when it ran, on the clock that all processes share."""
    began = time.monotonic()
    threading.Event().wait(0.02)
    return [began, time.monotonic()]


@background_job("sdk.alone", isolation="fork")
def alone() -> int:
    """The process that ran it."""
    return os.getpid()


@background_job("sdk.shaky")
@retry_on_failure(max_retries=3, retry_delay_seconds=0, retry_on=(ConnectionError,))
def shaky(name: str) -> int:
    """Works at the third call, within one attempt."""
    _calls[name] = _calls.get(name, 0) + 1
    if _calls[name] < 3:
        raise ConnectionError
    return _calls[name]


@job_chain(name="sums", stop_on_failure=True)
def sums(start: int) -> list[dict[str, Any]]:
    return [
        {"job_type": "sdk.add", "parameters": {"a": start, "b": 1}},
        {"job_type": "sdk.add", "parameters": {"a": {"$result": "step_0.sum"}, "b": 10}},
    ]
