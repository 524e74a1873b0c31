"""The backend that needs nobody else: the same engine on a SQLite file of this process, gone with it.

For tests and notebooks. Jobs are claimed, run and settled by the code that workers use, but in threads of
this process: a handler that dies takes the process with it, and one that outstays its timeout in C code, or
goes on after its cancel, cannot be killed. `run_next` and `run_all` run what is due in the calling thread;
`running` starts threads that do so whenever something falls due. No webhook leaves by itself.
"""

from __future__ import annotations

import asyncio
import atexit
import ctypes
import os
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from random import Random
from typing import Any, Self

import sqlalchemy as sa

from laneway import models
from laneway.clock import Clock, new_id
from laneway.db import Database
from laneway.domain.spec import lanes_of, queue_of
from laneway.engine import concurrency, flow_upkeep, leases, slots, upkeep
from laneway.engine.access.callers import DEFAULT_TENANT, ensure_tenant
from laneway.engine.admission import Admission
from laneway.engine.context import Progress
from laneway.engine.exchange import Holder, exchange
from laneway.engine.outcomes import Claimed
from laneway.engine.pauses import open_lanes, paused_names
from laneway.engine.queries import lanes_with_work, view
from laneway.engine.registry import load
from laneway.engine.running import Runner
from laneway.engine.service import JobService, Prepared
from laneway.errors import JobTimeout, Unprocessable
from laneway.lanes.backend import Due
from laneway.lanes.memory_lanes import MemoryLanes
from laneway.lanes.turns import FairPicks
from laneway.log import get_logger
from laneway.sdk.backend import Answer, Request
from laneway.sdk.declared import Declared
from laneway.sdk.local import SAVE_SECONDS, LocalBackend, follow_up, save_progress
from laneway.settings import Settings
from laneway.webhooks.secrets import KEY_BYTES, SecretBox

MAX_RUNS = 10_000
IDLE_SECONDS = 1.0

log = get_logger("memory")


class Endless(RuntimeError):
    """`run_all` came to no end: jobs make jobs."""


