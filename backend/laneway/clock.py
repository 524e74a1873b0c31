"""Time and ids: the only module that asks the operating system what time it is."""

from __future__ import annotations

import os
import threading
import time
from datetime import UTC, datetime, timedelta
from typing import Protocol


class Clock(Protocol):
    """What code that needs time is handed."""

    def now(self) -> datetime:
        """The moment, timezone-aware UTC."""
        ...

    def monotonic(self) -> float:
        """Seconds from an unknown start that never go back."""
        ...


class SystemClock:
    """The machine's own clocks. Process entry points build one; everything else is handed it."""

    def now(self) -> datetime:
        return datetime.now(UTC)

    def monotonic(self) -> float:
        return time.monotonic()


class FrozenClock:
    """A clock that moves only by `advance`: for tests."""

    def __init__(self, start: datetime = datetime(2026, 1, 1, 12, tzinfo=UTC)) -> None:
        self._now = start
        self._ticks = 1000.0

    def now(self) -> datetime:
        return self._now

    def monotonic(self) -> float:
        return self._ticks

    def advance(self, **by: float) -> datetime:
        """Move both clocks on by `timedelta(**by)`; returns the new moment."""
        step = timedelta(**by)
        self._now += step
        self._ticks += step.total_seconds()
        return self._now


_lock = threading.Lock()
_last = 0  # milliseconds since 1970 and a 12-bit counter, as one integer


def new_id() -> str:
    """A UUIDv7 (RFC 9562 section 5.7) as text: sorts by time of creation within this process.

    The 12 bits after the millisecond count up (RFC 9562 section 6.2, method 1), so a batch made in
    one millisecond keeps its order; past 4,096 a millisecond the stamp runs ahead of the clock.
    """
    global _last  # noqa: PLW0603 - the counter is the point
    stamp = (time.time_ns() // 1_000_000) << 12
    with _lock:
        _last = stamp = stamp if stamp > _last else _last + 1
    tail = int.from_bytes(os.urandom(8), "big") & 0x3FFF_FFFF_FFFF_FFFF
    number = (stamp >> 12) << 80 | 0x7 << 76 | (stamp & 0xFFF) << 64 | 0x2 << 62 | tail
    text = f"{number:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"
