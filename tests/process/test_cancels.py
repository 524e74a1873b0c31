"""Cancels against real workers, on both stores: what was answered holds."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from factories import at_once
from laneway.domain.states import FINAL, JobStatus
from laneway.engine.cancels import ActiveJobs, Manner, cancel_all
from laneway.engine.queries import JobFilter
from laneway.errors import IllegalTransition
from process.stack import Stack, is_alive


def test_no_handler_starts_after_an_answered_cancel(either_stack: Stack, tmp_path: Path) -> None:
    """Four callers cancel from the end, and some by one call, while two workers come from the front."""
    stack, ledger = either_stack, tmp_path / "ledger"
    for _ in range(2):
        stack.worker()
    ids = stack.enqueue_all(
        [("test.note", {"ledger": str(ledger), "text": str(n), "seconds": 0.05}) for n in range(240)]
    )
    stack.wait_for_file(ledger)

    def cancel(job_id: str) -> str:
        try:
            return "cancelled" if stack.service.cancel(job_id, stack.caller).done else "asked"
        except IllegalTransition:
            return "too late"

    with ThreadPoolExecutor(4) as callers:
        many = callers.submit(
            cancel_all, stack.service, stack.caller, ActiveJobs(JobFilter(), tuple(ids[60:120])), Manner()
        )
        answers = dict(zip(reversed(ids), callers.map(cancel, reversed(ids)), strict=True))
        assert many.result().remaining == 0
    stack.until(lambda: {stack.row(j)["status"] for j in ids} <= FINAL, what="all have ended", seconds=60)
    started = set(ledger.read_text().split())
    for place, job_id in enumerate(ids):
        row = stack.row(job_id)
        if answers[job_id] == "cancelled":
            assert row["status"] == JobStatus.CANCELLED, stack.events(job_id)
        if row["status"] == JobStatus.CANCELLED and "claim" not in stack.events(job_id):
            assert str(place) not in started, f"job {place} ran after its cancel"
        assert row["attempt"] <= 1, stack.events(job_id)
    never = [job_id for job_id in ids if "claim" not in stack.events(job_id)]
    assert never, "no cancel was faster than the workers: the test says nothing"
    assert started, "no worker was faster than the cancels"


@pytest.mark.parametrize("how", ["cooperative", "grace", "terminate"])
def test_a_running_job_stops_by_itself_or_is_killed(either_stack: Stack, tmp_path: Path, how: str) -> None:
    stack, ledger = either_stack, tmp_path / "ledger"
    stack.worker()
    wish = {"grace": {"grace_seconds": 0.2}, "terminate": {"terminate": True}}.get(how, {})
    asked = {"ledger": str(ledger), "gate": str(tmp_path / "never"), "cooperative": how == "cooperative"}
    ids = [stack.enqueue("test.hold", asked) for _ in range(2)]
    (line,) = stack.wait_for_file(ledger)
    manner = Manner("enough", **wish)  # type: ignore[arg-type]
    [done] = at_once(
        [lambda: cancel_all(stack.service, stack.caller, ActiveJobs(JobFilter(), tuple(ids)), manner)]
    )
    assert not isinstance(done, Exception)
    assert (done.cancelled, done.cancelling, done.remaining) == (1, 1, 0)
    for job_id, events in zip(ids, (["create", "claim", "stop"], ["create", "cancel"]), strict=True):
        row = stack.wait(job_id, "cancelled")
        assert (row["cancelled_by"], row["cancel_reason"]) == ("tester", "enough")
        assert stack.events(job_id) == events
    assert is_alive(int(line.split()[1])) == (how == "cooperative")
    assert len(ledger.read_text().splitlines()) == 1
