"""What a stock `rq worker critical high normal low` runs: one job, by the same claim and settle as the pool.

The pool is the fast way; this is the compatible one. Each call happens in RQ's forked work horse, makes a
worker row of its own, beats while the handler runs, and settles before it returns. RQ's own record of the
job follows from how this function ends; Laneway's does not depend on it.
"""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import threading
from random import Random
from typing import Any

import sqlalchemy as sa

from laneway.clock import SystemClock, new_id
from laneway.db import Database
from laneway.engine import leases, progress
from laneway.engine.context import Progress
from laneway.engine.endings import Cancelled, Ending, HandedOver, Raised, Returned, TimedOut
from laneway.engine.exchange import Holder, exchange
from laneway.engine.leases import Wish
from laneway.engine.outcomes import Claimed
from laneway.engine.registry import load
from laneway.engine.running import Runner
from laneway.lanes.live import RedisNews
from laneway.log import configure, get_logger
from laneway.settings import Settings, get_settings
from laneway.webhooks.messages import WAKE_CHANNEL
from laneway.worker.alarm import Alarm
from laneway.worker.beats import Beats

SAVE_PROGRESS_SECONDS = 1.0

log = get_logger("worker")


class JobFailed(Exception):
    """The job ended failed in Laneway; raised so that RQ's tools show it as failed too."""


def run(job_id: str) -> Any:
    """Claim the job, run its handler, settle. Returns the handler's result, None when nothing was to run."""
    settings = get_settings()
    configure(json_lines=None if settings.log_format == "auto" else settings.log_format == "json")
    run = _Run(settings)
    try:
        return run.execute(job_id)
    finally:
        run.close()


class _Run:
    """One job in this process, and the `Line` of its handler."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._clock = SystemClock()
        self._database = Database(
            settings.database, pool_size=2, statement_seconds=settings.worker_statement_seconds
        )
        self._news = RedisNews(settings.redis_url, courier_channel=WAKE_CHANNEL)
        self._worker_id = new_id()
        self._finished = threading.Event()
        self._stir = threading.Event()  # for the watch: it is finished, or somebody wants it to stop
        self._cancel_at: float | None = None  # monotonic: when the grace of a cancel is over
        self._settling = threading.Lock()
        self._unsaved: Progress | None = None
        self._job: Claimed | None = None

    def execute(self, job_id: str) -> Any:
        registry = load(self._settings.tasks)
        rng = Random()  # noqa: S311 - jitter
        self._holder = Holder(self._worker_id, registry.names, self._settings.crash_limit, rng)
        name = f"rq-{socket.gethostname()}-{os.getpid()}"
        leases.register(self._database, worker_id=self._worker_id, name=name, lanes=[])
        token = new_id()
        beats = Beats(
            self._settings,
            worker_id=self._worker_id,
            held=lambda: [token],
            begun=lambda: [token],
            clock=self._clock,
            wished=self._hear_wishes,
            lost=_end_process,
        )
        job = self._claim(job_id, token)
        if job is None:
            log.info("nothing_to_claim", job_id=job_id)
            return None
        self._job = job
        beats.start()
        try:
            threading.Thread(target=self._watch, daemon=True).start()
            ending = Runner(Alarm()).run(
                registry.need(job.job_type),
                job_id=job.job_id,
                attempt=job.attempt,
                parameters=job.parameters,
                timeout_seconds=job.timeout_seconds,
                line=self,
            )
            self._finished.set()
            self._stir.set()
            self._settle(ending)
        finally:
            beats.stop()
        if isinstance(ending, Returned):
            return None if ending.result is None else json.loads(ending.result)
        if isinstance(ending, Raised | TimedOut):
            raise JobFailed(ending.message if isinstance(ending, Raised) else "timed out")
        return None

    def close(self) -> None:
        leases.leave(self._database, worker_id=self._worker_id)
        self._news.close()
        self._database.dispose()

    def _claim(self, job_id: str, token: str) -> Claimed | None:
        done = exchange(
            self._database, self._holder, ended=(), wanted=[(job_id, token)], news={}, now=self._clock.now()
        )
        return done.claimed[0] if done.claimed else None

    def _settle(self, ending: Ending | HandedOver) -> None:
        """Write how the job ended, once: the handler's thread and the watchdogs may race."""
        job = self._job
        if job is None or not self._settling.acquire(blocking=False):
            return
        news = {} if self._unsaved is None else {job.job_id: (job, self._unsaved)}
        done = exchange(
            self._database, self._holder, ended=[(job, ending)], wanted=(), news=news, now=self._clock.now()
        )
        for _, error in done.refused:
            raise error
        if done.stale:
            log.warning("stale_attempt", job_id=job.job_id, attempt=job.attempt)
        self._news.changed([job.job_id])
        if any(settled.webhook for settled in done.settled):
            self._news.ring_courier()

    # The watch: a thread that ends the process when the handler does not end by itself

    def _watch(self) -> None:
        """Write progress while the handler runs; kill it when it outstays its timeout or its cancel."""
        if (job := self._job) is None:
            return
        timeout_at = self._clock.monotonic() + job.timeout_seconds + self._settings.timeout_grace_seconds
        while not self._finished.is_set():
            now = self._clock.monotonic()
            cancel_at = math.inf if self._cancel_at is None else self._cancel_at
            if now >= cancel_at:
                self._kill(Cancelled())
            if now >= timeout_at:
                self._kill(TimedOut(job.timeout_seconds))
            self._save_progress(job)
            self._stir.wait(max(0.0, min(SAVE_PROGRESS_SECONDS, timeout_at - now, cancel_at - now)))
            self._stir.clear()

    def _save_progress(self, job: Claimed) -> None:
        news, self._unsaved = self._unsaved, None
        if news is None:
            return
        try:
            with self._database.write() as connection:
                told = progress.save_and_tell(connection, [(job, news)], now=self._clock.now())
        except (sa.exc.DBAPIError, sa.exc.TimeoutError) as error:
            log.warning("progress_not_saved", error=type(error).__name__)
            return
        self._news.changed([job.job_id])
        if told:
            self._news.ring_courier()

    def _hear_wishes(self, wishes: list[Wish]) -> None:
        for wish in wishes:
            default = self._settings.cancel_grace_seconds
            grace = default if wish.grace_seconds is None else wish.grace_seconds
            kill_at = self._clock.monotonic() + (0.0 if wish.terminate else grace)
            self._cancel_at = kill_at if self._cancel_at is None else min(kill_at, self._cancel_at)
        self._stir.set()

    def _kill(self, ending: Ending) -> None:
        try:
            self._settle(ending)
            leases.leave(self._database, worker_id=self._worker_id)
        finally:  # also while the database is away: then the reaper finds that its worker is silent
            _end_process()

    # The handler's line

    def report(self, progress_now: Progress) -> None:
        self._unsaved = progress_now

    def cancelled(self) -> bool:
        return self._cancel_at is not None


def _end_process() -> None:
    """Kill this work horse, and what the handler started: it leads a process group."""
    me = os.getpid()
    if os.getpgrp() == me:
        os.killpg(me, signal.SIGKILL)
    os.kill(me, signal.SIGKILL)
