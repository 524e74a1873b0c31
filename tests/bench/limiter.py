"""What a decision of the rate limiter costs Redis: time on the server, and bytes of the keys.

Laneway's script against the classic log, a sorted set with a member a request, and against PyPI's `limits`.
All are given the clock, so that each sees the same callers: steady ones, whose requests come evenly over
the window, just below the quota. So the logs are as long as they get. Times are what Redis itself counts
(`INFO commandstats`); how the calls travel does not matter to them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Final

import redis
from limits.storage import RedisStorage

from bench.ground import Stores
from laneway.limits.decision import Charge
from laneway.limits.redis_windows import SPEND, spending
from laneway.limits.rules import Rule

WINDOW_SECONDS: Final = 60
QUOTAS: Final = {1: (100,), 3: (100, 200, 300)}
SPACING_US: Final = 650_000  # 92 requests in a minute: below the least quota, with any rounding
WARM_UP: Final = 100
START_US: Final = 1_800_000_000_000_000

Command = tuple[Any, ...]


class Contender(ABC):
    """One way to count: a script, and how one request of a caller is put to it."""

    def __init__(self, client: redis.Redis, rules: int) -> None:
        self.quotas = QUOTAS[rules]
        self._digest = client.script_load(self.source())

    @abstractmethod
    def source(self) -> str | bytes: ...

    @abstractmethod
    def arguments(self, caller: int, now_us: int) -> Sequence[Command]:
        """What follows the script, of each call that the decision takes."""

    def commands(self, caller: int, now_us: int) -> list[Command]:
        return [("EVALSHA", self._digest, *rest) for rest in self.arguments(caller, now_us)]

    def keys(self, caller: int) -> list[bytes]:
        return [b"rl:{tenant}:rule-%d:%032x" % (n, caller) for n in range(len(self.quotas))]


class Laneway(Contender):
    def source(self) -> bytes:
        return SPEND.source

    def arguments(self, caller: int, now_us: int) -> Sequence[Command]:
        charges = [
            Charge(key, Rule("rule", quota, WINDOW_SECONDS), 1)
            for key, quota in zip(self.keys(caller), self.quotas, strict=True)
        ]
        return [spending(charges, now_us=now_us).arguments]


class SortedSet(Contender):
    """The classic: one member a request, all rules in one script, all or nothing."""

    def source(self) -> str:
        return """
            local now, window, member = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3]
            for i = 1, #KEYS do
              redis.call('ZREMRANGEBYSCORE', KEYS[i], '-inf', now - window)
              if redis.call('ZCARD', KEYS[i]) >= tonumber(ARGV[3 + i]) then return 0 end
            end
            for i = 1, #KEYS do
              redis.call('ZADD', KEYS[i], now, member)
              redis.call('PEXPIRE', KEYS[i], window / 1000)
            end
            return 1
        """

    def arguments(self, caller: int, now_us: int) -> Sequence[Command]:
        keys = self.keys(caller)
        window_us = WINDOW_SECONDS * 1_000_000
        return [(len(keys), *keys, now_us, window_us, f"{now_us}:{caller}", *self.quotas)]


class PyPiLimits(Contender):
    """`limits.strategies.MovingWindowRateLimiter` on Redis: a list with an entry a request, a call a rule."""

    def __init__(self, client: redis.Redis, rules: int) -> None:
        self._script = RedisStorage("redis://", connection_pool=client.connection_pool)
        super().__init__(client, rules)

    def source(self) -> str | bytes:
        script: str | bytes = self._script.lua_acquire_moving_window.script
        return script

    def arguments(self, caller: int, now_us: int) -> Sequence[Command]:
        return [
            (1, key, now_us / 1_000_000, quota, WINDOW_SECONDS, 1)
            for key, quota in zip(self.keys(caller), self.quotas, strict=True)
        ]


CONTENDERS: Final[dict[str, type[Contender]]] = {
    "Laneway": Laneway,
    "sorted set": SortedSet,
    "limits": PyPiLimits,
}


def cost(stores: Stores, name: str, *, rules: int, count: int) -> dict[str, float]:
    """Microseconds of Redis for a request that is admitted and one that is refused; bytes of a caller.

    `count` decisions of each kind are measured.
    """
    with stores.empty_redis() as client:
        contender = CONTENDERS[name](client, rules)
        callers = range(max(1, count // WARM_UP))
        moments = [START_US + n * SPACING_US for n in range(2 * WARM_UP)]
        _run(client, contender, callers, moments[:1])
        idle = _bytes(client, contender, callers)
        _run(client, contender, callers, moments[1:WARM_UP])
        admitted = _timed(client, contender, callers, moments[WARM_UP:], wanted=True)
        last = moments[-1]
        _run(client, contender, callers, [last + n for n in range(1, WARM_UP)])
        full = _bytes(client, contender, callers)
        refused = _timed(
            client, contender, callers, [last + WARM_UP + n for n in range(WARM_UP)], wanted=False
        )
    return {"admit_us": admitted, "refuse_us": refused, "idle_bytes": idle, "full_bytes": full}


def _timed(
    client: redis.Redis, contender: Contender, callers: range, moments: Sequence[int], *, wanted: bool
) -> float:
    client.config_resetstat()
    # Who asks rule by rule stops at the first that refuses, and here the first one does.
    answers = _run(client, contender, callers, moments, first=None if wanted else 1)
    assert all(answer == wanted for answer in answers), f"{type(contender).__name__}: not all {wanted}"
    usec: float = client.info("commandstats")["cmdstat_evalsha"]["usec"]
    return usec / len(answers)


def _run(
    client: redis.Redis,
    contender: Contender,
    callers: range,
    moments: Sequence[int],
    *,
    first: int | None = None,
) -> list[bool]:
    """Whether each request passed, in order of the moments; `first` calls of each are made, None: all."""
    answers = []
    for now_us in moments:
        with client.pipeline(transaction=False) as pipeline:
            commands = [contender.commands(caller, now_us)[:first] for caller in callers]
            for each in commands:
                for command in each:
                    pipeline.execute_command(*command)
            replies = iter(pipeline.execute())
        for each in commands:
            passed = [_passed(next(replies)) for _ in each]
            answers.append(all(passed))
    return answers


def _passed(reply: Any) -> bool:
    return bool(reply[0] if isinstance(reply, list) else reply)


def _bytes(client: redis.Redis, contender: Contender, callers: range) -> float:
    """Of one caller's keys, all rules together."""
    sizes = [client.memory_usage(key) or 0 for caller in callers for key in contender.keys(caller)]
    return sum(sizes) / len(callers)
