"""The backend of a process that reaches the database itself: `JobService`, called as one of its tenants.

Within a job, jobs are made for the tenant of that job, in the name of who made it.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from random import Random
from typing import Any, ParamSpec, Self, TypeVar

import sqlalchemy as sa
from pydantic import BaseModel, ValidationError

from laneway import models
from laneway.clock import SystemClock, new_id
from laneway.db import Database
from laneway.domain.flow import ChainSpec
from laneway.domain.spec import JobSpec
from laneway.domain.states import FINAL, WAITING
from laneway.engine import batches, chains, leases, progress, queues
from laneway.engine.access.callers import DEFAULT_TENANT, Caller, Role
from laneway.engine.at_once import create_held
from laneway.engine.batches import BatchSpec
from laneway.engine.cancels import ActiveJobs, Manner, cancel_all
from laneway.engine.context import JobContext, Progress, running_job
from laneway.engine.endings import Ending
from laneway.engine.exchange import Exchanged, Holder, exchange
from laneway.engine.outcomes import Claimed
from laneway.engine.queries import JobFilter
from laneway.engine.registry import JobType, load
from laneway.engine.schedules import NewSchedule, ScheduleFilter, Schedules
from laneway.engine.service import JobService, Prepared
from laneway.errors import FieldError, LanewayError, NotFound, StorageUnavailable, Unprocessable
from laneway.lanes.backend import Due
from laneway.lanes.live import RedisNews
from laneway.lanes.rq_lanes import RqLanes
from laneway.log import get_logger
from laneway.sdk.backend import Answer, Request
from laneway.settings import Settings
from laneway.webhooks.messages import WAKE_CHANNEL

M = TypeVar("M", bound=BaseModel)
P = ParamSpec("P")
T = TypeVar("T")

SUBJECT = "python"
PAGE = 200
FIRST_LOOK_SECONDS = 0.01
LOOK_SECONDS = 0.25  # between two looks at a job that is waited for, in the end
SAVE_SECONDS = 1.0
KNOWN_CALLERS = 100

_AWAY = (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.InternalError, sa.exc.TimeoutError)

log = get_logger("sdk")


def _reaching(method: Callable[P, T]) -> Callable[P, T]:
    """The method, with a database that is away as StorageUnavailable."""

    @wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return method(*args, **kwargs)
        except _AWAY as error:
            raise StorageUnavailable from error

    return call


class LocalBackend:
    """Jobs of one tenant, through the service. `connect` makes one that owns its connections."""

    def __init__(self, service: JobService, *, tenant: str = DEFAULT_TENANT, subject: str = SUBJECT) -> None:
        self.service = service
        self._tenant = tenant
        self._subject = subject
        self._caller: Caller | None = None
        self._callers: OrderedDict[str, Caller] = OrderedDict()  # by the job they come from

    @classmethod
    def connect(cls, settings: Settings, *, tenant: str = DEFAULT_TENANT, subject: str = SUBJECT) -> Self:
        """A backend on the settings' database and Redis, which need not be there yet."""
        clock = SystemClock()
        database = Database(settings.database, statement_seconds=settings.statement_seconds)
        lanes = RqLanes(settings.redis_url, clock=clock, window=settings.lane_window)
        news = RedisNews(settings.redis_url, courier_channel=WAKE_CHANNEL)
        service = JobService(database, lanes, settings, load(settings.tasks), news=news, clock=clock)
        return cls(service, tenant=tenant, subject=subject)

    def close(self) -> None:
        self.service.lanes.close()
        self.service.news.close()
        self.service.database.dispose()

    # Making jobs

    @_reaching
    def enqueue(self, requests: Sequence[Request]) -> list[Answer]:
        answers = self.service.enqueue([self._prepare(request) for request in requests])
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return [answer for answer in answers if isinstance(answer, dict)]

    def enqueue_in(self, connection: sa.Connection, request: Request) -> JoinedJob:
        if connection.dialect.name != self.service.database.dialect:
            raise Unprocessable(
                f"the session is on {connection.dialect.name}, Laneway's own tables are on "
                f"{self.service.database.dialect}: a job can only join a transaction of its own database"
            )
        prepared = self._prepare(request)
        return JoinedJob(self.service, prepared, self.service.create_in(connection, prepared)["id"])

    @_reaching
    def hold(self, job_type: JobType, parameters: Mapping[str, Any]) -> HeldJob | None:
        request = {"job_type": job_type.name, "parameters": parameters, "max_retries": 0}
        return HeldJob(self.service, self._prepare(request), job_type)

    def _prepare(self, request: Request) -> Prepared:
        return self.service.prepare(checked(JobSpec, request), self.caller())

    @_reaching
    def caller(self) -> Caller:
        """Whom the service is called as. Raises NotFound for a tenant that nobody has made."""
        if (job := running_job()) is not None and (caller := self._caller_of(job.id)) is not None:
            return caller
        if self._caller is None:
            t = models.tenants.c
            with self.service.database.read() as connection:
                tenant_id = connection.execute(sa.select(t.id).where(t.name == self._tenant)).scalar()
            if tenant_id is None:
                raise NotFound(
                    f"there is no tenant {self._tenant!r}; `laneway api` makes the tenant `default` "
                    "when it first starts"
                )
            self._caller = Caller(str(tenant_id), self._subject, Role.OPERATOR)
        return self._caller

    def _caller_of(self, job_id: str) -> Caller | None:
        if (known := self._callers.get(job_id)) is not None:
            return known
        j = models.jobs.c
        with self.service.database.read() as connection:
            row = connection.execute(sa.select(j.tenant_id, j.created_by).where(j.id == job_id)).first()
        if row is None:
            return None
        caller = self._callers[job_id] = Caller(row.tenant_id, row.created_by, Role.OPERATOR)
        while len(self._callers) > KNOWN_CALLERS:
            self._callers.popitem(last=False)
        return caller

    # Looking at jobs

    @_reaching
    def get(self, job_id: str) -> Answer:
        return self.service.get(job_id, self.caller())

    @_reaching
    def wait(self, job_id: str, *, timeout_seconds: float) -> Answer:
        deadline = time.monotonic() + timeout_seconds
        pause, looking = FIRST_LOOK_SECONDS, threading.Event()
        while (job := self.get(job_id))["status"] not in FINAL:
            left = deadline - time.monotonic()
            if left <= 0:
                break
            looking.wait(min(pause, left))
            pause = min(LOOK_SECONDS, pause * 1.5)
        return job

    @_reaching
    def cancel(self, job_id: str, *, terminate: bool) -> Answer:
        return self.service.cancel(job_id, self.caller(), terminate=terminate).job

    # Queues

    @_reaching
    def queue_length(self, queue: str) -> int:
        known = queues.stats(self.service, self.caller())["queues"]
        return sum(each["queued"] for each in known if each["name"] == queue)

    @_reaching
    def purge_queue(self, queue: str) -> int:
        wanted = ActiveJobs(JobFilter(statuses=tuple(sorted(WAITING)), queue=queue))
        count = 0
        while True:
            done = cancel_all(self.service, self.caller(), wanted, Manner("the queue was purged"))
            count += done.cancelled
            if not done.remaining or not done.cancelled:
                return count

    # Many jobs, and those that follow each other

    @_reaching
    def enqueue_batch(self, request: Request) -> Answer:
        spec = checked(BatchSpec, {name: value for name, value in request.items() if name != "items"})
        jobs = ((f"/items/{n}", {"parameters": item}) for n, item in enumerate(request["items"]))
        caller = self.caller()
        return batches.make(self.service, batches.check(self.service, spec, jobs, caller), caller)

    @_reaching
    def start_chain(self, request: Request) -> Answer:
        spec = checked(ChainSpec, {name: value for name, value in request.items() if name != "execute"})
        caller = self.caller()
        return chains.create(self.service, chains.check(self.service, spec, caller), caller, execute=True)

    # Schedules

    @_reaching
    def create_schedule(self, request: Request) -> Answer:
        return Schedules(self.service).create(checked(NewSchedule, request), self.caller())

    def keep_schedule(self, request: Request) -> Answer:
        """The tenant's schedule of that name, made or brought up to date."""
        return Schedules(self.service).keep(checked(NewSchedule, request), self.caller())

    @_reaching
    def list_schedules(self) -> list[Answer]:
        found: list[Answer] = []
        cursor = None
        while True:
            page, cursor = Schedules(self.service).page(
                self.caller(), ScheduleFilter(), limit=PAGE, cursor=cursor
            )
            found += page
            if cursor is None:
                return found

    @_reaching
    def delete_schedule(self, schedule_id: str) -> None:
        Schedules(self.service).delete(schedule_id, self.caller())


