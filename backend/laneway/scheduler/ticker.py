"""The scheduler process: runs the sweeps whenever something may have fallen due. Any number may run.

One thread does what has a time, delayed jobs, retries and schedules, and sleeps until the next of them:
whatever else there is to do, they are not late. Somebody who makes something that is due sooner than it
knows rings (Redis, best effort); a look a tick is what that rests on. Another thread does all the rest, a
round a tick.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from random import Random

import sqlalchemy as sa

from laneway.clock import Clock
from laneway.db import Database
from laneway.engine import concurrency, flow_upkeep, http_jobs, recoveries, slots, upkeep
from laneway.engine.admission import Admission
from laneway.engine.failure_rates import FailureRates
from laneway.engine.reaper import Reaper
from laneway.engine.retention import Retention, prune
from laneway.engine.schedule_ends import fold_ends
from laneway.engine.slots import Fired
from laneway.lanes.backend import Due, LaneBackend, LanesUnavailable
from laneway.lanes.live import SCHEDULER_CHANNEL, News, Silence, listen
from laneway.log import get_logger
from laneway.sdk.declared import Declared
from laneway.settings import Settings

PRUNE_SECONDS = 0.25  # of one round: a due job waits no longer for the deletion of old ones
PRUNE_REST_SECONDS = 60.0
WATCH_SECONDS = 15.0
SLOTS_SECONDS = 3.0  # what was woken needs time to be claimed
RECOVER_SECONDS = 0.25  # of one round, likewise
BREATH_SECONDS = 0.01  # between two looks at what is due: what falls due meanwhile goes together

log = get_logger("scheduler")


class Ticker:
    """Promotes, fires, expires, reaps, reconciles, recovers, prunes and watches until it is stopped."""

    def __init__(
        self,
        database: Database,
        lanes: LaneBackend,
        settings: Settings,
        *,
        clock: Clock,
        news: News | None = None,
        declared: Declared | None = None,
    ) -> None:
        self._declared = declared
        self._database = database
        self._lanes = lanes
        self._settings = settings
        self._clock = clock
        self._news = news or Silence()
        self._room = Admission(database, settings, clock)
        self._rng = Random()  # noqa: S311 - jitter
        self._failure: Exception | None = None
        self._reaper = Reaper(
            database, clock, lease_seconds=settings.lease_seconds, crash_limit=settings.crash_limit
        )
        self._retention = Retention.from_settings(settings)
        self._failure_rates = FailureRates(database)
        self._watch_at = self._prune_at = self._slots_at = clock.monotonic()
        self._slots = concurrency.Place()

    def run(self, stopping: threading.Event) -> None:
        """Work until `stopping` is set. Raises what nobody expected."""
        log.info("scheduler_started")
        rung = threading.Event()
        url, heard = self._settings.redis_url, lambda _: rung.set()
        for target, arguments in ((_pass_on, (stopping, rung)), (_listen, (url, heard, stopping))):
            threading.Thread(target=target, args=arguments, daemon=True).start()
        rounds = threading.Thread(target=self._rounds, args=(stopping,), name="scheduler-rounds")
        rounds.start()
        try:
            while not stopping.is_set():
                rung.clear()
                rung.wait(self.turn())
        finally:
            stopping.set()
            rounds.join()
        if self._failure is not None:
            raise self._failure
        log.info("scheduler_stopped")

    def turn(self) -> float:
        """Do what is due. How long to sleep then: until the next is, a tick at most."""
        tick = self._settings.tick_seconds
        return max(BREATH_SECONDS, min(tick, self._until_due())) if self._due() else tick

    def _rounds(self, stopping: threading.Event) -> None:
        try:
            while not stopping.is_set():
                self.tick()
                stopping.wait(self._settings.tick_seconds)
        except Exception as error:
            self._failure = error
            stopping.set()

    def tick(self) -> bool:
        """One round of every sweep; whether all went well. One that fails is logged and tried again."""
        return all(
            [
                self._sweep("declared", self._declared.keep if self._declared else lambda: 0),
                self._due(),
                self._sweep("waiting", lambda: self._fired(slots.start_waiting)),
                self._sweep("overtaken", self._cancel_overtaken),
                self._sweep("schedule_ends", self._fold_ends),
                self._sweep("expire", lambda: upkeep.expire(self._database, now=self._clock.now())),
                self._sweep("reap", lambda: self._ring(self._reaper.sweep())),
                self._sweep("targets", self._end_overdue),
                self._sweep("flow", self._flow),
                self._sweep("slots", self._wake_waiting),
                self._sweep("reconcile", self._reconcile),
                self._sweep("recoveries", self._recover),
                self._sweep("prune", self._prune),
                self._sweep("watch", self._watch),
            ]
        )

    def _due(self) -> bool:
        """What has a time: runs of schedules, delayed jobs, retries."""
        return all([self._sweep("schedules", lambda: self._fired(slots.fire)), self._promote()])

    def _fired(self, sweep: Callable[..., Fired]) -> int:
        """The slots that it decided."""
        return self._tell(sweep(self._database, self._room, now=self._clock.now()))

    def _cancel_overtaken(self) -> int:
        done = slots.cancel_overtaken(self._database, now=self._clock.now())
        if done.decided:
            self._news.wished()
        return self._tell(done)

    def _fold_ends(self) -> int:
        count, told = fold_ends(self._database, now=self._clock.now())
        return self._tell(Fired(count, told=told))

    def _tell(self, done: Fired) -> int:
        if done.told:
            self._news.ring_courier()
        self._ring(done.rung)
        return done.decided

    def _promote(self) -> bool:
        due = partial(upkeep.promote, self._database, now=self._clock.now())
        return self._sweep("promote", lambda: self._ring(due()))

    def _reconcile(self) -> int:
        window = self._settings.lane_window
        return upkeep.reconcile(self._database, self._lanes, window=window, now=self._clock.now())

    def _end_overdue(self) -> int:
        """HTTP jobs whose target had no more time to report."""
        done = http_jobs.end_overdue(
            self._database,
            now=self._clock.now(),
            cancel_grace_seconds=self._settings.cancel_grace_seconds,
            crash_limit=self._settings.crash_limit,
            rng=self._rng,
        )
        self._news.changed(done.ids)
        self._tell(Fired(len(done.ids), rung=list(done.due), told=done.told))
        return len(done.ids)

    def _flow(self) -> int:
        """Jobs that may start, of what ends had left over; see engine/flow_upkeep.py."""
        return self._ring(flow_upkeep.sweep(self._database, now=self._clock.now()))

    def _wake_waiting(self) -> int:
        """Jobs woken whose slots are free; see engine/concurrency.py."""
        if self._clock.monotonic() < self._slots_at:
            return 0
        self._slots_at = self._clock.monotonic() + SLOTS_SECONDS
        woken, self._slots = concurrency.sweep(self._database, now=self._clock.now(), after=self._slots)
        return self._lanes.push_first(woken)

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
        return rows + slots.prune_runs(self._database, now=self._clock.now())

    def _watch(self) -> int:
        """Notifications written about job types that fail too often, or no longer."""
        if self._clock.monotonic() < self._watch_at:
            return 0
        self._watch_at = self._clock.monotonic() + WATCH_SECONDS
        return self._failure_rates.watch(now=self._clock.now())

    def _ring(self, items: Sequence[Due]) -> int:
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
        """Seconds until the next job or schedule falls due."""
        now = self._clock.now()
        try:
            due = upkeep.next_due(self._database)
            slot = slots.seconds_until_due(self._database, now=now)
        except (sa.exc.DBAPIError, sa.exc.TimeoutError):
            return self._settings.tick_seconds
        waits = [] if slot is None else [slot]
        waits += [] if due is None else [(due - now).total_seconds()]
        return max(0.0, min(waits, default=float("inf")))


def _pass_on(stopping: threading.Event, rung: threading.Event) -> None:
    stopping.wait()
    rung.set()


def _listen(redis_url: str, heard: Callable[[str], None], stopping: threading.Event) -> None:
    listen(redis_url, SCHEDULER_CHANNEL, heard, stopping=stopping)
