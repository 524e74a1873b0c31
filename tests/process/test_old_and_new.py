"""Two releases side by side: what only the new one knows waits for it, and says why."""

from __future__ import annotations

from pathlib import Path

from laneway.engine.access.callers import Caller
from process.stack import Stack


def test_a_job_that_no_living_worker_can_run_says_so_and_waits(either_stack: Stack, tmp_path: Path) -> None:
    stack, ledger = either_stack, tmp_path / "ledger"

    def reason(job_id: str, caller: Caller = stack.caller) -> str | None:
        answer = stack.service.get(job_id, caller)
        assert answer["status"] == "queued"
        return answer["status_reason"]

    old = stack.worker(LANEWAY_TASKS="")
    known = stack.enqueue("demo.echo")
    unknown = stack.enqueue("test.note", {"ledger": str(ledger), "text": "at last"})
    elsewhere = stack.enqueue("demo.noop", queue="nobody")
    stack.wait(known)
    for job_id in (unknown, elsewhere):
        stack.until(lambda one=job_id: reason(one) == "no_capable_worker", what="it says why it waits")
        assert stack.events(job_id) == ["create"], "it was told, not done anything to"
    new = stack.worker()
    row = stack.wait(unknown)
    assert (row["attempt"], row["status_reason"]) == (1, None)
    assert reason(elsewhere) == "no_capable_worker"
    assert not old.ended()
    assert not new.ended()
