"""What Laneway tells the outside: one name per thing that happened, `noun.past`, never renamed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import StrEnum
from fnmatch import fnmatchcase

from laneway.domain.states import JobStatus


class EventType(StrEnum):
    """What may happen to a job: the names that its `webhook_events` may hold."""

    JOB_COMPLETED = "job.completed"
    JOB_FAILED = "job.failed"
    JOB_TIMEOUT = "job.timeout"
    JOB_CANCELLED = "job.cancelled"
    JOB_EXPIRED = "job.expired"
    JOB_RETRYING = "job.retrying"
    JOB_DEAD_LETTERED = "job.dead_lettered"
    JOB_PROGRESS = "job.progress"


class SystemEvent(StrEnum):
    """What may happen to anything else: for registered endpoints, beside all of EventType."""

    BATCH_COMPLETED = "batch.completed"
    CHAIN_COMPLETED = "chain.completed"
    CHAIN_FAILED = "chain.failed"
    SCHEDULE_MISSED = "schedule.missed"
    SCHEDULE_FAILING = "schedule.failing"
    JOB_TYPE_FAILING = "job_type.failing"
    JOB_TYPE_RECOVERED = "job_type.recovered"
    ENDPOINT_FAILING = "endpoint.failing"
    ENDPOINT_DISABLED = "endpoint.disabled"
    ENDPOINT_RECOVERED = "endpoint.recovered"
    ENDPOINT_TEST = "endpoint.test"


EVENT_OF: dict[JobStatus, EventType] = {
    JobStatus.COMPLETED: EventType.JOB_COMPLETED,
    JobStatus.FAILED: EventType.JOB_FAILED,
    JobStatus.TIMEOUT: EventType.JOB_TIMEOUT,
    JobStatus.CANCELLED: EventType.JOB_CANCELLED,
    JobStatus.EXPIRED: EventType.JOB_EXPIRED,
    JobStatus.RETRYING: EventType.JOB_RETRYING,
}
"""The event that entering a status is; statuses that are not here tell nobody."""

DEFAULT_WEBHOOK_EVENTS: tuple[EventType, ...] = (
    EventType.JOB_COMPLETED,
    EventType.JOB_FAILED,
    EventType.JOB_TIMEOUT,
    EventType.JOB_CANCELLED,
    EventType.JOB_EXPIRED,
)
"""What a `webhook_url`, or an endpoint, hears when it names no events: every end of a job."""

CATALOGUE: dict[str, str] = {
    EventType.JOB_COMPLETED: "A job's handler returned, or an admin completed it.",
    EventType.JOB_FAILED: "A job failed for good.",
    EventType.JOB_TIMEOUT: "A job's last attempt ran out of time.",
    EventType.JOB_CANCELLED: "A job was cancelled.",
    EventType.JOB_EXPIRED: "A job had not started by its `expires_at`.",
    EventType.JOB_RETRYING: "An attempt failed, or asked for time; another one follows at `next_retry_at`.",
    EventType.JOB_DEAD_LETTERED: "A job became a dead letter, for `dead_letter_reason`; sent beside its end.",
    EventType.JOB_PROGRESS: "A running job got further; told once a second at most.",
    SystemEvent.BATCH_COMPLETED: "Every job of a batch ended.",
    SystemEvent.CHAIN_COMPLETED: "Every step of a chain's run completed.",
    SystemEvent.CHAIN_FAILED: "A chain's run ended otherwise: `failed`, `timeout` or `cancelled`.",
    SystemEvent.SCHEDULE_MISSED: "Slots of a schedule did not run, for the stated reason.",
    SystemEvent.SCHEDULE_FAILING: "Three runs of a schedule failed in a row. Told again once one succeeded.",
    SystemEvent.JOB_TYPE_FAILING: "Too many of a job type's jobs failed, by the operator's failure rates.",
    SystemEvent.JOB_TYPE_RECOVERED: "A job type that was failing fails no more than it may.",
    SystemEvent.ENDPOINT_FAILING: "An endpoint has been failing for 50, 70 or 90 % of what disables it.",
    SystemEvent.ENDPOINT_DISABLED: "An endpoint was disabled, for the stated reason.",
    SystemEvent.ENDPOINT_RECOVERED: "A failing endpoint answered well again.",
    SystemEvent.ENDPOINT_TEST: "Somebody asked for a test event.",
}
"""Every event and when it is sent: the reference page and OpenAPI's `webhooks` come from here."""

_GLOB = re.compile(r"[a-z_]+\.\*|\*")


def known_pattern(pattern: str) -> bool:
    """Whether an endpoint may subscribe to `pattern`: an event, `job.*` and its like, or `*`."""
    if pattern in CATALOGUE:
        return True
    return bool(_GLOB.fullmatch(pattern)) and any(fnmatchcase(name, pattern) for name in CATALOGUE)


def subscribed(event_type: str, patterns: Sequence[str]) -> bool:
    """Whether one of an endpoint's patterns covers the event. A test event is for everybody who is asked."""
    return any(event_type == each or fnmatchcase(event_type, each) for each in patterns)
