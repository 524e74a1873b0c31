"""Which jobs changed, inside one API process: from Redis when it is there, else whoever waits polls."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from laneway.lanes.live import JOBS_CHANNEL

POLL_SECONDS = 1.0  # between looks when nothing was heard: news may be lost
RECONNECT_SECONDS = 1.0
MAX_STEPS = 1_000  # that wait for one who watches all jobs: of more, the oldest are left out


@dataclass(frozen=True, slots=True)
class Step:
    """How far an attempt of a job is, as its worker said; the row follows within a second."""

    attempt: int
    percent: int
    message: str | None
    details: Any


class Watch:
    """One waiter's view of one job."""

    def __init__(self) -> None:
        self._changed = asyncio.Event()
        self._step: Step | None = None

    def stir(self, step: Step | None = None) -> None:
        """Wake the waiter: to take a step, or, with None, to look at the row."""
        if step is None or not self._changed.is_set() or self._step is not None:
            self._step = step
        self._changed.set()

    async def changed(self, seconds: float) -> Step | None:
        """The job's progress as soon as it is news; None when the row may have changed.

        That is on news too, or after at most `seconds` or POLL_SECONDS.
        """
        with suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), max(0.0, min(seconds, POLL_SECONDS)))
        self._changed.clear()
        step, self._step = self._step, None
        return step


class WatchAll:
    """One waiter's view of every job."""

    def __init__(self) -> None:
        self._changed = asyncio.Event()
        self._steps: dict[str, Step] = {}

    def stir(self, job_id: str, step: Step | None) -> None:
        """Wake the waiter; of each job it gets the newest step."""
        if step is not None:
            self._steps.pop(job_id, None)
            self._steps[job_id] = step
            if len(self._steps) > MAX_STEPS:
                del self._steps[next(iter(self._steps))]
        self._changed.set()

    async def changed(self, seconds: float) -> dict[str, Step]:
        """Progress by job, on news or after at most `seconds` or POLL_SECONDS."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), max(0.0, min(seconds, POLL_SECONDS)))
        self._changed.clear()
        steps, self._steps = self._steps, {}
        return steps


class Hub:
    """Hands news of jobs to those who wait for them."""

    def __init__(self, redis_url: str) -> None:
        self._redis: Redis = Redis.from_url(
            redis_url, socket_connect_timeout=1.0, retry=Retry(NoBackoff(), 0)
        )
        self._watches: dict[str, set[Watch]] = {}
        self._all: set[WatchAll] = set()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._listen())

    async def close(self) -> None:
        while self._task is not None and not self._task.done():
            self._task.cancel()  # again: one that comes while redis-py connects may be lost
            await asyncio.wait([self._task], timeout=0.1)
        for watches in self._watches.values():
            for watch in watches:
                watch.stir()
        for everything in self._all:
            everything.stir("", None)
        await self._redis.aclose()

    @contextmanager
    def watch(self, job_id: str) -> Iterator[Watch]:
        """A view of a job; make it before the first look at the row, so that no change falls in between."""
        watch = Watch()
        self._watches.setdefault(job_id, set()).add(watch)
        try:
            yield watch
        finally:
            watches = self._watches[job_id]
            watches.discard(watch)
            if not watches:
                del self._watches[job_id]

    @contextmanager
    def watch_all(self) -> Iterator[WatchAll]:
        """A view of all jobs, of every tenant: whoever has it must ask which of them it may tell of."""
        watch = WatchAll()
        self._all.add(watch)
        try:
            yield watch
        finally:
            self._all.discard(watch)

    async def _listen(self) -> None:
        while True:
            try:
                async with self._redis.pubsub(ignore_subscribe_messages=True) as news:
                    await news.subscribe(JOBS_CHANNEL)
                    async for message in news.listen():
                        self._hear(message["data"])
            except (RedisError, OSError):
                await asyncio.sleep(RECONNECT_SECONDS)

    def _hear(self, text: bytes) -> None:
        with suppress(ValueError, TypeError):  # anybody may publish anything
            for item in json.loads(text):
                job_id, step = (item, None) if isinstance(item, str) else _step_of(*item)
                for watch in self._watches.get(job_id, ()):
                    watch.stir(step)
                for everything in self._all:
                    everything.stir(job_id, step)


def _step_of(
    job_id: str, attempt: int, percent: int, message: str | None, details: str | None
) -> tuple[str, Step]:
    return job_id, Step(attempt, percent, message, json.loads(details) if details else None)
