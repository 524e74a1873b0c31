"""The scheduler as a process: what falls due, how many may run, how it ends."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from process.stack import SHORT_LEASE, Stack
from servers import RedisServer


def test_a_delayed_job_starts_when_it_is_due_and_not_before(either_stack: Stack, tmp_path: Path) -> None:
    stack = either_stack
    stack.scheduler()
    stack.worker()
    job_id = stack.enqueue("test.note", {"ledger": str(tmp_path / "ledger"), "text": "x"}, delay_seconds=1)
    row = stack.wait(job_id)
    assert row["started_at"] >= row["scheduled_for"]
    assert stack.events(job_id) == ["create", "enqueue", "claim", "complete"]


def test_a_retry_waits_for_its_delay(stack: Stack) -> None:
    stack.scheduler()
    stack.worker()
    job_id = stack.enqueue("demo.fail", {"times": 2}, retry_delay_seconds=0.2, retry_backoff=2)
    row = stack.wait(job_id)
    assert (row["attempt"], row["retry_count"]) == (3, 2)
    assert (row["finished_at"] - row["created_at"]).total_seconds() >= 0.2 + 0.4


def test_a_job_that_did_not_start_in_time_expires(stack: Stack) -> None:
    """No worker runs: nobody else could say so."""
    stack.scheduler()
    job_id = stack.enqueue("demo.noop", expires_at=stack.service.clock.now())
    row = stack.wait(job_id, "expired")
    assert row["attempt"] == 0


def test_three_schedulers_promote_each_job_once(either_stack: Stack, tmp_path: Path) -> None:
    stack, ledger = either_stack, tmp_path / "ledger"
    for _ in range(3):
        stack.scheduler()
    wanted = [("test.note", {"ledger": str(ledger), "text": str(n)}) for n in range(100)]
    ids = stack.enqueue_all(wanted, delay_seconds=0.5)
    stack.worker(concurrency=2)
    stack.wait_all(ids)
    assert sorted(ledger.read_text().splitlines(), key=int) == [str(n) for n in range(100)]
    assert {tuple(stack.events(job_id)) for job_id in ids} == {("create", "enqueue", "claim", "complete")}


def test_it_leaves_at_once_when_it_is_told_to(stack: Stack) -> None:
    for how in (signal.SIGTERM, signal.SIGINT):
        scheduler = stack.scheduler()
        scheduler.send(how)
        assert scheduler.wait(5) == 0, scheduler.said()
        assert "scheduler_stopped" in scheduler.said()


def test_it_outlives_a_redis_that_goes_away(
    stack_with_own_redis: Stack, own_redis_server: RedisServer
) -> None:
    stack = stack_with_own_redis
    scheduler = stack.scheduler()
    own_redis_server.kill()
    job_id = stack.enqueue("demo.noop", delay_seconds=0.1)
    stack.wait(job_id, "queued")
    scheduler.wait_for("sweep_failed")
    own_redis_server.start()
    with stack.redis() as redis:
        stack.until(lambda: redis.lrange("rq:queue:normal", 0, -1) == [job_id], what="its lane has it")
    assert not scheduler.ended()


def test_a_scheduler_that_slept_declares_nobody_dead(stack: Stack, tmp_path: Path) -> None:
    """It saw no beat for longer than a lease, since it did not look."""
    scheduler, worker = stack.scheduler(**SHORT_LEASE), stack.worker(**SHORT_LEASE)
    gate = tmp_path / "gate"
    job_id = stack.enqueue("test.hold", {"ledger": str(tmp_path / "ledger"), "gate": str(gate)})
    stack.wait_for_file(tmp_path / "ledger")
    scheduler.send(signal.SIGSTOP)
    before = stack.worker_rows()[0]["beat"]
    stack.until(lambda: stack.worker_rows()[0]["beat"] >= before + 8, what="more than a lease is over")
    scheduler.send(signal.SIGCONT)
    stack.wait(stack.enqueue("demo.noop", delay_seconds=0.1), "queued")
    assert [row["state"] for row in stack.worker_rows()] == ["active"]
    gate.touch()
    stack.wait(job_id)
    assert stack.events(job_id) == ["create", "claim", "complete"]
    assert os.getpgid(worker.pid) == worker.pid
