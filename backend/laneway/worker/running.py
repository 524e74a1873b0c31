"""Running one handler to an ending, in the process's main thread, under its timeout.

The soft timeout is SIGALRM. In a plain function its handler raises JobTimeout, a BaseException, so that
`except Exception` cannot swallow it; a coroutine is cancelled. What swallows even that, or sits in C
code, is killed a grace later by whoever supervises this process.
"""

from __future__ import annotations

import asyncio
import contextvars
import signal
import time
import traceback
from collections.abc import Callable, Coroutine
from types import FrameType
from typing import Any

from laneway.domain.payload import to_json
from laneway.engine.context import JobContext, Line, enter
from laneway.engine.endings import Cancelled, Ending, Raised, Returned, TimedOut
from laneway.engine.registry import JobType
from laneway.errors import (
    InvalidParameters,
    JobCancelled,
    JobTimeout,
    LanewayError,
    PermanentError,
    Retry,
    Snooze,
)


class Alarm:
    """SIGALRM shared by two purposes: the job's timeout, and one earlier nudge.

    `nudge` runs once, `after` seconds into the job, in the main thread between two bytecodes.
    """

    def __init__(self) -> None:
        self._deadline = 0.0
        self._nudge: Callable[[], bool] | None = None
        self._expire: Callable[[], None] | None = None
        signal.signal(signal.SIGALRM, self._ring)

    def set(self, *, seconds: float, expire: Callable[[], None]) -> None:
        """Call `expire` after `seconds`, and every second after that until cleared."""
        self._deadline = time.monotonic() + seconds
        self._expire = expire
        if self._nudge is None:
            signal.setitimer(signal.ITIMER_REAL, seconds)

    def nudge(self, nudge: Callable[[], bool] | None, *, after: float) -> None:
        """Call `nudge` after so many seconds, again a little later while it returns False."""
        self._nudge = nudge
        if nudge is not None:
            signal.setitimer(signal.ITIMER_REAL, after)

    def clear(self) -> None:
        self._expire = None
        if self._nudge is None:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _ring(self, _signal: int, _frame: FrameType | None) -> None:
        if self._nudge is not None:
            if not self._nudge():
                signal.setitimer(signal.ITIMER_REAL, 0.002)
                return
            self._nudge = None
        if self._expire is None:
            return
        left = self._deadline - time.monotonic()
        if left > 0:
            signal.setitimer(signal.ITIMER_REAL, left)
            return
        signal.setitimer(signal.ITIMER_REAL, 1.0)
        self._expire()


class Runner:
    """Runs handlers one after another. Keeps one event loop for those that are `async`."""

    def __init__(self) -> None:
        self.alarm = Alarm()
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(
        self,
        job_type: JobType,
        *,
        job_id: str,
        attempt: int,
        parameters: str,
        timeout_seconds: int,
        line: Line,
    ) -> Ending:
        """Call the handler and say how it ended. Never raises what the handler raised."""
        context = JobContext(job_id=job_id, job_type=job_type.name, attempt=attempt, line=line)
        timed_out = False

        def expire() -> None:
            nonlocal timed_out
            timed_out = True
            if self._task is not None:
                self._task.cancel()
            else:
                raise JobTimeout

        self._task: asyncio.Task[Any] | None = None
        try:
            arguments = job_type.arguments(parameters)
            for name in job_type.injected:
                arguments[name] = context if name == "job" else context.progress_callback
            self.alarm.set(seconds=timeout_seconds, expire=expire)
            try:
                if job_type.is_async:
                    result = self._run_coroutine(context, job_type.function(**arguments))
                else:
                    result = contextvars.copy_context().run(_call, context, job_type.function, arguments)
            finally:
                self.alarm.clear()
            return Returned(to_json(result, what="result") if result is not None else None)
        except JobCancelled:
            return Cancelled()
        except JobTimeout as error:
            return TimedOut(timeout_seconds, _trace(error))
        except asyncio.CancelledError as error:
            if timed_out:
                return TimedOut(timeout_seconds, _trace(error))
            return _raised(error)
        except BaseException as error:
            return _raised(error)

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


def _raised(error: BaseException) -> Ending:
    name, text = type(error).__name__, str(error)
    match error:
        case Retry():
            return Raised(name, text, in_seconds=error.in_seconds)
        case Snooze():
            return Raised(name, text, in_seconds=error.in_seconds, charged=False)
        case PermanentError() | InvalidParameters() | LanewayError():
            return Raised(name, text, _trace(error), permanent=True)
        case SystemExit():
            return Raised(name, f"the handler called sys.exit({error.code!r})", _trace(error))
    return Raised(name, text, _trace(error))


def _trace(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))
