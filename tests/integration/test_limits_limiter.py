"""The limiter on a real Redis: many callers at once, and everything that can happen to Redis."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import redis as redis_py
from structlog.testing import capture_logs

from laneway.clock import FrozenClock
from laneway.limits.decision import Decision
from laneway.limits.limiter import RateLimiter
from laneway.limits.rules import RateClass, parse_rules
from servers import RedisServer

TENANT = "01936f3e-0000-7000-8000-000000000001"


@asynccontextmanager
async def limiter_of(
    url: str, rules: str = "queue=50/60,default=100/60", *, clock: FrozenClock | None = None
) -> AsyncIterator[RateLimiter]:
    limiter = RateLimiter(parse_rules(rules), url, clock=clock or FrozenClock())
    try:
        yield limiter
    finally:
        await limiter.close()


async def hit(limiter: RateLimiter, subject: str = "ada", *, cost: int = 1) -> Decision:
    return await limiter.hit(RateClass.QUEUE, tenant_id=TENANT, subject=subject, cost=cost)


async def admitted_of(limiter: RateLimiter, callers: int, subject: str = "ada") -> int:
    decisions = await asyncio.gather(*[hit(limiter, subject) for _ in range(callers)])
    return sum(decision.allowed for decision in decisions)


async def used(limiter: RateLimiter, subject: str = "ada") -> int:
    return (await hit(limiter, subject, cost=0)).rules[0].used


def test_of_200_parallel_callers_with_a_limit_of_50_exactly_50_are_admitted(redis_url: str) -> None:
    async def main() -> None:
        async with limiter_of(redis_url) as limiter:
            for trial in range(10):
                assert await admitted_of(limiter, 200, f"caller-{trial}") == 50
            assert not limiter.degraded

    asyncio.run(main())


CALLER = """
import asyncio, sys
from laneway.clock import SystemClock
from laneway.limits.limiter import RateLimiter
from laneway.limits.rules import RateClass, parse_rules

async def main():
    limiter = RateLimiter(parse_rules("queue=50/60"), sys.argv[1], clock=SystemClock())
    hits = [limiter.hit(RateClass.QUEUE, tenant_id="t", subject="ada") for _ in range(40)]
    print(sum(d.allowed for d in await asyncio.gather(*hits)), limiter.degraded)
    await limiter.close()

