"""The courier: claims deliveries that are due, sends them, and writes down what came of it.

One asyncio loop sends; one thread of its own talks to the database, so that no query ever holds up the
loop. They meet once a turn: all that was finished since the last turn is settled, and what is due is
claimed, in one transaction. Turns follow each other while there is work; between them the courier sleeps
until an attempt ends, Redis rings, or half a second is over. Redis away costs that half second, no more.

A courier that dies keeps its leases until they run out; then another sends the same messages again under
the same ids. That is the only way a message is sent twice.
"""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta
from random import Random
from typing import TypeVar

import redis
import redis.asyncio
import sqlalchemy as sa
import uvloop
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from laneway.clock import Clock, SystemClock, new_id
from laneway.db import Database
from laneway.log import get_logger
from laneway.notify.channels import WebhookChannel
from laneway.notify.rules import current as notifications
from laneway.settings import Settings
from laneway.webhooks.deliveries import Claimed, Deliveries, Finished, Postponed, Room
from laneway.webhooks.dial import GetAddrInfo
from laneway.webhooks.guard import Policy
from laneway.webhooks.messages import WAKE_CHANNEL
from laneway.webhooks.notices import pass_on
from laneway.webhooks.pace import Pace
from laneway.webhooks.papers import Papers
from laneway.webhooks.retries import MAX_TIMEOUT_SECONDS, Answer, DeliveryStatus, judge
from laneway.webhooks.secrets import SecretBox
from laneway.webhooks.sender import Sender

POLL_SECONDS = 0.5
MIN_REST_SECONDS = 0.001
GATHER_SECONDS = 0.005  # so long a finished attempt waits for others to be settled with
LEASE_MARGIN_SECONDS = 20.0
STOP_MARGIN_SECONDS = 2.0
PAUSE_SECONDS = 1.0  # after the database or Redis could not be reached
UNREADABLE_SECRET_SECONDS = 60.0

log = get_logger("laneway.webhooks.courier")
T = TypeVar("T")


