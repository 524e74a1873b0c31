"""In which order a worker runs what waits, and what it holds back for nobody."""

from __future__ import annotations

from pathlib import Path

from process.stack import Stack

PRIORITIES = ("critical", "high", "normal", "low")


def block(stack: Stack, tmp_path: Path, *, children: int = 1) -> Path:
    """Keep every child busy until the file that is returned exists."""
    gate, ledger = tmp_path / "gate", tmp_path / "blockers"
    held = {"ledger": str(ledger), "gate": str(gate)}
    stack.enqueue_all([("test.hold", held)] * children, priority="critical")
    stack.wait_for_file(ledger, lines=children)
    return gate


def test_lanes_are_drained_by_priority_and_each_in_order(either_stack: Stack, tmp_path: Path) -> None:
    stack, ledger = either_stack, tmp_path / "ledger"
    stack.worker()
    gate = block(stack, tmp_path)
    ids = []
    for priority in reversed(PRIORITIES):
        notes = [("test.note", {"ledger": str(ledger), "text": f"{priority} {n}"}) for n in range(20)]
        ids += stack.enqueue_all(notes, priority=priority)
    gate.touch()
    stack.wait_all(ids)
    assert ledger.read_text().splitlines() == [f"{p} {n}" for p in PRIORITIES for n in range(20)]


def test_the_critical_jobs_of_all_queues_come_before_any_other(stack: Stack, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger"
    stack.worker("--queues", "default,emails")
    gate = block(stack, tmp_path)
    ids, expected = [], []
    for priority in reversed(PRIORITIES):
        for queue in ("emails", "default"):
            notes = [
                ("test.note", {"ledger": str(ledger), "text": f"{priority} {queue} {n}"}) for n in range(5)
            ]
            ids += stack.enqueue_all(notes, priority=priority, queue=queue)
            expected[:0] = [note["text"] for _, note in notes]
    gate.touch()
    stack.wait_all(ids)
    assert ledger.read_text().splitlines() == expected


def warm_up(stack: Stack, ledger: Path) -> None:
    """Teach the worker that notes are short, so that it takes many at a time."""
    for _ in range(10):
        stack.wait_all(stack.enqueue_all([("test.note", {"ledger": str(ledger), "text": "warm"})] * 20))


def test_a_slow_job_holds_no_short_ones_up(stack: Stack, tmp_path: Path) -> None:
    warm, ledger = tmp_path / "warm", tmp_path / "ledger"
    stack.worker(concurrency=2)
    warm_up(stack, warm)
    note = ("test.note", {"ledger": str(ledger), "text": "short"})
    slow = ("test.note", {"ledger": str(ledger), "text": "slow", "seconds": 600})
    gate = block(stack, tmp_path, children=2)
    slow_id, *short_ids = stack.enqueue_all([slow, *[note] * 40])
    gate.touch()
    stack.wait_all(short_ids)
    assert stack.row(slow_id)["status"] == "running", stack.evidence()
    assert {stack.row(job_id)["retry_count"] for job_id in short_ids} == {0}


def test_a_critical_job_overtakes_low_ones_that_no_child_has(stack: Stack, tmp_path: Path) -> None:
    """At most one round of short jobs for each child may come before it."""
    warm, ledger = tmp_path / "warm", tmp_path / "ledger"
    stack.worker()
    warm_up(stack, warm)
    note = ("test.note", {"ledger": str(ledger), "text": "low", "seconds": 0.03})
    low_ids = stack.enqueue_all([note] * 100, priority="low")
    stack.wait_for_file(ledger)
    critical = stack.enqueue("test.note", {"ledger": str(ledger), "text": "critical"}, priority="critical")
    before = len(ledger.read_text().splitlines())
    stack.wait(critical)
    lines = ledger.read_text().splitlines()
    assert lines.index("critical") <= before + 5, lines
    stack.wait_all(low_ids)
    assert ledger.read_text().splitlines().count("low") == 100
