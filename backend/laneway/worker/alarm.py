"""SIGALRM shared by several deadlines: the job's timeout, sharing a slow round, a held-back report."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from types import FrameType

AGAIN_SECONDS = 0.002
SOON_SECONDS = 1e-4  # setitimer(2) takes 0 for "never"


class Alarm:
    """Calls each action once its time has come, in the main thread between two bytecodes.

    While `put_off` answers True nothing is called, only a little later: what runs then must not be
    interrupted half-way. An action may raise; the exception appears where the main thread was. The timer
    is set only when a deadline comes before the one it is set for: a ring with nothing due is harmless,
    and a round of short jobs with long timeouts costs no system call.
    """

    def __init__(self, put_off: Callable[[], bool] = lambda: False) -> None:
        self._put_off = put_off
        self._due: dict[str, tuple[float, Callable[[], None]]] = {}
        self._set_for = math.inf
        signal.signal(signal.SIGALRM, self._ring)

    def set(self, name: str, action: Callable[[], None], *, seconds: float) -> None:
        """Call `action` after `seconds`, in place of what `name` stood for before."""
        at = time.monotonic() + seconds
        self._due[name] = at, action
        if at < self._set_for:
            self._set_timer(at)

    def clear(self, name: str) -> None:
        self._due.pop(name, None)

    def _set_timer(self, at: float) -> None:
        self._set_for = at
        signal.setitimer(signal.ITIMER_REAL, max(SOON_SECONDS, at - time.monotonic()))

    def _ring(self, _signal: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._put_off():
            self._set_timer(now + AGAIN_SECONDS)
            return
        self._set_for = math.inf
        late = [name for name, (at, _) in list(self._due.items()) if at <= now]
        actions = [self._due.pop(name)[1] for name in late]
        if self._due:
            self._set_timer(min(at for at, _ in list(self._due.values())))
        for action in actions:
            action()
