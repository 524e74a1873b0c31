"""What the API process holds while it runs, and the dependencies that hand it to routes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ParamSpec, TypeVar, cast

import anyio.to_thread
import sqlalchemy as sa
from fastapi import Depends, Request

from laneway.api.hub import Hub
from laneway.api.leaving import Leaving
from laneway.api.streams import Streams
from laneway.clock import Clock, SystemClock
from laneway.db import Database
from laneway.engine.access.callers import Caller
from laneway.engine.access.credentials import Callers
from laneway.engine.access.watch import KeyLooks, Look, OverrideLook, Watch
from laneway.engine.group_commit import GroupCommit
from laneway.engine.queries import sign_cursors
from laneway.engine.registry import Registry, load
from laneway.engine.service import JobService, Prepared
from laneway.errors import StorageUnavailable
from laneway.lanes.live import RedisNews
from laneway.lanes.rq_lanes import RqLanes
from laneway.limits.anonymous import AnonymousLimiter
from laneway.limits.limiter import RateLimiter
from laneway.limits.rule_book import RuleBook
from laneway.limits.rules import parse_rules
from laneway.settings import Settings
from laneway.webhooks.messages import WAKE_CHANNEL
from laneway.webhooks.secrets import SecretBox

MAX_WAITING = 1000  # requests that may wait for one of the 40 threads
_AWAY = (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.InternalError, sa.exc.TimeoutError)

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Runtime:
    """The parts of a running API. One an event loop."""

    settings: Settings
    clock: Clock
    database: Database
    service: JobService
    callers: Callers
    limiter: RateLimiter
    anonymous: AnonymousLimiter
    new_jobs: GroupCommit[Prepared, dict[str, Any]]
    hub: Hub
    streams: Streams
    leaving: Leaving

    @classmethod
    @asynccontextmanager
    async def running(
        cls, settings: Settings, *, registry: Registry | None = None, leaving: Leaving | None = None
    ) -> AsyncIterator[Runtime]:
        """A runtime from `settings`, stopped in order when the block ends."""
        sign_cursors(SecretBox.from_settings(settings).derived("cursors").values())
        clock = SystemClock()
        database = Database(
            settings.database,
            statement_seconds=settings.statement_seconds,
            row_security=settings.row_security,
        )
        lanes = RqLanes(settings.redis_url, clock=clock, window=settings.lane_window)
        news = RedisNews(settings.redis_url, courier_channel=WAKE_CHANNEL)
        known = registry or load(settings.tasks)
        service = JobService(database, lanes, settings, known, news=news, clock=clock)
        rule_book = RuleBook(parse_rules(settings.rate_limits), clock=clock)
        limiter = RateLimiter(
            rule_book,
            settings.ratelimit_redis_url or settings.redis_url,
            clock=clock,
            replicas=settings.ratelimit_replicas,
        )
        new_jobs = GroupCommit(service.create, after=service.ring_new, weigh=lambda p: len(p.row.parameters))
        callers = Callers.from_settings(settings, database, clock)
        override_looks = OverrideLook(database, rule_book.take, clock=clock).looks
        watches = [
            Watch(*override_looks, *KeyLooks(database, callers).looks),
            Watch(Look("jwt_issuers", callers.refresh)),
        ]
        await anyio.to_thread.run_sync(watches[0].look)  # the first request meets the overrides
        hub = Hub(settings.redis_url)
        hub.start()
        for watch in watches:
            watch.start()
        try:
            yield cls(
                settings,
                clock,
                database,
                service,
                callers,
                limiter,
                AnonymousLimiter(clock=clock),
                new_jobs,
                hub,
                Streams(limit=settings.streams_per_caller),
                leaving or Leaving(),
            )
        finally:
            await hub.close()
            for watch in watches:
                await anyio.to_thread.run_sync(watch.close)
            await anyio.to_thread.run_sync(new_jobs.close)
            await limiter.close()
            lanes.close()
            news.close()
            database.dispose()


def runtime_of(request: Request) -> Runtime:
    """The runtime that serves a request."""
    return cast(Runtime, request.app.state.runtime)


# Coroutines, although they wait for nothing: FastAPI runs plain functions in a thread.


async def get_runtime(request: Request) -> Runtime:
    return runtime_of(request)


async def get_caller(request: Request) -> Caller:
    """Who calls: set by the gate before the route's body is read."""
    return cast(Caller, request.scope["laneway.caller"])


async def get_service(request: Request) -> JobService:
    return runtime_of(request).service


RuntimeDep = Annotated[Runtime, Depends(get_runtime)]
CallerDep = Annotated[Caller, Depends(get_caller)]
ServiceDep = Annotated[JobService, Depends(get_service)]


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run what blocks (SQL, Redis) off the event loop.

    Raises StorageUnavailable while the database is away, and at once when MAX_WAITING wait already.
    """
    threads = anyio.to_thread.current_default_thread_limiter()
    if not threads.available_tokens and threads.statistics().tasks_waiting >= MAX_WAITING:
        raise StorageUnavailable("too many requests wait for the database")
    try:
        return await anyio.to_thread.run_sync(partial(function, *args, **kwargs))
    except _AWAY as error:
        raise StorageUnavailable() from error
