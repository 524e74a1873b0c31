"""Jobs that get a process each: what stays in it, how it ends, and what the others notice of it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from process.stack import Process, Stack, descriptors, is_alive
from process.test_worker_order import PRIORITIES, block


@pytest.fixture
def working(stack: Stack) -> Iterator[Stack]:
    """One worker with two children, one scheduler."""
    stack.worker(concurrency=2, LANEWAY_CHILD_MEMORY_MIB="256")
    stack.scheduler()
    return stack


def hold(
    stack: Stack,
    tmp_path: Path,
    job_type: str = "test.hold_forked",
    *,
    name: str = "held",
    **how: object,
) -> tuple[str, Path, int]:
    """A job that runs until the file exists; its id, the file, its process."""
    ledger, gate = tmp_path / f"{name}.ledger", tmp_path / f"{name}.gate"
    job_id = stack.enqueue(job_type, {"ledger": str(ledger), "gate": str(gate), **how})
    (line,) = stack.wait_for_file(ledger)
    return job_id, gate, int(line.split()[1])


def wait_for_children(stack: Stack, worker: Process, expected: list[int]) -> None:
    stack.until(lambda: stack.children(worker) == expected, what=f"the children are {expected}")


def test_each_job_finds_its_process_as_it_was_forked(stack: Stack, tmp_path: Path) -> None:
    worker = stack.worker()
    [child] = stack.children(worker)
    seen = {}
    for job_type in ("test.remember", "test.remember_forked"):
        ledger = tmp_path / job_type
        stack.wait_all(stack.enqueue_all([(job_type, {"ledger": str(ledger)})] * 3))
        seen[job_type] = [line.split() for line in ledger.read_text().splitlines()]
    here = str(Path.cwd())
    assert seen["test.remember"] == [[str(child), here, "1"], [str(child), "/", "2"], [str(child), "/", "3"]]
    forked = seen["test.remember_forked"]
    assert [line[1:] for line in forked] == [[here, "1"]] * 3
    assert len({child, *(int(pid) for pid, *_ in forked)}) == 4


def test_fifty_jobs_leave_no_process_and_no_descriptor_and_the_children_as_they_were(
    either_stack: Stack, tmp_path: Path
) -> None:
    stack, ledger = either_stack, tmp_path / "ledger"
    worker = stack.worker(concurrency=2)
    stack.wait(stack.enqueue("test.remember_forked", {"ledger": str(ledger)}))
    children = stack.children(worker)
    nursery = stack.nursery(worker)

    def rest() -> tuple[list[int], int, int]:
        return sorted(stack.pids()), descriptors(worker.pid), descriptors(nursery)

    stack.until(lambda: len(rest()[0]) == 4, what="the worker, its nursery and two children are left")
    before = rest()
    wanted = [("test.remember_forked", {"ledger": str(ledger)}), ("test.remember", {"ledger": str(ledger)})]
    stack.wait_all(stack.enqueue_all(wanted * 50))
    stack.until(lambda: rest() == before, what="all is as it was")
    assert stack.children(worker, dead=True) == children
    pids = [int(line.split()[0]) for line in ledger.read_text().splitlines()]
    assert set(children) == {pid for pid in pids if pids.count(pid) > 1}
    assert len(set(pids) - set(children)) == 51


def test_no_more_jobs_run_at_once_than_there_are_children(stack: Stack, tmp_path: Path) -> None:
    ledger, gate = tmp_path / "ledger", tmp_path / "gate"
    worker = stack.worker(concurrency=2)
    held = {"ledger": str(ledger), "gate": str(gate)}
    ids = stack.enqueue_all([(name, held) for name in ("test.hold_forked", "test.hold") * 3])
    stack.wait_for_file(ledger, lines=2)
    looks = stack.worker_rows()[0]["beat"]
    stack.until(lambda: stack.worker_rows()[0]["beat"] > looks + 2, what="it had time to start more")
    assert len(ledger.read_text().splitlines()) == 2
    assert len(stack.children(worker)) == 3, "two, and the one that is forked"
    gate.touch()
    stack.wait_all(ids)


def test_a_forked_process_that_is_killed_is_held_against_its_own_job_only(
    working: Stack, tmp_path: Path
) -> None:
    stack = working
    children = stack.children(stack.processes[0])
    beside, gate_beside, _ = hold(stack, tmp_path, "test.hold", name="beside")
    job_id, gate, pid = hold(stack, tmp_path)
    os.kill(pid, signal.SIGKILL)
    stack.wait(job_id, "retrying")
    assert "SIGKILL" in stack.errors(job_id)[0]["message"]
    stack.hurry()
    gate.touch()
    gate_beside.touch()
    row = stack.wait(job_id)
    assert (row["attempt"], row["crash_count"]) == (2, 1)
    assert stack.events(stack.wait(beside)["id"]) == ["create", "claim", "complete"]
    wait_for_children(stack, stack.processes[0], children)


def test_timeouts_cancels_progress_and_memory_are_what_they_are_elsewhere(
    working: Stack, tmp_path: Path
) -> None:
    stack, ledger = working, tmp_path / "ledger"
    children = stack.children(stack.processes[0])
    endless = {
        how: stack.enqueue(
            "test.endless_forked",
            {"how": how, "ledger": str(ledger), "times": 1},
            timeout_seconds=1,
            max_retries=1,
        )
        for how in ("exception", "c")
    }
    for how, job_id in endless.items():
        row = stack.wait(job_id)
        assert (row["result"], row["retry_count"], row["crash_count"]) == (2, 1, 0), how
        assert (stack.errors(job_id)[0]["traceback"] is not None) == (how == "exception"), how
    asked, _, _ = hold(stack, tmp_path, name="asked", cooperative=True)
    stack.cancel(asked)
    assert stack.wait(asked, "cancelled")["crash_count"] == 0
    killed, _, pid = hold(stack, tmp_path, name="killed")
    stack.cancel(killed, terminate=True)
    assert stack.wait(killed, "cancelled")["crash_count"] == 0
    stack.until(lambda: not is_alive(pid), what="its process is dead")
    gate = tmp_path / "gate"
    told = stack.enqueue("test.progress_forked", {"reports": [[70, "far", None]], "gate": str(gate)})
    stack.until(lambda: stack.row(told)["progress"] == 70, what="it is far")
    gate.touch()
    stack.wait(told)
    for how, error in (("memory", "MemoryError"), ("exit", "ProcessDied")):
        job_id = stack.enqueue("test.poison_forked", {"how": how, "ledger": str(ledger)}, max_retries=0)
        stack.until(lambda job_id=job_id: stack.errors(job_id), what="its attempt has ended")
        assert stack.errors(job_id)[0]["type"] == error
    wait_for_children(stack, stack.processes[0], children)


def test_a_process_that_does_not_leave_after_its_job_is_killed(stack: Stack, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger"
    stack.worker()
    stack.wait_all(stack.enqueue_all([("test.stay", {"ledger": str(ledger)}), ("demo.noop", {})]))
    pid = int(ledger.read_text())
    stack.until(lambda: not is_alive(pid), what="it is gone")


def test_forked_jobs_keep_the_order_of_their_lanes(stack: Stack, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger"
    stack.worker()
    gate = block(stack, tmp_path)
    ids = []
    for priority in reversed(PRIORITIES):
        notes = [
            (job_type, {"ledger": str(ledger), "text": f"{priority} {n}"})
            for n, job_type in enumerate(("test.note", "test.note_forked", "test.note_forked", "test.note"))
        ]
        ids += stack.enqueue_all(notes, priority=priority)
    gate.touch()
    stack.wait_all(ids)
    assert ledger.read_text().splitlines() == [f"{p} {n}" for p in PRIORITIES for n in range(4)]


def test_sigterm_waits_for_a_forked_job(stack: Stack, tmp_path: Path) -> None:
    worker = stack.worker()
    running, gate, _ = hold(stack, tmp_path)
    waiting = stack.enqueue("test.hold_forked", {"ledger": str(tmp_path / "late"), "gate": str(gate)})
    worker.send(signal.SIGTERM)
    worker.wait_for("worker_draining")
    gate.touch()
    assert worker.wait() == 0
    assert stack.row(running)["status"] == "completed"
    assert stack.events(waiting) == ["create"]
    stack.until(lambda: not stack.pids(), what="no process is left")


def test_a_job_whose_process_is_not_there_yet_can_be_cancelled_and_is_given_back(
    stack: Stack, tmp_path: Path
) -> None:
    worker = stack.worker(concurrency=2)
    nursery = stack.nursery(worker)
    os.kill(nursery, signal.SIGSTOP)
    held = {"ledger": str(tmp_path / "ledger"), "gate": str(tmp_path / "gate")}
    dropped, given_back = stack.enqueue_all([("test.hold_forked", held)] * 2)
    for job_id in (dropped, given_back):
        stack.wait(job_id, "running")
    stack.cancel(dropped)
    assert stack.wait(dropped, "cancelled")["attempt"] == 1
    worker.send(signal.SIGTERM)
    row = stack.wait(given_back, "queued")
    assert (row["retry_count"], row["crash_count"]) == (0, 0)
    assert worker.wait() == 0
    assert not (tmp_path / "ledger").exists()
    stack.until(lambda: not stack.pids(), what="no process is left")


def test_a_process_that_comes_too_late_for_its_job_leaves(stack: Stack, tmp_path: Path) -> None:
    worker = stack.worker(concurrency=2)
    children, nursery = stack.children(worker), stack.nursery(worker)
    os.kill(nursery, signal.SIGSTOP)
    held = {"ledger": str(tmp_path / "ledger"), "gate": str(tmp_path / "gate")}
    dropped = stack.enqueue("test.hold_forked", held)
    stack.wait(dropped, "running")
    stack.cancel(dropped)
    stack.wait(dropped, "cancelled")
    os.kill(nursery, signal.SIGCONT)
    stack.wait(stack.enqueue("test.note_forked", {"ledger": str(tmp_path / "after"), "text": "works"}))
    wait_for_children(stack, worker, children)
    assert not (tmp_path / "ledger").exists()
