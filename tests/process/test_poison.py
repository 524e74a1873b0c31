"""Jobs that harm the process they run in: each ends as it should, and nobody else feels it."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import sqlalchemy as sa

from laneway.models import jobs
from process.stack import SHORT_LEASE, Stack, is_alive

GOOD = 20  # notes between one bad job and the next
MEMORY_MIB = 4096

DEADLY = {
    "segfault": (signal.SIGSEGV, None),
    "exit": (None, 137),
    "kill": (signal.SIGKILL, None),
    "close all": (None, 70),  # it cannot say how the job ended
    "fork and die": (signal.SIGABRT, None),
    "write everywhere": (signal.SIGKILL, None),  # by the worker
}
HARMLESS = {
    "deaf": ("timeout", "timeout", "longer than its timeout of 1 s"),
    "memory": ("failed", "exhausted", ""),
    "huge result": ("failed", "permanent", "262144 bytes of JSON, and is 1073741826"),
    "no json": ("failed", "permanent", "result/a: object is not JSON"),
    "long error": ("failed", "exhausted", "xxx"),
}


def test_what_kills_its_process_three_times_is_poison_and_its_neighbours_do_not_feel_it(
    either_stack: Stack, tmp_path: Path
) -> None:
    stack, notes = either_stack, tmp_path / "notes"
    worker = stack.worker(concurrency=2, LANEWAY_CHILD_MEMORY_MIB=str(MEMORY_MIB))
    scheduler = stack.scheduler()
    good: list[str] = []
    bad: dict[str, str] = {}

    def ledger(how: str) -> Path:
        return tmp_path / how.replace(" ", "_")

    for how in [*DEADLY, *HARMLESS]:
        given = {"how": how, "ledger": str(ledger(how))}
        bad[how] = stack.enqueue(
            "test.poison", given, timeout_seconds=1 if how == "deaf" else 60, max_retries=0
        )
        lines = [{"ledger": str(notes), "text": str(len(good) + n)} for n in range(GOOD)]
        good += stack.enqueue_all([("test.note", line) for line in lines])

    def all_ended() -> bool:
        stack.hurry()
        active = sa.select(jobs.c.id).where(jobs.c.finished_at.is_(None)).limit(1)
        return not stack.rows(active)

    stack.until(all_ended, what="every job ended", seconds=90)
    for how, (number, exit_status) in DEADLY.items():
        row = stack.row(bad[how])
        told = (row["status"], row["dead_letter_reason"], row["crash_count"], row["retry_count"])
        assert told == ("failed", "poison", 3, 0), how
        assert len(ledger(how).read_text().split()) == 3, "three processes were lost to it, and no more"
        errors = stack.errors(bad[how])
        assert [error["type"] for error in errors] == ["ProcessDied"] * 3
        for death in [error["process"] for error in errors]:
            assert (death["signal"], death["exit_status"]) == (number and number.name, exit_status), how
            assert 48 <= death["peak_memory_mib"] < 512, "its own, not that of the job before"
            assert (death["progress_percent"], death["progress_message"]) == (40, "so far so good")
    for how, (status, reason, message) in HARMLESS.items():
        row = stack.row(bad[how])
        told = (row["status"], row["dead_letter_reason"], row["crash_count"], row["retry_count"])
        assert told == (status, reason, 0, 0), how
        assert message in row["error"]["message"]
    assert stack.row(bad["memory"])["error"]["type"] == "MemoryError"
    assert sorted(notes.read_text().splitlines(), key=int) == [str(n) for n in range(len(good))]
    for job_id in good:
        row = stack.row(job_id)
        assert (row["status"], row["crash_count"], row["dead_letter_reason"]) == ("completed", 0, None)
        assert stack.events(job_id).count("complete") == 1
    assert not worker.ended()
    family = {scheduler.pid, worker.pid, stack.nursery(worker), *stack.children(worker)}
    stack.until(lambda: set(stack.pids()) <= family, what="what they had started is dead")


def test_what_kills_its_whole_worker_is_poison_after_the_first_doubt(
    either_stack: Stack, tmp_path: Path
) -> None:
    """Unless a beat named it just then, it may not have begun when the first worker dies. Later ones do."""
    stack, ledger = either_stack, tmp_path / "ledger"
    stack.scheduler(**SHORT_LEASE)
    job_id = stack.enqueue("test.poison", {"how": "kill worker", "ledger": str(ledger)}, max_retries=0)
    deaths = 0
    while stack.row(job_id)["status"] != "failed":
        worker = stack.worker(**SHORT_LEASE)
        stack.until(worker.ended, what="the job has killed its worker")
        deaths += 1
        stack.wait(job_id, "queued", "failed")
    row = stack.row(job_id)
    assert (row["dead_letter_reason"], row["retry_count"], row["crash_count"]) == ("poison", 0, 3)
    assert row["attempt"] == deaths == len(ledger.read_text().split())
    assert deaths in (3, 4)
    assert [error["type"] for error in stack.errors(job_id)] == ["WorkerLost"] * 3


def test_a_drain_or_a_worker_that_leaves_never_makes_poison(stack: Stack, tmp_path: Path) -> None:
    """Each of these ends an attempt more often than the crash limit says."""
    ledger, gate = tmp_path / "ledger", tmp_path / "gate"
    stack.scheduler()
    job_id = stack.enqueue("test.hold", {"ledger": str(ledger), "gate": str(gate)})
    for deploy in range(1, 5):
        worker = stack.worker(LANEWAY_DRAIN_SECONDS="0")
        stack.wait_for_file(ledger, lines=deploy)
        worker.send(signal.SIGTERM)
        assert worker.wait() == 0
    gate.touch()
    stack.worker()
    row = stack.wait(job_id)
    assert (row["attempt"], row["retry_count"], row["crash_count"]) == (5, 0, 0)


def test_a_child_that_keeps_too_much_memory_is_replaced(stack: Stack, tmp_path: Path) -> None:
    worker = stack.worker(LANEWAY_CHILD_MEMORY_MIB="64")
    (child,) = stack.children(worker)
    stack.wait_all(stack.enqueue_all([("test.keep", {"mib": 10})] * 3))
    assert stack.children(worker) == [child], "30 of 64 are not yet too much"
    stack.wait(stack.enqueue("test.keep", {"mib": 10}))
    stack.until(lambda: not is_alive(child), what="the child is replaced")
    stack.wait_all(stack.enqueue_all([("test.keep", {"mib": 20})] * 9))
    assert {tuple(stack.events(row["id"])) for row in stack.rows(sa.select(jobs.c.id))} == {
        ("create", "claim", "complete")
    }


@pytest.mark.parametrize(("mib", "status"), [(40, "completed"), (80, "failed")])
def test_a_child_may_take_the_memory_it_was_allowed_and_no_more(stack: Stack, mib: int, status: str) -> None:
    stack.worker(LANEWAY_CHILD_MEMORY_MIB="64")
    job_id = stack.enqueue("test.keep", {"mib": mib}, max_retries=0)
    row = stack.wait(job_id, status)
    assert (row["error"] or {"type": None})["type"] == (None if status == "completed" else "MemoryError")


def test_a_daemon_that_a_job_left_behind_dies_with_its_child(stack: Stack, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger"
    stack.worker(LANEWAY_RECYCLE_JOBS="2")
    stack.wait(stack.enqueue("test.leave_a_fork", {"ledger": str(ledger), "apart": True}))
    (daemon,) = map(int, stack.wait_for_file(ledger))
    assert is_alive(daemon), "the child lives on"
    stack.wait(stack.enqueue("demo.noop"))
    stack.until(lambda: not is_alive(daemon), what="the daemon is dead")


def test_a_child_killed_between_two_jobs_leaves_nobody_to_blame(stack: Stack) -> None:
    worker = stack.worker(concurrency=1, LANEWAY_LOG_FORMAT="json")
    brief = [("test.last_breath", {"deadly": False}), ("demo.noop", {})]
    stack.wait_all(stack.enqueue_all(brief * 40))  # from now on they travel in rounds
    worker.send(signal.SIGSTOP)
    round_ = stack.enqueue_all([("test.last_breath", {"deadly": True}), *[("demo.noop", {})] * 3])
    worker.send(signal.SIGCONT)
    stack.wait_all(round_)
    worker.wait_for("child_died")
    [death] = [json.loads(line) for line in worker.said().splitlines() if '"child_died"' in line]
    assert (death["how"], death["job_id"]) == (
        "killed by signal 9 (SIGKILL), as the kernel does when memory runs out",
        None,
    )
    assert [(stack.row(each)["attempt"], stack.row(each)["crash_count"]) for each in round_] == [(1, 0)] * 4
