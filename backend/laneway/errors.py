"""Every error Laneway raises on purpose.

    LanewayError                   code, HTTP status, facts
    ├── BadRequest            400  cannot be read at all
    │   └── WebhookNotVerified     raised to receivers, by verify_webhook
    ├── Unauthenticated       401
    ├── Forbidden             403  known caller, missing right
    │   ├── HostNotAllowed
    │   └── OriginNotAllowed
    ├── NotFound              404  also for what belongs to another tenant
    │   ├── KeyNotFound
    │   ├── DeadLetterNotFound
    │   ├── JobNotFound
    │   ├── JobTypeNotFound
    │   ├── EndpointNotFound
    │   ├── DeliveryNotFound
    │   ├── BatchNotFound
    │   ├── ChainNotFound
    │   ├── ChainRunNotFound
    │   ├── ScheduleNotFound
    │   ├── QueueNotFound
    │   └── TenantNotFound
    ├── Conflict              409  the state does not allow it; facts.current_status
    │   ├── IllegalTransition
    │   ├── NotFinished
    │   ├── IdempotencyInProgress
    │   └── UniqueKeyTaken
    ├── PreconditionFailed    412  it has changed since it was read
    ├── PayloadTooLarge       413
    ├── Unprocessable         422  readable, and wrong; `errors` points at the fields
    │   ├── IdempotencyKeyReused
    │   ├── InvalidParameters
    │   ├── InvalidPayload
    │   ├── UnknownDependency
    │   ├── UnknownJobType
    │   ├── CostExceedsQuota       waiting does not help
    │   └── WebhookUrlRefused
    ├── RateLimited           429
    │   ├── AbnormalUsage          too many failed logins from one address
    │   └── ConcurrentRequests     too many streams and long waits at once
    ├── QuotaQueued           429  too many jobs of the tenant wait
    └── Unavailable           503  try again
        ├── StorageUnavailable     nobody can say that anything was written
        ├── CapacityReduced        a rate limit cannot be checked, and is set to refuse then
        └── Overloaded             too many jobs wait

A handler answers by raising: PermanentError, TransientError, Retry, Snooze. JobCancelled and
JobTimeout derive from BaseException, so that `except Exception` in a handler cannot swallow them.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import randint
from typing import Any, ClassVar


@dataclass(frozen=True, slots=True)
class FieldError:
    """One wrong field: `pointer` is a JSON Pointer (RFC 6901) into the request body."""

    pointer: str
    detail: str
    code: str


def try_again_seconds() -> int:
    """2 to 10, drawn: callers that were refused together shall not come back together."""
    return randint(2, 10)  # noqa: S311 - jitter


class LanewayError(Exception):
    """The root. `code` is for programs and never changes; the message is for people and may.

    `facts` are safe to show to the caller. `retry_after_seconds` becomes a Retry-After header.
    """

    code: ClassVar[str] = "internal_error"
    status: ClassVar[int] = 500
    title: ClassVar[str] = "Internal error"

    def __init__(
        self,
        message: str = "",
        *,
        errors: tuple[FieldError, ...] = (),
        retry_after_seconds: int | None = None,
        **facts: Any,
    ) -> None:
        super().__init__(message or self.title)
        self.errors = errors
        self.retry_after_seconds = retry_after_seconds
        self.facts = facts


class BadRequest(LanewayError):
    code, status, title = "bad_request", 400, "The request cannot be read"


class InvalidCursor(BadRequest):
    code, title = "invalid_cursor", "The cursor is bent, or was made for other filters"


class WebhookNotVerified(BadRequest):
    code, title = "webhook_not_verified", "The request is not a webhook of ours, or not a fresh one"


class Unauthenticated(LanewayError):
    code, status, title = "unauthenticated", 401, "A valid API key is needed"


class Forbidden(LanewayError):
    code, status, title = "forbidden", 403, "The caller may not do this"


class HostNotAllowed(Forbidden):
    code, title = "host_not_allowed", "The API does not answer to this host name"


class OriginNotAllowed(Forbidden):
    code, title = "origin_not_allowed", "Pages of this origin may not call the API"


class NotFound(LanewayError):
    code, status, title = "not_found", 404, "There is nothing here"


class JobNotFound(NotFound):
    code, title = "job_not_found", "There is no such job"


class DeadLetterNotFound(NotFound):
    code, title = "dead_letter_not_found", "There is no such dead letter"


class JobTypeNotFound(NotFound):
    code, title = "job_type_not_found", "There is no such job type"


class EndpointNotFound(NotFound):
    code, title = "endpoint_not_found", "There is no such webhook endpoint"


class DeliveryNotFound(NotFound):
    code, title = "delivery_not_found", "There is no such webhook delivery"


class BatchNotFound(NotFound):
    code, title = "batch_not_found", "There is no such batch"


class ChainNotFound(NotFound):
    code, title = "chain_not_found", "There is no such chain"


class ChainRunNotFound(NotFound):
    code, title = "chain_run_not_found", "There is no such run of the chain"


class ScheduleNotFound(NotFound):
    code, title = "schedule_not_found", "There is no such schedule"


class QueueNotFound(NotFound):
    code, title = "queue_not_found", "There is no such queue"


class TenantNotFound(NotFound):
    code, title = "tenant_not_found", "There is no such tenant"


class KeyNotFound(NotFound):
    code, title = "key_not_found", "There is no such API key"


class Conflict(LanewayError):
    code, status, title = "conflict", 409, "The present state does not allow this"


class IllegalTransition(Conflict):
    code, title = "illegal_transition", "The job's status does not allow this action"


class NotFinished(Conflict):
    code, title = "not_finished", "The job has not ended yet"


class UniqueKeyTaken(Conflict):
    code, title = "unique_key_taken", "An active job holds this unique key"


class IdempotencyInProgress(Conflict):
    code, title = "idempotency_in_progress", "A request with this Idempotency-Key is still under way"


class PreconditionFailed(LanewayError):
    code, status, title = "precondition_failed", 412, "It has changed since it was read"


class PayloadTooLarge(LanewayError):
    code, status, title = "payload_too_large", 413, "The payload is too large"


class Unprocessable(LanewayError):
    code, status, title = "invalid_request", 422, "The request is not valid"


class IdempotencyKeyReused(Unprocessable):
    code, title = "idempotency_key_reused", "The Idempotency-Key was sent with another request before"


class InvalidParameters(Unprocessable):
    code, title = "invalid_parameters", "The parameters do not fit the job type"


class InvalidPayload(Unprocessable):
    code, title = "invalid_payload", "The JSON holds something that cannot be stored"


class UnknownJobType(Unprocessable):
    code, title = "unknown_job_type", "No such job type is registered"


class UnknownDependency(Unprocessable):
    code, title = "unknown_dependency", "There is no such job to wait for"


class WebhookUrlRefused(Unprocessable):
    code, title = "webhook_url_refused", "The webhook URL may not be called from here"


class CostExceedsQuota(Unprocessable):
    code, title = "cost_exceeds_quota", "The request costs more than a rate limit ever allows"


class RateLimited(LanewayError):
    code, status, title = "rate_limited", 429, "Too many requests"


class AbnormalUsage(RateLimited):
    code, title = "abnormal_usage_detected", "Too many failed logins"


class ConcurrentRequests(RateLimited):
    code, title = "concurrent_requests", "Too many streams and long waits at once"


class QuotaQueued(LanewayError):
    code, status, title = "quota_queued", 429, "Too many jobs of this tenant wait"


class Unavailable(LanewayError):
    """Asks for `try_again_seconds()` unless told otherwise."""

    code, status, title = "unavailable", 503, "Nothing was accepted; try again later"

    def __init__(self, message: str = "", *, retry_after_seconds: int | None = None, **more: Any) -> None:
        super().__init__(message, retry_after_seconds=retry_after_seconds or try_again_seconds(), **more)


class StorageUnavailable(Unavailable):
    code, title = "storage_unavailable", "The database cannot be reached; nothing was accepted"


class CapacityReduced(Unavailable):
    code, title = "temporary_reduced_capacity", "A rate limit cannot be checked; nothing was accepted"


class Overloaded(Unavailable):
    code, title = "overloaded", "Too many jobs wait; more urgent ones are accepted"


class PermanentError(Exception):
    """Raised by a handler: another attempt would fail too. The job becomes a dead letter at once."""


class TransientError(Exception):
    """Raised by a handler: try again with the job's backoff."""


class Retry(Exception):
    """Raised by a handler: try again in `in_seconds`. It is charged like any other failed attempt."""

    def __init__(self, in_seconds: float = 0.0, message: str = "") -> None:
        if in_seconds < 0:
            raise ValueError("in_seconds must not be negative")
        super().__init__(message or f"retry in {in_seconds:g} s")
        self.in_seconds = in_seconds


class Snooze(Exception):
    """Raised by a handler: come back in `in_seconds`. No attempt is charged."""

    def __init__(self, in_seconds: float, message: str = "") -> None:
        if in_seconds < 0:
            raise ValueError("in_seconds must not be negative")
        super().__init__(message or f"snoozed for {in_seconds:g} s")
        self.in_seconds = in_seconds


class JobCancelled(BaseException):
    """Raised in a handler by `check_cancelled()` once somebody asked the job to stop."""


class JobTimeout(BaseException):
    """Raised in a handler when its `timeout_seconds` are over. A grace later the process is killed."""
