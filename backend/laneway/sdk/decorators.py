"""What turns functions into jobs: `background_job`, `scheduled_job`, `job_chain`, `retry_on_failure`.

All of them give back a plain function of the same signature, with `__wrapped__`, so that they can be put on
top of other decorators and below them. Nothing here looks for a store before a function is called.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Concatenate, Generic, Literal, ParamSpec, Protocol, TypeVar, cast, overload

from laneway.domain.cadence import Cron
from laneway.domain.flow import ExecutionMode
from laneway.domain.retry import RetryPolicy
from laneway.domain.spec import DEFAULT_QUEUE, Priority
from laneway.engine import registry as registration
from laneway.engine.context import JobContext, running_job
from laneway.engine.registry import INJECTED, DeclaredSchedule, Isolation, JobType, default_name
from laneway.errors import PermanentError, Retry, Snooze
from laneway.log import get_logger

MAX_DELAY_SECONDS = 1800.0  # of `retry_on_failure`, like the longest wait between two attempts of a job
WAIT_STEP_SECONDS = 0.2  # between two looks for a cancel while it waits

P = ParamSpec("P")
R_co = TypeVar("R_co", covariant=True)
T = TypeVar("T")
Mode = Literal["sequential", "parallel"]

log = get_logger("sdk")


class BackgroundJob(Protocol[P, R_co]):
    """A function that is a job type. Called, it runs here and now, and leaves a job's row behind."""

    job_type: str

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...

    def delay(self, *args: P.args, **kwargs: P.kwargs) -> str:
        """Enqueue it; the job's id."""
        ...

    def options(self, **fields: Any) -> Delayed[P]:
        """The same with fields of the job's request: `.options(priority="high").delay(…)`."""
        ...


@dataclass(frozen=True)
class Delayed(Generic[P]):
    """A function to be enqueued with some fields of its own."""

    job_type: JobType
    fields: Mapping[str, Any]

    def delay(self, *args: P.args, **kwargs: P.kwargs) -> str:
        """Enqueue it; the job's id. Raises what `enqueue` raises."""
        from laneway.sdk.backend import current_backend, jsonable

        parameters = jsonable(bound(self.job_type, args, kwargs))
        request = {**self.fields, "job_type": self.job_type.name, "parameters": parameters}
        return str(current_backend().enqueue([request])[0]["id"])


class JobDecorator(Protocol):
    """Makes a job of a function; of one whose first parameter is a JobContext, the job has the others."""

    @overload
    def __call__(self, function: Callable[Concatenate[JobContext, P], T], /) -> BackgroundJob[P, T]: ...
    @overload
    def __call__(self, function: Callable[P, T], /) -> BackgroundJob[P, T]: ...


def background_job(
    name: str | None = None,
    *,
    queue: str = DEFAULT_QUEUE,
    priority: str = "normal",
    max_retries: int = 3,
    retry_delay_seconds: float = 120.0,
    exponential_backoff: bool = True,
    retry_jitter: bool = True,
    retry_on: tuple[type[BaseException], ...] = (),
    no_retry_on: tuple[type[BaseException], ...] = (),
    timeout_seconds: int | None = None,
    track_progress: bool = True,
    unique_key: str | None = None,
    concurrency_key: str | None = None,
    concurrency_limit: int | None = None,
    tags: Sequence[str] = (),
    isolation: str = "child",
) -> JobDecorator:
    """Register a plain or `async` function as a job type.

    Called directly it runs here and now, tracked: its row is running while it runs, and then completed or
    failed with the result or the traceback. `.delay(…)` enqueues it, `.options(priority="high").delay(…)`
    with other fields. Within a job a direct call is a plain call.

    `name` is what requests say (default: `module.function`, lower case) and what rows keep, so it should
    not change. With `retry_on` only these exceptions are tried again; `no_retry_on` never are, and wins.
    `unique_key` and `concurrency_key` may name parameters in braces: `invoice-{number}`. With `isolation`
    "fork" a worker starts a process for each job, which ends with it: what the function leaks, changes or
    loads is gone. The rest are defaults for jobs that do not say otherwise.
    """

    def register(function: Callable[..., Any]) -> Any:
        job_type = JobType(
            name=name or default_name(function),
            function=function,
            queue=queue,
            priority=Priority(priority),
            max_retries=max_retries,
            retry_delay_seconds=retry_delay_seconds,
            retry_backoff=2.0 if exponential_backoff else 1.0,
            retry_jitter=retry_jitter,
            timeout_seconds=timeout_seconds,
            retry_on=retry_on,
            no_retry_on=no_retry_on,
            track_progress=track_progress,
            unique_key=unique_key,
            concurrency_key=concurrency_key,
            concurrency_limit=concurrency_limit,
            tags=tuple(tags),
            isolation=Isolation(isolation),
        )
        registration.registry.add(job_type)
        return _callable(job_type)

    return cast(JobDecorator, register)


