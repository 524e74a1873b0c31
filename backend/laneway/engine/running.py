"""Running one handler to an ending, under its timeout.

The soft timeout is the alarm's: a worker's is SIGALRM. In a plain function it raises JobTimeout, a
BaseException, so that `except Exception` cannot swallow it; a coroutine is cancelled. What swallows even
that, or sits in C code, is killed a grace later by whoever supervises this process, if there is one.
"""

from __future__ import annotations

import asyncio
import contextvars
import traceback
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from laneway.domain.payload import to_json
from laneway.domain.retry import Category, category_of
from laneway.engine.context import JobContext, Line, enter
from laneway.engine.endings import (
    MAX_ERROR_MESSAGE,
    MAX_TRACEBACK,
    Cancelled,
    Ending,
    GoesOnElsewhere,
    HandedOver,
    Raised,
    Returned,
    TimedOut,
)
from laneway.engine.registry import JobType
from laneway.errors import JobCancelled, JobTimeout, Retry, Snooze

NAG_SECONDS = 1.0  # between one soft timeout and the next, for a handler that swallowed it


class Alarm(Protocol):
    """Calls actions once their time has come, in the thread that runs the handler."""

    def set(self, name: str, action: Callable[[], None], *, seconds: float) -> None: ...

    def clear(self, name: str) -> None: ...


class Runner:
    """Runs handlers one after another. Keeps one event loop for those that are `async`."""

    def __init__(self, alarm: Alarm) -> None:
        self._alarm = alarm
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[Any] | None = None

    def run(
        self,
        job_type: JobType,
        *,
        job_id: str,
        attempt: int,
        parameters: str,
        timeout_seconds: int,
        line: Line,
    ) -> Ending | HandedOver:
        """Call the handler and say how it ended. Never raises what the handler raised."""
        context = JobContext(
            job_id=job_id,
            job_type=job_type.name,
            attempt=attempt,
            line=line,
            track_progress=job_type.track_progress,
        )
        timed_out = False

        def expire() -> None:
            nonlocal timed_out
            timed_out = True
            self._alarm.set("timeout", expire, seconds=NAG_SECONDS)
            self._interrupt()

        try:
            arguments = job_type.arguments(parameters)
            arguments |= injections(job_type, context)
            self._alarm.set("timeout", expire, seconds=timeout_seconds)
            try:
                if job_type.is_async:
                    result = self._run_coroutine(context, job_type.function(**arguments))
                else:
                    result = contextvars.copy_context().run(_call, context, job_type.function, arguments)
            finally:
                self._alarm.clear("timeout")
            return Returned(to_json(result, what="result") if result is not None else None)
        except GoesOnElsewhere:
            return HandedOver()
        except BaseException as error:
            if timed_out and not isinstance(error, JobCancelled):
                return TimedOut(timeout_seconds, _trace(error))
            return ending_of(error, job_type)
        finally:
            self._alarm.clear("timeout")  # again: the one above may be where the alarm struck

    def _interrupt(self) -> None:
        if self._task is None or self._loop is None:
            raise JobTimeout
        # A plain cancel() would be noticed when the loop next wakes, which may be never.
        self._loop.call_soon_threadsafe(self._task.cancel)

    def _run_coroutine(self, context: JobContext, coroutine: Coroutine[Any, Any, Any]) -> Any:
        if self._loop is None or self._loop.is_closed():
            self._loop = asyncio.new_event_loop()
        loop = self._loop

        async def main() -> Any:
            enter(context)
            return await coroutine

        self._task = loop.create_task(main())
        try:
            return loop.run_until_complete(self._task)
        finally:
            self._task = None
            _finish_stragglers(loop)


def injections(job_type: JobType, context: JobContext) -> dict[str, Any]:
    """What the function is handed besides the job's parameters."""
    given = {"job": context, "progress_callback": context.progress_callback}
    return {name: given[name] for name in job_type.injected}


def ending_of(error: BaseException, job_type: JobType) -> Ending:
    """The ending that a handler's exception makes."""
    if isinstance(error, JobCancelled):
        return Cancelled()
    category = category_of(error, retry_on=job_type.retry_on, no_retry_on=job_type.no_retry_on)
    name, text = type(error).__name__, _words(error)
    match error:
        case Retry():
            return Raised(name, text, in_seconds=error.in_seconds)
        case Snooze():
            return Raised(name, text, in_seconds=error.in_seconds, charged=False)
        case SystemExit():
            text = f"the handler called sys.exit({error.code!r})"
    return Raised(name, text, _trace(error), permanent=category is Category.PERMANENT)


def _call(context: JobContext, function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    enter(context)
    return function(**arguments)


def _finish_stragglers(loop: asyncio.AbstractEventLoop) -> None:
    """Cancel the tasks a handler left behind: the next job must not find them."""
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    if tasks:
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))


def _words(error: BaseException) -> str:
    try:
        return str(error)[:MAX_ERROR_MESSAGE]  # here too: what is cut is not sent
    except Exception as why:
        return f"(its message cannot be made: {type(why).__name__})"


def _trace(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))[-MAX_TRACEBACK:]
