"""News by Redis pub/sub: only ever an accelerator. Whoever listens also polls."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import redis

from laneway.clock import Breaker
from laneway.lanes.rq_lanes import BREAK_SECONDS, connect
from laneway.log import get_logger

JOBS_CHANNEL = "laneway:live"
"""JSON lists: the id of a job whose row changed, or `[id, attempt, percent, message, details]` of one that
got on; `details` is JSON text or null."""

ProgressNews = tuple[str, int, int, str | None, str | None]

WISHES_CHANNEL = "laneway:wishes"
"""Anything: a running job was asked to stop, so workers beat now instead of later."""

SCHEDULER_CHANNEL = "laneway:scheduler"
"""Anything: something falls due sooner than schedulers know, so they look now."""

LISTEN_SECONDS = 5.0
NEWS_SECONDS = 0.25

log = get_logger("live")


class News(Protocol):
    """Says what changed. Never raises: news that is lost is found by polling."""

    def changed(self, job_ids: Sequence[str]) -> None: ...

    def progressed(self, news: Sequence[ProgressNews]) -> None: ...

    def wished(self) -> None: ...

    def ring_courier(self) -> None: ...

    def ring_scheduler(self) -> None: ...

    def close(self) -> None: ...


class RedisNews:
    """News over Redis. After a failed connection nothing is said for a second."""

    def __init__(
        self, redis_url: str, *, courier_channel: str, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._redis = connect(redis_url, command_seconds=NEWS_SECONDS)
        self._courier_channel = courier_channel
        self._breaker = Breaker(monotonic, seconds=BREAK_SECONDS)

    def changed(self, job_ids: Sequence[str]) -> None:
        if job_ids:
            self._publish(JOBS_CHANNEL, json.dumps(list(job_ids)))

    def progressed(self, news: Sequence[ProgressNews]) -> None:
        if news:
            self._publish(JOBS_CHANNEL, json.dumps(news))

    def wished(self) -> None:
        self._publish(WISHES_CHANNEL, "")

    def ring_courier(self) -> None:
        self._publish(self._courier_channel, "")

    def ring_scheduler(self) -> None:
        self._publish(SCHEDULER_CHANNEL, "")

    def close(self) -> None:
        self._redis.close()

    def _publish(self, channel: str, text: str) -> None:
        if not self._breaker.may_try():
            return
        try:
            self._redis.publish(channel, text)
        except (redis.ConnectionError, redis.TimeoutError):
            self._breaker.failed()  # whoever waits polls
        except redis.RedisError:
            pass
        else:
            self._breaker.worked()


class Silence:
    """No news: for stores without Redis."""

    def changed(self, job_ids: Sequence[str]) -> None:
        pass

    def progressed(self, news: Sequence[ProgressNews]) -> None:
        pass

    def wished(self) -> None:
        pass

    def ring_courier(self) -> None:
        pass

    def ring_scheduler(self) -> None:
        pass

    def close(self) -> None:
        pass


def listen(redis_url: str, channel: str, heard: Callable[[str], None], *, stopping: threading.Event) -> None:
    """Call `heard` with each message on `channel` until `stopping`; reconnects for as long as it takes."""
    client = connect(redis_url, command_seconds=LISTEN_SECONDS + 2)
    while not stopping.is_set():
        try:
            with client.pubsub(ignore_subscribe_messages=True) as subscription:  # type: ignore[no-untyped-call]
                subscription.subscribe(channel)
                while not stopping.is_set():
                    message = subscription.get_message(timeout=LISTEN_SECONDS)
                    if message is not None:
                        heard(str(message["data"]))
        except redis.RedisError:
            stopping.wait(1.0)
    client.close()
