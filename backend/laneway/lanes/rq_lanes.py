"""Lanes on RQ: its lists, job hashes and registries, so that `rq info` and rq-dashboard answer truly.

Each method is one Lua call or one pipeline. The scripts write the keys themselves (`job.lua` lists
them); this package imports nothing of RQ. A stock `rq worker` may serve the same lanes: each job is the
call `laneway.worker.entry.run(job_id)`. Our own workers never unpickle it, they take the id.

Nothing is tried again here: repeating a pop whose reply was lost would lose an id, repeating a push
would double it. After a failed connection every call fails at once for a second, then one asks with a
PING and a short patience: a Redis that hangs costs its callers 2 s once and then 0.25 s in each second.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import redis
from redis.backoff import NoBackoff
from redis.commands.core import Script
from redis.retry import Retry

from laneway.clock import Breaker, Clock
from laneway.domain.spec import queue_of
from laneway.domain.states import JobStatus
from laneway.lanes.backend import (
    BELL_STROKES,
    LONGEST_WAIT_SECONDS,
    Backlog,
    Due,
    EndedRun,
    Lack,
    LanesUnavailable,
    by_lane,
    by_tenant,
)
from laneway.log import get_logger

CONNECT_SECONDS = 1.0
COMMAND_SECONDS = 2.0
BREAK_SECONDS = 1.0
PROBE_SECONDS = 0.25
SHORTEST_WAIT_SECONDS = 0.01  # BLPOP takes 0 for "for ever", and Redis 6.2 even takes 0.001 for 0
REMOVED_TTL = 500
WEIGHTS_KEY = "laneway:weights"
REMOVE_PART = 500  # LREM walks the list: about 0.1 ms each in a full lane

_RQ_STATUS = {
    JobStatus.COMPLETED: "finished",
    JobStatus.FAILED: "failed",
    JobStatus.TIMEOUT: "failed",
    JobStatus.CANCELLED: "canceled",
    JobStatus.EXPIRED: "canceled",
    JobStatus.RETRYING: "scheduled",
    JobStatus.SCHEDULED: "scheduled",
    JobStatus.BLOCKED: "scheduled",
    JobStatus.QUEUED: "queued",
}

log = get_logger("lanes")


def queue_key(lane: str) -> str:
    """RQ's list of the lane's ids."""
    return f"rq:queue:{lane}"


def backlog_key(lane: str) -> str:
    """The hash that says whose rows wait outside the lane."""
    return f"laneway:backlog:{lane}"


def turns_key(lane: str) -> str:
    """The hash of the turns that tenants' next ids get."""
    return f"laneway:turns:{lane}"


def bell_key(queue: str) -> str:
    """The list a worker of `queue` may BLPOP on."""
    return f"laneway:bell:{queue}"


def connect(redis_url: str, command_seconds: float = COMMAND_SECONDS) -> redis.Redis:
    """A client for `redis://`, `rediss://` or `unix://` that fails fast and never repeats a command.

    `command_seconds` must be longer than the longest blocking command. Replies are text.
    """
    client: redis.Redis = redis.Redis.from_url(
        redis_url,
        protocol=2,
        decode_responses=True,
        encoding_errors="replace",
        socket_connect_timeout=min(CONNECT_SECONDS, command_seconds),
        socket_timeout=command_seconds,
        retry=Retry(NoBackoff(), 0),
    )
    return client


