"""Laneway: background jobs over HTTP and Python, in priority lanes on RQ, with the record in SQL.

The public names are loaded on first use, so importing this package loads no server and no driver.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from laneway.domain.flow import ExecutionMode as JobExecutionMode
    from laneway.domain.spec import Priority as JobPriority
    from laneway.domain.states import JobStatus
    from laneway.engine.context import JobContext, current_job
    from laneway.engine.registry import register_job_function
    from laneway.errors import JobCancelled, PermanentError, Retry, Snooze, TransientError
    from laneway.sdk.client import AsyncLanewayClient, LanewayClient
    from laneway.sdk.decorators import background_job, job_chain, retry_on_failure, scheduled_job
    from laneway.sdk.functions import Job, cancel, enqueue, enqueue_delayed, poll
    from laneway.sdk.manager import JobManager, JobQueue, get_job_manager, get_queue
    from laneway.sdk.results import BatchResult, JobResult, Schedule
    from laneway.sdk.tracked import JobFailed
    from laneway.webhooks.signing import verify_webhook

__version__ = "0.1.0"

_HOMES = {
    "AsyncLanewayClient": "laneway.sdk.client",
    "BatchResult": "laneway.sdk.results",
    "Job": "laneway.sdk.functions",
    "JobCancelled": "laneway.errors",
    "JobContext": "laneway.engine.context",
    "JobExecutionMode": "laneway.domain.flow:ExecutionMode",
    "JobFailed": "laneway.sdk.tracked",
    "JobManager": "laneway.sdk.manager",
    "JobPriority": "laneway.domain.spec:Priority",
    "JobQueue": "laneway.sdk.manager",
    "JobResult": "laneway.sdk.results",
    "JobStatus": "laneway.domain.states",
    "LanewayClient": "laneway.sdk.client",
    "PermanentError": "laneway.errors",
    "Retry": "laneway.errors",
    "Schedule": "laneway.sdk.results",
    "Snooze": "laneway.errors",
    "TransientError": "laneway.errors",
    "background_job": "laneway.sdk.decorators",
    "cancel": "laneway.sdk.functions",
    "current_job": "laneway.engine.context",
    "enqueue": "laneway.sdk.functions",
    "enqueue_delayed": "laneway.sdk.functions",
    "get_job_manager": "laneway.sdk.manager",
    "get_queue": "laneway.sdk.manager",
    "job_chain": "laneway.sdk.decorators",
    "poll": "laneway.sdk.functions",
    "register_job_function": "laneway.engine.registry",
    "retry_on_failure": "laneway.sdk.decorators",
    "scheduled_job": "laneway.sdk.decorators",
    "verify_webhook": "laneway.webhooks.signing",
}

__all__ = [
    "AsyncLanewayClient",
    "BatchResult",
    "Job",
    "JobCancelled",
    "JobContext",
    "JobExecutionMode",
    "JobFailed",
    "JobManager",
    "JobPriority",
    "JobQueue",
    "JobResult",
    "JobStatus",
    "LanewayClient",
    "PermanentError",
    "Retry",
    "Schedule",
    "Snooze",
    "TransientError",
    "background_job",
    "cancel",
    "current_job",
    "enqueue",
    "enqueue_delayed",
    "get_job_manager",
    "get_queue",
    "job_chain",
    "poll",
    "register_job_function",
    "retry_on_failure",
    "scheduled_job",
    "verify_webhook",
]


def __getattr__(name: str) -> Any:
    try:
        module, _, attribute = _HOMES[name].partition(":")
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    return getattr(import_module(module), attribute or name)
