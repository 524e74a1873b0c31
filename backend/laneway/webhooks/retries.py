"""What one attempt means for its delivery: done, tried again at a moment, or dead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from enum import StrEnum
from http import HTTPStatus
from random import Random

QUICK_SECONDS = (5.0, 60.0)
"""The waits after the first and the second attempt: the schedule of a job's own `webhook_url`."""

STANDARD_SECONDS = (5.0, 300.0, 1800.0, 7200.0, 18000.0, 36000.0, 50400.0, 72000.0, 86400.0)
"""The schedule of registered endpoints: ten attempts over 75 hours (Standard Webhooks' example)."""

JITTER = 0.2
BUSY = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
KEPT_HEADERS = ("content-type", "date", "location", "retry-after", "server", "webhook-retry")
MAX_RETRY_AFTER_SECONDS = 24 * 3600
MAX_TIMEOUT_SECONDS = 30.0
MAX_UNCHARGED = 20


class DeliveryStatus(StrEnum):
    """Where a delivery is."""

    PENDING = "pending"
    SENDING = "sending"  # a courier holds it: `lease_owner`, `lease_until`
    RETRYING = "retrying"  # waits for `next_at`
    DELIVERED = "delivered"  # answered 2xx
    DEAD = "dead"  # given up
    CANCELLED = "cancelled"  # its endpoint was disabled or deleted
    SUPERSEDED = "superseded"  # progress that was overtaken
    SKIPPED = "skipped"  # its endpoint was disabled when it happened


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
    CHANNEL = "channel"  # a notification's channel could not pass it on


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time of an attempt went, in milliseconds; None for what was not needed or not reached."""

    total_ms: int
    dns_ms: int | None = None
    connect_ms: int | None = None  # with the TLS handshake
    first_byte_ms: int | None = None  # from the start to the status line


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one request. `error_class` is None exactly when the receiver said 2xx."""

    started_at: datetime
    timings: Timings
    status_code: int | None = None
    error_class: ErrorClass | None = None
    error: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)  # those of KEPT_HEADERS, names in lower case
    body: str | None = None  # at most 4 KiB of it
    truncated: bool = False
    remote_ip: str | None = None
    request_bytes: int = 0

    @property
    def retry_after(self) -> str | None:
        return self.headers.get("retry-after")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of the delivery; `next_at` is set for RETRYING alone.

    `charged` is False for an attempt that only learnt how long to wait: it does not count against the
    delivery's attempts.
    """

    status: DeliveryStatus
    next_at: datetime | None = None
    charged: bool = True


def judge(
    answer: Answer,
    *,
    attempt: int,
    max_attempts: int,
    schedule: Sequence[float],
    give_up_at: datetime | None,
    now: datetime,
    rng: Random,
) -> Verdict:
    """The verdict on the attempt with the number `attempt`, counted from 1.

    Every status but 2xx is tried again, also 404: deployments answer it. 410 says that nobody wants it
    any more (Standard Webhooks 1.0.0), `webhook-retry: no` says so of this message, and what the guard
    refused it will refuse again. `schedule` holds the seconds before each retry, spread by 20 %. A
    Retry-After longer than the schedule is honoured, up to a day; with 429 or 503 the attempt is not
    charged, which ends with the 20th. Nothing is tried after `give_up_at`.
    """
    if answer.error_class is None:
        return Verdict(DeliveryStatus.DELIVERED)
    refused = answer.headers.get("webhook-retry", "").strip().lower() == "no"
    gone = answer.status_code == HTTPStatus.GONE
    asked = retry_after_seconds(answer.retry_after, now=now)
    charged = not (asked > 0 and answer.status_code in BUSY and attempt <= MAX_UNCHARGED)
    left = max_attempts - attempt
    if gone or refused or answer.error_class is ErrorClass.SSRF_BLOCKED or (charged and left <= 0):
        return Verdict(DeliveryStatus.DEAD)
    place = min(max(len(schedule) - left, 0), len(schedule) - 1)
    scheduled = schedule[place] * rng.uniform(1 - JITTER, 1 + JITTER) if schedule else 0.0
    next_at = now + timedelta(seconds=max(scheduled, asked))
    if give_up_at is not None and next_at > give_up_at:
        return Verdict(DeliveryStatus.DEAD)
    return Verdict(DeliveryStatus.RETRYING, next_at, charged)


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