class MemoryBackend(LocalBackend):
    """A store, its lanes and its only worker. Safe to use from many threads."""

    service: JobService

    def __init__(self, settings: Settings, *, clock: Clock | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="laneway-")
        url = f"sqlite:///{self._folder.name}/laneway.db"
        nobody = f"unix://{self._folder.name}/no-redis.sock"
        settings = settings.model_copy(
            update={"database_url": url, "redis_url": nobody, "waiting_per_tenant": 10**9}
        )
        database = Database(url)
        sa.event.listen(database.engine, "connect", _hurry if clock is None else _tell_time(clock))
        models.metadata.create_all(database.engine)
        self.box = SecretBox({"memory": os.urandom(KEY_BYTES)})
        ensure_tenant(database, self.box, DEFAULT_TENANT)
        self._lanes = _RingingLanes()
        service = JobService(database, self._lanes, settings, load(settings.tasks), clock=clock)
        super().__init__(service)
        self._room = Admission(database, settings, service.clock)
        worker_id = new_id()
        leases.register(database, worker_id=worker_id, name="memory", lanes=[])
        self._worker_id = worker_id
        self._picks: dict[str, FairPicks] = {}
        self._threads: list[threading.Thread] = []
        self._stopping = False

    @classmethod
    def running(cls, settings: Settings) -> Self:
        """A backend whose jobs run by themselves, as many at once as a worker has children."""
        backend = cls(settings)
        backend.keep_declared()
        for number in range(backend.service.settings.children):
            thread = threading.Thread(target=backend._work, name=f"laneway-memory-{number}", daemon=True)
            thread.start()
            backend._threads.append(thread)
        atexit.register(backend.close)
        return backend

    def close(self) -> None:
        self._stopping = True
        self._lanes.bell.set()
        for thread in self._threads:
            thread.join(IDLE_SECONDS)
        super().close()
        self._folder.cleanup()
        atexit.unregister(self.close)

    @property
    def engine(self) -> sa.Engine:
        """SQLAlchemy's engine of the store: for an application's own tables beside it."""
        return self.service.database.engine

    def keep_declared(self) -> None:
        """Make the schedules that `@scheduled_job` declared, as a scheduler does when it starts."""
        Declared(self.service).keep()

    def _prepare(self, request: Request) -> Prepared:
        if request.get("target") is not None:
            raise Unprocessable("the memory backend calls no URLs: HTTP jobs need a running Laneway")
        return super()._prepare(request)

    def wait(self, job_id: str, *, timeout_seconds: float) -> Answer:
        if not self._threads:
            self.run_all()
            return self.get(job_id)
        return super().wait(job_id, timeout_seconds=timeout_seconds)

    # Running jobs

    def run_all(self) -> list[Answer]:
        """Run what is due until nothing is, also what that enqueues; the jobs, in the order they ran.

        Retries that are due later wait for their time. Raises Endless past MAX_RUNS runs.
        """
        if _in_event_loop():  # handlers that are `async` need a thread without one
            with ThreadPoolExecutor(1, "laneway-memory") as elsewhere:
                return elsewhere.submit(self.run_all).result()
        ran: list[str] = []
        while (job_id := self.run_next()) is not None:
            ran.append(job_id)
            if len(ran) > MAX_RUNS:
                raise Endless(f"{MAX_RUNS} jobs ran, and there are more: does a job enqueue itself?")
        with self.service.database.read() as connection:  # of every tenant
            rows = connection.execute(sa.select(models.jobs).where(models.jobs.c.id.in_(ran))).mappings()
            jobs = {row["id"]: view(row) for row in rows}
        return [jobs[job_id] for job_id in ran if job_id in jobs]

    def run_next(self) -> str | None:
        """Run the most urgent job that is due; its id, None when none is."""
        job = self._claim_next() or (self._fall_due() and self._claim_next()) or None
        if job is None:
            return None
        job_type = self.service.registry.need(job.job_type)
        line = _Line(self.service, job)
        ending = Runner(ThreadAlarm()).run(
            job_type,
            job_id=job.job_id,
            attempt=job.attempt,
            parameters=job.parameters,
            timeout_seconds=job.timeout_seconds,
            line=line,
        )
        news = {} if line.unsaved is None else {job.job_id: (job, line.unsaved)}
        done = exchange(
            self.service.database,
            self._holder(),
            ended=[(job, ending)],
            wanted=(),
            news=news,
            now=self.service.clock.now(),
        )
        for _, error in done.refused:
            raise error
        follow_up(self.service, done)
        self._lanes.bell.set()  # it may be due again at some time
        return job.job_id

    def _holder(self) -> Holder:
        service = self.service
        rng = Random()  # noqa: S311 - jitter
        return Holder(self._worker_id, service.registry.names, service.settings.crash_limit, rng)

    def _claim_next(self) -> Claimed | None:
        database, now = self.service.database, self.service.clock.now()
        paused = paused_names(database)
        while True:
            with database.read() as connection:
                waiting = {queue_of(lane) for lane in lanes_with_work(connection)}
                lanes = open_lanes(lanes_of(tuple(sorted(waiting))), paused)
                ids = self._lanes.take(lanes, 1, worker_name="memory") or leases.find_queued(
                    connection, lanes, self.service.registry.names, limit=1, before=now, picks=self._picks
                )
            if not ids:
                return None
            token = new_id()
            done = exchange(database, self._holder(), ended=(), wanted=[(ids[0], token)], news={}, now=now)
            if done.claimed:
                return done.claimed[0]

    def _fall_due(self) -> bool:
        """Queue what has fallen due; whether anything has."""
        database, now = self.service.database, self.service.clock.now()
        upkeep.expire(database, now=now)
        due = upkeep.promote(database, now=now)
        slots.cancel_overtaken(database, now=now)
        due += slots.fire(database, self._room, now=now).rung
        due += slots.start_waiting(database, self._room, now=now).rung
        due += flow_upkeep.sweep(database, now=now)
        due += concurrency.sweep(database, now=now)[0]
        self.service.ring(due)
        return bool(due)

    def _work(self) -> None:
        while not self._stopping:
            try:
                if self.run_next() is not None:
                    continue
                rest = self._seconds_until_due()
            except Exception as error:  # a thread that dies would leave jobs lying
                log.exception("run_failed", error=type(error).__name__)
                rest = IDLE_SECONDS
            self._lanes.bell.wait(rest)
            self._lanes.bell.clear()

    def _seconds_until_due(self) -> float:
        """Until the next job or schedule falls due; at most IDLE_SECONDS."""
        database, now = self.service.database, self.service.clock.now()
        due = upkeep.next_due(database)
        waits = [None if due is None else (due - now).total_seconds()]
        waits.append(slots.seconds_until_due(database, now=now))
        return max(0.0, min(wait for wait in (*waits, IDLE_SECONDS) if wait is not None))


