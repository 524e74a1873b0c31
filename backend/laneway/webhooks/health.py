"""How a receiver has been answering, and what follows: its pace, its pauses, its end.

Pure rules over one record a *target*: a registered endpoint, or one tenant's way to one origin for the
URLs that single jobs name. Couriers share the records through the database (`webhook_health`).

The pace is an adaptive cap on attempts in flight: one more for each success, half of it on each failure
(additive increase, multiplicative decrease: Chiu and Jain, Computer Networks 1989). A fixed cap is not
enough: fifty receivers that hang, at eight attempts each, take every slot that a courier has.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum
from http import HTTPStatus
from uuid import UUID, uuid5

from laneway.webhooks.retries import BUSY, Answer, ErrorClass, retry_after_seconds

FIRST_CAP = 2
SUSPECT_FAILURES = 3  # in a row: from here on a target shares a quarter of the slots with all such
BREAKER_FAILURES = 5  # in a row, of the kind that time heals
BREAKER_SECONDS = 30.0
BREAKER_MAX_SECONDS = 900.0
DISABLE_AFTER = timedelta(days=5)
DISABLE_SPREAD = timedelta(hours=12)  # between the first and the last failure, however few there are
WARN_PERCENTS = (50, 70, 90)

_ORIGINS = UUID("6f0c4a8e-6d5b-5b63-9c43-3a0f9c1f6f0a")


class BlockedReason(StrEnum):
    """Why nothing is sent to a target for a while."""

    BREAKER = "breaker"
    RETRY_AFTER = "retry_after"
    PROBE = "probe"  # the pause is over, and one attempt finds out whether the target is back


@dataclass(frozen=True, slots=True)
class Health:
    """What is known of one target; the default is that of a target nothing is known of."""

    consecutive_failures: int = 0
    failing_since: datetime | None = None
    last_failure_at: datetime | None = None
    last_success_at: datetime | None = None
    opened: int = 0  # how often the breaker opened since the last success
    blocked_until: datetime | None = None
    blocked_reason: BlockedReason | None = None
    warned_percent: int = 0

    @property
    def suspect(self) -> bool:
        return self.consecutive_failures >= SUSPECT_FAILURES

    def paused(self, until: datetime | None, reason: BlockedReason | None) -> Health:
        return replace(self, blocked_until=until, blocked_reason=reason)

    @property
    def worth_keeping(self) -> bool:
        """Whether it says more than a target's absence from the table."""
        return self != Health(last_success_at=self.last_success_at)


def origin(url: str) -> str:
    """What one receiver's URLs have in common: `https://host:port/` of a canonical URL."""
    end = url.find("/", len("https://"))
    return url if end < 0 else url[: end + 1]


def target_of(tenant_id: str, url: str) -> str:
    """The target of a job's own `webhook_url`: one a tenant and origin, so that unique paths share it."""
    return str(uuid5(_ORIGINS, f"{tenant_id}|{origin(url)}"))


def after(health: Health, answer: Answer, *, opened: int, now: datetime) -> Health:
    """The health once `answer` came.

    `opened` is what it was when the attempt was claimed: an answer to what was in flight when
    the breaker opened changes nothing about it.

    Any failure counts towards disabling. Only what time heals (no connection, no answer, 5xx, 429) opens
    the breaker: 404 and its kin say that the receiver is there. The pause doubles from 30 s to 15 minutes
    for each probe that fails. A Retry-After of a 429 or 503 pauses the target for as long as it asks,
    whatever else is answered well.
    """
    asked = health.blocked_reason is BlockedReason.RETRY_AFTER
    if answer.error_class is None:
        if asked and health.blocked_until is not None and health.blocked_until > now:
            return Health(last_success_at=now).paused(health.blocked_until, health.blocked_reason)
        return Health(last_success_at=now)
    failed = replace(
        health,
        consecutive_failures=health.consecutive_failures + 1,
        failing_since=health.failing_since or now,
        last_failure_at=now,
    )
    if asks_to_wait(answer, now=now):
        until = now + timedelta(seconds=retry_after_seconds(answer.retry_after, now=now))
        longer = asked and health.blocked_until is not None and health.blocked_until >= until
        return failed if longer else failed.paused(until, BlockedReason.RETRY_AFTER)
    if opened != health.opened:
        return failed
    if failed.consecutive_failures >= BREAKER_FAILURES and _time_may_heal(answer):
        seconds = min(BREAKER_SECONDS * 2.0 ** min(health.opened, 20), BREAKER_MAX_SECONDS)
        until = now + timedelta(seconds=seconds)
        if asked and health.blocked_until is not None:
            until = max(until, health.blocked_until)
        return replace(failed.paused(until, BlockedReason.BREAKER), opened=health.opened + 1)
    return failed.paused(None, None) if health.blocked_reason is BlockedReason.PROBE else failed


def asks_to_wait(answer: Answer, *, now: datetime) -> bool:
    """Whether the receiver asked for a pause: 429 or 503 with Retry-After. It is not charged."""
    return answer.status_code in BUSY and retry_after_seconds(answer.retry_after, now=now) > 0


def _time_may_heal(answer: Answer) -> bool:
    match answer.error_class:
        case ErrorClass.HTTP_4XX:
            return answer.status_code in (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS)
        case ErrorClass.SSRF_BLOCKED | ErrorClass.REDIRECT:
            return False
        case _:
            return True


def next_cap(cap: int, answer: Answer, *, most: int) -> int:
    """The cap on attempts in flight after `answer`: 1 to `most`."""
    return min(cap + 1, most) if answer.error_class is None else max(cap // 2, 1)


def capped(cap: int, health: Health) -> int:
    """The cap as far as the health allows it: one at a time to a target that fails or was paused."""
    return 1 if health.suspect or health.blocked_reason is not None else cap


def percent_to_disabling(health: Health, *, enabled_at: datetime, now: datetime) -> int:
    """How far a failing endpoint is on its way to being disabled: 0 to 100.

    100 after five days without a success in which it failed, and failed again at least twelve hours later.
    """
    if health.failing_since is None or health.last_failure_at is None:
        return 0
    since = max(health.failing_since, enabled_at)
    percent = int(100 * min((now - since) / DISABLE_AFTER, 1.0))
    if percent >= 100 and health.last_failure_at - since < DISABLE_SPREAD:
        return 99
    return max(percent, 0)


def due_warning(health: Health, percent: int) -> int | None:
    """The warning of WARN_PERCENTS that `percent` reached and nobody has been told yet."""
    reached = [step for step in WARN_PERCENTS if health.warned_percent < step <= percent]
    return reached[-1] if reached else None
