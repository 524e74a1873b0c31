"""The schedules that `@scheduled_job` declared, brought into the store by a scheduler that starts."""

from __future__ import annotations

from laneway.engine.registry import DeclaredSchedule
from laneway.engine.service import JobService
from laneway.errors import Conflict, LanewayError, NotFound, Unavailable
from laneway.log import get_logger
from laneway.sdk.local import LocalBackend

log = get_logger("schedules")


class Declared:
    """What is declared in the loaded modules and not yet in the store.

    Schedules that were declared once and are no more stay as they are: somebody may have changed them.
    """

    def __init__(self, service: JobService) -> None:
        self._left = dict(service.registry.schedules)
        self._backend = LocalBackend(service)

    def keep(self) -> int:
        """Make what is missing, or bring it up to date by its name; how many. Call again for the rest.

        What is wrong is logged and left out. What another scheduler is about to make, or what has no tenant
        yet, is tried again. Raises sqlalchemy's errors.
        """
        kept = 0
        for name, declared in list(self._left.items()):
            try:
                self._backend.keep_schedule(request_of(declared))
            except (Conflict, NotFound, Unavailable) as error:
                log.warning("schedule_not_kept", schedule=name, error=error.code)
                continue
            except LanewayError as error:
                log.error("schedule_refused", schedule=name, error=str(error))
            else:
                kept += 1
            del self._left[name]
        return kept


def request_of(declared: DeclaredSchedule) -> dict[str, object]:
    """As the HTTP API takes it."""
    fields = {
        "name": declared.name,
        "description": declared.description,
        "job_type": declared.job_type,
        "cron_expression": declared.cron,
        "interval_seconds": declared.interval_seconds,
        "max_concurrent_runs": declared.max_concurrent_runs,
        "overlap": declared.overlap,
        "misfire": declared.misfire,
        "priority": declared.priority,
        "max_retries": declared.max_retries,
    }
    if declared.cron is not None:
        fields["timezone"] = declared.timezone
    return {name: value for name, value in fields.items() if value is not None}
