"""Paused queues and jobs completed by hand, against real workers."""

from __future__ import annotations

from pathlib import Path

import pytest

from laneway.clock import SystemClock
from laneway.engine import administration, queues
from laneway.engine.access.callers import Caller, Role
from process.stack import Stack
from servers import RedisServer

COUNT = 200


def admin(stack: Stack) -> Caller:
    return Caller(stack.caller.tenant_id, "ada", Role.ADMIN)


def pass_beats(stack: Stack, count: int = 3) -> None:
    """Until every worker has said so often that it lives."""
    before = {row["id"]: row["beat"] for row in stack.worker_rows()}
    stack.until(
        lambda: all(row["beat"] >= before.get(row["id"], 0) + count for row in stack.worker_rows()),
        what=f"{count} beats have passed",
    )


def test_nothing_is_claimed_after_an_answered_pause(either_stack: Stack, tmp_path: Path) -> None:
    """Amid many jobs; another queue goes on, and after the resume all jobs are run, each once."""
    stack, ledger = either_stack, tmp_path / "ledger"
    stack.scheduler()
    worker = stack.worker("--queues", "default,sms", concurrency=2)
    ids = stack.enqueue_all(
        [("test.note", {"ledger": str(ledger), "text": str(n), "seconds": 0.02}) for n in range(COUNT)]
    )
    stack.wait_for_file(ledger)
    queues.pause(stack.service, "default", admin(stack))
    answered_at = SystemClock().now()
    worker.wait_for("paused_queues_changed")
    late = stack.enqueue("test.note", {"ledger": str(ledger), "text": "late"})
    elsewhere = stack.enqueue("test.note", {"ledger": str(ledger), "text": "elsewhere"}, queue="sms")
    stack.wait(elsewhere)
    stack.until(lambda: not stack.statuses().get("running"), what="what ran has ended")
    pass_beats(stack)
    rows = [stack.row(job_id) for job_id in ids]
    claimed = [row["started_at"] for row in rows if row["attempt"]]
    assert 0 < len(claimed) < len(ids), "the pause came before the first claim, or after the last"
    assert max(claimed) <= answered_at
    assert stack.row(late)["status"] == "queued"
    assert stack.lanes.depths(["normal"])["normal"] > 0, "the ids stay where they are"
    queues.resume(stack.service, "default", admin(stack))
    stack.wait_all([*ids, late], seconds=60)
    assert sorted(ledger.read_text().split()) == sorted([*map(str, range(COUNT)), "late", "elsewhere"])


def test_without_redis_a_paused_queue_is_left_alone_too(
    stack_with_own_redis: Stack, own_redis_server: RedisServer, tmp_path: Path
) -> None:
    stack, ledger = stack_with_own_redis, tmp_path / "ledger"
    stack.worker()
    own_redis_server.stop()
    queues.pause(stack.service, "default", admin(stack))
    waiting = stack.enqueue("test.note", {"ledger": str(ledger), "text": "waits"})
    pass_beats(stack)
    assert stack.row(waiting)["status"] == "queued"
    assert stack.events(waiting) == ["create"]
    queues.resume(stack.service, "default", admin(stack))
    stack.wait(waiting)


def test_a_stock_worker_gets_nothing_of_a_paused_queue(stack: Stack, tmp_path: Path) -> None:
    queues.pause(stack.service, "default", admin(stack))
    job_id = stack.enqueue("test.note", {"ledger": str(tmp_path / "ledger"), "text": "waits"})
    stack.stock_worker("normal", burst=True).wait(60)
    assert stack.lanes.contents("normal") == [], "the stock worker took the id"
    assert stack.row(job_id)["status"] == "queued"
    queues.resume(stack.service, "default", admin(stack))
    stack.scheduler()
    stack.worker()
    stack.wait(job_id)


@pytest.mark.parametrize("end", ["returns", "dies"])
def test_what_a_worker_reports_of_a_job_completed_by_hand_is_discarded(
    stack: Stack, tmp_path: Path, end: str
) -> None:
    ledger, gate = tmp_path / "ledger", tmp_path / "gate"
    worker = stack.worker()
    job_id = stack.enqueue("test.hold", {"ledger": str(ledger), "gate": str(gate), "cooperative": True})
    stack.wait_for_file(ledger)
    done = administration.force_complete(stack.service, job_id, admin(stack), result={"by": "hand"})
    assert (done["status"], done["result"]) == ("completed", {"by": "hand"})
    if end == "dies":
        worker.kill()
        stack.scheduler()
        stack.worker()
    gate.touch()
    if end == "returns":
        worker.wait_for("stale_attempt")
    after = stack.enqueue("test.note", {"ledger": str(ledger), "text": "next"})
    stack.wait(after)
    row = stack.row(job_id)
    assert (row["status"], row["result"], row["attempt"]) == ("completed", {"by": "hand"}, 1)
    assert stack.events(job_id) == ["create", "claim", "force_complete"]