asyncio.run(main())
"""


def test_several_processes_share_one_limit(redis_url: str) -> None:
    callers = [
        subprocess.Popen([sys.executable, "-c", CALLER, redis_url], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    answers = [caller.communicate(timeout=60)[0].split() for caller in callers]
    assert sum(int(admitted) for admitted, _ in answers) == 50, answers
    assert [degraded for _, degraded in answers] == ["False"] * 4


def test_the_callers_of_one_turn_travel_together(redis_url: str, redis: redis_py.Redis) -> None:
    async def main() -> None:
        async with limiter_of(redis_url) as limiter:
            await hit(limiter, "first")  # opens the connection
            before = redis.info("stats")["total_reads_processed"]
            await asyncio.gather(*[hit(limiter, f"caller-{n}") for n in range(200)])
            reads = redis.info("stats")["total_reads_processed"] - before
            assert reads <= 5, reads  # the batch's 33 kB are read in pieces of 16 kB; one is INFO's own
            assert redis.info("commandstats")["cmdstat_evalsha"]["calls"] >= 201

    asyncio.run(main())


def test_one_more_than_a_batch_is_decided_too(redis_url: str) -> None:
    async def main() -> None:
        async with limiter_of(redis_url, "queue=1000/60") as limiter:
            assert await admitted_of(limiter, 257) == 257
            assert await used(limiter) == 257

    asyncio.run(main())


def test_the_reply_is_redis_own_decision(redis_url: str, redis: redis_py.Redis) -> None:
    async def main() -> None:
        clock = FrozenClock()  # ten months behind Redis' clock, which is the one that counts
        async with limiter_of(redis_url, clock=clock) as limiter:
            found = await hit(limiter, cost=3)
            seconds, _ = redis.time()
            assert abs(found.now_us - seconds * 1_000_000) < 5_000_000
            (rule,) = found.rules
            assert (found.allowed, rule.name, rule.quota, rule.used, rule.reset_us) == (
                True,
                "queue",
                50,
                3,
                60_000_000,
            )

    asyncio.run(main())


def test_streams_are_charged_to_default_and_the_free_class_to_nothing(
    redis_url: str, redis: redis_py.Redis
) -> None:
    async def main() -> None:
        async with limiter_of(redis_url) as limiter:
            for rate_class in (RateClass.STREAM, RateClass.DEFAULT):
                found = await limiter.hit(rate_class, tenant_id=TENANT, subject="ada")
            assert (found.rules[0].name, found.rules[0].used) == ("default", 2)
            free = await limiter.hit(RateClass.FREE, tenant_id=TENANT, subject="ada", cost=10**9)
            assert (free.allowed, free.rules) == (True, ())
            assert redis.dbsize() == 1

    asyncio.run(main())


def test_all_windows_of_a_class_are_charged_or_none(redis_url: str, redis: redis_py.Redis) -> None:
    async def main() -> None:
        async with limiter_of(redis_url, "queue=10/60+12/3600@tenant") as limiter:
            assert (await hit(limiter, cost=10)).allowed
            refused = await hit(limiter, cost=3)
            assert [(rule.name, rule.used) for rule in refused.rules] == [("queue", 10), ("queue-3600", 10)]
            assert not refused.allowed
            assert redis.dbsize() == 2

    asyncio.run(main())


def test_two_users_share_their_tenants_budget_and_not_their_own(redis_url: str) -> None:
    async def main() -> None:
        async with limiter_of(redis_url, "queue=1/60@tenant,default=1/60@user") as limiter:
            assert (await hit(limiter, "ada")).allowed
            assert not (await hit(limiter, "bob")).allowed
            for subject in ("ada", "bob"):
                hits = [limiter.hit(RateClass.DEFAULT, tenant_id=TENANT, subject=subject) for _ in range(2)]
                assert [d.allowed for d in await asyncio.gather(*hits)] == [True, False]
            assert (await limiter.hit(RateClass.QUEUE, tenant_id="another", subject="ada")).allowed

    asyncio.run(main())


def test_a_negative_cost_is_refused_before_anything_is_charged(redis_url: str) -> None:
    async def main() -> None:
        async with limiter_of(redis_url) as limiter:
            with pytest.raises(ValueError, match="negative"):
                await hit(limiter, cost=-1)
            assert await used(limiter) == 0

    asyncio.run(main())


def test_a_url_that_is_none_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="scheme"):
        RateLimiter(parse_rules("off"), "localhost:6379", clock=FrozenClock())


def test_every_key_of_any_subject_expires_and_names_nobody(redis_url: str, redis: redis_py.Redis) -> None:
    subjects = ["ada", "}", "{x}", "a:b\r\nFLUSHALL\r\n", "\x00", "\N{PILE OF POO}", "\ud800", "é" * 500_000]

    async def main() -> None:
        async with limiter_of(redis_url) as limiter:
            for subject in subjects:
                for rate_class in (RateClass.QUEUE, RateClass.DEFAULT):
                    found = await limiter.hit(rate_class, tenant_id=TENANT, subject=subject)
                    assert found.rules[0].used == 1, subject
            assert not limiter.degraded

    asyncio.run(main())
    keys = redis.keys()
    assert len(keys) == 2 * len(subjects)
    assert {key[: key.rindex(b":")].decode() for key in keys} == {
        f"rl:{{{TENANT}}}:queue",
        f"rl:{{{TENANT}}}:default",
    }
    assert all(0 < redis.pttl(key) <= 61_000 for key in keys)


def test_a_flushed_script_cache_is_survived_and_charges_once(redis_url: str, redis: redis_py.Redis) -> None:
    async def main() -> None:
        async with limiter_of(redis_url) as limiter:
            for n in range(5):
                assert await admitted_of(limiter, 3) == 3
                assert await used(limiter) == 3 * (n + 1)
                redis.script_flush()
            assert not limiter.degraded

    asyncio.run(main())


def test_a_connection_that_redis_closed_meanwhile_is_opened_anew(
    redis_url: str, redis: redis_py.Redis
) -> None:
    async def main() -> None:
        async with limiter_of(redis_url) as limiter:
            await hit(limiter)
            redis.client_kill_filter(_type="normal", skipme=True)
            await noticed()
            assert (await hit(limiter)).rules[0].used == 2
            assert not limiter.degraded

    asyncio.run(main())


async def noticed() -> None:
    """Give the event loop the turns it needs to read what is in its sockets."""
    for _ in range(10):
        await asyncio.sleep(0)


def test_redis_over_tcp_works_the_same(redis_server: RedisServer, redis: redis_py.Redis) -> None:
    async def main() -> None:
        async with Bridge(redis_server) as bridge, limiter_of(bridge.url + "/0") as limiter:
            assert await admitted_of(limiter, 60) == 50
            assert not limiter.degraded

    asyncio.run(main())


class Bridge:
    """A TCP port before Redis' socket. `deaf`: it takes what is sent and passes it on, and no reply back."""

    def __init__(self, server: RedisServer) -> None:
        self._socket = str(server.socket)
        self._tasks: set[asyncio.Task[None]] = set()
        self.deaf = False
        self.connections = 0

    async def __aenter__(self) -> Bridge:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        redis_reader, redis_writer = await asyncio.open_unix_connection(self._socket)

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, back: bool) -> None:
            while data := await source.read(65536):
                if not (back and self.deaf):
                    sink.write(data)
            sink.close()

        try:
            await asyncio.gather(
                pump(reader, redis_writer, back=False), pump(redis_reader, writer, back=True)
            )
        finally:
            redis_writer.close()
            writer.close()


