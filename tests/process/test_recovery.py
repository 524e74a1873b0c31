"""Whatever is lost or killed, what was accepted is run to an end, and ends once: on both stores."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from process.stack import SHORT_LEASE, Process, Stack, is_alive
from servers import PostgresServer, RedisServer


def notes(ledger: Path, count: int) -> list[tuple[str, dict[str, object]]]:
    return [("test.note", {"ledger": str(ledger), "text": str(n)}) for n in range(count)]


def assert_each_ran_once(stack: Stack, ledger: Path, job_ids: list[str]) -> None:
    assert sorted(ledger.read_text().splitlines(), key=int) == [str(n) for n in range(len(job_ids))]
    for job_id in job_ids:
        events = stack.events(job_id)
        assert events.count("complete") == 1, events


@pytest.mark.parametrize("with_scheduler", [True, False])
def test_jobs_outlive_a_flushed_redis(either_stack: Stack, tmp_path: Path, *, with_scheduler: bool) -> None:
    """A scheduler rings for them again; without one a worker finds them when it looks for itself."""
    stack, ledger, gate = either_stack, tmp_path / "ledger", tmp_path / "gate"
    stack.worker(concurrency=2)
    if with_scheduler:
        stack.scheduler()
    held = ("test.hold", {"ledger": str(tmp_path / "held"), "gate": str(gate)})
    blockers = stack.enqueue_all([held] * 2)
    stack.wait_for_file(tmp_path / "held", lines=2)
    ids = stack.enqueue_all(notes(ledger, 200))
    with stack.redis() as redis:
        redis.flushall()
    gate.touch()
    stack.wait_all(blockers + ids)
    assert_each_ran_once(stack, ledger, ids)


def test_jobs_run_while_redis_is_down(
    stack_with_own_redis: Stack, own_redis_server: RedisServer, tmp_path: Path
) -> None:
    stack, ledger = stack_with_own_redis, tmp_path / "ledger"
    worker, scheduler = stack.worker(concurrency=2), stack.scheduler()
    own_redis_server.stop()
    ids = stack.enqueue_all(notes(ledger, 100))
    delayed = stack.enqueue("demo.noop", delay_seconds=0.3)
    failing = stack.enqueue("demo.fail", {"times": 2})
    stack.wait_all([*ids, delayed, failing])
    assert_each_ran_once(stack, ledger, ids)

    own_redis_server.start()
    with stack.redis() as redis:
        redis.flushall()
        stack.until(lambda: redis.smembers("rq:workers"), what="the worker shows itself again")
        (key,) = redis.smembers("rq:workers")
        assert redis.hget(key, "pid") == str(worker.pid)
        stack.wait(stack.enqueue("demo.noop"))
        channel = f"rq:pubsub:{key.removeprefix('rq:worker:')}"
        stack.until(lambda: redis.publish(channel, '{"command": "shutdown"}'), what="it listens again")
    assert worker.wait() == 0
    assert not scheduler.ended()


def start_pair(stack: Stack) -> Process:
    """A scheduler, and a worker whose children may be killed."""
    stack.scheduler(**SHORT_LEASE)
    return stack.worker(concurrency=1, **SHORT_LEASE)


def hold_once(stack: Stack, ledger: Path, gate: Path) -> str:
    """A job whose first attempt never ends, started."""
    job_id = stack.enqueue("test.hold", {"ledger": str(ledger), "gate": str(gate), "once": True})
    stack.wait_for_file(ledger)
    return job_id


@pytest.mark.parametrize("victim", ["child", "pool", "everything"])
def test_a_job_ends_on_a_later_attempt_whatever_is_killed(
    either_stack: Stack, tmp_path: Path, victim: str
) -> None:
    stack = either_stack
    worker = start_pair(stack)
    job_id = hold_once(stack, tmp_path / "ledger", tmp_path / "gate")
    parent = stack.enqueue(
        "test.parent", {"ledger": str(tmp_path / "pids"), "gate": str(tmp_path / "gate")}, max_retries=9
    )
    second = stack.worker(**SHORT_LEASE)
    pids = [int(word) for word in stack.wait_for_file(tmp_path / "pids")[0].split()]
    for each in (job_id, parent):
        stack.wait_named(each)
    pools = [worker, second]
    match victim:
        case "child":
            dead = [pid for pool in pools for pid in stack.children(pool)]
            for pid in dead:
                os.kill(pid, signal.SIGKILL)
        case "pool":
            dead = [pid for pool in pools for pid in (pool.pid, *stack.children(pool))]
            for pool in pools:
                pool.kill()
        case "everything":
            dead = stack.pids()
            for pid in dead:
                os.kill(pid, signal.SIGKILL)
    stack.until(lambda: not any(map(is_alive, [*dead, *pids])), what="no orphan is left")
    if victim == "everything":
        stack.scheduler(**SHORT_LEASE)
    if victim != "child":
        stack.worker(concurrency=2, **SHORT_LEASE)
    (tmp_path / "gate").touch()

    def ended() -> bool:
        stack.hurry()
        return stack.statuses() == {"completed": 2}

    stack.until(ended, what="both are completed")
    for each in (job_id, parent):
        row = stack.row(each)
        assert (row["attempt"], row["retry_count"], row["crash_count"]) == (2, 0, 1)
        assert stack.events(each)[-1] == "complete"


def test_a_long_job_of_a_healthy_worker_is_never_taken_away(either_stack: Stack, tmp_path: Path) -> None:
    stack, gate = either_stack, tmp_path / "gate"
    start_pair(stack)
    job_id = stack.enqueue("test.hold", {"ledger": str(tmp_path / "ledger"), "gate": str(gate)})
    stack.wait_for_file(tmp_path / "ledger")
    started_at = stack.worker_rows()[0]["beat"]
    stack.until(lambda: stack.worker_rows()[0]["beat"] >= started_at + 10, what="more than a lease is over")
    gate.touch()
    stack.wait(job_id)
    assert stack.events(job_id) == ["create", "claim", "complete"]


def test_a_worker_that_was_stopped_past_its_lease_comes_back_as_another(
    either_stack: Stack, tmp_path: Path
) -> None:
    stack, ledger, gate = either_stack, tmp_path / "ledger", tmp_path / "gate"
    frozen = start_pair(stack)
    job_id = hold_once(stack, ledger, gate)
    (child,) = stack.children(frozen)
    frozen.send(signal.SIGSTOP)
    stack.worker(**SHORT_LEASE)
    stack.wait(job_id)
    assert stack.row(job_id)["attempt"] == 2
    assert is_alive(child), "nobody told it so far"
    gate.touch()  # its late result is on the way to a pool that does not listen
    frozen.send(signal.SIGCONT)
    frozen.wait_for("lease_lost")
    stack.until(
        lambda: [row["state"] for row in stack.worker_rows()] == ["dead", "active", "active"],
        what="it is there again, under a new id",
    )
    assert {row["pid"] for row in stack.worker_rows()} == {frozen.pid, stack.processes[-1].pid}
    assert stack.events(job_id) == ["create", "claim", "release", "claim", "complete"]
    stack.processes[-1].kill()
    stack.wait(stack.enqueue("demo.noop"))
    assert not frozen.ended()


def test_a_worker_that_loses_its_lease_kills_what_it_ran(either_stack: Stack, tmp_path: Path) -> None:
    stack = either_stack
    frozen = start_pair(stack)
    job_id = hold_once(stack, tmp_path / "ledger", tmp_path / "gate")
    (child,) = stack.children(frozen)
    frozen.send(signal.SIGSTOP)
    stack.wait(job_id, "queued")
    frozen.send(signal.SIGCONT)
    stack.wait(job_id)
    stack.until(lambda: not is_alive(child), what="the child that ran it is dead")
    assert stack.row(job_id)["attempt"] == 2
    assert stack.statuses() == {"completed": 1}


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_a_database_that_goes_away_costs_no_job(
    own_postgres_server: PostgresServer, redis_url: str, tmp_path: Path, how: str
) -> None:
    """Endings are kept until it is back; past the lease the worker lets go, and starts anew."""
    ledger, gate = tmp_path / "ledger", tmp_path / "gate"
    with Stack(own_postgres_server.fresh(), redis_url, tmp_path) as stack:
        lease = {} if how == "stop" else SHORT_LEASE
        worker, scheduler = stack.worker(concurrency=2, **lease), stack.scheduler(**lease)
        held = {"ledger": str(tmp_path / "held"), "gate": str(gate), "once": True}
        holding = stack.enqueue("test.hold", held)
        stack.wait_for_file(tmp_path / "held")
        ids = stack.enqueue_all(notes(ledger, 20))
        stack.wait_all(ids)
        getattr(own_postgres_server, how)()
        if how == "stop":
            gate.touch()
            worker.wait_for("group_refused")
        else:
            worker.wait_for("lease_lost")
        own_postgres_server.start()
        stack.database.dispose()  # the test's own connections died with it
        row = stack.wait(holding)
        assert (row["attempt"], row["crash_count"]) == (1 if how == "stop" else 2, 0)
        stack.wait_all(stack.enqueue_all([("demo.noop", {})] * 20))
        assert_each_ran_once(stack, ledger, ids)
        assert not worker.ended()
        assert not scheduler.ended()


def test_a_worker_without_a_database_still_obeys_a_signal(
    own_postgres_server: PostgresServer, redis_url: str, tmp_path: Path
) -> None:
    with Stack(own_postgres_server.fresh(), redis_url, tmp_path) as stack:
        worker = stack.worker(LANEWAY_DRAIN_SECONDS="0.1", **SHORT_LEASE)
        hold_once(stack, tmp_path / "ledger", tmp_path / "gate")
        own_postgres_server.stop()
        worker.send(signal.SIGTERM)
        assert worker.wait() == 0, worker.said()
        own_postgres_server.start()
        stack.database.dispose()  # the test's own connections died with it
        assert stack.statuses() == {"running": 1}, "the reaper takes it back when the lease is over"
