"""`JobManager`: jobs for `async` applications, and the dependencies that hand it to FastAPI routes.

Each method asks the backend in a thread, so that no route waits for another's database.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

from laneway.domain.flow import ExecutionMode
from laneway.domain.spec import DEFAULT_QUEUE
from laneway.engine import registry as registration
from laneway.errors import IllegalTransition
from laneway.sdk.backend import Backend, Request, current_backend, jsonable
from laneway.sdk.decorators import Mode, chain_request
from laneway.sdk.joining import join_async
from laneway.sdk.results import BatchResult, JobResult, Schedule

T = TypeVar("T")
Task = str | Callable[..., Any]
"""A job type's name, or its function."""


class JobManager:
    """Makes jobs and looks at them, on the process's backend unless it is given another.

    Everything raises LanewayError for what is refused: UnknownJobType, InvalidParameters, JobNotFound, ….
    """

    def __init__(self, backend: Backend | None = None) -> None:
        self._backend = backend

    @property
    def backend(self) -> Backend:
        return self._backend or current_backend()

    async def _ask(self, call: Callable[[Backend], T]) -> T:
        return await asyncio.to_thread(lambda: call(self.backend))

    # Making jobs

    async def enqueue(
        self,
        job_type: Task,
        *,
        priority: str | int | None = None,
        delay: timedelta | float | None = None,
        **parameters: Any,
    ) -> str:
        """The id of a new job, which runs at once or after `delay` (a timedelta, or seconds)."""
        request = job_request(job_type, parameters, priority=priority, delay=delay)
        return str((await self._ask(lambda backend: backend.enqueue([request])))[0]["id"])

    async def enqueue_delayed(
        self,
        job_type: Task,
        delay: timedelta | float,
        *,
        priority: str | int | None = None,
        **parameters: Any,
    ) -> str:
        """The id of a new job that starts after `delay` (a timedelta, or seconds)."""
        return await self.enqueue(job_type, priority=priority, delay=delay, **parameters)

    async def enqueue_batch(
        self,
        job_type: Task,
        items: Iterable[Mapping[str, Any]],
        *,
        batch_size: int = 100,
        priority: str | int | None = None,
    ) -> BatchResult:
        """One job for each of `items`, which are their parameters; all of them, or none.

        `batch_size` is taken and changes nothing: the rows are written in one transaction, some hundreds by
        each statement.
        """
        defaults = {} if priority is None else {"priority": priority}
        request = {
            "job_type": name_of(job_type),
            "items": [jsonable(item) for item in items],
            "defaults": defaults,
        }
        answer = await self._ask(lambda backend: backend.enqueue_batch(request))
        return BatchResult(str(answer["id"]), answer["total"], answer["enqueued"])

    async def enqueue_in(
        self,
        session: Any,
        job_type: Task,
        *,
        priority: str | int | None = None,
        delay: timedelta | float | None = None,
        **parameters: Any,
    ) -> str:
        """The id of a job whose row joins a transaction of the caller's, on Laneway's own database.

        `session` is a SQLAlchemy Session, AsyncSession, Connection or AsyncConnection. With its rollback
        there is no job; after its commit a worker is told. Raises RuntimeError with LANEWAY_BACKEND=http.
        """
        request = job_request(job_type, parameters, priority=priority, delay=delay)
        return await join_async(self.backend, session, request)

    async def chain(
        self,
        steps: Sequence[tuple[Task, Sequence[Any], Mapping[str, Any]]],
        *,
        name: str = "chain",
        execution_mode: ExecutionMode | Mode = "sequential",
        stop_on_failure: bool = True,
        timeout_seconds: int | None = None,
    ) -> str:
        """The id of a chain of `(job type, args, kwargs)` steps, started."""
        definition = [
            {"job_type": name_of(task), "parameters": named(task, args, kwargs)}
            for task, args, kwargs in steps
        ]
        request = chain_request(
            definition,
            name=name,
            execution_mode=ExecutionMode(execution_mode).value,
            stop_on_failure=stop_on_failure,
            timeout_seconds=timeout_seconds,
        )
        return str((await self._ask(lambda backend: backend.start_chain(request)))["id"])

    # Schedules

    async def schedule(
        self, job_type: Task, *, cron: str, name: str | None = None, timezone: str = "UTC", **parameters: Any
    ) -> str:
        """The id of a schedule that runs the job type by a cron expression of five fields."""
        return await self._schedule(job_type, parameters, name=name, cron_expression=cron, timezone=timezone)

    async def schedule_interval(
        self, job_type: Task, *, interval: timedelta | float, name: str | None = None, **parameters: Any
    ) -> str:
        """The id of a schedule that runs the job type every `interval` (a timedelta, or seconds)."""
        return await self._schedule(job_type, parameters, name=name, interval_seconds=seconds(interval))

    async def _schedule(self, job_type: Task, parameters: Mapping[str, Any], **fields: Any) -> str:
        request = schedule_request(job_type, parameters, **fields)
        return str((await self._ask(lambda backend: backend.create_schedule(request)))["id"])

    async def list_scheduled(self) -> list[Schedule]:
        """The tenant's schedules."""
        found = await self._ask(lambda backend: backend.list_schedules())
        return [Schedule.of(each) for each in found]

    async def unschedule(self, schedule_id: str) -> None:
        """Delete a schedule; the jobs it has made stay. Raises NotFound."""
        await self._ask(lambda backend: backend.delete_schedule(schedule_id))

    # Looking at jobs

    async def get_status(self, job_id: str) -> JobResult:
        """Where the job is. Raises JobNotFound."""
        return JobResult.of(await self._ask(lambda backend: backend.get(job_id)))

    async def wait_for(self, job_id: str, timeout: float = 60.0) -> JobResult:
        """The job once it has ended, however. Raises JobNotFound, TimeoutError after `timeout` seconds."""
        return ended(await self._ask(lambda backend: backend.wait(job_id, timeout_seconds=timeout)))

    async def cancel(self, job_id: str, terminate: bool = False) -> bool:
        """End a waiting job, or ask a running one to stop; with `terminate` it is killed at once.

        False when it had ended already. Raises JobNotFound.
        """
        return await self._ask(lambda backend: stop(backend, job_id, terminate=terminate))

    # Queues

    async def queue_length(self, queue: str = DEFAULT_QUEUE) -> int:
        """How many jobs of the queue wait for a worker."""
        return await self._ask(lambda backend: backend.queue_length(queue))

    async def purge_queue(self, queue: str) -> int:
        """Cancel everything of the tenant's that waits in the queue; how many jobs that were."""
        return await self._ask(lambda backend: backend.purge_queue(queue))


