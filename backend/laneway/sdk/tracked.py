"""A direct call of a job's function: it runs in the caller's thread or event loop, and leaves a row behind.

The row is running from the moment the call begins, held by a worker row of this call's own, and settled
before the call returns or raises. Such a call is not tried again, and its time is the caller's own:
`timeout_seconds` does not cut it. When the process dies under it, a worker runs the job anew, as it does
for any job whose worker died. With LANEWAY_BACKEND=http a worker of the server runs it, and the call waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from laneway.domain.payload import to_json
from laneway.domain.states import JobStatus
from laneway.engine.context import entered
from laneway.engine.endings import Cancelled, Ending, Raised, Returned
from laneway.engine.registry import JobType
from laneway.engine.running import ending_of, injections
from laneway.errors import JobCancelled, LanewayError
from laneway.log import get_logger
from laneway.sdk.backend import Held, current_backend, jsonable

__all__ = ["JobFailed", "injections", "run", "run_async"]

log = get_logger("sdk")


class JobFailed(LanewayError):
    """A job that somebody waited for ended without a result. `facts` has its id, status and error."""

    code, title = "job_failed", "The job ended without a result"


def run(job_type: JobType, arguments: Mapping[str, Any]) -> Any:
    """What the function returns; raises what it raises."""
    parameters = jsonable(arguments)
    held = current_backend().hold(job_type, parameters)
    if held is None:
        return _run_elsewhere(job_type, parameters)
    try:
        with entered(held.context):
            result = job_type.function(**arguments, **injections(job_type, held.context))
        ending = _returned(result)
    except BaseException as error:
        _fail(held, _ended(error, job_type))
        raise
    held.end(ending)
    return result


async def run_async(job_type: JobType, arguments: Mapping[str, Any]) -> Any:
    """`run` for an `async` function: awaited in the caller's task, the store asked in a thread."""
    parameters = jsonable(arguments)
    held = await _hold(job_type, parameters)
    if held is None:
        return await asyncio.to_thread(_run_elsewhere, job_type, parameters)
    try:
        with entered(held.context):
            result = await job_type.function(**arguments, **injections(job_type, held.context))
        ending = _returned(result)
    except BaseException as error:
        # Not in a thread: the caller's task may be cancelled, and would not wait for it.
        _fail(held, _ended(error, job_type))
        raise
    await asyncio.to_thread(held.end, ending)
    return result


async def _hold(job_type: JobType, parameters: Mapping[str, Any]) -> Held | None:
    """The row of this call. A call that is cancelled while it is made waits for it, and ends it."""
    holding = asyncio.ensure_future(asyncio.to_thread(current_backend().hold, job_type, parameters))
    try:
        return await asyncio.shield(holding)
    except asyncio.CancelledError:
        if (held := await holding) is not None:
            _fail(held, Cancelled())
        raise


def _returned(result: Any) -> Ending:
    return Returned(None if result is None else to_json(result, what="result"))


def _ended(error: BaseException, job_type: JobType) -> Ending:
    """A direct call has one attempt: what asks for another one has failed."""
    if isinstance(error, asyncio.CancelledError):
        return Cancelled()
    ending = ending_of(error, job_type)
    return replace(ending, in_seconds=None, charged=True) if isinstance(ending, Raised) else ending


def _fail(held: Held, ending: Ending) -> None:
    try:
        held.end(ending)
    except LanewayError as error:  # the caller shall learn what the function raised
        log.warning("call_not_recorded", job_id=held.context.id, error=error.code)


def _run_elsewhere(job_type: JobType, parameters: Mapping[str, Any]) -> Any:
    backend = current_backend()
    request = {"job_type": job_type.name, "parameters": parameters, "max_retries": 0}
    [job] = backend.enqueue([request])
    while not job["finished_at"]:
        job = backend.wait(job["id"], timeout_seconds=float(job["timeout_seconds"]))
    match JobStatus(job["status"]):
        case JobStatus.COMPLETED:
            return job["result"]
        case JobStatus.CANCELLED:
            raise JobCancelled
    error = job["error"] or {}
    words = f"{error.get('type', '')}: {error.get('message', '')}" if error else f"it is {job['status']}"
    raise JobFailed(
        f"job {job['id']} of {job_type.name}: {words}",
        job_id=job["id"],
        status=job["status"],
        error=job["error"],
    )
