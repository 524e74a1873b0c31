"""What may be asked for: one job, with its limits."""

from __future__ import annotations

from datetime import datetime, timedelta
from enum import StrEnum
from typing import Annotated, Any, Literal, Self
from uuid import UUID

from pydantic import (
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    model_validator,
)
from pydantic_core import PydanticCustomError

from laneway.domain.events import EventType
from laneway.domain.http_target import HTTP_REQUEST, HttpTarget

QUEUE_PATTERN = r"^[a-z][a-z0-9_]{0,49}$"
JOB_TYPE_PATTERN = r"^[a-z][a-z0-9_]*(\.[a-z0-9_]+)*$"
DEFAULT_QUEUE = "default"
MAX_TAGS = 20
MAX_DEPENDENCIES = 100
MAX_SECONDS = 366 * 24 * 3600
MAX_CONCURRENCY = 1_000  # jobs of one key that run at once
MAX_DEBOUNCE_SECONDS = 86_400


class Priority(StrEnum):
    """Which lane of its queue a job waits in, most urgent first."""

    CRITICAL = "critical"
    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"


_BY_NUMBER = {10: Priority.CRITICAL, 8: Priority.HIGH, 5: Priority.NORMAL, 0: Priority.LOW}


def priority_of(value: object) -> object:
    """The priority that an integer stands for; anything else as it is."""
    return _BY_NUMBER.get(value, value) if type(value) is int else value


def lane_of(queue: str, priority: Priority) -> str:
    """The lane's name, which is the RQ queue's: `high` on the default queue, `emails-high` on another."""
    if queue == DEFAULT_QUEUE:
        return priority.value
    return queue if priority is Priority.NORMAL else f"{queue}-{priority.value}"


def lanes_of(queues: tuple[str, ...]) -> tuple[str, ...]:
    """Every lane of `queues` in the order a worker drains them: all critical ones first, and so on."""
    return tuple(lane_of(queue, priority) for priority in Priority for queue in queues)


def queue_of(lane: str) -> str:
    """The queue a lane belongs to: `default` for `high`, `emails` for `emails-high` and `emails`."""
    queue = lane.partition("-")[0]
    return DEFAULT_QUEUE if queue in _RESERVED else queue


_RESERVED = {lane_of(DEFAULT_QUEUE, priority) for priority in Priority}


def queue_name(value: str) -> str:
    """The name, unless it is a lane's: then ValueError."""
    if value in _RESERVED:
        raise ValueError(f"{value!r} is a lane of the default queue; ask for queue 'default' and a priority")
    return value


Text = Annotated[str, Field(max_length=200)]
Tags = Annotated[tuple[Annotated[str, Field(min_length=1, max_length=100)], ...], Field(max_length=MAX_TAGS)]
Seconds = Annotated[float, Field(ge=0, le=MAX_SECONDS, allow_inf_nan=False)]


def _unsaid() -> Any:
    return None


def _or_of_the_target(value: object, info: ValidationInfo) -> object:
    """The job type; where none is said that of HTTP jobs, if there is a target (be it a bad one)."""
    if value is not None:
        return value
    if "target" in info.data and info.data["target"] is None:
        raise PydanticCustomError("missing", "Field required")
    return HTTP_REQUEST


