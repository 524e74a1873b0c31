"""What Laneway tells the outside about a job: one name per thing that happened."""

from __future__ import annotations

from enum import StrEnum

from laneway.domain.states import JobStatus


class EventType(StrEnum):
    """The names a `webhook_events` list may hold. `noun.past`, never renamed."""

    JOB_COMPLETED = "job.completed"
    JOB_FAILED = "job.failed"
    JOB_TIMEOUT = "job.timeout"
    JOB_CANCELLED = "job.cancelled"
    JOB_EXPIRED = "job.expired"


EVENT_OF: dict[JobStatus, EventType] = {
    JobStatus.COMPLETED: EventType.JOB_COMPLETED,
    JobStatus.FAILED: EventType.JOB_FAILED,
    JobStatus.TIMEOUT: EventType.JOB_TIMEOUT,
    JobStatus.CANCELLED: EventType.JOB_CANCELLED,
    JobStatus.EXPIRED: EventType.JOB_EXPIRED,
}
"""The event that entering a status is; statuses that are not here tell nobody."""

DEFAULT_WEBHOOK_EVENTS: tuple[EventType, ...] = tuple(EventType)
"""What a job's `webhook_url` hears when it names no `webhook_events`: every end."""