def checked(model: type[M], request: Request) -> M:
    """A request as `model`. Raises Unprocessable with a pointer to each wrong field."""
    try:
        return model.model_validate(dict(request))
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False, include_context=False)
        wrong = tuple(FieldError("/".join(("", *map(str, e["loc"]))), e["msg"], e["type"]) for e in found)
        words = "; ".join(f"{each.pointer or 'the request'}: {each.detail}" for each in wrong)
        raise Unprocessable(words, errors=wrong) from None


class JoinedJob:
    """A row in somebody's transaction."""

    def __init__(self, service: JobService, prepared: Prepared, job_id: str) -> None:
        self.job_id = job_id
        self._service = service
        self._prepared = prepared

    def ring(self) -> None:
        row = self._prepared.row
        if row.queued_at is not None and row.id == self.job_id:
            self._service.ring([Due(row.lane, row.id, row.tenant_id)])


class HeldJob:
    """A job that runs in this process, outside of any worker, and the `Line` of its handler.

    It has a worker row of its own, which beats from a thread until `end`.
    """

    def __init__(self, service: JobService, prepared: Prepared, job_type: JobType) -> None:
        self._service = service
        self._settings = service.settings
        self._worker_id, token = new_id(), new_id()
        self._holder = Holder(
            self._worker_id,
            [job_type.name],
            self._settings.crash_limit,
            Random(),  # noqa: S311 - jitter
        )
        self._unsaved: Progress | None = None
        self._stop_asked = False
        self._over = threading.Event()
        now = service.clock.now()
        name = f"call-{socket.gethostname()}-{os.getpid()}"
        leases.register(service.database, worker_id=self._worker_id, name=name, lanes=[])
        try:
            self._job = create_held(service, prepared, lease_token=token, worker_id=self._worker_id, now=now)
        except LanewayError:
            leases.leave(service.database, worker_id=self._worker_id)
            raise
        self.context = JobContext(
            job_id=self._job.job_id,
            job_type=self._job.job_type,
            attempt=self._job.attempt,
            line=self,
            track_progress=job_type.track_progress,
        )
        self._watch = threading.Thread(target=self._keep, name="laneway-call", daemon=True)
        self._watch.start()

    def end(self, ending: Ending) -> None:
        """Settle it. Raises StorageUnavailable: then a worker will run it anew."""
        self._over.set()
        self._watch.join()
        job, news = self._job, {}
        if self._unsaved is not None:
            news[job.job_id] = (job, self._unsaved)
        now = self._service.clock.now()
        database = self._service.database
        done = exchange(database, self._holder, ended=[(job, ending)], wanted=(), news=news, now=now)
        for _, error in done.refused:
            raise error
        if done.stale:  # it was taken for dead, and a worker has the job now
            log.warning("stale_attempt", job_id=job.job_id, attempt=job.attempt)
        follow_up(self._service, done)
        try:
            leases.leave(database, worker_id=self._worker_id)
        except _AWAY:
            pass  # its row will be called silent, and it holds nothing

    def _keep(self) -> None:
        beat_at = 0.0
        while not self._over.wait(min(SAVE_SECONDS, self._settings.beat_seconds)):
            try:
                if time.monotonic() >= beat_at:
                    beat_at = time.monotonic() + self._settings.beat_seconds
                    self._beat()
                self._save()
            except _AWAY as error:
                log.warning("beat_failed", worker_id=self._worker_id, error=type(error).__name__)

    def _beat(self) -> None:
        token = self._job.lease_token
        wishes = leases.beat(self._service.database, worker_id=self._worker_id, held=[token], begun=[token])
        if wishes is None or wishes:  # taken for dead, or asked to stop
            self._stop_asked = True

    def _save(self) -> None:
        news, self._unsaved = self._unsaved, None
        if news is not None:
            save_progress(self._service, self._job, news)

    # The handler's line

    def report(self, news: Progress) -> None:
        self._unsaved = news

    def cancelled(self) -> bool:
        return self._stop_asked


def follow_up(service: JobService, done: Exchanged) -> None:
    """After the commit: ring what may start since, and tell who listens."""
    service.ring([item for settled in done.settled for item in settled.due])
    service.ring(done.next, first=True)
    service.news.changed([settled.job.job_id for settled in done.settled])
    if any(settled.webhook for settled in done.settled):
        service.news.ring_courier()


def save_progress(service: JobService, job: Claimed, news: Progress) -> None:
    """Write a running job's progress, and tell who follows it."""
    with service.database.write() as connection:
        told = progress.save_and_tell(connection, [(job, news)], now=service.clock.now())
    service.news.changed([job.job_id])
    if told:
        service.news.ring_courier()