def degraded_then_recovered(logs: list[Any]) -> list[str]:
    return [line["event"] for line in logs if line["event"].startswith("limiter_")]


@pytest.mark.parametrize("damage", ["killed", "out of memory", "read only", "refusing the password"])
def test_with_redis_broken_the_limit_still_holds_and_it_comes_back_within_a_second_of_redis(
    own_redis_server: RedisServer, damage: str
) -> None:
    server, clock = own_redis_server, FrozenClock()

    async def main() -> None:
        async with limiter_of(server.url, clock=clock) as limiter:
            assert (await hit(limiter, "before")).rules[0].used == 1
            repair = break_redis(server, damage)
            assert await admitted_of(limiter, 200) == 50
            assert limiter.degraded
            assert await admitted_of(limiter, 10) == 0
            clock.advance(seconds=1)
            assert await admitted_of(limiter, 10) == 0  # the probe found it broken still
            assert limiter.degraded
            repair()
            clock.advance(seconds=0.999)
            await hit(limiter, "a call too early to probe")
            assert limiter.degraded
            clock.advance(seconds=0.001)
            assert (await hit(limiter, "before")).rules[0].used == 2
            assert not limiter.degraded
            assert (await hit(limiter)).rules[0].used == 1  # what was spent meanwhile was not Redis' to count

    with capture_logs() as logs:
        asyncio.run(main())
    assert degraded_then_recovered(logs) == ["limiter_degraded", "limiter_recovered"], logs


def break_redis(server: RedisServer, damage: str) -> Callable[[], None]:
    """Damage the server; returns what mends it."""

    def config(**values: str) -> None:
        with server.client() as client:
            for name, value in values.items():
                client.config_set(name.replace("_", "-"), value)

    def follow(*leader: str) -> None:
        with server.client() as client:
            client.execute_command("REPLICAOF", *leader)

    def password(word: str) -> None:
        with server.client(password="sesame" if not word else None) as client:
            client.config_set("requirepass", word)
            client.client_kill_filter(_type="normal", skipme=True)

    match damage:
        case "killed":
            server.kill()
            return server.start
        case "out of memory":
            config(maxmemory="1")
            return lambda: config(maxmemory="0")
        case "read only":
            follow("127.0.0.1", "1")
            return lambda: follow("NO", "ONE")
        case _:
            password("sesame")
            return lambda: password("")


