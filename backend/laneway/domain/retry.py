"""When a failed job is tried again."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

CRASH_DELAY_SECONDS = 5.0
CRASH_MAX_DELAY_SECONDS = 300.0


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