def _callable(job_type: JobType) -> Any:
    """The function to be called in the place of the registered one."""
    from laneway.sdk import tracked

    function = job_type.function
    call: Any
    if job_type.is_async:

        @functools.wraps(function)
        async def call_async(*args: Any, **kwargs: Any) -> Any:
            arguments = bound(job_type, args, kwargs)
            if (job := running_job()) is not None:
                return await function(**arguments, **tracked.injections(job_type, job))
            return await tracked.run_async(job_type, arguments)

        call = call_async
    else:

        @functools.wraps(function)
        def call_plain(*args: Any, **kwargs: Any) -> Any:
            arguments = bound(job_type, args, kwargs)
            if (job := running_job()) is not None:
                return function(**arguments, **tracked.injections(job_type, job))
            return tracked.run(job_type, arguments)

        call = call_plain
    plain: Delayed[...] = Delayed(job_type, {})
    call.job_type = job_type.name
    call.delay = plain.delay
    call.options = lambda **fields: Delayed(job_type, fields)
    return call


def bound(job_type: JobType, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments by name, without those that the function is handed. Raises TypeError like a call."""
    signature = inspect.signature(job_type.function)
    own = [each for name, each in signature.parameters.items() if name not in INJECTED]
    given = signature.replace(parameters=own).bind(*args, **kwargs).arguments
    for each in own:
        if each.kind is each.VAR_KEYWORD:
            given |= given.pop(each.name, {})
        elif each.kind is each.VAR_POSITIONAL and given.pop(each.name, ()):
            raise TypeError(f"{job_type.name} takes its parameters by name")
    return dict(given)


def scheduled_job(
    *,
    cron: str | None = None,
    interval_seconds: int | None = None,
    timezone: str = "UTC",
    name: str | None = None,
    description: str | None = None,
    max_concurrent_runs: int = 1,
    overlap: str = "skip",
    misfire: str = "fire_once",
    priority: str = "normal",
    max_retries: int = 3,
) -> JobDecorator:
    """Run a function by the clock: by a cron expression of five fields, or every so many seconds.

    A scheduler that has the module loaded makes the schedule when it starts, or brings it up to date by its
    `name` (default: the job type's). The function is a job type as well; put this on top of
    `background_job` to say more about that. Raises ValueError unless exactly one of `cron` and
    `interval_seconds` is given, and for an expression or a time zone that is none.
    """
    if (cron is None) == (interval_seconds is None):
        raise ValueError("give a schedule either cron or interval_seconds")
    if cron is not None:
        Cron.checked(cron, timezone)

    def declare(function: Callable[..., Any]) -> Any:
        job = function
        if not hasattr(function, "job_type"):
            job = background_job(priority=priority, max_retries=max_retries)(function)
        job_type = cast(BackgroundJob[..., Any], job).job_type
        registration.registry.declare(
            DeclaredSchedule(
                name=name or job_type,
                job_type=job_type,
                cron=cron,
                interval_seconds=interval_seconds,
                timezone=timezone,
                description=description or inspect.getdoc(function),
                max_concurrent_runs=max_concurrent_runs,
                overlap=overlap,
                misfire=misfire,
                priority=None if priority == "normal" else Priority(priority).value,
                max_retries=None if max_retries == 3 else max_retries,
            )
        )
        return job

    return cast(JobDecorator, declare)


class ChainDecorator(Protocol):
    """Makes of a function that returns steps one that returns the id of a chain."""

    @overload
    def __call__(
        self, function: Callable[P, Coroutine[Any, Any, Sequence[Mapping[str, Any]]]], /
    ) -> Callable[P, Coroutine[Any, Any, str]]: ...
    @overload
    def __call__(self, function: Callable[P, Sequence[Mapping[str, Any]]], /) -> Callable[P, str]: ...


def job_chain(
    *,
    name: str,
    execution_mode: ExecutionMode | Mode = "sequential",
    stop_on_failure: bool = True,
    timeout_seconds: int | None = None,
) -> ChainDecorator:
    """Make a chain of the steps that a function returns: `[{"job_type": …, "parameters": {…}}, …]`.

    Calling it makes the chain, starts it, and returns its id. `{"$result": "step_0.path"}` among the
    parameters takes an earlier step's result. Raises ValueError for what are no steps.
    """

    def declare(function: Callable[..., Any]) -> Any:
        def start(steps: Any) -> str:
            from laneway.sdk.backend import current_backend

            request = chain_request(
                steps,
                name=name,
                execution_mode=ExecutionMode(execution_mode).value,
                stop_on_failure=stop_on_failure,
                timeout_seconds=timeout_seconds,
            )
            return str(current_backend().start_chain(request)["id"])

        if inspect.iscoroutinefunction(inspect.unwrap(function)):

            @functools.wraps(function)
            async def call_async(*args: Any, **kwargs: Any) -> str:
                return await asyncio.to_thread(start, await function(*args, **kwargs))

            return call_async

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> str:
            return start(function(*args, **kwargs))

        return call

    return cast(ChainDecorator, declare)


def chain_request(steps: Any, **fields: Any) -> dict[str, Any]:
    """The request for a chain of these steps. Raises ValueError for what are none."""
    from laneway.sdk.backend import jsonable

    if not isinstance(steps, Sequence) or not steps:
        raise ValueError("a chain needs a list of steps")
    for number, step in enumerate(steps):
        if not isinstance(step, Mapping) or "job_type" not in step:
            raise ValueError(f"step {number} of a chain must be a mapping with a job_type, and is {step!r}")
    definition = [{**step, "parameters": jsonable(step.get("parameters", {}))} for step in steps]
    return {key: value for key, value in fields.items() if value is not None} | {
        "chain_definition": definition,
        "execute": True,
    }


def retry_on_failure(
    max_retries: int = 3,
    retry_delay_seconds: float = 60.0,
    exponential_backoff: bool = True,
    retry_on: tuple[type[BaseException], ...] = (Exception,),
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Call a plain or `async` function again when it fails, here, after a wait that doubles.

    The waits are spread like those between a job's attempts, up to half an hour, and end when the job they
    are in is cancelled. `PermanentError`, `Retry` and `Snooze` are for whoever runs the job: they pass.
    What the last call raises is raised.
    """
    policy = RetryPolicy(
        max_retries, retry_delay_seconds, 2.0 if exponential_backoff else 1.0, MAX_DELAY_SECONDS
    )

    def waits(function: Callable[..., Any]) -> Iterator[float]:
        rng = Random()  # noqa: S311 - jitter
        for number in range(max_retries):
            seconds = policy.delay(number, rng=rng)
            log.warning("call_failed", function=function.__name__, retry=number + 1, in_seconds=seconds)
            yield seconds

    def passes(error: BaseException) -> bool:
        return isinstance(error, PermanentError | Retry | Snooze)

    def decorate(function: Callable[..., Any]) -> Any:
        if inspect.iscoroutinefunction(inspect.unwrap(function)):

            @functools.wraps(function)
            async def call_async(*args: Any, **kwargs: Any) -> Any:
                left = waits(function)
                while True:
                    try:
                        return await function(*args, **kwargs)
                    except retry_on as error:
                        if passes(error) or (seconds := next(left, None)) is None:
                            raise
                    for step in _steps(seconds):
                        await asyncio.sleep(step)

            return call_async

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            left = waits(function)
            while True:
                try:
                    return function(*args, **kwargs)
                except retry_on as error:
                    if passes(error) or (seconds := next(left, None)) is None:
                        raise
                for step in _steps(seconds):
                    threading.Event().wait(step)

        return call

    return cast(Callable[[Callable[P, T]], Callable[P, T]], decorate)


def _steps(seconds: float) -> Iterator[float]:
    """The wait, cut so that a cancel of the job it is in is seen. Raises JobCancelled."""
    job = running_job()
    while seconds > 0:
        if job is not None:
            job.check_cancelled()
        step = min(seconds, WAIT_STEP_SECONDS) if job is not None else seconds
        seconds -= step
        yield step
