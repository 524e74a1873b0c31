"""Laneway: background jobs over HTTP and Python, in priority lanes on RQ, with the record in SQL.

The public names are loaded on first use, so importing this package loads no server and no driver.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from laneway.domain.spec import Priority as JobPriority
    from laneway.domain.states import JobStatus
    from laneway.engine.context import JobContext, current_job
    from laneway.engine.registry import background_job
    from laneway.errors import JobCancelled, PermanentError, Retry, Snooze, TransientError
    from laneway.webhooks.signing import verify_webhook

__version__ = "0.1.0"

_HOMES = {
    "JobCancelled": "laneway.errors",
    "JobContext": "laneway.engine.context",
    "JobPriority": "laneway.domain.spec:Priority",
    "JobStatus": "laneway.domain.states",
    "PermanentError": "laneway.errors",
    "Retry": "laneway.errors",
    "Snooze": "laneway.errors",
    "TransientError": "laneway.errors",
    "background_job": "laneway.engine.registry",
    "current_job": "laneway.engine.context",
    "verify_webhook": "laneway.webhooks.signing",
}

__all__ = [
    "JobCancelled",
    "JobContext",
    "JobPriority",
    "JobStatus",
    "PermanentError",
    "Retry",
    "Snooze",
    "TransientError",
    "background_job",
    "current_job",
    "verify_webhook",
]


def __getattr__(name: str) -> Any:
    try:
        module, _, attribute = _HOMES[name].partition(":")
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    return getattr(import_module(module), attribute or name)
