"""The scheduler process: runs the sweeps whenever something may have fallen due. Any number may run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial

import sqlalchemy as sa

from laneway.clock import Clock
from laneway.db import Database
from laneway.engine import recoveries, upkeep
from laneway.engine.failure_rates import FailureRates
from laneway.engine.reaper import Reaper
from laneway.engine.retention import Retention, prune
from laneway.lanes.backend import LaneBackend, LanesUnavailable
from laneway.log import get_logger
from laneway.settings import Settings

PRUNE_SECONDS = 0.25  # of one round: a due job waits no longer for the deletion of old ones
PRUNE_REST_SECONDS = 60.0
WATCH_SECONDS = 15.0
RECOVER_SECONDS = 0.25  # of one round, likewise

log = get_logger("scheduler")


class Ticker:
    """Promotes, expires, reaps, reconciles, recovers, prunes and watches until it is stopped."""

    def __init__(self, database: Database, lanes: LaneBackend, settings: Settings, *, clock: Clock) -> None:
        self._database = database
        self._lanes = lanes
        self._settings = settings
        self._clock = clock
        self._reaper = Reaper(
            database, clock, lease_seconds=settings.lease_seconds, crash_limit=settings.crash_limit
        )
        self._retention = Retention.from_settings(settings)
        self._failure_rates = FailureRates(database)
        self._watch_at = self._prune_at = clock.monotonic()

    def run(self, stopping: threading.Event) -> None:
        """Run a round every `tick_seconds`, and promote in between as soon as a job falls due."""
        log.info("scheduler_started")
        round_at = self._clock.monotonic()
        wait = 0.0
        while not stopping.wait(wait):
            if self._clock.monotonic() >= round_at:
                went_well = self.tick()
                round_at = self._clock.monotonic() + self._settings.tick_seconds
            else:
                went_well = self._promote()
            left = max(0.0, round_at - self._clock.monotonic())
            wait = min(left, self._until_due()) if went_well else left
        log.info("scheduler_stopped")

    def tick(self) -> bool:
        """One round of every sweep; whether all went well. One that fails is logged and tried again."""
        return all(
            [
                self._promote(),
                self._sweep("expire", lambda: upkeep.expire(self._database, now=self._clock.now())),
                self._sweep("reap", lambda: self._ring(self._reaper.sweep())),
                self._sweep("reconcile", self._reconcile),
                self._sweep("recoveries", self._recover),
                self._sweep("prune", self._prune),
                self._sweep("watch", self._watch),
            ]
        )

    def _promote(self) -> bool:
        due = partial(upkeep.promote, self._database, now=self._clock.now())
        return self._sweep("promote", lambda: self._ring(due()))

    def _reconcile(self) -> int:
        window = self._settings.lane_window
        return upkeep.reconcile(self._database, self._lanes, window=window, now=self._clock.now())

    def _recover(self) -> int:
        """Deliveries queued. Batches follow each other for RECOVER_SECONDS."""
        began = self._clock.monotonic()
        queued, more = 0, True
        while more and self._clock.monotonic() - began < RECOVER_SECONDS:
            count, more = recoveries.sweep(self._database, now=self._clock.now())
            queued += count
        return queued

    def _prune(self) -> int:
        """Rows deleted. Batches follow each other for PRUNE_SECONDS; when none is left, a rest follows."""
        began = self._clock.monotonic()
        rows = 0
        while self._clock.monotonic() >= self._prune_at:
            batch = prune(self._database, self._retention, now=self._clock.now())
            rows += batch.rows
            now = self._clock.monotonic()
            if not batch.more:
                self._prune_at = now + PRUNE_REST_SECONDS
            elif now - began >= PRUNE_SECONDS:
                break
        return rows

    def _watch(self) -> int:
        """Notifications written about job types that fail too often, or no longer."""
        if self._clock.monotonic() < self._watch_at:
            return 0
        self._watch_at = self._clock.monotonic() + WATCH_SECONDS
        return self._failure_rates.watch(now=self._clock.now())

    def _ring(self, items: Sequence[tuple[str, str]]) -> int:
        return self._lanes.push(items) if items else 0

    def _sweep(self, name: str, sweep: Callable[[], int]) -> bool:
        try:
            done = sweep()
        except (LanesUnavailable, sa.exc.DBAPIError, sa.exc.TimeoutError) as error:
            log.warning("sweep_failed", sweep=name, error=type(error).__name__)
            return False
        if done:
            log.info("swept", sweep=name, rows=done)
        return True

    def _until_due(self) -> float:
        """Seconds until the next scheduled or retrying job falls due."""
        try:
            due = upkeep.next_due(self._database)
        except (sa.exc.DBAPIError, sa.exc.TimeoutError):
            return self._settings.tick_seconds
        return float("inf") if due is None else max(0.0, (due - self._clock.now()).total_seconds())
