"""What one attempt means for its delivery: done, tried again at a moment, or dead."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from enum import StrEnum
from http import HTTPStatus
from random import Random

QUICK_SECONDS = (5.0, 60.0)
"""The waits after the first and the second attempt: the schedule of a job's own `webhook_url`."""

MAX_ATTEMPTS = len(QUICK_SECONDS) + 1
JITTER = 0.2
MAX_RETRY_AFTER_SECONDS = 24 * 3600


class DeliveryStatus(StrEnum):
    """Where a delivery is."""

    PENDING = "pending"
    SENDING = "sending"  # a courier holds it: `lease_owner`, `lease_until`
    RETRYING = "retrying"  # waits for `next_at`
    DELIVERED = "delivered"  # answered 2xx
    DEAD = "dead"  # given up


UNDONE = frozenset({DeliveryStatus.PENDING, DeliveryStatus.SENDING, DeliveryStatus.RETRYING})


class ErrorClass(StrEnum):
    """Why an attempt failed, for programs."""

    DNS = "dns"
    CONNECT = "connect"
    TLS = "tls"
    TIMEOUT = "timeout"
    RESET = "reset"
    SSRF_BLOCKED = "ssrf_blocked"
    PROTOCOL = "protocol"
    REDIRECT = "redirect"
    HTTP_4XX = "http_4xx"
    HTTP_5XX = "http_5xx"


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one request. `error_class` is None exactly when the receiver said 2xx."""

    started_at: datetime
    total_ms: int
    status_code: int | None = None
    error_class: ErrorClass | None = None
    error: str | None = None
    body: str | None = None  # at most 4 KiB of it
    retry_after: str | None = None  # the header, as it came


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of the delivery; `next_at` is set for RETRYING alone."""

    status: DeliveryStatus
    next_at: datetime | None = None


def judge(answer: Answer, *, attempt: int, max_attempts: int, now: datetime, rng: Random) -> Verdict:
    """The verdict on the attempt with the number `attempt`, counted from 1.

    Every status but 2xx is tried again, also 404: deployments answer it. 410 says that nobody wants it
    any more (Standard Webhooks 1.0.0), and what the guard refused it will refuse again. A Retry-After
    longer than the schedule is honoured, up to a day.
    """
    if answer.error_class is None:
        return Verdict(DeliveryStatus.DELIVERED)
    gone = answer.status_code == HTTPStatus.GONE
    if gone or answer.error_class is ErrorClass.SSRF_BLOCKED or attempt >= max_attempts:
        return Verdict(DeliveryStatus.DEAD)
    scheduled = QUICK_SECONDS[min(attempt, len(QUICK_SECONDS)) - 1] * rng.uniform(1 - JITTER, 1 + JITTER)
    asked = retry_after_seconds(answer.retry_after, now=now)
    return Verdict(DeliveryStatus.RETRYING, now + timedelta(seconds=max(scheduled, asked)))


def retry_after_seconds(value: str | None, *, now: datetime) -> float:
    """The seconds a Retry-After header asks for (RFC 9110 section 10.2.3), 0 to a day; 0 for nonsense."""
    if value is None:
        return 0.0
    value = value.strip()
    if value.isascii() and value.isdigit():
        return float(MAX_RETRY_AFTER_SECONDS if len(value) > 9 else min(int(value), MAX_RETRY_AFTER_SECONDS))
    try:
        moment = parsedate_to_datetime(value)
        moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment
        seconds = (moment - now).total_seconds()
    except (ValueError, TypeError, OverflowError):
        return 0.0
    return min(max(seconds, 0.0), float(MAX_RETRY_AFTER_SECONDS))