class JobQueue:
    """What `get_queue` hands to a route: the queues, without the rest of the manager."""

    def __init__(self, manager: JobManager) -> None:
        self._manager = manager

    async def queue_length(self, queue: str = DEFAULT_QUEUE) -> int:
        """How many jobs of the queue wait for a worker."""
        return await self._manager.queue_length(queue)

    async def purge_queue(self, queue: str) -> int:
        """Cancel everything of the tenant's that waits in the queue; how many jobs that were."""
        return await self._manager.purge_queue(queue)


async def get_job_manager() -> JobManager:
    """The process's job manager. A FastAPI dependency: `jobs: JobManager = Depends(get_job_manager)`."""
    return JobManager()


async def get_queue() -> JobQueue:
    """The process's queues. A FastAPI dependency: `queue: JobQueue = Depends(get_queue)`."""
    return JobQueue(JobManager())


# What the synchronous functions share with the methods above


def name_of(task: Task) -> str:
    """The job type's name. Raises JobTypeNotFound for a function that is none."""
    return task if isinstance(task, str) else registration.registry.type_of(task).name


def named(task: Task, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments as parameters. Raises TypeError for some without a name where nobody knows the function."""
    from laneway.sdk.decorators import bound

    known = registration.registry.get(name_of(task))
    if known is not None:
        return bound(known, tuple(args), kwargs)
    if args:
        raise TypeError(f"this process does not know {name_of(task)}: give its parameters by name")
    return dict(kwargs)


def seconds(span: timedelta | float) -> float:
    return span.total_seconds() if isinstance(span, timedelta) else float(span)


def job_request(
    task: Task,
    parameters: Mapping[str, Any],
    *,
    priority: str | int | None = None,
    delay: timedelta | float | None = None,
) -> Request:
    request: dict[str, Any] = {"job_type": name_of(task), "parameters": jsonable(parameters)}
    if priority is not None:
        request["priority"] = priority
    if delay is not None:
        request["delay_seconds"] = seconds(delay)
    return request


def schedule_request(
    task: Task, parameters: Mapping[str, Any], *, name: str | None, **fields: Any
) -> Request:
    job_type = name_of(task)
    return {"name": name or job_type, "job_type": job_type, "parameters": jsonable(parameters), **fields}


def ended(job: Mapping[str, Any]) -> JobResult:
    result = JobResult.of(job)
    if not result.ended:
        raise TimeoutError(f"job {result.id} is still {result.status}")
    return result


def stop(backend: Backend, job_id: str, *, terminate: bool) -> bool:
    try:
        backend.cancel(job_id, terminate=terminate)
    except IllegalTransition:
        return False
    return True
