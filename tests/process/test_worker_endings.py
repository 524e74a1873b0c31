"""How attempts end, and what each ending makes of the job: over a real worker and a real scheduler."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from laneway.domain.payload import MAX_BYTES
from process.stack import Stack

NOBODY = "https://hooks.example.com/jobs"  # no courier runs here: nothing is ever sent


@pytest.fixture
def working(stack: Stack) -> Iterator[Stack]:
    """One worker with two children, one scheduler."""
    stack.worker(concurrency=2, LANEWAY_CRASH_LIMIT="3")
    stack.scheduler()
    return stack


def crash_until_given_up(stack: Stack, job_id: str) -> Any:
    """Waits of seconds lie between the attempts of a job that crashes; here they are skipped."""

    def ended() -> Any:
        stack.hurry()
        row = stack.row(job_id)
        return row if row["status"] in {"failed", "completed"} else None

    return stack.until(ended, what=f"{job_id} has ended")


def test_each_way_to_fail_ends_as_documented(working: Stack) -> None:
    stack = working

    def fail(kind: str, times: int, **spec: Any) -> str:
        return stack.enqueue("demo.fail", {"kind": kind, "times": times}, webhook_url=NOBODY, **spec)

    again, exhausted = fail("transient", 2), fail("transient", 9, max_retries=2)
    permanent, crash, poison = fail("permanent", 1), fail("crash", 2), fail("crash", 9)
    left, hanging = fail("exit", 1), fail("hang", 1, timeout_seconds=1)
    hung = fail("hang", 9, timeout_seconds=1, max_retries=0)

    row = stack.wait(again)
    assert row["result"] == {"attempt": 3}
    assert (row["attempt"], row["retry_count"], row["error"]) == (3, 2, None)
    assert stack.events(again) == [
        "create",
        *["claim", "back_off", "enqueue"] * 2,
        "claim",
        "complete",
    ]
    row = stack.wait(exhausted, "failed")
    assert (row["attempt"], row["retry_count"], row["dead_letter_reason"]) == (3, 2, "exhausted")
    assert row["error"]["category"] == "transient"
    assert "attempt 3 fails as asked" in row["error"]["message"]
    assert "TransientError" in row["error"]["traceback"]

    row = stack.wait(permanent, "failed")
    assert (row["attempt"], row["dead_letter_reason"]) == (1, "permanent")

    row = crash_until_given_up(stack, crash)
    assert (row["status"], row["attempt"], row["retry_count"], row["crash_count"]) == ("completed", 3, 0, 2)
    row = crash_until_given_up(stack, poison)
    assert (row["status"], row["attempt"], row["crash_count"]) == ("failed", 3, 3)
    assert row["dead_letter_reason"] == "poison"
    assert "SIGKILL" in row["error"]["message"]
    row = crash_until_given_up(stack, left)
    assert (row["status"], row["attempt"], row["crash_count"]) == ("completed", 2, 1)

    row = stack.wait(hanging)
    assert (row["attempt"], row["retry_count"], row["crash_count"]) == (2, 1, 0)
    row = stack.wait(hung, "timeout")
    assert (row["attempt"], row["dead_letter_reason"]) == (1, "timeout")
    assert row["error"]["type"] == "JobTimeout"

    told = dict(stack.webhooks())
    assert told == {
        again: "job.completed",
        exhausted: "job.failed",
        permanent: "job.failed",
        crash: "job.completed",
        poison: "job.failed",
        left: "job.completed",
        hanging: "job.completed",
        hung: "job.timeout",
    }


def test_a_result_past_a_limit_fails_its_own_job_only(working: Stack, tmp_path: Path) -> None:
    stack, ledger = working, tmp_path / "ledger"
    fits = stack.enqueue("test.result", {"kind": "limit"})
    bad = {
        kind: stack.enqueue("test.result", {"kind": kind})
        for kind in ("past_limit", "nan", "object", "surrogate")
    }
    others = stack.enqueue_all([("test.note", {"ledger": str(ledger), "text": "fine"})] * 20)
    assert len(json.dumps(stack.wait(fits)["result"])) == MAX_BYTES
    errors = {kind: stack.wait(job_id, "failed")["error"] for kind, job_id in bad.items()}
    stack.wait_all(others)
    assert "262144 bytes" in errors["past_limit"]["message"]
    assert "result/0: numbers must be finite" in errors["nan"]["message"]
    assert "result/a: object is not JSON" in errors["object"]["message"]
    assert "Unicode" in errors["surrogate"]["message"]
    assert {stack.row(job_id)["dead_letter_reason"] for job_id in bad.values()} == {"permanent"}


def test_an_error_that_cannot_be_printed_is_an_error_like_any_other(working: Stack) -> None:
    job_id = working.enqueue("test.raise_unprintable", max_retries=0)
    row = working.wait(job_id, "failed")
    assert (row["error"]["type"], row["crash_count"]) == ("_Unprintable", 0)


def test_a_job_type_nobody_knows_stays_queued_and_untouched(stack: Stack, tmp_path: Path) -> None:
    stack.scheduler()
    stack.worker(LANEWAY_TASKS="")
    ledger = tmp_path / "ledger"
    unknown = stack.enqueue("test.note", {"ledger": str(ledger), "text": "at last"})
    before = stack.row(unknown)
    stack.wait_all([stack.enqueue("demo.echo", {"n": n}) for n in range(20)])
    assert stack.row(unknown) == before
    stack.worker()
    stack.wait(unknown)
    assert stack.events(unknown) == ["create", "claim", "complete"]


def test_ids_that_are_none_harm_nobody(stack: Stack) -> None:
    worker = stack.worker()
    job_id = stack.enqueue("demo.noop")
    stack.wait(job_id)
    with stack.redis() as redis:
        redis.rpush(
            "rq:queue:critical", "nonsense", "", job_id, job_id, "00000000-0000-7000-8000-000000000000"
        )
    stack.wait(stack.enqueue("demo.noop"))
    assert stack.events(job_id) == ["create", "claim", "complete"]
    assert not worker.ended()


def test_progress_reaches_the_row_and_never_falls(working: Stack, tmp_path: Path) -> None:
    stack, gate = working, tmp_path / "gate"
    reports = [[10, "first", None], [60, "é" * 501, {"page": 4, "of": ["a"]}], [30, "back", {"page": 5}]]
    job_id = stack.enqueue("test.progress", {"reports": reports, "gate": str(gate)})
    row = stack.until(
        lambda: (r := stack.row(job_id))["progress_message"] == "back" and r, what="the report arrives"
    )
    assert (row["status"], row["progress"], row["progress_details"]) == ("running", 60, {"page": 5})
    gate.touch()
    row = stack.wait(job_id)
    assert (row["progress"], row["progress_message"]) == (100, "back")


@pytest.mark.parametrize(("length", "kept"), [(500, 500), (501, 500)])
def test_a_progress_message_keeps_its_first_500_characters(
    working: Stack, tmp_path: Path, length: int, kept: int
) -> None:
    gate = tmp_path / "gate"
    gate.touch()
    job_id = working.enqueue("test.progress", {"reports": [[1, "é" * length, None]], "gate": str(gate)})
    assert working.wait(job_id)["progress_message"] == "é" * kept


def test_progress_starts_anew_with_each_attempt(working: Stack, tmp_path: Path) -> None:
    stack, gate = working, tmp_path / "gate"
    job_id = stack.enqueue(
        "test.progress", {"reports": [[70, "far", None]], "gate": str(gate)}, max_retries=9
    )
    stack.until(lambda: stack.row(job_id)["progress"] == 70, what="it is far")
    for pid in stack.children(stack.processes[0]):
        os.kill(pid, signal.SIGKILL)
    stack.wait(job_id, "retrying")
    stack.hurry()
    stack.until(
        lambda: stack.row(job_id)["attempt"] == 2 and stack.row(job_id)["progress"] == 70, what="again"
    )
    gate.touch()
    assert stack.wait(job_id)["attempt"] == 2


def test_reports_of_many_threads_arrive_whole(working: Stack) -> None:
    row = working.wait(working.enqueue("test.chatter", {"count": 200}))
    assert (row["attempt"], row["progress_details"]) == (1, {"text": "d" * 8000})
