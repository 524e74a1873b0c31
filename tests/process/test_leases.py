"""Leases with real processes: killed, stopped and busy ones, and what the reaper takes and leaves alone."""

from __future__ import annotations

import os
import signal
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from fault_proxy import FaultProxy
from laneway.clock import SystemClock
from laneway.models import job_events
from process.stack import SHORT_LEASE, Stack, is_alive
from servers import PostgresServer

LEASE_SECONDS = float(SHORT_LEASE["LANEWAY_LEASE_SECONDS"])
TAKEN_BACK_ONCE = ["create", "claim", "release", "claim", "complete"]


def hold_once(stack: Stack, tmp_path: Path) -> tuple[str, Path]:
    """A job whose first attempt waits for the file, started."""
    ledger, gate = tmp_path / "ledger", tmp_path / "gate"
    job_id = stack.enqueue("test.hold", {"ledger": str(ledger), "gate": str(gate), "once": True})
    stack.wait_for_file(ledger)
    return job_id, gate


def moment_of(stack: Stack, job_id: str, action: str) -> datetime:
    e = job_events.c
    (row,) = stack.rows(sa.select(e.at).where(e.job_id == job_id, e.action == action))
    return row["at"]


def test_the_job_of_a_killed_worker_waits_again_within_a_lease_and_two_ticks(
    either_stack: Stack, tmp_path: Path
) -> None:
    stack, tick = either_stack, 0.5
    stack.scheduler(LANEWAY_TICK_SECONDS=str(tick), **SHORT_LEASE)
    worker = stack.worker(**SHORT_LEASE)
    job_id, _ = hold_once(stack, tmp_path)
    stack.wait_named(job_id)
    killed_at = SystemClock().now()
    worker.kill()
    stack.wait(job_id, "queued")
    waited = moment_of(stack, job_id, "release") - killed_at
    assert waited <= timedelta(seconds=LEASE_SECONDS + 2 * tick)
    stack.worker(**SHORT_LEASE)
    row = stack.wait(job_id)
    assert stack.events(job_id) == TAKEN_BACK_ONCE
    assert (row["retry_count"], row["crash_count"]) == (0, 1)


def test_a_job_that_keeps_its_interpreter_busy_for_three_leases_runs_once(either_stack: Stack) -> None:
    """Twenty at once, on more children than there are processors."""
    stack = either_stack
    stack.scheduler(**SHORT_LEASE)
    for _ in range(2):
        stack.worker(concurrency=10, **SHORT_LEASE)
    workers = {row["id"] for row in stack.worker_rows()}
    ids = stack.enqueue_all([("test.burn", {"seconds": 3 * LEASE_SECONDS})] * 20)
    stack.wait_all(ids, seconds=60)
    for job_id in ids:
        assert stack.events(job_id) == ["create", "claim", "complete"]
        ran = moment_of(stack, job_id, "complete") - moment_of(stack, job_id, "claim")
        assert ran >= timedelta(seconds=3 * LEASE_SECONDS)
    assert {row["id"] for row in stack.worker_rows()} == workers, "nobody came back as another"


@pytest.mark.parametrize("stopped", ["the pool", "the pool and its child"])
def test_what_was_stopped_past_its_lease_changes_nothing_when_it_wakes(
    either_stack: Stack, tmp_path: Path, stopped: str
) -> None:
    stack = either_stack
    stack.scheduler(**SHORT_LEASE)
    zombie = stack.worker(**SHORT_LEASE)
    job_id, gate = hold_once(stack, tmp_path)
    (child,) = stack.children(zombie)
    frozen = [zombie.pid, child] if "child" in stopped else [zombie.pid]
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    successor = stack.worker(**SHORT_LEASE)
    stack.wait(job_id)
    before = stack.row(job_id)
    gate.touch()  # the first attempt comes to its end too, and its worker hears of it
    for pid in reversed(frozen):
        os.kill(pid, signal.SIGCONT)
    zombie.wait_for("lease_lost")
    stack.until(
        lambda: [row["state"] for row in stack.worker_rows()] == ["dead", "active", "active"],
        what="it is there again, under a new id",
    )
    assert stack.row(job_id) == before
    assert stack.events(job_id) == TAKEN_BACK_ONCE
    successor.kill()
    stack.wait(stack.enqueue("demo.noop"))
    assert not zombie.ended()


def test_a_stopped_child_of_a_living_worker_keeps_its_job(either_stack: Stack, tmp_path: Path) -> None:
    """The worker vouches for it; what ends such a job is its timeout."""
    stack = either_stack
    stack.scheduler(**SHORT_LEASE)
    worker = stack.worker(**SHORT_LEASE)
    job_id, gate = hold_once(stack, tmp_path)
    (child,) = stack.children(worker)
    os.kill(child, signal.SIGSTOP)
    beats_in_a_lease = LEASE_SECONDS / float(SHORT_LEASE["LANEWAY_BEAT_SECONDS"])
    seen = stack.worker_rows()[0]["beat"]
    stack.until(
        lambda: stack.worker_rows()[0]["beat"] > seen + 1.5 * beats_in_a_lease, what="a lease is over"
    )
    gate.touch()
    os.kill(child, signal.SIGCONT)
    assert stack.wait(job_id)["attempt"] == 1
    assert stack.events(job_id) == ["create", "claim", "complete"]


def test_a_stopped_child_is_killed_when_its_job_times_out(stack: Stack, tmp_path: Path) -> None:
    worker = stack.worker()
    ledger = tmp_path / "ledger"
    given = {"ledger": str(ledger), "gate": str(tmp_path / "gate")}
    job_id = stack.enqueue("test.hold", given, timeout_seconds=2, max_retries=0)
    stack.wait_for_file(ledger)
    (child,) = stack.children(worker)
    os.kill(child, signal.SIGSTOP)
    assert stack.wait(job_id, "timeout")["crash_count"] == 0
    assert not is_alive(child)


def test_a_claim_whose_answer_was_lost_is_taken_back_without_blame(
    postgres_server: PostgresServer,
    postgres_url: str,
    redis_url: str,
    tmp_path: Path,
) -> None:
    with (
        FaultProxy(postgres_server.folder / ".s.PGSQL.5432") as proxy,
        Stack(postgres_url, redis_url, tmp_path) as stack,
    ):
        behind = postgres_url.partition("?")[0].replace("@/", f"@127.0.0.1:{proxy.port}/")
        stack.scheduler()
        worker = stack.worker(LANEWAY_DATABASE_URL=behind)
        proxy.lose_reply(to=b"SET status = 'running'")  # a statement that commits by itself
        job_id = stack.enqueue("demo.noop")
        stack.until(lambda: proxy.lost, what="the answer to the claim was lost")
        proxy.heal()
        assert stack.events(job_id)[:2] == ["create", "claim"], "the claim itself was not"
        row = stack.wait(job_id)
        assert stack.events(job_id) == TAKEN_BACK_ONCE
        assert (row["attempt"], row["retry_count"], row["crash_count"]) == (2, 0, 0)
        assert [row["state"] for row in stack.worker_rows()] == ["active"], "and it lost nothing else"
        assert not worker.ended()