def test_a_redis_that_does_not_answer_costs_one_call_its_patience_and_is_charged_once(
    redis_server: RedisServer, redis: redis_py.Redis
) -> None:
    clock = FrozenClock()

    async def main() -> None:
        async with Bridge(redis_server) as bridge, limiter_of(bridge.url, clock=clock) as limiter:
            assert (await hit(limiter)).rules[0].used == 1
            bridge.deaf = True
            local = await asyncio.wait_for(hit(limiter), 10)
            assert (local.allowed, local.rules[0].used) == (True, 1)  # by the twin, which starts afresh
            assert limiter.degraded
            connections = bridge.connections
            for _ in range(100):
                await hit(limiter, "others")
            assert bridge.connections == connections  # nobody else went to see
            bridge.deaf = False
            clock.advance(seconds=1)
            assert (await hit(limiter)).rules[0].used == 3  # the unanswered one was spent, and only once
            assert not limiter.degraded

    asyncio.run(main())


def test_after_a_refusal_by_redis_the_next_probe_looks_for_redis_anew(own_redis_server: RedisServer) -> None:
    clock = FrozenClock()

    async def main() -> None:
        async with Bridge(own_redis_server) as bridge, limiter_of(bridge.url, clock=clock) as limiter:
            repair = break_redis(own_redis_server, "read only")
            await hit(limiter)
            repair()
            clock.advance(seconds=1)
            assert (await hit(limiter)).rules[0].used == 1
            assert bridge.connections == 2

    asyncio.run(main())


def test_while_one_call_finds_out_whether_redis_is_back_the_others_do_not_wait(
    redis_server: RedisServer, redis: redis_py.Redis
) -> None:
    clock = FrozenClock()

    async def main() -> None:
        async with Bridge(redis_server) as bridge, limiter_of(bridge.url, clock=clock) as limiter:
            bridge.deaf = True
            await hit(limiter)
            clock.advance(seconds=1)
            probe = asyncio.create_task(hit(limiter))
            await asyncio.sleep(0)
            for _ in range(30):
                assert (await hit(limiter, "others")).allowed
            assert not probe.done()
            assert (await probe).allowed

    asyncio.run(main())


def test_a_process_that_was_held_up_does_not_blame_redis(redis_url: str) -> None:
    async def main() -> None:
        async with limiter_of(redis_url) as limiter:
            await hit(limiter)
            waiting = asyncio.create_task(hit(limiter))
            for _ in range(2):
                await asyncio.sleep(0)  # sent, and not read yet
            hold_up_until = time.monotonic() + 0.2  # four times Redis' allowance
            while time.monotonic() < hold_up_until:
                pass
            assert (await waiting).rules[0].used == 2
            assert not limiter.degraded

    asyncio.run(main())


def test_a_caller_that_gives_up_harms_nobody_else(redis_url: str, redis: redis_py.Redis) -> None:
    async def main() -> None:
        async with limiter_of(redis_url) as limiter:
            await hit(limiter)
            for round_ in range(20):
                gone = [asyncio.create_task(hit(limiter, "gone")) for _ in range(5)]
                stays = asyncio.create_task(hit(limiter, "stays"))
                for _ in range(round_ % 4):
                    await asyncio.sleep(0)
                for task in gone:
                    task.cancel()
                assert (await stays).rules[0].used == round_ + 1
            assert not limiter.degraded
            assert len([c for c in redis.client_list() if c["cmd"] in ("evalsha", "eval")]) == 1

    asyncio.run(main())


def test_a_caller_that_left_before_anything_was_sent_is_not_charged(redis_url: str) -> None:
    async def main() -> None:
        async with limiter_of(redis_url) as limiter:
            task = asyncio.create_task(hit(limiter))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert await used(limiter) == 0

    asyncio.run(main())


def test_closing_answers_whoever_still_waits(redis_server: RedisServer, redis: redis_py.Redis) -> None:
    async def main() -> None:
        async with Bridge(redis_server) as bridge, limiter_of(bridge.url) as limiter:
            await hit(limiter)
            bridge.deaf = True
            waiting = asyncio.create_task(hit(limiter))
            await noticed()
            await limiter.close()
            assert (await asyncio.wait_for(waiting, 10)).allowed

    asyncio.run(main())
