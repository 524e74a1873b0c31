"""The synchronous form: `enqueue`, `enqueue_delayed`, `poll`, `cancel`, and `Job` for all that may be said.

`async` code uses `JobManager`: these functions block for as long as the database takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from laneway.domain.spec import Priority
from laneway.sdk.backend import current_backend, jsonable
from laneway.sdk.manager import Task, job_request, name_of, named, schedule_request, stop
from laneway.sdk.results import JobResult


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job to be enqueued. `function` is a job type's name, or its function; `name` is the job's title.

    `depends_on` are ids of jobs that must end first. With `cron_expression` it is a schedule: `enqueue` makes
    that, and returns its id. What is not said is the job type's.
    """

    function: str | Callable[..., Any]
    name: str | None = None
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    priority: Priority | str | int | None = None
    queue: str | None = None
    depends_on: Sequence[str] = ()
    scheduled_at: datetime | None = None
    cron_expression: str | None = None
    max_retries: int | None = None
    retry_delay: float | None = None
    retry_backoff: float | None = None
    retry_jitter: bool | None = None
    timeout_seconds: int | None = None
    tags: Sequence[str] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def request(self) -> dict[str, Any]:
        """As the HTTP API takes it."""
        fields = {
            "title": self.name,
            "priority": self.priority,
            "queue": self.queue,
            "depends_on": list(self.depends_on) or None,
            "scheduled_for": self.scheduled_at and self.scheduled_at.isoformat(),
            "max_retries": self.max_retries,
            "retry_delay_seconds": self.retry_delay,
            "retry_backoff": self.retry_backoff,
            "retry_jitter": self.retry_jitter,
            "timeout_seconds": self.timeout_seconds,
            "tags": list(self.tags) or None,
            "metadata": jsonable(self.metadata) or None,
        }
        said = {name: value for name, value in fields.items() if value is not None}
        parameters = jsonable(named(self.function, self.args, self.kwargs))
        return {"job_type": name_of(self.function), "parameters": parameters, **said}


def enqueue(
    job: Job | Task,
    *,
    priority: str | int | None = None,
    delay: timedelta | float | None = None,
    **parameters: Any,
) -> str:
    """The id of a new job: `enqueue(Job(…))`, or `enqueue("emails.send", to="ada@example.org")`.

    Of a `Job` with a cron expression it is the id of a new schedule. Raises LanewayError for what is
    refused: UnknownJobType, InvalidParameters, ….
    """
    backend = current_backend()
    if not isinstance(job, Job):
        request = job_request(job, parameters, priority=priority, delay=delay)
        return str(backend.enqueue([request])[0]["id"])
    if priority is not None or delay is not None or parameters:
        raise TypeError("a Job says everything itself: enqueue(Job(…)) takes no more")
    if job.cron_expression is None:
        return str(backend.enqueue([job.request()])[0]["id"])
    return str(backend.create_schedule(_schedule(job))["id"])


def _schedule(job: Job) -> Mapping[str, Any]:
    if job.scheduled_at is not None or job.depends_on:
        raise ValueError("a job with a cron_expression can have neither scheduled_at nor depends_on")
    request = job.request()
    kept = ("priority", "queue", "max_retries", "retry_delay_seconds", "timeout_seconds")
    fields = {name: request[name] for name in kept if name in request}
    return schedule_request(
        job.function,
        request["parameters"],
        name=job.name,
        cron_expression=job.cron_expression,
        **fields,
    )


def enqueue_delayed(
    job_type: Task, delay: timedelta | float, *, priority: str | int | None = None, **parameters: Any
) -> str:
    """The id of a new job that starts after `delay` (a timedelta, or seconds)."""
    return enqueue(job_type, priority=priority, delay=delay, **parameters)


def poll(job_id: str) -> JobResult:
    """Where the job is. Raises JobNotFound."""
    return JobResult.of(current_backend().get(job_id))


def cancel(job_id: str, terminate: bool = False) -> bool:
    """End a waiting job, or ask a running one to stop; with `terminate` it is killed at once.

    False when it had ended already. Raises JobNotFound.
    """
    return stop(current_backend(), job_id, terminate=terminate)
