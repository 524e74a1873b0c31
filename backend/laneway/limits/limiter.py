"""The limiter that requests meet: Redis decides, and this process while Redis is away.

All calls of one turn of the event loop travel together, at most one batch is under way, and what
arrives meanwhile is the next batch. A failure opens a breaker for a second: until a batch comes back
whole, calls are decided without Redis, each rule as its `on_failure` says. What is decided by the twin
has the same rules but only this process's own memory. So over an outage a caller gets at most its quota
from Redis and its share of the quota from each process, never no limit; and Redis costs one call in a
second 50 ms, not every call.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache

from redis.exceptions import RedisError

from laneway.clock import Clock
from laneway.errors import CapacityReduced
from laneway.limits.decision import UNLIMITED, Charge, Decision, Standing
from laneway.limits.local import LocalWindows
from laneway.limits.redis_windows import Call, RedisWindows, Reply, giving_back, spending
from laneway.limits.rule_book import RuleBook
from laneway.limits.rules import OnFailure, Policy, RateClass, Rule
from laneway.log import get_logger

BREAKER_SECONDS = 1.0
SHADOW_LOG_SECONDS = 60.0
BATCH = 256

log = get_logger("limits")


@dataclass(frozen=True, slots=True, eq=False)
class _Asked:
    call: Call
    reply: asyncio.Future[Reply | None]  # None: Redis did not say


class RateLimiter:
    """Decides by `book`, with logs in the Redis of `redis_url`. For one event loop.

    `replicas` processes share a quota while each counts for itself.
    """

    def __init__(self, book: RuleBook, redis_url: str, *, clock: Clock, replicas: int = 1) -> None:
        self._book = book
        self._clock = clock
        self._replicas = replicas
        self._redis = RedisWindows(redis_url)
        self._local = LocalWindows()
        self._waiting: list[_Asked] = []
        self._batches: asyncio.Task[None] | None = None
        self._degraded = False
        self._probe_at = 0.0
        self._shadow_refusals: Counter[str] = Counter()
        self._shadow_logged: dict[str, tuple[float, int]] = {}  # when, and at which count

    @property
    def degraded(self) -> bool:
        """True from the first failure until Redis has answered a batch again."""
        return self._degraded

    @property
    def shadow_refusals(self) -> Mapping[str, int]:
        """What each shadow rule would have refused since this process started."""
        return self._shadow_refusals

    async def hit(
        self,
        rate_class: RateClass,
        *,
        tenant_id: str,
        subject: str,
        cost: int = 1,
        jobs: int = 0,
        spend: bool = True,
    ) -> Decision:
        """Charge `cost` requests of a class, and `jobs` jobs, to `subject` of a tenant, if all are free.

        Every rule is charged or none; with `spend` false none is, and the answer says what would be. A call
        that is cancelled may have been charged. Raises ValueError for a negative cost, and CapacityReduced
        while Redis is away where a rule wants Redis, or more than this process's share of it.
        """
        if cost < 0 or jobs < 0:
            raise ValueError("cost must not be negative")
        charges = self._book.charges(rate_class, tenant_id=tenant_id, subject=subject, cost=cost, jobs=jobs)
        if not charges:
            return UNLIMITED
        reply = await self._ask(spending(charges, spend=spend))
        if reply is None:
            return self._without_redis(charges, spend=spend)
        decision = Decision.read(charges, reply)
        if spend and decision.shadows:
            self._watch(decision.shadows, tenant_id)
        return decision

    async def give_back(self, decision: Decision, policy: Policy) -> Decision:
        """Take back what `decision` was charged under a policy; returns it as it stands now.

        To be called once. Where Redis does not answer, the units leave with their window as all others do.
        """
        if not decision.allowed:
            return decision
        rules = []
        for standing in decision.rules:
            charge = standing.charge
            if charge.rule.policy == policy and await self._given_back(charge, decision):
                standing = replace(standing, used=standing.used - charge.cost)  # noqa: PLW2901
            rules.append(standing)
        return replace(decision, rules=tuple(rules))

    async def standings(self, *, tenant_id: str, subject: str) -> tuple[Decision, list[list[Policy]]]:
        """How full the windows of all rules are that hold for a caller, and which policies each stands for.

        Charges nothing. Shadow rules are not told of.
        """
        found = self._book.all_charges(tenant_id=tenant_id, subject=subject)
        charges = [charge for charge, _ in found]
        if not charges:
            return UNLIMITED, []
        reply = await self._ask(spending(charges, spend=False))
        if reply is None:
            decision = self._decide_here([self._share(charge) for charge in charges], spend=False)
        else:
            decision = Decision.read(charges, reply)
        return decision, [policies for _, policies in found]

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

    async def _ask(self, call: Call) -> Reply | None:
        if self._breaker_open():
            return None
        asked = _Asked(call, asyncio.get_running_loop().create_future())
        self._waiting.append(asked)
        if self._batches is None:
            self._batches = asyncio.create_task(self._send_batches())
        return await asked.reply

    async def _given_back(self, charge: Charge, decision: Decision) -> bool:
        if decision.local:
            return self._local.give_back(charge, spent_us=decision.now_us, now_us=self._now_us())
        return bool(await self._ask(giving_back(charge, spent_us=decision.now_us)))

    def _without_redis(self, charges: Sequence[Charge], *, spend: bool) -> Decision:
        enforced = [charge for charge in charges if not charge.rule.shadow]
        closed = [charge.rule.name for charge in enforced if charge.rule.on_failure is OnFailure.CLOSED]
        counted = [charge for charge in enforced if charge.rule.on_failure is OnFailure.LOCAL]
        shares = [self._share(charge) for charge in counted]
        beyond = [
            charge.rule.name
            for charge, share in zip(counted, shares, strict=True)
            if share.rule.quota < charge.cost <= charge.rule.quota
        ]
        if closed or beyond:
            names = closed or beyond
            raise CapacityReduced(f'policy "{names[0]}" cannot be checked now', violated_policies=names)
        return self._decide_here(shares, spend=spend) if shares else UNLIMITED

    def _decide_here(self, charges: Sequence[Charge], *, spend: bool) -> Decision:
        reply = self._local.hit(charges, now_us=self._now_us(), spend=spend)
        return Decision.read(charges, reply, local=True)

    def _share(self, charge: Charge) -> Charge:
        return charge if self._replicas == 1 else replace(charge, rule=_share_of(charge.rule, self._replicas))

    def _now_us(self) -> int:
        return round(self._clock.now().timestamp() * 1_000_000)

    def _watch(self, shadows: Sequence[Standing], tenant_id: str) -> None:
        """Count what shadow rules would have refused; tell of each rule at most once a minute."""
        for standing in shadows:
            if not standing.retry_us:
                continue
            name = standing.rule.name
            self._shadow_refusals[name] += 1
            count, now = self._shadow_refusals[name], self._clock.monotonic()
            logged_at, logged = self._shadow_logged.get(name, (now - SHADOW_LOG_SECONDS, 0))
            if now - logged_at >= SHADOW_LOG_SECONDS:
                self._shadow_logged[name] = (now, count)
                log.info(
                    "rate_limit_shadow_refused", policy=name, refused=count - logged, tenant_id=tenant_id
                )

    async def _send_batches(self) -> None:
        """Send what waits, until nothing does or Redis fails. Whoever is left is decided without Redis."""
        batch: list[_Asked] = []
        try:
            while self._waiting:
                batch = [asked for asked in self._waiting[:BATCH] if not asked.reply.done()]  # some gave up
                del self._waiting[:BATCH]
                if not batch:
                    continue
                replies = await self._redis.run([asked.call for asked in batch])
                for asked, reply in zip(batch, replies, strict=True):
                    if not (asked.reply.done() or isinstance(reply, RedisError)):
                        asked.reply.set_result(reply)
                refusal = next((reply for reply in replies if isinstance(reply, RedisError)), None)
                if refusal is not None:
                    raise refusal
                self._recovered()
        except (RedisError, OSError, TimeoutError) as error:
            await self._redis.close()  # what answers READONLY may be a replica: resolve the name again
            self._failed(error)
        finally:
            self._batches = None
            for asked in (*batch, *self._waiting):
                if not asked.reply.done():
                    asked.reply.set_result(None)
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


@lru_cache(1024)
def _share_of(rule: Rule, replicas: int) -> Rule:
    return replace(rule, quota=-(-rule.quota // replicas))
