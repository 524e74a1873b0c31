"""`python -m chaos.program ROLE …`: `laneway ROLE …` with failpoints, a clock that can be set, short waits.

What has no setting in the product is shortened here, so that retries of crashes and of webhooks fit into
a run of two minutes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path

from chaos import failpoints, mutants

CLOCK_VARIABLE = "CHAOS_CLOCK"
"""A file with the seconds by which this process's wall clock is wrong. Gone: it is right."""


def main() -> None:
    shorten()
    _wrong_clock(Path(os.environ[CLOCK_VARIABLE]))
    failpoints.install(failpoints.IN_MAIN, Path(os.environ[failpoints.FOLDER_VARIABLE]))
    if name := os.environ.get(mutants.VARIABLE):
        mutants.MUTANTS[name]()

    from laneway.cli import main as laneway

    with short_crashes():
        laneway(sys.argv[1:])


@contextmanager
def short_crashes() -> Iterator[None]:
    """Also for the harness: the checker knows how long a crashed job must have waited."""
    from laneway.domain import retry

    usual = retry.CRASH_DELAY_SECONDS, retry.CRASH_MAX_DELAY_SECONDS
    retry.CRASH_DELAY_SECONDS, retry.CRASH_MAX_DELAY_SECONDS = 0.5, 2.0
    try:
        yield
    finally:
        retry.CRASH_DELAY_SECONDS, retry.CRASH_MAX_DELAY_SECONDS = usual


def shorten() -> None:
    """For the processes alone: a test process would go on with it in other tests."""
    from laneway.webhooks import courier, health, messages

    messages.QUICK_SECONDS = (0.5, 1.0)
    health.BREAKER_SECONDS, health.BREAKER_MAX_SECONDS = 1.0, 2.0
    courier.LEASE_MARGIN_SECONDS, courier.MAX_TIMEOUT_SECONDS = 3.0, 0.0


def _wrong_clock(path: Path) -> None:
    from laneway.clock import SystemClock

    right = SystemClock.now

    def now(self: SystemClock) -> datetime:
        try:
            return right(self) + timedelta(seconds=float(path.read_text()))
        except (FileNotFoundError, ValueError):
            return right(self)

    SystemClock.now = now  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
