"""A worker from its start to its end: signals, drains, recycled children, processes that die."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from process.stack import Process, Stack, is_alive


def hold(stack: Stack, tmp_path: Path, **how: object) -> tuple[str, Path]:
    """A job that runs until the file exists."""
    ledger, gate = tmp_path / "ledger", tmp_path / "gate"
    job_id = stack.enqueue("test.hold", {"ledger": str(ledger), "gate": str(gate), **how})
    stack.wait_for_file(ledger)
    return job_id, gate


def assert_gone(stack: Stack, worker: Process, *, status: int = 0) -> None:
    """It has left in order: nothing of it runs, nothing shows it."""
    assert worker.wait() == status, worker.said()
    assert stack.worker_rows()[-1]["state"] == "gone"
    with stack.redis() as redis:
        assert redis.smembers("rq:workers") == set()
    stack.until(lambda: not stack.pids(), what="no process is left")


def test_sigterm_lets_the_running_job_finish_and_takes_no_other(either_stack: Stack, tmp_path: Path) -> None:
    stack = either_stack
    worker = stack.worker()
    running, gate = hold(stack, tmp_path)
    waiting = stack.enqueue("demo.noop")
    worker.send(signal.SIGTERM)
    worker.wait_for("worker_draining")
    stack.until(lambda: stack.worker_rows()[0]["state"] == "draining", what="it says that it drains")
    late = stack.enqueue("demo.noop", priority="critical")
    gate.touch()
    assert_gone(stack, worker)
    assert stack.row(running)["status"] == "completed"
    assert stack.events(waiting) == stack.events(late) == ["create"]
    with stack.redis() as redis:
        assert redis.lrange("rq:queue:normal", 0, -1) == [waiting]


def test_a_job_longer_than_the_drain_goes_back_uncharged_to_its_old_place(
    either_stack: Stack, tmp_path: Path
) -> None:
    stack = either_stack
    worker = stack.worker(concurrency=2, LANEWAY_DRAIN_SECONDS="0.5")
    ledger, gate = tmp_path / "ledger", tmp_path / "gate"
    held = ("test.hold", {"ledger": str(ledger), "gate": str(gate)})
    running = [stack.enqueue(*held), stack.enqueue(*held)]
    stack.wait_for_file(ledger, lines=2)
    waiting = stack.enqueue_all([("demo.noop", {})] * 3)
    worker.send(signal.SIGTERM)
    assert_gone(stack, worker)
    for job_id in running:
        row = stack.row(job_id)
        assert (row["status"], row["retry_count"], row["crash_count"]) == ("queued", 0, 0)
        assert stack.events(job_id) == ["create", "claim", "release"]
    with stack.redis() as redis:
        assert redis.lrange("rq:queue:normal", 0, -1) == running + waiting
        assert not redis.exists("laneway:backlog:normal"), "later pushes need not wait"
    gate.touch()
    stack.worker("--burst", ready=False).wait()
    stack.wait_all(running + waiting)


def test_a_second_sigterm_releases_at_once(stack: Stack, tmp_path: Path) -> None:
    worker = stack.worker()
    running, _ = hold(stack, tmp_path)
    worker.send(signal.SIGTERM)
    worker.wait_for("worker_draining")
    assert stack.row(running)["status"] == "running"
    worker.send(signal.SIGTERM)
    assert_gone(stack, worker)
    assert stack.events(running) == ["create", "claim", "release"]


def test_an_idle_worker_leaves_at_once_on_ctrl_c(stack: Stack) -> None:
    worker = stack.worker(concurrency=2, LANEWAY_DRAIN_SECONDS="600")
    os.killpg(worker.pid, signal.SIGINT)  # as a terminal does: to every process of the group
    assert_gone(stack, worker)


def test_a_drain_kills_what_finished_jobs_left_behind(stack: Stack, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger"
    worker = stack.worker()
    stack.wait(stack.enqueue("test.leave_a_fork", {"ledger": str(ledger)}))
    worker.send(signal.SIGTERM)
    assert_gone(stack, worker)


def test_burst_ends_when_the_lanes_are_empty(stack: Stack, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger"
    notes = [("test.note", {"ledger": str(ledger), "text": str(n)}) for n in range(50)]
    ids = stack.enqueue_all(notes)
    worker = stack.worker("--burst", concurrency=2, ready=False)
    assert_gone(stack, worker)
    assert {stack.row(job_id)["status"] for job_id in ids} == {"completed"}
    assert sorted(ledger.read_text().splitlines(), key=int) == [str(n) for n in range(50)]


def test_burst_with_nothing_to_do_ends(stack: Stack) -> None:
    assert_gone(stack, stack.worker("--burst", ready=False))


def test_children_are_recycled_without_losing_a_job(stack: Stack, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger"
    worker = stack.worker(concurrency=2, LANEWAY_RECYCLE_JOBS="7")
    before = set(stack.children(worker))
    ids = stack.enqueue_all([("test.note", {"ledger": str(ledger), "text": str(n)}) for n in range(200)])
    stack.wait_all(ids)
    assert sorted(ledger.read_text().splitlines(), key=int) == [str(n) for n in range(200)]
    assert {tuple(stack.events(job_id)[-2:]) for job_id in ids} == {("claim", "complete")}
    stack.until(lambda: len(set(stack.children(worker)) - before) == 2, what="all children are new")


def test_a_child_that_dies_while_idle_is_replaced(stack: Stack) -> None:
    worker = stack.worker(concurrency=2)
    victim, other = stack.children(worker)
    os.kill(victim, signal.SIGKILL)
    stack.until(
        lambda: (now := stack.children(worker)) and len(now) == 2 and victim not in now,
        what="there are two again",
    )
    assert other in stack.children(worker)
    stack.wait_all(stack.enqueue_all([("demo.noop", {})] * 10))
    worker.wait_for("child_died")


def test_when_the_nursery_dies_the_worker_leaves_and_its_jobs_are_not_charged(
    stack: Stack, tmp_path: Path
) -> None:
    worker = stack.worker()
    running, _ = hold(stack, tmp_path, once=True)
    os.kill(stack.nursery(worker), signal.SIGKILL)
    assert_gone(stack, worker, status=1)
    assert "nursery_failed" in worker.said()
    stack.scheduler()
    stack.worker()
    row = stack.wait(running)
    assert (row["attempt"], row["retry_count"], row["crash_count"]) == (2, 0, 0)


def test_a_broken_task_module_ends_the_worker_with_the_reason(stack: Stack) -> None:
    (stack.folder / "broken_tasks.py").write_text("import a_module_that_is_not_there\n")
    path = f"{stack.env['PYTHONPATH']}{os.pathsep}{stack.folder}"
    worker = stack.worker(ready=False, LANEWAY_TASKS="broken_tasks", PYTHONPATH=path)
    assert worker.wait() == 1
    last = worker.said().strip().splitlines()[-1]
    assert last == "ModuleNotFoundError: No module named 'a_module_that_is_not_there'"
    assert stack.worker_rows() == []
    assert not stack.pids()


def test_a_task_module_that_ends_its_process_ends_the_worker(stack: Stack) -> None:
    (stack.folder / "leaving_tasks.py").write_text("import os\nos._exit(3)\n")
    path = f"{stack.env['PYTHONPATH']}{os.pathsep}{stack.folder}"
    worker = stack.worker(ready=False, LANEWAY_TASKS="leaving_tasks", PYTHONPATH=path)
    assert worker.wait() == 1
    assert "the nursery process died" in worker.said()


def test_a_signature_that_cannot_be_read_fails_the_jobs_of_its_own_type_only(stack: Stack) -> None:
    (stack.folder / "odd_tasks.py").write_text(
        "from laneway import background_job\n"
        "@background_job('test.note')\n"
        "def note(ledger: 'Nowhere', text: str) -> None: ...\n"
    )
    path = f"{stack.env['PYTHONPATH']}{os.pathsep}{stack.folder}"
    stack.worker(LANEWAY_TASKS="odd_tasks", PYTHONPATH=path)
    odd = stack.enqueue("test.note", {"ledger": "l", "text": "t"}, max_retries=0)
    stack.wait(stack.enqueue("demo.noop"))
    assert stack.wait(odd, "failed")["error"]["type"] == "NameError"


def test_the_last_words_of_a_handler_are_heard(stack: Stack, tmp_path: Path) -> None:
    """What it prints is written before its child may be killed."""
    worker = stack.worker(PYTHONUNBUFFERED="")
    stack.wait(stack.enqueue("test.say", {"text": "these words"}))
    (child,) = stack.children(worker)
    worker.send(signal.SIGKILL)
    stack.until(lambda: not is_alive(child), what="the child is dead")
    assert "these words" in worker.said()
