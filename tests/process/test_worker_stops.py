"""Timeouts and cancels: how a handler that does not want to stop is stopped, and who else feels it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from process.stack import Stack, is_alive


@pytest.fixture
def working(stack: Stack) -> Iterator[Stack]:
    """One worker with two children, one scheduler."""
    stack.worker(concurrency=2)
    stack.scheduler()
    return stack


def test_no_handler_outlives_its_timeout(working: Stack, tmp_path: Path) -> None:
    """Softly where an exception can reach it, by SIGKILL where none can; either way it may be tried again."""
    stack, ledger = working, tmp_path / "ledger"
    plain = {
        how: stack.enqueue(
            "test.endless", {"how": how, "ledger": str(ledger), "times": 1}, timeout_seconds=1, max_retries=1
        )
        for how in ("exception", "base", "c")
    }
    coroutines = {
        how: stack.enqueue(
            "test.endless_async", {"how": how, "ledger": str(ledger)}, timeout_seconds=1, max_retries=0
        )
        for how in ("exception", "base", "block")
    }
    for how, job_id in plain.items():
        row = stack.wait(job_id)
        assert (row["result"], row["retry_count"], row["crash_count"]) == (2, 1, 0), how
        assert (stack.errors(job_id)[0]["traceback"] is not None) == (how == "exception"), (
            "softly, if it can be"
        )
    traces = {}
    for how, job_id in coroutines.items():
        row = stack.wait(job_id, "timeout")
        assert (row["attempt"], row["crash_count"], row["dead_letter_reason"]) == (1, 0, "timeout"), how
        traces[how] = row["error"]["traceback"]
    assert "endless_async" in traces["exception"], "it was cancelled where it waited"
    assert traces["base"] is None, "it was killed"
    assert traces["block"] is None, "it was killed"


def test_a_soft_timeout_says_where_the_handler_was(working: Stack, tmp_path: Path) -> None:
    held = {"ledger": str(tmp_path / "ledger"), "gate": str(tmp_path / "gate")}
    job_id = working.enqueue("test.hold", held, timeout_seconds=1, max_retries=0)
    error = working.wait(job_id, "timeout")["error"]
    assert error["category"] == "timeout"
    assert "_wait_for" in error["traceback"]
    assert "JobTimeout" in error["traceback"]


@pytest.mark.parametrize("how", ["crash", "base", "c"])
def test_the_neighbours_in_a_round_are_not_charged(stack: Stack, tmp_path: Path, how: str) -> None:
    """The bad one stands first, of a type known to be short, so that others wait behind it in its child."""
    ledger, lines = tmp_path / "ledger", tmp_path / "lines"
    stack.worker()

    def maybe_bad(times: int) -> tuple[str, dict[str, object]]:
        if how == "crash":
            return "demo.fail", {"kind": "crash", "times": times}
        return "test.endless", {"how": how, "ledger": str(ledger), "times": times}

    note = ("test.note", {"ledger": str(lines), "text": "fine"})
    for _ in range(10):
        stack.wait_all(stack.enqueue_all([note, maybe_bad(0)] * 10))
    bad_id, *rest = stack.enqueue_all([maybe_bad(9), *[note] * 15], timeout_seconds=1, max_retries=0)
    stack.wait_all(rest)
    for job_id in rest:
        row = stack.row(job_id)
        assert (row["retry_count"], row["crash_count"], row["error"]) == (0, 0, None), stack.events(job_id)
    row = stack.wait(bad_id, "timeout", "retrying")
    assert row["attempt"] == 1
    assert lines.read_text().splitlines().count("fine") == 115


def test_a_timed_job_behind_a_short_one_still_gets_its_timeout(stack: Stack, tmp_path: Path) -> None:
    """A round is shared out after a moment by the same timer that serves the timeout."""
    ledger, gate = tmp_path / "ledger", tmp_path / "gate"
    stack.worker()
    gate.touch()
    quick = ("test.hold", {"ledger": str(ledger), "gate": str(gate)})
    for _ in range(10):
        stack.wait_all(stack.enqueue_all([quick] * 20))
    slow = ("test.hold", {"ledger": str(ledger), "gate": str(tmp_path / "never")})
    ids = stack.enqueue_all([quick, slow, quick, slow, quick], timeout_seconds=1, max_retries=0)
    stack.wait_all([ids[0], ids[2], ids[4]])
    for job_id in (ids[1], ids[3]):
        error = stack.wait(job_id, "timeout")["error"]
        assert "JobTimeout" in error["traceback"], "by the soft one"


def hold(stack: Stack, tmp_path: Path, **how: object) -> tuple[str, Path, int]:
    """A job that runs until the file exists; its id, the file, its process."""
    ledger, gate = tmp_path / "ledger", tmp_path / "gate"
    job_id = stack.enqueue("test.hold", {"ledger": str(ledger), "gate": str(gate), **how})
    (line,) = stack.wait_for_file(ledger)
    return job_id, gate, int(line.split()[1])


def test_a_cooperative_handler_stops_when_it_is_asked(working: Stack, tmp_path: Path) -> None:
    job_id, _, pid = hold(working, tmp_path, cooperative=True)
    working.cancel(job_id, reason="not needed")
    row = working.wait(job_id, "cancelled", seconds=10)
    assert (row["attempt"], row["cancelled_by"], row["cancel_reason"]) == (1, "tester", "not needed")
    assert working.events(job_id) == ["create", "claim", "stop"]
    assert is_alive(pid), "nobody was killed"


def ask_twice(stack: Stack, job_id: str) -> None:
    stack.cancel(job_id)
    asked_at = stack.worker_rows()[0]["beat"]
    stack.until(lambda: stack.worker_rows()[0]["beat"] > asked_at + 1, what="the first wish was heard")
    stack.cancel(job_id, terminate=True)


@pytest.mark.parametrize(
    "ask",
    [
        pytest.param(lambda s, j: s.cancel(j, grace_seconds=0.2), id="after the grace"),
        pytest.param(lambda s, j: s.cancel(j, terminate=True), id="at once"),
        pytest.param(ask_twice, id="asked, then at once"),
    ],
)
def test_a_handler_that_does_not_listen_is_killed(
    working: Stack, tmp_path: Path, ask: Callable[[Stack, str], object]
) -> None:
    job_id, gate, pid = hold(working, tmp_path)
    ask(working, job_id)
    row = working.wait(job_id, "cancelled", seconds=10)
    assert (row["attempt"], row["crash_count"], row["error"]) == (1, 0, None)
    working.until(lambda: not is_alive(pid), what="its process is dead")
    gate.touch()
    again = working.enqueue("test.note", {"ledger": str(tmp_path / "after"), "text": "works"})
    working.wait(again)


def test_a_job_that_is_cancelled_while_it_waits_never_starts(working: Stack, tmp_path: Path) -> None:
    ledger, gate = tmp_path / "ledger", tmp_path / "gate"
    blockers = working.enqueue_all([("test.hold", {"ledger": str(ledger), "gate": str(gate)})] * 2)
    working.wait_for_file(ledger, lines=2)
    waiting = working.enqueue("test.note", {"ledger": str(ledger), "text": "never"})
    working.cancel(waiting)
    gate.touch()
    working.wait_all(blockers)
    assert working.row(waiting)["status"] == "cancelled"
    assert "never" not in ledger.read_text()


def test_what_a_killed_handler_started_dies_with_it(working: Stack, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger"
    job_id = working.enqueue("test.parent", {"ledger": str(ledger), "gate": str(tmp_path / "gate")})
    pids = [int(word) for word in working.wait_for_file(ledger)[0].split()]
    assert all(map(is_alive, pids))
    working.cancel(job_id, terminate=True)
    working.wait(job_id, "cancelled")
    working.until(lambda: not any(map(is_alive, pids)), what="they are dead")


@pytest.mark.parametrize("how", ["in its group", "and dies", "in a session of its own, and dies"])
def test_a_fork_that_a_handler_left_behind_hangs_nobody(stack: Stack, tmp_path: Path, how: str) -> None:
    """It keeps the child's socket open, so that the end of the child is not the end of the stream."""
    ledger = tmp_path / "ledger"
    stack.worker(LANEWAY_RECYCLE_JOBS="1")
    fork = {"ledger": str(ledger), "die": "dies" in how, "apart": "session" in how}
    job_id = stack.enqueue("test.leave_a_fork", fork)
    stack.wait(job_id, "retrying" if fork["die"] else "completed")
    (forked,) = stack.wait_for_file(ledger)
    stack.wait(stack.enqueue("demo.noop"))
    if not fork["apart"]:
        stack.until(lambda: not is_alive(int(forked)), what="the fork is dead")
