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
from laneway.errors import CapacityReduced
from laneway.limits import redis_windows
from laneway.limits.decision import Decision
from laneway.limits.limiter import RateLimiter
from laneway.limits.rule_book import RuleBook
from laneway.limits.rules import Policy, RateClass, parse_rules
from servers import RedisServer

TENANT = "01936f3e-0000-7000-8000-000000000001"


@pytest.fixture(autouse=True)
def _patience(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine Redis may need longer than it gets in service: only `hasty` tests are about that."""
    if "hasty" not in request.fixturenames:
        monkeypatch.setattr(redis_windows, "TIMEOUT_SECONDS", 20.0)


@pytest.fixture
def hasty() -> None:
    """Redis gets the 50 ms that it gets in service."""


@asynccontextmanager
async def limiter_of(
    url: str,
    rules: str = "queue=50/60,default=100/60",
    *,
    clock: FrozenClock | None = None,
    replicas: int = 1,
) -> AsyncIterator[RateLimiter]:
    clock = clock or FrozenClock()
    book = RuleBook(parse_rules(rules), clock=clock)
    limiter = RateLimiter(book, url, clock=clock, replicas=replicas)
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
from laneway.limits import redis_windows
from laneway.limits.limiter import RateLimiter
from laneway.limits.rule_book import RuleBook
from laneway.limits.rules import RateClass, parse_rules

async def main():
    redis_windows.TIMEOUT_SECONDS = 20.0
    clock = SystemClock()
    limiter = RateLimiter(RuleBook(parse_rules("queue=50/60"), clock=clock), sys.argv[1], clock=clock)
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
            assert (found.allowed, found.local, rule.used, rule.reset_us) == (True, False, 3, 60_000_000)
            assert (rule.rule.name, rule.rule.quota) == ("queue", 50)

    asyncio.run(main())


def test_streams_are_charged_to_default_and_the_free_class_to_nothing(
    redis_url: str, redis: redis_py.Redis
) -> None:
    async def main() -> None:
        async with limiter_of(redis_url) as limiter:
            for rate_class in (RateClass.STREAM, RateClass.POLL, RateClass.DEFAULT):
                found = await limiter.hit(rate_class, tenant_id=TENANT, subject="ada")
            assert (found.rules[0].rule.name, found.rules[0].used) == ("default", 3)
            free = await limiter.hit(RateClass.FREE, tenant_id=TENANT, subject="ada", cost=10**9)
            assert (free.allowed, free.rules) == (True, ())
            assert redis.dbsize() == 1

    asyncio.run(main())


def test_all_windows_of_a_class_are_charged_or_none(redis_url: str, redis: redis_py.Redis) -> None:
    async def main() -> None:
        async with limiter_of(redis_url, "queue=10/60+12/3600@tenant") as limiter:
            assert (await hit(limiter, cost=10)).allowed
            refused = await hit(limiter, cost=3)
            assert [(each.rule.name, each.used) for each in refused.rules] == [
                ("queue", 10),
                ("queue-3600", 10),
            ]
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
        RateLimiter(RuleBook({}, clock=FrozenClock()), "localhost:6379", clock=FrozenClock())


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
    redis_server: RedisServer, redis: redis_py.Redis, hasty: None
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
    redis_server: RedisServer, redis: redis_py.Redis, hasty: None
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


def test_a_process_that_was_held_up_does_not_blame_redis(redis_url: str, hasty: None) -> None:
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


BUDGETS = "queue=10/60,batch=5/60,tenant=12/60,jobs=100/60"


async def spend(
    limiter: RateLimiter, rate_class: RateClass, jobs: int = 0, *, subject: str = "ada"
) -> tuple[bool, dict[str, int]]:
    found = await limiter.hit(rate_class, tenant_id=TENANT, subject=subject, jobs=jobs)
    return found.allowed, {each.rule.name: each.used for each in found.rules}


def test_a_batch_of_many_jobs_costs_one_request_and_many_jobs_or_nothing(
    redis_url: str, redis: redis_py.Redis
) -> None:
    async def main() -> None:
        async with limiter_of(redis_url, BUDGETS) as limiter:
            assert await spend(limiter, RateClass.BATCH, 60) == (True, {"batch": 1, "tenant": 1, "jobs": 60})
            assert await spend(limiter, RateClass.BATCH, 41) == (False, {"batch": 1, "tenant": 1, "jobs": 60})
            assert await spend(limiter, RateClass.BATCH, 40) == (True, {"batch": 2, "tenant": 2, "jobs": 100})
            assert await spend(limiter, RateClass.QUEUE, 1) == (False, {"queue": 0, "tenant": 2, "jobs": 100})
            assert await spend(limiter, RateClass.QUEUE) == (True, {"queue": 1, "tenant": 3})
            assert redis.info("commandstats")["cmdstat_evalsha"]["calls"] >= 4
            (found,) = (await limiter.hit(RateClass.BATCH, tenant_id=TENANT, subject="ada", jobs=101)).never
            assert (found.rule.name, found.charge.cost) == ("jobs", 101)

    asyncio.run(main())


def test_the_users_of_a_tenant_share_its_budget_and_another_tenant_has_its_own(redis_url: str) -> None:
    async def main() -> None:
        async with limiter_of(redis_url, BUDGETS) as limiter:
            admitted = [(await spend(limiter, RateClass.QUEUE, subject=f"user-{n}"))[0] for n in range(13)]
            assert admitted == [True] * 12 + [False]
            assert (await limiter.hit(RateClass.QUEUE, tenant_id="another", subject="user-1")).allowed

    asyncio.run(main())


def test_looking_ahead_spends_nothing(redis_url: str, redis: redis_py.Redis) -> None:
    async def main() -> None:
        async with limiter_of(redis_url, BUDGETS) as limiter:
            for _ in range(9):
                found = await limiter.hit(RateClass.BATCH, tenant_id=TENANT, subject="ada", spend=False)
                assert found.allowed
            assert redis.dbsize() == 0

    asyncio.run(main())


def test_jobs_that_were_not_made_are_given_back_and_the_request_is_not(
    redis_url: str, own_redis_server: RedisServer
) -> None:
    async def main() -> None:
        async with limiter_of(own_redis_server.url, BUDGETS) as limiter:
            for _ in range(2):  # first by Redis, then by the twin
                for n in range(3):
                    found = await limiter.hit(RateClass.QUEUE, tenant_id=TENANT, subject="ada", jobs=100)
                    assert found.allowed
                    found = await limiter.give_back(found, Policy.JOBS)
                    assert {each.rule.name: each.used for each in found.rules} == {
                        "queue": n + 1,
                        "tenant": n + 1,
                        "jobs": 0,
                    }
                refused = await limiter.hit(RateClass.QUEUE, tenant_id=TENANT, subject="ada", jobs=101)
                assert await limiter.give_back(refused, Policy.JOBS) == refused
                own_redis_server.kill()

    asyncio.run(main())


def test_what_redis_cannot_give_back_stays_charged(own_redis_server: RedisServer) -> None:
    async def main() -> None:
        async with limiter_of(own_redis_server.url, BUDGETS) as limiter:
            found = await limiter.hit(RateClass.QUEUE, tenant_id=TENANT, subject="ada", jobs=5)
            own_redis_server.kill()
            assert await limiter.give_back(found, Policy.JOBS) == found
            assert limiter.degraded

    asyncio.run(main())


def test_a_shadow_rule_refuses_nothing_and_says_once_a_minute_what_it_would_have(redis_url: str) -> None:
    clock = FrozenClock()

    async def main() -> None:
        async with limiter_of(redis_url, "queue=3/60;shadow,tenant=9/60", clock=clock) as limiter:
            found = [await hit(limiter) for _ in range(8)]
            assert all(decision.allowed for decision in found)
            assert [each.rule.name for each in found[-1].rules] == ["tenant"]
            assert limiter.shadow_refusals == {"queue": 5}
            clock.advance(seconds=60)
            await limiter.hit(RateClass.QUEUE, tenant_id=TENANT, subject="ada", spend=False)
            assert (await hit(limiter)).allowed
            assert limiter.shadow_refusals == {"queue": 6}
            assert not (await hit(limiter)).allowed, "the other rule is enforced"

    with capture_logs() as logs:
        asyncio.run(main())
    told = [line for line in logs if line["event"] == "rate_limit_shadow_refused"]
    assert [(line["policy"], line["refused"], line["tenant_id"]) for line in told] == [
        ("queue", 1, TENANT),
        ("queue", 5, TENANT),
    ]


def test_without_redis_each_rule_fails_as_it_says(own_redis_server: RedisServer) -> None:
    rules = (
        "queue=3/60;on_failure=open,batch=3/60;on_failure=closed,default=3/60,tenant=5/60,stream=0/1;shadow"
    )

    async def main() -> None:
        async with limiter_of(own_redis_server.url, rules) as limiter:
            own_redis_server.kill()
            opened = await hit(limiter)
            assert (opened.allowed, [each.rule.name for each in opened.rules]) == (True, ["tenant"])
            for spend_it in (True, False):
                with pytest.raises(CapacityReduced) as refused:
                    await limiter.hit(RateClass.BATCH, tenant_id=TENANT, subject="ada", spend=spend_it)
                assert refused.value.facts == {"violated_policies": ["batch"]}
                assert refused.value.retry_after_seconds
            local = [await limiter.hit(RateClass.DEFAULT, tenant_id=TENANT, subject="ada") for _ in range(4)]
            assert [decision.allowed for decision in local] == [True] * 3 + [False]
            stream = await limiter.hit(RateClass.STREAM, tenant_id=TENANT, subject="ada")
            assert (stream.allowed, len(stream.rules), stream.shadows) == (True, 1, ())

    asyncio.run(main())


def test_without_redis_a_caller_of_open_rules_alone_meets_no_limit(own_redis_server: RedisServer) -> None:
    async def main() -> None:
        async with limiter_of(own_redis_server.url, "queue=1/60;on_failure=open") as limiter:
            own_redis_server.kill()
            assert await admitted_of(limiter, 20) == 20

    asyncio.run(main())


@pytest.mark.parametrize(("quota", "share"), [(10, 4), (9, 3), (1, 1), (0, 0)])
def test_without_redis_each_of_several_processes_allows_its_part_rounded_up(
    own_redis_server: RedisServer, quota: int, share: int
) -> None:
    async def main() -> None:
        async with limiter_of(own_redis_server.url, f"queue={quota}/60", replicas=3) as limiter:
            assert await admitted_of(limiter, 20, "before") == quota
            own_redis_server.kill()
            assert await admitted_of(limiter, 20) == share

    asyncio.run(main())


def test_what_is_more_than_a_processes_part_is_not_called_hopeless(own_redis_server: RedisServer) -> None:
    async def main() -> None:
        async with limiter_of(own_redis_server.url, "jobs=100/60", replicas=3) as limiter:
            own_redis_server.kill()
            assert (await limiter.hit(RateClass.BATCH, tenant_id="t", subject="ada", jobs=34)).allowed
            with pytest.raises(CapacityReduced):
                await limiter.hit(RateClass.BATCH, tenant_id="t", subject="ada", jobs=35)
            assert (await limiter.hit(RateClass.BATCH, tenant_id="t", subject="ada", jobs=101)).never

    asyncio.run(main())


def test_a_look_at_ones_limits_costs_nothing_also_without_redis(own_redis_server: RedisServer) -> None:
    rules = "queue=10/60;on_failure=closed,default=0/60,jobs=100/60"

    async def look(limiter: RateLimiter) -> list[tuple[str, int, list[Policy]]]:
        decision, policies = await limiter.standings(tenant_id=TENANT, subject="ada")
        return [(s.rule.name, s.used, p) for s, p in zip(decision.rules, policies, strict=True)]

    async def main() -> None:
        async with limiter_of(own_redis_server.url, rules) as limiter:
            await limiter.hit(RateClass.QUEUE, tenant_id=TENANT, subject="ada", jobs=7)
            seen = [
                ("queue", 1, [Policy.QUEUE]),
                ("default", 0, [Policy.DEFAULT, Policy.POLL, Policy.STREAM]),
                ("jobs", 7, [Policy.JOBS]),
            ]
            assert await look(limiter) == await look(limiter) == seen
            own_redis_server.kill()
            assert await look(limiter) == [(name, 0, policies) for name, _, policies in seen]
        async with limiter_of(own_redis_server.url, "off") as limiter:
            assert await look(limiter) == []

    asyncio.run(main())


def test_of_a_thousand_looks_none_names_another_reset(redis_url: str) -> None:
    async def main() -> None:
        async with limiter_of(redis_url) as limiter:
            first = await hit(limiter)
            stamp = first.now_us + first.rules[0].reset_us
            looks = await asyncio.gather(*[hit(limiter, cost=0) for _ in range(1000)])
            assert {look.now_us + look.rules[0].reset_us for look in looks} == {stamp}

    asyncio.run(main())


def test_a_thousand_callers_each_leave_at_most_200_bytes(redis_url: str, redis: redis_py.Redis) -> None:
    async def main() -> None:
        async with limiter_of(redis_url) as limiter:
            await asyncio.gather(*[hit(limiter, f"caller-{n}") for n in range(1000)])

    asyncio.run(main())
    keys = redis.keys()
    assert len(keys) == 1000
    assert max(redis.memory_usage(key) for key in keys) <= 200


def test_ten_thousand_callers_that_give_up_leave_one_connection(
    redis_url: str, redis: redis_py.Redis
) -> None:
    async def main() -> None:
        async with limiter_of(redis_url, "queue=90000/60") as limiter:
            await hit(limiter)
            before = len(redis.client_list())
            for _ in range(100):
                tasks = [asyncio.create_task(hit(limiter)) for _ in range(100)]
                await asyncio.sleep(0)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            assert (await hit(limiter)).allowed
            assert len(redis.client_list()) == before
            assert not limiter.degraded

    asyncio.run(main())