class JobSpec(BaseModel):
    """A job as its caller describes it. Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # Before `job_type`, which it stands for.
    target: HttpTarget | None = Field(
        None, description="A URL to be called, in place of `job_type` and `parameters`."
    )
    job_type: Annotated[str, BeforeValidator(_or_of_the_target)] = Field(
        default_factory=_unsaid,
        validate_default=True,
        pattern=JOB_TYPE_PATTERN,
        max_length=100,
        examples=["demo.echo"],
        description="Needed where there is no `target`.",
    )
    parameters: dict[str, Any] = Field(
        default_factory=dict, description="At most 256 KiB of JSON, 32 levels deep."
    )
    queue: Annotated[str, Field(pattern=QUEUE_PATTERN)] = DEFAULT_QUEUE
    priority: Annotated[Priority, BeforeValidator(priority_of)] = Field(
        Priority.NORMAL,
        description="The integers 10, 8, 5 and 0 are taken for critical, high, normal and low.",
    )
    title: Text | None = None
    description: Annotated[str, Field(max_length=2000)] | None = None
    tags: Tags = ()
    metadata: dict[str, Any] = Field(
        default_factory=dict, description="The caller's own; at most 16 KiB of JSON."
    )
    scheduled_for: AwareDatetime | None = Field(None, description="Do not start before this moment.")
    delay_seconds: Seconds | None = Field(None, description="Instead of scheduled_for: start so much later.")
    expires_at: AwareDatetime | None = Field(None, description="A job not started by then ends `expired`.")
    timeout_seconds: Annotated[int, Field(ge=1, le=MAX_SECONDS)] | None = None
    max_retries: Annotated[int, Field(ge=0, le=100)] = 3
    retry_delay_seconds: Seconds = 120.0
    retry_backoff: Annotated[float, Field(ge=1, le=10, allow_inf_nan=False)] = 2.0
    retry_max_delay_seconds: Seconds = 1800.0
    retry_jitter: bool = True
    depends_on: Annotated[tuple[UUID, ...], Field(max_length=MAX_DEPENDENCIES)] = Field(
        (), description="Jobs that must have completed before this one may start."
    )
    on_dependency_failure: Literal["cancel", "run"] = Field(
        "cancel", description="What becomes of the job when one of these ends in another way."
    )
    unique_key: Annotated[str, Field(min_length=1, max_length=200)] | None = Field(
        None, description="At most one active job of the tenant holds this key."
    )
    on_conflict: Literal["return_existing", "reject"] = "return_existing"
    debounce_seconds: Annotated[int, Field(ge=1, le=MAX_DEBOUNCE_SECONDS)] | None = Field(
        None, description="Start so long after the last request with the unique key, with what that one says."
    )
    concurrency_key: Annotated[str, Field(min_length=1, max_length=200)] | None = Field(
        None, description="Of the tenant's jobs with this key only so many run at once."
    )
    concurrency_limit: Annotated[int, Field(ge=1, le=MAX_CONCURRENCY)] | None = Field(
        None, description="How many; 1 where only the key is given."
    )
    webhook_url: Annotated[str, Field(min_length=1, max_length=2048)] | None = None
    webhook_events: (
        Annotated[tuple[EventType, ...], Field(min_length=1, max_length=len(EventType))] | None
    ) = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        queue_name(self.queue)
        if self.scheduled_for is not None and self.delay_seconds is not None:
            raise ValueError("give scheduled_for or delay_seconds, not both")
        if self.target is not None and not self.model_fields_set.isdisjoint(("job_type", "parameters")):
            raise ValueError("give job_type and parameters, or a target, not both")
        if self.depends_on and (self.scheduled_for is not None or self.delay_seconds is not None):
            raise ValueError("give depends_on or a time to start at, not both")
        if self.concurrency_limit is not None and self.concurrency_key is None:
            raise ValueError("concurrency_limit needs a concurrency_key")
        if self.debounce_seconds is not None:
            self._can_be_debounced()
        if self.webhook_events is not None and self.webhook_url is None:
            raise ValueError("webhook_events needs a webhook_url")
        return self

    def _can_be_debounced(self) -> None:
        if self.unique_key is None:
            raise ValueError("debounce_seconds needs a unique_key")
        if self.on_conflict != "return_existing":
            raise ValueError("give debounce_seconds or on_conflict, not both")
        if self.depends_on or self.scheduled_for is not None or self.delay_seconds is not None:
            raise ValueError("give debounce_seconds, another time to start at or depends_on: one of them")

    @property
    def parents(self) -> tuple[str, ...]:
        """`depends_on`, each job once."""
        return tuple(dict.fromkeys(map(str, self.depends_on)))

    @property
    def lane(self) -> str:
        return lane_of(self.queue, self.priority)

    def starts_at(self, now: datetime) -> datetime | None:
        """When the job may start, or None for at once."""
        if delay := self.debounce_seconds or self.delay_seconds:
            return now + timedelta(seconds=delay)
        return self.scheduled_for if self.scheduled_for is not None and self.scheduled_for > now else None


class JobChange(BaseModel):
    """What shall be different about a job that waits: at least one of these. Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    priority: Annotated[Priority, BeforeValidator(priority_of)] = Field(
        default_factory=_unsaid, description="As in `POST /jobs`. A job that is queued goes to that lane."
    )
    scheduled_for: AwareDatetime = Field(
        default_factory=_unsaid, description="Only of a scheduled job; a moment that is past: now."
    )
    tags: Tags = Field(default_factory=_unsaid, description="In place of all it has.")
    metadata: dict[str, Any] = Field(default_factory=_unsaid, description="In place of all it has.")
    parameters: dict[str, Any] = Field(
        default_factory=_unsaid, description="In place of all it has; checked as in `POST /jobs`."
    )

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not self.model_fields_set:
            raise ValueError(f"give at least one of {', '.join(type(self).model_fields)}")
        return self
