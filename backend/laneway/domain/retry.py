"""Whether and when a failed job is tried again."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from random import Random

from laneway.errors import (
    LanewayError,
    PermanentError,
    QuotaQueued,
    RateLimited,
    Retry,
    Snooze,
    TransientError,
    Unavailable,
)

CRASH_DELAY_SECONDS = 5.0
CRASH_MAX_DELAY_SECONDS = 300.0


class Category(StrEnum):
    """Why an attempt did not complete, and so what follows."""

    TRANSIENT = "transient"  # another attempt may succeed: it follows while retries are left
    PERMANENT = "permanent"  # another attempt would fail too: a dead letter at once
    TIMEOUT = "timeout"  # it used up its `timeout_seconds`: retried like a transient failure
    CRASH = "crash"  # its process died: charged as a crash, of which `crash_limit` make a dead letter
    SNOOZE = "snooze"  # it asked to come back later: nothing is charged


class DeadLetterReason(StrEnum):
    """Why no attempt followed the last one."""

    EXHAUSTED = "exhausted"  # it failed, and no retry was left
    PERMANENT = "permanent"  # it failed in a way that another attempt would not mend
    TIMEOUT = "timeout"  # it ran out of time, and no retry was left
    POISON = "poison"  # its process died so often as `crash_limit` says


Exceptions = tuple[type[BaseException], ...]

CATEGORIES: dict[type[BaseException], Category] = {
    PermanentError: Category.PERMANENT,
    TransientError: Category.TRANSIENT,
    Retry: Category.TRANSIENT,
    Snooze: Category.SNOOZE,
    LanewayError: Category.PERMANENT,  # refused by us, and would be again: parameters, a result
    QuotaQueued: Category.TRANSIENT,
    RateLimited: Category.TRANSIENT,
    Unavailable: Category.TRANSIENT,
    BaseException: Category.TRANSIENT,
}
"""What an exception means where its job type does not say; the nearest of its classes counts.

All that is not ours may pass: most failures are of something else, and a mistake in the handler is mended
by a deploy while its jobs wait (so Sidekiq, Oban and Temporal too).
"""


def category_of(error: BaseException, *, retry_on: Exceptions = (), no_retry_on: Exceptions = ()) -> Category:
    """What an attempt that raised `error` is, by its job type's two lists and then by CATEGORIES.

    What is in `no_retry_on` is permanent. With `retry_on`, what is not in it is permanent as well. Neither
    overrules `Retry` and `Snooze`, which ask for another attempt by name; `retry_on` none of ours.
    """
    nearest = next(kind for kind in type(error).__mro__ if kind in CATEGORIES)
    if nearest not in (Retry, Snooze) and isinstance(error, no_retry_on):
        return Category.PERMANENT
    if nearest is BaseException and retry_on and not isinstance(error, retry_on):
        return Category.PERMANENT
    return CATEGORIES[nearest]


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """A job's own answer to failure: how many more attempts, and how long before each."""

    max_retries: int = 3
    delay_seconds: float = 120.0
    backoff: float = 2.0
    max_delay_seconds: float = 1800.0
    jitter: bool = True

    def delay(self, retry_count: int, *, rng: Random) -> float:
        """Seconds before the attempt that follows the `retry_count`-th retry (0: the first failure).

        `min(delay · backoff^retry_count, cap)`: 2, 4, 8 … 30 minutes by default. With jitter, spread over
        50 to 100 % of itself, so that jobs failing together do not come back together ("equal jitter":
        Brooker, Exponential Backoff And Jitter, AWS Architecture Blog 2015). Raises ValueError below 0.
        """
        if retry_count < 0:
            raise ValueError("retry_count must not be negative")
        try:
            full = min(self.delay_seconds * self.backoff**retry_count, self.max_delay_seconds)
        except OverflowError:
            full = self.max_delay_seconds
        return full * rng.uniform(0.5, 1.0) if self.jitter else full


def crash_delay(crash_count: int) -> float:
    """Seconds before a job whose process died is tried again: 5, 10, 20 … 300 s."""
    return float(min(CRASH_DELAY_SECONDS * 2.0 ** min(crash_count - 1, 20), CRASH_MAX_DELAY_SECONDS))
