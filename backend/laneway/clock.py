"""Time, ids, and when to try again: the only module that asks the operating system what time it is."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable
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


class Breaker:
    """Whether to try what failed a moment ago: not for `seconds`, and then one caller after the other.

    Each caller asks `may_try`, and says `failed` when nobody answered, `worked` when somebody did. Safe to
    share between threads.
    """

    def __init__(self, monotonic: Callable[[], float], *, seconds: float) -> None:
        self._monotonic = monotonic
        self._seconds = seconds
        self._lock = threading.Lock()
        self._shut_until = -math.inf

    @property
    def shut(self) -> bool:
        """True from a failure until something worked."""
        return self._shut_until > -math.inf

    def may_try(self) -> bool:
        """False while shut. When that is over one caller tries; the others wait for another `seconds`."""
        if not self.shut:
            return True
        with self._lock:
            now = self._monotonic()
            if now < self._shut_until:
                return False
            if self.shut:
                self._shut_until = now + self._seconds
            return True

    def failed(self) -> None:
        with self._lock:
            self._shut_until = self._monotonic() + self._seconds

    def worked(self) -> None:
        if self.shut:
            with self._lock:
                self._shut_until = -math.inf


class _Ids:
    """The state behind `new_id`. Random bytes are fetched for many ids at once: the call gives up the GIL,
    and under load it costs a hundred times more to get that back than to make an id."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = 0  # milliseconds since 1970 and a 12-bit counter, as one integer
        self._random = memoryview(b"")

    def next(self) -> tuple[int, int]:
        """A stamp larger than every one before, and 62 random bits."""
        stamp = (time.time_ns() // 1_000_000) << 12
        with self._lock:
            self._last = stamp = stamp if stamp > self._last else self._last + 1
            if not self._random:
                self._random = memoryview(os.urandom(8 * 512))
            tail, self._random = self._random[:8], self._random[8:]
        return stamp, int.from_bytes(tail, "big") & 0x3FFF_FFFF_FFFF_FFFF


_ids = _Ids()


def _start_over() -> None:
    """A forked child must not draw the ids that its parent draws."""
    global _ids  # noqa: PLW0603 - one state a process
    _ids = _Ids()


os.register_at_fork(after_in_child=_start_over)


def new_id() -> str:
    """A UUIDv7 (RFC 9562 section 5.7) as text: sorts by time of creation within this process.

    The 12 bits after the millisecond count up (RFC 9562 section 6.2, method 1), so a batch made in
    one millisecond keeps its order; past 4,096 a millisecond the stamp runs ahead of the clock.
    """
    return _text(*_ids.next())


def first_id(moment: datetime, *, seconds: float = 0.0) -> str:
    """The smallest UUIDv7 of that millisecond, `seconds` later: what was made earlier sorts before it."""
    return _text(max(0, int((moment.timestamp() + seconds) * 1000)) << 12, 0)


def _text(stamp: int, tail: int) -> str:
    number = (stamp >> 12) << 80 | 0x7 << 76 | (stamp & 0xFFF) << 64 | 0x2 << 62 | tail
    text = f"{number:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"