class Courier:
    """Delivers until it is stopped. Any number may run beside each other.

    A receiver that hangs holds up its own messages and nobody else's: webhooks/pace.py has the shares.
    """

    def __init__(
        self,
        database: Database,
        settings: Settings,
        clock: Clock,
        *,
        box: SecretBox,
        rng: Random,
        getaddrinfo: GetAddrInfo = socket.getaddrinfo,
    ) -> None:
        self.id = new_id()
        self._clock = clock
        self._box = box
        self._rng = rng
        self._redis_url = settings.redis_url
        self._timeout_seconds = settings.webhook_timeout_seconds
        longest = max(self._timeout_seconds, MAX_TIMEOUT_SECONDS)
        self._lease_seconds = longest + LEASE_MARGIN_SECONDS
        self._stop_seconds = longest + STOP_MARGIN_SECONDS
        self._deliveries = Deliveries(database, owner=self.id, lease_seconds=self._lease_seconds)
        self._sender = Sender(
            Policy.from_settings(settings),
            timeout_seconds=self._timeout_seconds,
            clock=clock,
            getaddrinfo=getaddrinfo,
        )
        self._tasks: set[asyncio.Task[Answer | None]] = set()
        self._pace = Pace(clock.monotonic)
        self._finished: list[Finished] = []
        self._postponed: list[Postponed] = []
        self._reclaim_at = float("-inf")
        self._stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None

    async def run(self) -> None:
        """Works until `stop` is called; then finishes what is in flight and gives back what was not sent."""
        self._bell = asyncio.Event()
        self._loop = asyncio.get_running_loop()  # from here on, `stop` rings the bell
        self._gathering: asyncio.TimerHandle | None = None
        self._sql = ThreadPoolExecutor(1, thread_name_prefix="laneway-courier-sql")
        bell_rope = redis.asyncio.Redis.from_url(self._redis_url, retry=Retry(NoBackoff(), 0))
        listener = asyncio.create_task(self._listen(bell_rope))
        log.info("courier_started", courier_id=self.id)
        try:
            async with self._sender:
                while not self._stopping:
                    await self._reclaim()
                    if (seconds := await self._turn()) > 0:
                        await self._rest(seconds)
                await self._drain()
        finally:
            self._loop = None
            while not listener.done():
                listener.cancel()  # again: one that comes while redis-py connects may be lost
                await asyncio.wait([listener], timeout=0.1)
            await bell_rope.aclose()
            self._sql.shutdown()
        log.info("courier_stopped", courier_id=self.id)

    def stop(self) -> None:
        """Ask `run` to come to its end. From any thread, before or during the run, any number of times."""
        self._stopping = True
        if (loop := self._loop) is not None:
            with suppress(RuntimeError):  # the loop was closed just now
                loop.call_soon_threadsafe(self._bell.set)

    async def _turn(self) -> float:
        """Settle and claim once. How long to rest unless the bell rings: 0 to half a second."""
        finished, self._finished = self._finished, []
        postponed, self._postponed = self._postponed, []
        room = Room(0) if self._stopping else self._pace.room()
        now = self._clock.now()
        try:
            turn = await self._in_thread(lambda: self._deliveries.turn(finished, postponed, room, now=now))
        except sa.exc.SQLAlchemyError as error:
            self._finished = finished + self._finished
            self._postponed = postponed + self._postponed
            await self._store_failed(error)
            return POLL_SECONDS
        for each in finished:
            _tell(each)
        for delivery in turn.claimed:
            if self._stopping:
                self._postponed.append(Postponed(delivery, self._clock.now()))
            else:
                self._start(delivery)
        return 0.0 if turn.more else self._rest_seconds(turn.next_at)

    def _rest_seconds(self, next_at: datetime | None) -> float:
        waits = [POLL_SECONDS, self._pace.wait_seconds()]
        if next_at is not None:
            waits.append((next_at - self._clock.now()).total_seconds())
        return max(min(wait for wait in waits if wait is not None), MIN_REST_SECONDS)

    def _start(self, delivery: Claimed) -> None:
        self._pace.began(delivery)
        task = asyncio.create_task(self._attempt(delivery))
        self._tasks.add(task)

        def ended(task: asyncio.Task[Answer | None]) -> None:
            self._tasks.discard(task)
            self._pace.ended(delivery, None if task.cancelled() or task.exception() else task.result())
            self._ring_soon()

        task.add_done_callback(ended)

    async def _attempt(self, delivery: Claimed) -> Answer | None:
        try:
            answer = await self._send(delivery)
        except ValueError as error:
            # The operator's fault, not the receiver's: no attempt is charged until the key is there.
            log.error("webhook_key_unusable", tenant_id=delivery.tenant_id, reason=str(error))
            until = self._clock.now() + timedelta(seconds=UNREADABLE_SECRET_SECONDS)
            self._postponed.append(Postponed(delivery, until))
            return None
        verdict = judge(
            answer,
            attempt=delivery.attempt,
            max_attempts=delivery.max_attempts,
            schedule=delivery.retry_schedule,
            give_up_at=delivery.give_up_at,
            now=self._clock.now(),
            rng=self._rng,
        )
        self._finished.append(Finished(delivery, answer, verdict))
        return answer

    async def _send(self, delivery: Claimed) -> Answer:
        """Raises ValueError when what signs it cannot be opened."""
        if not delivery.notifies:
            return await self._sender.send(delivery, Papers.open(delivery, self._box))
        channel = notifications().channel(delivery.url)
        if isinstance(channel, WebhookChannel):
            papers = Papers.open(delivery, self._box)
            return await self._sender.send(replace(delivery, url=channel.url), papers)
        return await pass_on(delivery, channel, clock=self._clock)

    async def _reclaim(self) -> None:
        if self._clock.monotonic() < self._reclaim_at:
            return
        now = self._clock.now()
        try:
            count = await self._in_thread(lambda: self._deliveries.reclaim(now=now))
        except sa.exc.SQLAlchemyError as error:
            await self._store_failed(error)
            return
        self._reclaim_at = self._clock.monotonic() + self._lease_seconds / 3
        if count:
            log.warning("webhook_leases_reclaimed", count=count)

    async def _drain(self) -> None:
        try:
            async with asyncio.timeout(self._stop_seconds):
                while self._tasks or self._finished or self._postponed:
                    await self._turn()
                    if self._tasks and not self._finished:
                        await self._rest(POLL_SECONDS)
        except TimeoutError:
            left = len(self._tasks) + len(self._finished) + len(self._postponed)
            log.warning("courier_left_leases", count=left)  # they run out, and others take over
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _rest(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._bell.wait()
        self._bell.clear()

    def _ring_soon(self) -> None:
        if not self._tasks:
            self._bell.set()  # nothing else to wait for
        elif self._gathering is None:
            self._gathering = asyncio.get_running_loop().call_later(GATHER_SECONDS, self._ring)

    def _ring(self) -> None:
        self._gathering = None
        self._bell.set()

    async def _store_failed(self, error: sa.exc.SQLAlchemyError) -> None:
        log.warning("courier_store_unavailable", error=type(error).__name__)  # its text would hold parameters
        await asyncio.sleep(PAUSE_SECONDS)

    async def _in_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._sql, call)

    async def _listen(self, client: redis.asyncio.Redis) -> None:
        """Ring the bell for each message on the wake channel, for as long as Redis is there."""
        heard = True
        while True:
            try:
                async with client.pubsub(ignore_subscribe_messages=True) as channel:
                    await channel.subscribe(WAKE_CHANNEL)
                    heard = True
                    while True:
                        await channel.get_message(timeout=None)
                        self._bell.set()  # also for the reply to SUBSCRIBE: what rang before it went unheard
            except (redis.RedisError, OSError) as error:
                if heard:
                    log.warning("courier_hears_no_bell", error=type(error).__name__)
                heard = False
            await asyncio.sleep(PAUSE_SECONDS)


def _tell(finished: Finished) -> None:
    delivery, answer, verdict = finished.delivery, finished.answer, finished.verdict
    facts = {
        "delivery_id": delivery.id,
        "message_id": delivery.message_id,
        "job_id": delivery.job_id,
        "attempt": delivery.attempt,
        "status_code": answer.status_code,
        "total_ms": answer.timings.total_ms,
    }
    if verdict.status is DeliveryStatus.DELIVERED:
        log.info("webhook_delivered", **facts)
    elif verdict.status is DeliveryStatus.RETRYING:
        log.warning(
            "webhook_attempt_failed", error_class=answer.error_class, next_at=str(verdict.next_at), **facts
        )
    else:
        log.error("webhook_dead", error_class=answer.error_class, **facts)


def main(settings: Settings) -> None:
    """Run one courier until SIGTERM or SIGINT."""
    clock = SystemClock()
    database = Database(settings.database, statement_seconds=settings.statement_seconds)
    courier = Courier(database, settings, clock, box=SecretBox.from_settings(settings), rng=Random())  # noqa: S311

    async def run() -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, courier.stop)
        await courier.run()

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(run())
    finally:
        database.dispose()