class RqLanes:
    """LaneBackend over one Redis or Valkey (6.2 or later, single or Sentinel's master; not Cluster)."""

    def __init__(
        self,
        redis_url: str,
        *,
        clock: Clock,
        window: int = 10_000,
        connect: Callable[[str, float], redis.Redis] = connect,
    ) -> None:
        self.window = window
        self._clock = clock
        self._redis = connect(redis_url, COMMAND_SECONDS)
        self._bells = connect(redis_url, LONGEST_WAIT_SECONDS + COMMAND_SECONDS)
        self._probe = connect(redis_url, PROBE_SECONDS)
        self._push = self._script("turns", "push")
        self._push_first = self._script("turns", "first")
        self._take = self._script("take")
        self._refill = self._script("turns", "refill")
        self._removed = self._script("turns", "remove")
        self._purge = self._script("purge")
        self._running = self._script("running")
        self._ended = self._script("ended")
        self._breaker = Breaker(clock.monotonic, seconds=BREAK_SECONDS)
        self._policy_checked = False

    def push(self, items: Sequence[Due]) -> int:
        return self._put(self._push, items)

    def push_first(self, items: Sequence[Due]) -> int:
        return self._put(self._push_first, items)

    def _put(self, script: Script, items: Sequence[Due]) -> int:
        if not items:
            return 0
        keys: list[str] = []
        args: list[Any] = [self.window, self._iso_now(), BELL_STROKES]
        for (lane, tenant_id), job_ids in by_tenant(items).items():
            keys += _lane_keys(lane)
            args += [lane, tenant_id, len(job_ids), *job_ids]
        with self._reaching():
            return int(script(keys=keys, args=args))

    def take(self, lanes: Sequence[str], count: int, *, worker_name: str) -> list[str]:
        if count <= 0 or not lanes:
            return []
        with self._reaching():
            taken = self._take(
                keys=[queue_key(lane) for lane in lanes], args=[count, worker_name, self._iso_now()]
            )
            return cast(list[str], taken)

    def remove(self, lane: str, job_ids: Sequence[str]) -> int:
        removed = 0
        with self._reaching():
            for start in range(0, len(job_ids), REMOVE_PART):
                part = job_ids[start : start + REMOVE_PART]
                pipeline = self._redis.pipeline(transaction=False)
                for job_id in part:
                    pipeline.lrem(queue_key(lane), 0, job_id)
                    pipeline.expire(f"rq:job:{job_id}", REMOVED_TTL)
                counts = pipeline.execute()[::2]
                removed += sum(counts)
                if gone := [job_id for job_id, count in zip(part, counts, strict=True) if count]:
                    self._removed(keys=[turns_key(lane)], args=gone)
        return removed

    def purge(self, lane: str) -> int:
        with self._reaching():
            return int(self._purge(keys=[queue_key(lane)]))

    def depths(self, lanes: Sequence[str]) -> dict[str, int]:
        with self._reaching():
            pipeline = self._redis.pipeline(transaction=False)
            for lane in lanes:
                pipeline.llen(queue_key(lane))
            return dict(zip(lanes, pipeline.execute(), strict=True))

    def contents(self, lane: str) -> list[str]:
        with self._reaching():
            return cast(list[str], self._redis.lrange(queue_key(lane), 0, -1))

    def backlog(self, lane: str) -> Backlog:
        with self._reaching():
            fields = cast(dict[str, str], self._redis.hgetall(backlog_key(lane)))
        marked = (name.partition(":") for name in fields)
        outside = frozenset(tenant for kind, _, tenant in marked if kind == "outside")
        return Backlog(int(fields.get("refusals", 0)), outside)

    def refill(self, lane: str, lacks: Sequence[Lack], *, refusals_seen: int) -> int:
        args: list[Any] = [self.window, self._iso_now(), BELL_STROKES, lane, refusals_seen]
        for lack in lacks:
            args += [lack.tenant_id, int(lack.complete), len(lack.head), len(lack.tail)]
            args += [*lack.head, *lack.tail]
        with self._reaching():
            return int(self._refill(keys=_lane_keys(lane), args=args))

    def weigh(self, weights: Mapping[str, int]) -> None:
        with self._reaching():
            pipeline = self._redis.pipeline()
            pipeline.delete(WEIGHTS_KEY)
            if weights:
                pipeline.hset(WEIGHTS_KEY, items=[each for pair in weights.items() for each in pair])
            pipeline.execute()

    def workers(self) -> list[str]:
        with self._reaching():
            keys = sorted(cast(set[str], self._redis.smembers("rq:workers")))
            pipeline = self._redis.pipeline(transaction=False)
            for key in keys:
                pipeline.exists(key)
            alive = pipeline.execute()
        return [key.removeprefix("rq:worker:") for key, lives in zip(keys, alive, strict=True) if lives]

    def wait(self, queues: Sequence[str], timeout_seconds: float) -> bool:
        seconds = min(max(timeout_seconds, SHORTEST_WAIT_SECONDS), LONGEST_WAIT_SECONDS)
        with self._reaching():
            return self._bells.blpop([bell_key(queue) for queue in queues], timeout=seconds) is not None

    def mirror_running(
        self, items: Sequence[tuple[str, str]], *, worker_name: str, lease_seconds: float
    ) -> None:
        if not items:
            return
        now = self._clock.now()
        args: list[Any] = [now.timestamp(), _iso(now), worker_name, math.ceil(lease_seconds)]
        for lane, job_ids in by_lane(items).items():
            args += [lane, len(job_ids), *job_ids]
        with self._reaching():
            self._running(keys=[f"rq:worker:{worker_name}:executions"], args=args)

    def mirror_ended(self, items: Sequence[EndedRun], *, worker_name: str = "") -> None:
        if not items:
            return
        now = self._clock.now()
        runs: dict[str, list[EndedRun]] = {}
        for run in items:
            runs.setdefault(run.lane, []).append(run)
        args: list[Any] = [now.timestamp(), _iso(now), self.window]
        for lane, of_lane in runs.items():
            args += [lane, len(of_lane)]
            for run in of_lane:
                due = run.due_at or now
                args += [run.job_id, _RQ_STATUS[run.status], due.timestamp(), _stored_error(run.error)]
        worker = f"rq:worker:{worker_name}"
        with self._reaching():
            self._ended(keys=[worker, f"{worker}:executions"], args=args)

    def close(self) -> None:
        self._redis.close()
        self._bells.close()
        self._probe.close()

    def _script(self, *names: str) -> Script:
        here = Path(__file__).parent
        return self._redis.register_script(
            "".join((here / f"{name}.lua").read_text() for name in ("job", *names))
        )

    def _iso_now(self) -> str:
        return _iso(self._clock.now())

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        """Talk to Redis: every failure is LanesUnavailable, and one of the connection shuts the breaker."""
        if not self._breaker.may_try():
            raise LanesUnavailable()
        try:
            if self._breaker.shut:
                self._probe.ping()
            if not self._policy_checked:
                self._check_policy()
            yield
        except (redis.ConnectionError, redis.TimeoutError) as error:
            self._breaker.failed()
            log.warning("lanes_unreachable", error=str(error))
            raise LanesUnavailable() from error
        except redis.RedisError as error:
            if isinstance(error, redis.ReadOnlyError):  # a replica since a failover: ask anew who is master
                self._redis.connection_pool.disconnect(inuse_connections=False)
            log.warning("lanes_refused", error=str(error))
            raise LanesUnavailable(str(error)) from error
        self._breaker.worked()

    def _check_policy(self) -> None:
        """Say once when Redis may throw ids away to make room. Managed services often hide CONFIG."""
        try:
            policy = self._redis.config_get("maxmemory-policy").get("maxmemory-policy", "noeviction")
        except redis.ResponseError:
            policy = "noeviction"
        self._policy_checked = True
        if policy != "noeviction":
            log.warning("redis_may_evict", maxmemory_policy=policy, wanted="noeviction")


def _lane_keys(lane: str) -> list[str]:
    return [queue_key(lane), backlog_key(lane), bell_key(queue_of(lane)), turns_key(lane)]


def _iso(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _stored_error(text: str) -> str:
    """An error's text as an entry of RQ's result stream holds it (rq.results.Result.restore)."""
    return base64.b64encode(zlib.compress(text.encode())).decode() if text else ""
