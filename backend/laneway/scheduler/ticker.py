"""The scheduler process: runs the sweeps whenever something may have fallen due. Any number may run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import sqlalchemy as sa

from laneway.clock import Clock
from laneway.db import Database
from laneway.engine import upkeep
from laneway.lanes.backend import LaneBackend, LanesUnavailable
from laneway.log import get_logger
from laneway.settings import Settings

log = get_logger("scheduler")


class Ticker:
    """Promotes, expires, reaps and reconciles until it is stopped."""

    def __init__(self, database: Database, lanes: LaneBackend, settings: Settings, *, clock: Clock) -> None:
        self._database = database
        self._lanes = lanes
        self._settings = settings
        self._clock = clock
        self._reaper = upkeep.Reaper(
            database, clock, lease_seconds=settings.lease_seconds, crash_limit=settings.crash_limit
        )

    def run(self, stopping: threading.Event) -> None:
        """Tick until `stopping` is set; sleeps no longer than to the next due job, after failures a tick."""
        log.info("scheduler_started")
        went_well = True
        while not stopping.wait(self._pause() if went_well else self._settings.tick_seconds):
            went_well = self.tick()
        log.info("scheduler_stopped")

    def tick(self) -> bool:
        """One round of every sweep; whether all went well. One that fails is logged and tried again."""
        now = self._clock.now
        return all(
            [
                self._sweep("promote", lambda: self._ring(upkeep.promote(self._database, now=now()))),
                self._sweep("expire", lambda: upkeep.expire(self._database, now=now())),
                self._sweep("reap", lambda: self._ring(self._reaper.sweep())),
                self._sweep("reconcile", self._reconcile),
            ]
        )

    def _reconcile(self) -> int:
        window = self._settings.lane_window
        return upkeep.reconcile(self._database, self._lanes, window=window, now=self._clock.now())

    def _ring(self, items: Sequence[tuple[str, str]]) -> int:
        return self._lanes.push(items) if items else 0

    def _sweep(self, name: str, sweep: Callable[[], int]) -> bool:
        try:
            done = sweep()
        except (LanesUnavailable, sa.exc.DBAPIError, sa.exc.TimeoutError) as error:
            log.warning("sweep_failed", sweep=name, error=type(error).__name__)
            return False
        if done:
            log.info("swept", sweep=name, jobs=done)
        return True

    def _pause(self) -> float:
        longest = self._settings.tick_seconds
        try:
            due = upkeep.next_due(self._database)
        except (sa.exc.DBAPIError, sa.exc.TimeoutError):
            return longest
        if due is None:
            return longest
        return min(longest, max(0.0, (due - self._clock.now()).total_seconds()))
