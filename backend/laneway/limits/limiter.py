"""The limiter that requests meet: Redis decides, and this process while Redis is away.

All calls of one turn of the event loop travel together, at most one batch is under way, and what
arrives meanwhile is the next batch. A failure opens a breaker for a second: until a batch comes back
whole, calls are decided by the twin, with the same rules but only this process's own memory. So over
an outage a caller gets at most its quota from Redis and its quota from each process, never no limit;
and Redis costs one call in a second 50 ms, not every call.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from redis.exceptions import RedisError

from laneway.clock import Clock
from laneway.limits.decision import UNLIMITED, Charge, Decision
from laneway.limits.local import LocalWindows
from laneway.limits.redis_windows import RedisWindows, Reply
from laneway.limits.rules import RateClass, RuleSet
from laneway.log import get_logger

BREAKER_SECONDS = 1.0
BATCH = 256

log = get_logger("limits")


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    charges: Sequence[Charge]
    reply: asyncio.Future[Reply | None]  # None: Redis did not say


class RateLimiter:
    """Decides by `rules`, with logs in the Redis of `redis_url`. For one event loop.

    Fails to the in-process twin, never open and never closed.
    """

    def __init__(self, rules: RuleSet, redis_url: str, *, clock: Clock) -> None:
        self._rules = rules
        self._clock = clock
        self._redis = RedisWindows(redis_url)
        self._local = LocalWindows()
        self._waiting: list[_Call] = []
        self._batches: asyncio.Task[None] | None = None
        self._degraded = False
        self._probe_at = 0.0

    @property
    def degraded(self) -> bool:
        """True from the first failure until Redis has answered a batch again."""
        return self._degraded

    async def hit(self, rate_class: RateClass, *, tenant_id: str, subject: str, cost: int = 1) -> Decision:
        """Charge `cost` units of a class to `subject` of a tenant, and say whether they were free.

        All windows of the class are charged or none; cost 0 looks and charges nothing. A call that is
        cancelled may have been charged. Raises ValueError for a negative cost, nothing else.
        """
        if cost < 0:
            raise ValueError("cost must not be negative")
        rules = self._rules[rate_class]
        if not rules:
            return UNLIMITED
        charges = [Charge(rule.key(tenant_id=tenant_id, subject=subject), rule, cost) for rule in rules]
        reply = None if self._breaker_open() else await self._ask(charges)
        if reply is None:
            now_us = round(self._clock.now().timestamp() * 1_000_000)
            reply = self._local.hit(charges, now_us=now_us)
        return Decision.read(charges, reply)

    async def close(self) -> None:
        """Stop, and drop the connection. Calls under way are decided locally."""
        if self._batches is not None:
            self._batches.cancel()
            with suppress(asyncio.CancelledError):
                await self._batches
        await self._redis.close()

    def _breaker_open(self) -> bool:
        """True while nobody, or somebody else, is to find out whether Redis is back."""
        return self._degraded and (self._batches is not None or self._clock.monotonic() < self._probe_at)

    async def _ask(self, charges: Sequence[Charge]) -> Reply | None:
        call = _Call(charges, asyncio.get_running_loop().create_future())
        self._waiting.append(call)
        if self._batches is None:
            self._batches = asyncio.create_task(self._send_batches())
        return await call.reply

    async def _send_batches(self) -> None:
        """Send what waits, until nothing does or Redis fails. Whoever is left is decided locally."""
        batch: list[_Call] = []
        try:
            while self._waiting:
                batch = [call for call in self._waiting[:BATCH] if not call.reply.done()]  # some gave up
                del self._waiting[:BATCH]
                if not batch:
                    continue
                replies = await self._redis.hit([call.charges for call in batch])
                for call, reply in zip(batch, replies, strict=True):
                    if not (call.reply.done() or isinstance(reply, RedisError)):
                        call.reply.set_result(reply)
                refusal = next((reply for reply in replies if isinstance(reply, RedisError)), None)
                if refusal is not None:
                    raise refusal
                self._recovered()
        except (RedisError, OSError, TimeoutError) as error:
            await self._redis.close()  # what answers READONLY may be a replica: resolve the name again
            self._failed(error)
        finally:
            self._batches = None
            for call in (*batch, *self._waiting):
                if not call.reply.done():
                    call.reply.set_result(None)
            self._waiting.clear()

    def _failed(self, error: Exception) -> None:
        self._probe_at = self._clock.monotonic() + BREAKER_SECONDS
        if not self._degraded:
            self._degraded = True
            log.warning("limiter_degraded", error=type(error).__name__, reason=str(error))

    def _recovered(self) -> None:
        if self._degraded:
            self._degraded = False
            log.info("limiter_recovered")