class _RingingLanes(MemoryLanes):
    """Lanes that also wake whoever runs the jobs of all queues."""

    def __init__(self) -> None:
        super().__init__()
        self.bell = threading.Event()

    def push(self, items: Sequence[Due]) -> int:
        taken = super().push(items)
        self.bell.set()
        return taken

    def push_first(self, items: Sequence[Due]) -> int:
        taken = super().push_first(items)
        self.bell.set()
        return taken


class _Line:
    """The line of a handler in this process: the store is near enough to be asked each time."""

    def __init__(self, service: JobService, job: Claimed) -> None:
        self.unsaved: Progress | None = None
        self._service = service
        self._job = job
        self._save_at = 0.0

    def report(self, progress: Progress) -> None:
        self.unsaved = progress
        if time.monotonic() >= self._save_at:
            self._save_at = time.monotonic() + SAVE_SECONDS
            save_progress(self._service, self._job, progress)
            self.unsaved = None

    def cancelled(self) -> bool:
        j = models.jobs.c
        asked = sa.select(j.id).where(j.id == self._job.job_id, j.cancel_requested_at.is_not(None))
        with self._service.database.read() as connection:
            return connection.execute(asked).first() is not None


class ThreadAlarm:
    """An `Alarm` without signals: an action that raises JobTimeout raises it in the thread that made this.

    The exception appears there between two bytecodes (PyThreadState_SetAsyncExc), and never after `clear`.
    """

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        self._lock = threading.Lock()
        self._timers: dict[str, threading.Timer] = {}

    def set(self, name: str, action: Callable[[], None], *, seconds: float) -> None:
        timer = threading.Timer(seconds, self._ring, (name, action))
        timer.daemon = True
        self._timers[name] = timer
        timer.start()

    def clear(self, name: str) -> None:
        with self._lock:
            timer = self._timers.pop(name, None)
        if timer is not None:
            timer.cancel()
            self._raise(None)

    def _ring(self, name: str, action: Callable[[], None]) -> None:
        with self._lock:
            if self._timers.get(name) is not threading.current_thread():
                return
            try:
                action()
            except JobTimeout:
                self._raise(JobTimeout)

    def _raise(self, error: type[BaseException] | None) -> None:
        target = ctypes.py_object(error) if error is not None else None
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread), target)


def _hurry(connection: sqlite3.Connection, _record: Any) -> None:
    connection.execute("PRAGMA synchronous=OFF")  # the file does not outlive the process


def _tell_time(clock: Clock) -> Callable[[sqlite3.Connection, Any], None]:
    """Let the store's own clock be `clock`: what compares the two finds them in step."""

    def strftime(form: str, when: str) -> str:
        moment = clock.now() if when == "now" else datetime.fromisoformat(when)
        fraction = f"{moment.second:02d}.{moment.microsecond // 1000:03d}"
        return moment.strftime(form.replace("%f", fraction))

    def prepare(connection: sqlite3.Connection, record: Any) -> None:
        _hurry(connection, record)
        connection.create_function("strftime", 2, strftime)

    return prepare


def _in_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
